"""beartype for jaxtyping's import hook, except where it cannot read a signature."""

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def checked(function):
    """Check the call, unless the signature says `Self`, which beartype takes only from classes it decorates itself.

    A function made inside another is let be: it is decorated anew each time it is made, and a lazy checkpoint makes one
    for each tensor, which takes ten times as long as reading it.
    """
    if "<locals>" in function.__qualname__:
        return function
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
