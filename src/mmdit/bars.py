"""A progress bar where somebody can see it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def bar(items: Iterable[Item], total: int | None, shown: bool | None) -> Iterator[Item]:
    """The items, counted by a bar; None shows it in terminals and notebooks and not in files and pipes."""
    if shown is None:
        shown = "ipykernel" in sys.modules or sys.stderr.isatty()
    yield from tqdm(items, total=total, disable=not shown)
