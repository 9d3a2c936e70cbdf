"""Looking through folders: which regular files lie there, opened at most once, and which of them cannot be used."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoders.json_files import MAX_BYTES, JSONError, printable, read_json
from mmdit.checkpoints.safetensors_io import CheckpointError, Header, read_header

ENDINGS = (".safetensors", ".sft")
OTHER_ENDINGS = (".gguf", ".bin", ".ckpt", ".pt", ".pth", ".onnx")  # of weights that are not read
MAX_ENTRIES = 5000  # of a folder and what is in it, so that no whole disk is searched
MAX_LEVELS = 4


@dataclass
class Files:
    """The files of a checkpoint: headers that have been read, and files that were set aside, with the reason."""

    headers: dict[Path, Header] = field(default_factory=dict)
    aside: dict[Path, str] = field(default_factory=dict)

    def header(self, path: Path) -> Header:
        """The header of a file, read when it is first asked for.

        Raises:
            OSError, CheckpointError: see `read_header`.
        """
        if path not in self.headers:
            self.headers[path] = read_header(path)
        return self.headers[path]

    def usable(self, path: Path) -> Header | None:
        """The header of a file that nobody has named; None, and the file is set aside, where it cannot be read."""
        try:
            return self.header(path)
        except (CheckpointError, OSError) as error:
            self.aside[path] = str(error)
            return None

    def weights(self, folder: Path, *, nested: bool = True) -> list[Path]:
        """The safetensors files in a folder, in the order of their names; weights of other formats are set aside."""
        found = []
        for path in regular_files(folder, MAX_LEVELS if nested else 1):
            if path.suffix.lower() in ENDINGS:
                found.append(path)
            elif path.suffix.lower() in OTHER_ENDINGS:
                self.aside[path] = f"{path} is a {path.suffix} file; only .safetensors is read"
        return sorted(found)


def regular_files(folder: Path, levels: int = MAX_LEVELS) -> Iterator[Path]:
    """The regular files in a folder and in folders inside it, through links too; hidden ones are passed over.

    Raises:
        CheckpointError: there are so many that the folder is no checkpoint.
    """
    root = _status(folder)
    seen = set() if root is None else {(root.st_dev, root.st_ino)}
    entries = 0
    waiting = [(folder, levels)]
    while waiting:
        place, left = waiting.pop()
        for path in _entries(place):
            entries += 1
            if entries > MAX_ENTRIES:
                raise CheckpointError(
                    f"{folder} holds more than {MAX_ENTRIES} files and folders; give the folder of one checkpoint"
                )
            status = _status(path)
            if status is not None and stat.S_ISREG(status.st_mode):
                yield path
            elif status is not None and stat.S_ISDIR(status.st_mode) and left > 1:
                identity = status.st_dev, status.st_ino
                waiting += [] if identity in seen else [(path, left - 1)]  # links can lead in a circle
                seen.add(identity)


def is_file(path: Path) -> bool:
    """Whether there is a regular file; a name that is too long for the system is none."""
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        value: dict[str, Any] = read_json(path, kind=dict, max_bytes=max_bytes)
    except JSONError as error:
        raise CheckpointError(str(error)) from error
    return value


def plain_name(path: Path, name: str) -> str:
    """A file name that a file says, which must be the name of a safetensors file beside it and no way elsewhere.

    Raises:
        CheckpointError: it is none.
    """
    if (
        not name.lower().endswith(ENDINGS)
        or name.startswith(".")
        or any(letter in name for letter in "/\\:\0")
        or len(os.fsencode(name)) > 255
    ):
        raise CheckpointError(
            f"{path} names the file {printable(name, 120)!r}; expected the plain name of a .safetensors file beside it"
        )
    return name


def _entries(folder: Path) -> list[Path]:
    """What is in a folder that can be read, in the order of names, without what is hidden."""
    try:
        with os.scandir(folder) as found:
            return sorted(Path(entry.path) for entry in found if not entry.name.startswith("."))
    except OSError:
        return []


def _status(path: Path) -> os.stat_result | None:
    """What a path leads to; None for links that lead nowhere or in a circle, and for what may not be looked at."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None
