"""The log of a run, for people and for programs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mmdit.utils import make_folder, write_text


class Journal:
    """The log of a run: lines for people on the screen and in log.txt, rows for programs in progress.jsonl.

    Args:
        folder: of both files.
        quiet: write no line on the screen.
    """

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        self.folder, self.start, self.quiet = folder, time.monotonic(), quiet
        make_folder(folder)

    def say(self, text: str) -> None:
        """Write one line with the seconds since the start."""
        line = f"[{time.monotonic() - self.start:7.1f} s] {text}"
        if not self.quiet:
            print(line, flush=True)  # noqa: T201
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def row(self, stage: str, **values: object) -> None:
        """Write one row, and the same as a line; a number that is not finite stops the run.

        Raises:
            FloatingPointError: a value is not finite; the state saved before it is sound.
        """
        row = {"stage": stage, "seconds": round(time.monotonic() - self.start, 1)} | values
        with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.say(f"{stage} " + " ".join(f"{name} {_short(value)}" for name, value in values.items()))
        if bad := [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]:
            raise FloatingPointError(f"{stage}: {', '.join(bad)} is not finite; resume from the last saved state")

    def rewind(self, step: int) -> None:
        """Remove the rows of this step and of later ones, which a run that goes on from there writes again.

        A last row that a killed process wrote in part is removed too.
        """
        path = self.folder / "progress.jsonl"
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        write_text(path, "".join(line for line in whole if json.loads(line).get("step", -1) < step))


class Unwritten(Journal):
    """The log of a process that is not the first one, which writes nothing."""

    def __init__(self) -> None:
        """There is no folder."""

    def say(self, text: str) -> None:
        """Write nothing."""

    def row(self, stage: str, **values: object) -> None:
        """Write nothing."""

    def rewind(self, step: int) -> None:
        """Remove nothing."""


def mean_of(values: Iterable[Tensor]) -> float:
    """The mean of scalar tensors, with one copy from their device."""
    return float(torch.stack(list(values)).mean())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
