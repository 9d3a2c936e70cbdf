"""`mmdit generate` in several processes of torchrun: which rank draws what, and which of them speaks and writes."""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from mmdit.cli.console import Note
from mmdit.cli.usage import UsageError
from mmdit.pipeline.parallelize import parallelize
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime import mesh
from mmdit.runtime.lifeline import Lifeline
from mmdit.runtime.parallel import connected

T = TypeVar("T")
_LAST = 10  # seconds after a failure in which a process ends by itself


@dataclass
class Ranks:
    """The processes of a command: one, several that draw each picture together, or several that draw different ones."""

    mode: Literal["cfg", "sequence", "auto"] | None = None  # how a picture is split
    data: bool = False  # whether the pictures are split
    rank: int = 0
    world: int = 1
    lifeline: Lifeline | None = None
    pipe: Pipeline | None = None  # the pipeline that draws together with those of the other ranks

    @classmethod
    def of(cls, options: Namespace) -> Ranks:
        """The ranks that the options ask for.

        Raises:
            UsageError: options exclude each other, or torchrun has not started the process.
        """
        if options.parallel is None and not options.data_parallel:
            return cls()
        option = "--data-parallel" if options.data_parallel else f"--parallel {options.parallel}"
        if options.parallel is not None and options.data_parallel:
            raise UsageError("--parallel and --data-parallel are both given; give one of them")
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise UsageError(
                f"{option} needs several processes: start torchrun --nproc-per-node N -m mmdit generate ..., with as "
                "many processes as GPUs"
            )
        if options.prompts == "-":
            raise UsageError(f"{option}: several processes cannot all read standard input; give --prompts FILE")
        if options.data_parallel and options.grid is not None:
            raise UsageError("--grid needs all pictures in one process; leave it or --data-parallel out")
        return cls(options.parallel, options.data_parallel, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    @property
    def several(self) -> bool:
        """Whether there are several processes."""
        return self.mode is not None or self.data

    @property
    def writes(self) -> bool:
        """Whether this rank writes the pictures that it draws."""
        return self.data or self.rank == 0

    def note(self, note: Note) -> Note:
        """The notes of rank 0 alone; the others would repeat them."""
        return note if self.rank == 0 else lambda _: None

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank."""
        return mesh.own_device(device) if self.several else device

    @contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """Within the context, an error on one rank ends all of them; each says which rank it was."""
        if not self.several:
            yield
            return
        mesh.start(device)
        self.lifeline = connected()
        try:
            with self.lifeline.guarded():
                yield
        except BaseException:
            signal.alarm(_LAST)  # ends the process even if a broken communicator keeps it from ending
            raise
        if self.pipe is not None and self.pipe.parallel is not None:
            self.pipe.parallel.close()
        self.lifeline.close()
        dist.destroy_process_group()

    def share(self, pipe: Pipeline, guided: bool) -> None:
        """Split the drawings of the pipeline, where a picture is split.

        Args:
            pipe: the pipeline of this rank.
            guided: whether the pictures are drawn with guidance.
        """
        if self.mode is not None:
            cfg = 1 if self.mode == "sequence" or (self.mode == "auto" and (not guided or self.world % 2)) else 2
            parallelize(pipe, cfg)
            self.pipe = pipe

    def own(self, things: Sequence[T]) -> Sequence[T]:
        """Those of all pictures, or of what belongs to them, that this rank draws: every one, or every world-th."""
        return things[self.rank :: self.world] if self.data else things

    def names(self, names: Iterator[Path], count: int) -> Iterator[Path]:
        """The names of the pictures that this rank writes; rank 0 chooses them for all."""
        if not self.data:
            return names
        return iter(self.own(mesh.from_first(list(islice(names, count)) if self.rank == 0 else None)))

    def check(self) -> None:
        """Raise ParallelError if another rank has failed."""
        if self.lifeline is not None:
            self.lifeline.check()
