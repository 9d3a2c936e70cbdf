"""Output of the command line: stdout and stderr that never end a command, notes, and warnings as notes."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOBase
from typing import Any, TextIO

Note = Callable[[str], None]


class Stream(TextIOBase):
    """A text stream that keeps its first error instead of raising it, and writes nothing afterwards.

    Characters that the stream cannot encode are written as escapes.

    Args:
        stream: The stream to write to; None, as Python has it for a closed stdout, writes nowhere.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | ValueError | None = None  # ValueError: the stream is closed

    def write(self, text: str) -> int:
        with self._kept() as stream:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._kept() as stream:
            stream.flush()

    def isatty(self) -> bool:
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError("the stream is closed")
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def abandon(self) -> None:
        """Send what Python still writes at its exit to nowhere."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())

    @contextmanager
    def _kept(self) -> Iterator[Any]:
        if self.stream is None or self.error is not None:
            yield _Nowhere()
            return
        try:
            yield self.stream
        except (OSError, ValueError) as error:
            self.error = error


class _Nowhere:
    """A stream that writes nothing."""

    def write(self, text: str) -> None: ...
    def flush(self) -> None: ...


@contextmanager
def streams() -> Iterator[Stream]:
    """Replace stdout and stderr by streams that never raise; gives stdout."""
    before = sys.stdout, sys.stderr
    out, err = map(Stream, before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
        out.flush()
        err.flush()
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            if stream.error is not None:
                stream.abandon()


def say(text: object) -> None:
    """A line of the result, on stdout."""
    print(text, flush=True)


def note(text: str) -> None:
    """Tell the user something that is not an error, on stderr."""
    print(f"mmdit: note: {text}", file=sys.stderr)


def note_of(options: Namespace) -> Note:
    """`note`, or with --quiet what says nothing."""
    return _silent if getattr(options, "quiet", False) else note


def _silent(text: str) -> None:
    """Say nothing."""


@contextmanager
def warnings_shown_by(note: Note) -> Iterator[None]:
    """Show warnings as notes, without the line of code that they come from."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        note(str(message))

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
