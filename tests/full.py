"""What `make test-all` runs in full, with MMDIT_FULL=1, and `make test` in part."""

import os
from collections.abc import Sequence
from typing import TypeVar

FULL = os.environ.get("MMDIT_FULL") == "1"
T = TypeVar("T")


def in_full(everything: Sequence[T], instead: Sequence[T]) -> Sequence[T]:
    """All cases of a sweep for `make test-all`, and for `make test` those that stand for them."""
    missing = [case for case in instead if case not in everything]
    assert not missing, f"no case of the sweep: {missing}"
    return everything if FULL else instead
