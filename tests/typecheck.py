"""beartype for jaxtyping's import hook, except where it cannot read a signature."""

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def checked(function):
    """Check the call, unless the signature says `Self`, which beartype takes only from classes it decorates itself."""
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
