"""Small helpers that every room may use: files, arguments, memory, progress, tables."""

from __future__ import annotations

import errno
import functools
import inspect
import math
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from difflib import get_close_matches
from importlib.util import find_spec
from operator import index
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, ParamSpec, SupportsFloat, SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".mmdit-"  # the start of temporary names, which all have the same length
_STALE = 60  # seconds, in which a file that was just made gets its lock
_DAY = 86400
_CPU_WORDS = ("tried to allocate", "allocate memory", "size calculation overflowed", "multiplication overflow")
Item = TypeVar("Item")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def ahead(run: Callable[[], Result]) -> Iterator[Callable[[], Result]]:
    """Run a function in a thread within the context; what it gives waits for the end and returns or raises the result.

    The thread has ended where the context has, also by an error. It has torch's default modes: gradients are on, and no
    stream or device of a context manager is current.
    """
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run).result


def bar(items: Iterable[Item], total: int | None, shown: bool | None) -> Iterator[Item]:
    """The items, counted by a progress bar.

    Args:
        items: what is counted.
        total: their number, if it is known.
        shown: None shows the bar in terminals and notebooks, not in files and pipes, and never where the environment
            variable TQDM_DISABLE is set.
    """
    if shown is None:
        shown = ("ipykernel" in sys.modules or sys.stderr.isatty()) and not os.environ.get("TQDM_DISABLE")
    if not shown:
        yield from items
    elif "ipykernel" in sys.modules and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as in_notebook  # noqa: PLC0415 # it warns where ipywidgets is missing

        yield from in_notebook(items, total=total)
    else:
        yield from tqdm(items, total=total)


def whole(name: str, value: SupportsIndex, least: int, most: int = 2**63 - 1) -> int:
    """The argument `name`, which counts something, as an int: NumPy's whole numbers are taken, booleans are not.

    Raises:
        ValueError: it is no whole number from `least` to `most`.
    """
    try:
        found = None if is_boolean(value) else index(value)
    except TypeError:
        found = None
    if found is None or not least <= found <= most:
        bound = "" if most == 2**63 - 1 else f" and at most {most}"
        raise ValueError(f"{name} must be a whole number of at least {least}{bound}, got {shortened(value)}")
    return found


def number(name: str, value: SupportsFloat, least: int | float = -math.inf, most: int | float = math.inf) -> float:
    """The argument `name` as a float: whole numbers and NumPy's numbers are taken, strings and booleans are not.

    Raises:
        ValueError: it is no finite number from `least` to `most`.
    """
    try:
        found = math.nan if is_boolean(value) or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not math.isfinite(found) or not least <= found <= most:
        raise ValueError(f"{name} must be a finite number{range_words(least, most)}, got {shortened(value)}")
    return found


def range_words(least: int | float, most: int | float) -> str:
    """A range that a number must be in, in words that follow "number"; empty where there is no bound."""
    if most == math.inf:
        return "" if least == -math.inf else f" of at least {least:g}"
    return f" of at most {most:g}" if least == -math.inf else f" from {least:g} to {most:g}"


def is_boolean(value: object) -> bool:
    """Whether a value is True or False, of Python, NumPy or torch."""
    return isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def shortened(value: object) -> str:
    """The repr of a value in at most a line; whole numbers of thousands of digits have none in Python."""
    try:
        return shorten(value)
    except ValueError:
        return f"a long {type(value).__name__}"


@contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """A name to write to; the file takes the place of `path` at the end, and is removed if the writing fails.

    The file is made here, under a random name that no link can stand in for, and reaches the disk before it gets its
    name. It keeps the permissions of the file that it replaces. What killed processes have left is removed.

    Args:
        path: where the file goes; its folder is made where it is missing.
        new: there must be no such file, nor may one be made meanwhile.

    Raises:
        FileExistsError: `new`, and there is one.
        NotADirectoryError: a file is in the place of its folder.
        OSError: the file cannot be written; the error names `path`.
    """
    with _named(path):
        make_folder(path.parent)
        _remove_stale(path.parent)
        part = path.parent / _temporary_name()
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            try:
                _lock(file)
                yield part
                _check_same(part, file)
                os.fsync(file)
                if not new and path.is_file():
                    part.chmod(stat.S_IMODE(path.stat().st_mode))
                os.utime(part)  # so that it is not stale between here and its name
            finally:
                os.close(file)  # Windows renames no open file
            _rename_new(part, path) if new else part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder with those above it, where they are missing.

    Raises:
        NotADirectoryError: a file is in its place, or in that of one above it.
        OSError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # which would say that what is written there exists
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: a killed process leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: Path, *, over: bool = False) -> Iterator[Path]:
    """A folder to write to, which gets the name `path` at the end, and is removed if the writing fails.

    Args:
        path: where the folder goes.
        over: it takes the place of the folder that is there.

    Raises:
        FileExistsError: not `over`, and there is something at `path`, or something was made there meanwhile.
        OSError: the folder cannot be written; the error names `path`.
    """
    with _named(path):
        make_folder(path.parent)
        _remove_stale(path.parent)
        part = path.parent / _temporary_name()
        part.mkdir()
        folder = os.open(part, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None
        try:
            _lock(folder)
            yield part
            for file in part.rglob("*"):
                _sync_file(file)
            with _aside(path) if over else nullcontext():
                _name_folder(part, path)
        finally:
            if folder is not None:
                os.close(folder)
            shutil.rmtree(part, ignore_errors=True)
        _sync_folder(path.parent)


def _name_folder(part: Path, path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError(errno.EEXIST, "something was made there meanwhile", str(path))
    try:
        part.rename(path)  # of several that make it only one goes on: a folder with files is never replaced
    except OSError as error:
        raise FileExistsError(errno.EEXIST, "something was made there meanwhile", str(path)) from error


@contextmanager
def _aside(path: Path) -> Iterator[None]:
    """Give a folder that is to be replaced another name; it is removed at the end, and comes back where that fails."""
    if path.is_symlink() or not path.is_dir():
        yield
        return
    old = path.rename(path.parent / _temporary_name())
    try:
        yield
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder. It loses its name first, so that a killed process leaves no part of it under the name."""
    shutil.rmtree(path.rename(path.parent / _temporary_name()))


def _temporary_name() -> str:
    return f"{_TEMPORARY}{secrets.token_hex(8)}"


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes have left: temporary files and folders that nobody holds a lock of."""
    for path in folder.glob(f"{_TEMPORARY}{'[0-9a-f]' * 16}"):
        try:
            status = path.lstat()
            if time.time() - status.st_mtime < _STALE or stat.S_ISLNK(status.st_mode) or not _is_unlocked(path):
                continue
            shutil.rmtree(path) if stat.S_ISDIR(status.st_mode) else path.unlink()
        except OSError:  # of another user, or removed by another process
            continue


def _is_unlocked(path: Path) -> bool:
    """Whether no process holds a lock; where there are no locks, what is a day old has none."""
    if fcntl is None:
        return time.time() - path.lstat().st_mtime > _DAY
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _lock(descriptor: int | None) -> None:
    """Show other processes that a temporary file is in use."""
    if fcntl is not None and descriptor is not None:
        with suppress(OSError):  # a file system without locks; its files are never taken for stale ones there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _check_same(path: Path, descriptor: int) -> None:
    """Raise OSError where a name no longer leads to the file that was made under it."""
    here, made = path.lstat(), os.fstat(descriptor)
    if (here.st_dev, here.st_ino) != (made.st_dev, made.st_ino):
        raise OSError(errno.EIO, "the temporary file was replaced while it was written", str(path))


def _rename_new(part: Path, path: Path) -> None:
    """Give a file its name, which must be free."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        part.rename(path)


def _sync_file(path: Path) -> None:
    if path.is_file():
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Bring the new name to the disk, where the system lets folders be opened."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system that name no file, such as "no space left", or a temporary one, name the given file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and _TEMPORARY not in str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def checks_names(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function refuse a keyword argument that it does not have with the nearest names that it has."""
    known = [name for name, one in inspect.signature(function).parameters.items() if one.kind != one.VAR_KEYWORD]

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if wrong := [name for name in kwargs if name not in known]:
            near = get_close_matches(wrong[0], known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise TypeError(
                f"{function.__name__}() has no argument {wrong[0]!r}; {hint}Its arguments are {', '.join(known)}"
            )
        return function(*args, **kwargs)

    return checked


def taken(value: Tensor, axis: int, places: Tensor | None) -> Tensor:
    """The part of a tensor at some places along an axis.

    Args:
        value: [samples, ...].
        axis: along which `places` count.
        places: whole numbers [n], or [samples, n] where each sample has its own; None takes all.
    """
    if places is None:
        return value
    places = places.to(value.device)
    if places.ndim == 1:
        return value.index_select(axis, places)
    shape = [1] * value.ndim
    shape[0], shape[axis] = places.shape
    return value.take_along_dim(places.view(shape), dim=axis)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch says so of the CPU in a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _CPU_WORDS)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored.

    A tensor subclass counts by the tensors that it holds, because it may report the bytes of what it stands for.
    """
    # Without `keep_vars` each tensor is detached, which is dear for float8 weights: see `Float8Tensor.as_parameter`.
    return sum(map(_stored_bytes, model.state_dict(keep_vars=True).values()))


def _stored_bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table, with cells padded so that the columns also line up as text.

    Args:
        header: The titles of the columns.
        rows: The cells of each row, as many as there are titles.

    Raises:
        ValueError: a row has another number of cells.
    """
    lines = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    if odd := [row for row in lines if len(row) != len(header)]:
        raise ValueError(f"a row of {len(odd[0])} cells in a table of {len(header)} columns: {odd[0]}")
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in lines]
