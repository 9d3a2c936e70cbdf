"""Look up a name that a user typed."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from samplers.checks import shown

Value = TypeVar("Value")


def pick(table: Mapping[str, Value], name: str, what: str) -> Value:
    """Return the entry called `name`.

    Raises:
        ValueError: there is no such entry; the message lists the nearest names and all names.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    near = get_close_matches(name, table, n=3) if isinstance(name, str) else []
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {shown(name)}; {hint}Known: {', '.join(table)}")
