"""Where `mmdit generate` writes: names of pictures and of their grid, checked before anything is drawn."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from PIL import Image

from mmdit.pipeline.images import png_path
from mmdit.pipeline.settings import save_png

DEFAULT = Path("picture.png")
_NAME_BYTES, _PATH_BYTES = 255, 4095  # limits of Linux


@dataclass(frozen=True)
class Output:
    """One file or a numbered row of files.

    Args:
        path: The file of a single picture; several are path-0, path-1 ..., with equally many digits.
        count: The number of pictures.
        keep: Whether files that exist are kept. Then the next free number is taken.
    """

    path: Path
    count: int = 1
    keep: bool = False

    def names(self) -> Iterator[Path]:
        """The names in order; endless where files that exist are kept, because other programs take names too."""
        first = self._next_free() if self.keep else 0
        numbers = itertools.count(first) if self.keep else range(self.count)
        width = len(str(first + self.count - 1))
        row = (self.path.with_stem(f"{self.path.stem}-{number:0{width}}") for number in numbers)
        if self.count > 1:
            return row
        return itertools.chain([self.path], row if self.keep else ())

    def write(
        self,
        name: Iterator[Path],
        image: Image.Image,
        settings: Mapping[str, object],
        workflow: Mapping[str, object] | None = None,
    ) -> Path:
        """Write a picture to the next of `names`, which is an iterator over them; errors name the file."""
        path = next(path for path in name if _claimed(path)) if self.keep else next(name)
        try:
            return save_png(image, path, settings, workflow=workflow)
        except BaseException as error:
            if self.keep:
                path.unlink()  # the reserved file is empty
            if isinstance(error, OSError) and error.errno is not None:
                raise type(error)(error.errno, error.strerror, str(path)) from error  # a full disk names no file
            raise

    def check(self, option: str) -> None:
        """Raise ValueError for what cannot be written: another ending, a folder, a place without permission."""
        png_path(self.path)
        for path in itertools.islice(self.names() if not self.keep else [self._longest()], self.count):
            _check_lengths(path, option)
        if not self.keep and (taken := [path for path in self.names() if path.is_dir()]):
            raise ValueError(f"{option}: {taken[0]} is a folder; name a file")
        check_folder(self.path.parent, f"{option} {self.path}")

    def _longest(self) -> Path:
        """A name of the maximum length of the numbered names."""
        return self.path.with_stem(f"{self.path.stem}-{self.count}")

    def _next_free(self) -> int:
        """The number after the highest that is in use; a single picture begins with the name without one."""
        numbered = re.compile(rf"{re.escape(self.path.stem)}-(\d+){re.escape(self.path.suffix)}")
        matches = (numbered.fullmatch(path.name) for path in self.path.parent.iterdir())
        return max((int(match[1]) for match in matches if match), default=0 if self.count == 1 else -1) + 1


def outputs(
    output: str | None, grid: str | None, count: int, *, read: Iterable[tuple[str, str | None]] = ()
) -> tuple[Output, Output | None]:
    """Where pictures and their grid go.

    Args:
        output: The option --output; None is `DEFAULT` in the current folder, where nothing is overwritten.
        grid: None for none, "" for a name derived from the output.
        count: pictures.
        read: options that name files that are read, and these files; None where one is not given.

    Raises:
        ValueError: it cannot be written there, or a file that is read would be overwritten.
    """
    path = DEFAULT if output is None else Path(output)
    pictures = Output(path, count, keep=output is None)
    pictures.check("--output")
    inputs = {Path(file).resolve(): option for option, file in read if file is not None}
    _keep_inputs("--output", () if pictures.keep else pictures.names(), inputs)
    if grid is None:
        return pictures, None
    sheet = Output(Path(grid)) if grid else Output(path.with_stem(f"{path.stem}-grid"), keep=output is None)
    if sheet.path.suffix.lower() != ".png":
        raise ValueError(f"--grid {grid!r} must be a file that ends in .png; prompts go before --grid")
    sheet.check("--grid")
    _keep_inputs("--grid", () if sheet.keep else (sheet.path,), inputs)
    if sheet.path.absolute() in {name.absolute() for name in itertools.islice(pictures.names(), count)}:
        raise ValueError(f"--grid {sheet.path} is where a picture goes; give another name")
    return pictures, sheet


def _keep_inputs(option: str, names: Iterable[Path], inputs: Mapping[Path, str]) -> None:
    """Raise ValueError where one of the names is that of a file that is read."""
    for name in names:
        if (by := inputs.get(name.resolve())) is not None:
            raise ValueError(f"{option}: {name} is the picture that {by} reads, and would be lost; give another name")


def check_folder(path: Path, named: str) -> None:
    """Raise ValueError for a folder, which need not be there yet, to which nothing can be written.

    Args:
        path: the folder.
        named: what the error begins with: the option and what it gives.
    """
    above = path.absolute()
    folder = next(one for one in (above, *above.parents) if one.exists())  # missing ones are made
    if not folder.is_dir():
        raise ValueError(f"{named}: {folder} is a file, expected a folder")
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{named}: nothing can be written to {folder} ({error.strerror})") from error


def _check_lengths(path: Path, option: str) -> None:
    """Raise ValueError for a name that is longer than file systems take; it cannot even be asked whether it exists."""
    if long := [part for part in path.parts if len(os.fsencode(part)) > _NAME_BYTES]:
        name, size = long[0], len(os.fsencode(long[0]))
        raise ValueError(f"{option}: the name {name[:20]}... has {size} bytes; names have at most {_NAME_BYTES}")
    if len(os.fsencode(path.absolute())) > _PATH_BYTES:
        raise ValueError(
            f"{option}: the path of {len(os.fsencode(path.absolute()))} bytes is too long; give a shorter one"
        )


def _claimed(path: Path) -> bool:
    """Make an empty file, which no other program can do with this name at the same time; False if it exists."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
