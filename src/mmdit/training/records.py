"""A folder of pictures and captions, read and checked before anything is encoded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from encoders.json_files import JSONError, described, parse_json, read_bytes, read_json

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
TABLE: Final = "metadata.jsonl"
HINTS: Final = "hints"  # folder of the hints of a ControlNet, named as their pictures
_CAPTION_KEYS: Final = ("text", "caption", "prompt")


class DataError(ValueError):
    """A folder of training data cannot be used; the message names the file and what to do."""


class Record(NamedTuple):
    """A picture, its caption, and its hint where a ControlNet is trained."""

    picture: Path
    caption: str
    hint: Path | None = None


class Size(NamedTuple):
    """The size of a picture in pixels."""

    height: int
    width: int


def read_records(folder: str | Path, *, hints: bool = False) -> list[Record]:
    """The records of a folder, sorted by path.

    Captions are in metadata.jsonl, a JSON object on each line with "file_name" and "text", "caption" or "prompt"; or,
    where there is no such file, beside each picture: NAME.txt, or NAME.json with one of these keys. Hints are the
    pictures of the same names in the subfolder `hints`, or the line's "hint".

    Raises:
        DataError: there is no folder or no picture; a picture has no caption or two, or no hint; a caption has no
            picture; or a line or a file does not hold a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; data is a folder of pictures with captions")
    table = folder / TABLE
    records = list(_of_table(table, hints=hints) if table.exists() else _of_files(folder, hints=hints))
    if not records:
        raise DataError(
            f"{folder} holds no picture ({', '.join(SUFFIXES)}); put pictures there, each with a caption in NAME.txt, "
            f"NAME.json or {TABLE}"
        )
    return sorted(records)


def _of_files(folder: Path, *, hints: bool) -> Iterator[Record]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != HINTS]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    known = {path.with_suffix("") for path in pictures}
    if len(known) < len(pictures):
        stems = [path.with_suffix("") for path in pictures]
        twin = next(stem for stem in stems if stems.count(stem) > 1)
        raise DataError(f"{twin}: two pictures have this name and would share a caption; rename one")
    for path in files:
        if path.suffix in (".txt", ".json") and path.with_suffix("") not in known:
            raise DataError(f"{path} is a caption without a picture; add {path.stem}.png, or remove the caption")
    for picture in pictures:
        yield Record(picture, _caption_beside(picture), _hint_of(folder, picture) if hints else None)


def _caption_beside(picture: Path) -> str:
    text, table = picture.with_suffix(".txt"), picture.with_suffix(".json")
    if text.exists() and table.exists():
        raise DataError(f"{picture} has two captions, {text.name} and {table.name}; remove one")
    if text.exists():
        return _decoded(text)
    if table.exists():
        return _caption_in(read_json(table, kind=dict), table)
    raise DataError(f"{picture} has no caption; write {text.name}, or remove the picture")


def _decoded(path: Path) -> str:
    try:
        return read_bytes(path, 2**20).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _of_table(table: Path, *, hints: bool) -> Iterator[Record]:
    seen: set[Path] = set()
    for number, line in enumerate(_decoded_lines(table), start=1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        try:
            entry = parse_json(line, where, kind=dict)
        except JSONError as error:
            raise DataError(str(error)) from error
        picture = _inside(table.parent, entry.get("file_name"), f"{where}: file_name")
        if picture in seen:
            raise DataError(f"{where}: {picture.name} occurs twice; a picture has one caption")
        seen.add(picture)
        hint = None
        if hints:
            given = entry.get("hint")
            hint = _hint_of(table.parent, picture) if given is None else _inside(table.parent, given, f"{where}: hint")
        yield Record(picture, _caption_in(entry, where), hint)


def _decoded_lines(table: Path) -> list[str]:
    try:
        return table.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _inside(folder: Path, name: object, where: str) -> Path:
    """A file of the folder, which must be there."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} is {described(name)}, expected the name of a file")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where} {name!r} leads out of {folder}; move the file into the folder")
    if not path.is_file():
        raise DataError(f"{where} {name!r} is a caption without a picture: there is no {path}")
    return path


def _caption_in(entry: dict[str, Any], where: object) -> str:
    found = [key for key in _CAPTION_KEYS if key in entry]
    if len(found) != 1 or not isinstance(entry[found[0]], str):
        have = ", ".join(f"{key!r}: {described(entry[key])}" for key in found) or f"the keys {list(entry)}"
        raise DataError(f"{where} has {have}; expected one of {', '.join(_CAPTION_KEYS)} with a string")
    return str(entry[found[0]])


def _hint_of(folder: Path, picture: Path) -> Path:
    place = folder / HINTS / picture.relative_to(folder)
    found = [place.with_suffix(suffix) for suffix in SUFFIXES if place.with_suffix(suffix).is_file()]
    if len(found) != 1:
        raise DataError(f"{picture} has {len(found)} hints; expected one picture {place}")
    return found[0]


def bucket_sizes(size: int, multiple: int, most_ratio: float, longest: int) -> list[Size]:
    """The sizes of buckets: for each width, the largest height with an area of at most size^2.

    Args:
        size: the side of the square bucket; its area bounds all others.
        multiple: of which all sides are multiples.
        most_ratio: the largest ratio of the sides.
        longest: the longest side that the model's position table allows.

    Raises:
        DataError: no size fits.
    """
    found = set()
    for one in range(multiple, longest + 1, multiple):
        other = min(size * size // one, longest) // multiple * multiple
        if other and max(one, other) / min(one, other) <= most_ratio:
            found |= {Size(one, other), Size(other, one)}
    square = size // multiple * multiple
    found |= {Size(square, square)} if square <= longest else set()
    if not found:
        raise DataError(
            f"no bucket of {size} pixels in multiples of {multiple} fits a model of {longest} pixels a side"
        )
    return sorted(found)


def bucket_of(picture: Size, sizes: Sequence[Size]) -> Size:
    """The size whose ratio of sides is nearest to that of a picture; the larger one of two."""
    ratio = math.log(picture.width / picture.height)
    return min(sizes, key=lambda one: (abs(math.log(one.width / one.height) - ratio), -one.height * one.width))
