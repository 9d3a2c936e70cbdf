"""The files of a checkpoint folder: regular files, opened at most once, and those that cannot be used."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoders.json_files import MAX_BYTES, JSONError, printable, read_json
from mmdit.checkpoints.recognise import Split, split
from mmdit.checkpoints.safetensors_io import CheckpointError, Header, read_header

ENDINGS = (".safetensors", ".sft")
OTHER_ENDINGS = (".gguf", ".bin", ".ckpt", ".pt", ".pth", ".onnx")  # endings of weight files that are not read
MAX_ENTRIES = 5000  # files and folders below a folder; the bound keeps a mistyped path from searching a whole disk
MAX_LEVELS = 4


@dataclass
class Files:
    """The files of a checkpoint: the headers read so far, and the files that were set aside, with the reason.

    Attributes:
        headers: by file.
        splits: the models of each file or shard index, with averaged weights or without.
        aside: files that cannot be used: why.
    """

    headers: dict[Path, Header] = field(default_factory=dict)
    splits: dict[tuple[Path, bool], Split] = field(default_factory=dict)
    aside: dict[Path, str] = field(default_factory=dict)

    def header(self, path: Path) -> Header:
        """The header of a file, which is read in the first call only.

        Raises:
            OSError, CheckpointError: see `read_header`.
        """
        if path not in self.headers:
            self.headers[path] = read_header(path)
        return self.headers[path]

    def split(self, path: Path, keys: Iterable[str], *, ema: bool) -> Split:
        """The models that a file or the shards of an index hold; names are sorted in the first call only.

        Args:
            path: the file or index.
            keys: the names of its tensors.
            ema: see `mmdit.checkpoints.recognise.split`.
        """
        if (path, ema) not in self.splits:
            self.splits[path, ema] = split(keys, ema=ema)
        return self.splits[path, ema]

    def usable(self, path: Path) -> Header | None:
        """The header of a file that the caller did not name; None (and set aside) where it cannot be read."""
        try:
            return self.header(path)
        except (CheckpointError, OSError) as error:
            self.aside[path] = str(error)
            return None

    def weights(self, folder: Path, *, nested: bool = True) -> list[Path]:
        """The safetensors files in a folder, sorted by name; weight files of other formats are set aside."""
        found = []
        for path in regular_files(folder, MAX_LEVELS if nested else 1):
            if path.suffix.lower() in ENDINGS:
                found.append(path)
            elif path.suffix.lower() in OTHER_ENDINGS:
                self.aside[path] = f"{path} is a {path.suffix} file; only .safetensors is read"
        return sorted(found)


def regular_files(folder: Path, levels: int = MAX_LEVELS) -> Iterator[Path]:
    """The regular files in a folder and its subfolders, also behind links, but without hidden ones.

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
    """Whether a path is a regular file; a name that is too long for the system is not."""
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
    """Check a file name that a file contains: it must be the plain name of a safetensors file beside it.

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
    """The entries of a folder, sorted by name, without hidden ones; none where the folder cannot be read."""
    try:
        with os.scandir(folder) as found:
            return sorted(Path(entry.path) for entry in found if not entry.name.startswith("."))
    except OSError:
        return []


def _status(path: Path) -> os.stat_result | None:
    """The status of a path's target; None for broken or circular links, and where access is denied."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None
