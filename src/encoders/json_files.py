"""One strict reader for every JSON file and JSON text that the library opens.

Files come from anywhere, so a text is checked before and while it is parsed: its size, its nesting, its encoding, its
numbers and its keys. Every failure is a `JSONError`, which names the file, what was found and what to do.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

MAX_BYTES = 8 * 2**20  # the largest official file, T5's tokenizer.json, has 2.4 MB
MAX_DEPTH = 64  # official files nest 6 deep; Python's parser raises RecursionError at about 1000
MAX_DIGITS = 40  # enough for 2**128, and any such integer converts to a float

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STARTS = (
    (b"\xef\xbb\xbf", "starts with a byte order mark; save it as UTF-8 without one"),
    (b"\xff\xfe", "is UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; save it as UTF-8"),
    (b"version https://git-lfs", "is a Git LFS pointer in place of the file; download the file itself (git lfs pull)"),
    (b"<", "is a web page or XML, no JSON; download the file itself"),
    (b"PK\x03\x04", "is a zip archive, no JSON"),
)
_AGAIN = "download it again, or repair it"


class JSONError(ValueError):
    """A JSON text cannot be used; the message names the file, what was found in it and what to do."""


def read_json(
    path: str | os.PathLike[str], *, kind: type | None = None, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> Any:
    """Read and parse one JSON file.

    Args:
        path: the file, which must be a regular one (no folder, pipe or device).
        kind: the type that the outermost value must have, such as dict; None takes any.
        max_bytes: the largest size of the file in bytes; nothing larger is read.
        max_depth: how deep arrays and objects may nest.

    Raises:
        JSONError: the file cannot be read, or `parse_json` refuses what it holds.
    """
    return parse_json(read_bytes(path, max_bytes), path, kind=kind, max_bytes=max_bytes, max_depth=max_depth)


def parse_json(
    data: bytes | str,
    where: str | os.PathLike[str],
    *,
    kind: type | None = None,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
) -> Any:
    """Parse one JSON text strictly, as RFC 8259 has it.

    NaN, Infinity, numbers that overflow, integers of more than 40 digits, keys that occur twice in an object, lone
    surrogates and every encoding but UTF-8 are errors. Time and memory are linear in the size of the text.

    Args:
        data: the text.
        where: what the text is called in an error, usually the path of its file.
        kind: the type that the outermost value must have, such as dict; None takes any.
        max_bytes: the largest size of the text in bytes of UTF-8.
        max_depth: how deep arrays and objects may nest.

    Raises:
        JSONError: the text is refused; the message says where and why.
    """
    name = printable(str(where), 300)
    try:
        value = _parsed(data, max_bytes, max_depth)
    except json.JSONDecodeError as error:
        where_in = f"line {error.lineno}, column {error.colno}"
        raise JSONError(f"{name} is not valid JSON: {error.msg} at {where_in}; {_AGAIN}") from error
    except UnicodeError as error:
        raise JSONError(f"{name} is not UTF-8 text ({error.reason}); save it as UTF-8") from error  # type: ignore[attr-defined]
    except _TextError as error:
        raise JSONError(f"{name} {error}") from None
    if kind is not None and not isinstance(value, kind):
        raise JSONError(f"{name} holds {described(value)}, expected {_NAMES.get(kind, kind.__name__)}; {_AGAIN}")
    return value


def described(value: object) -> str:
    """What kind of JSON value this is and how it begins, for an error: `the string "abc"`, `an array`."""
    if isinstance(value, dict | list):
        return _NAMES[type(value)]
    text = printable(json.dumps(value, ensure_ascii=False, default=repr), 60)
    return text if value is None or isinstance(value, bool) else f"{_NAMES.get(type(value), 'the value')} {text}"


def printable(text: str, length: int) -> str:
    """Text from a file for an error: at most `length` characters, what cannot be printed escaped."""
    shown = text if len(text) <= length else text[:length] + "..."
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


class _TextError(ValueError):
    """Why a text is refused, to be put after the name of its file."""


_NAMES: Mapping[type, str] = {
    dict: "an object",
    list: "an array",
    str: "the string",
    int: "the number",
    float: "the number",
}


def read_bytes(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file, without waiting for a pipe; one byte more than `max_bytes` where it is larger.

    Raises:
        JSONError: the file cannot be read or is no regular file.
    """
    name = printable(str(path), 300)
    try:
        # O_NONBLOCK, because opening a pipe would wait for its writer; regular files do not know it
        opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(opened, "rb") as file:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise JSONError(f"{name} is no regular file")
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, JSONError):
            raise
        raise JSONError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parsed(data: bytes | str, max_bytes: int, max_depth: int) -> Any:
    raw = data.encode("utf-8") if isinstance(data, str) else data
    if len(raw) > max_bytes:
        raise _TextError(f"has more than {max_bytes} bytes, the most that is read of such a file; it is another file")
    if not raw.strip():
        raise _TextError(f"is empty; {_AGAIN}")
    for start, problem in _STARTS:
        if raw.startswith(start):
            raise _TextError(problem)
    _check_depth(raw, max_depth)
    text = raw.decode("utf-8")
    value = json.loads(
        text, object_pairs_hook=_without_duplicates, parse_constant=_constant, parse_int=_integer, parse_float=_float
    )
    if _SURROGATE.search(text):  # an escaped half of a character that stands alone
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _check_depth(raw: bytes, limit: int) -> None:
    """Count brackets outside strings; what follows the first error of a malformed text may be counted wrongly."""
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(unescaped.split(b'"')[::2]).translate(None, _NOT_BRACKETS)
    if any(depth > limit for depth in accumulate(map(_STEP.__getitem__, brackets))):
        raise _TextError(f"nests arrays and objects more than {limit} deep; it is damaged or another file")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        shown = ", ".join(repr(printable(key, 60)) for key in twice[:3])
        raise _TextError(f"has {len(twice)} keys more than once in one object: {shown}; remove all but one of each")
    return found


def _constant(word: str) -> Any:
    raise _TextError(f"holds {word}, which JSON does not have; write a finite number or null")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:
        raise _TextError(f"holds an integer of {len(digits)} digits ({digits[:12]}...), more than {MAX_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _TextError(f"holds the number {printable(digits, 30)}, which is too large for a float")
    return value
