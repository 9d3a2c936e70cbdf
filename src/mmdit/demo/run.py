"""One training run: its recipe, device, clock, log, processes, folder of states, and place among several GPUs."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from mmdit.demo.recipe import TrainingRecipe
from mmdit.training.journal import Journal

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """One training run, as every stage needs it."""

    recipe: TrainingRecipe
    device: torch.device
    folder: Path
    journal: Journal
    pool: Executor
    seconds: float  # time of the whole run
    compiled: Collection[str] = ()  # names of `trainee.REGIONS`
    quick: Collection[str] = ()  # names of `trainee.QUICK`
    rank: int = 0  # of `world` processes with a GPU each, which torch.distributed connects; the first one writes files
    world: int = 1
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - self.start)

    def generator(self, offset: int) -> torch.Generator:
        """A generator on the device, whose seed differs from stage to stage and from process to process."""
        return torch.Generator(self.device).manual_seed(1000 * self.recipe.seed + 100 * self.rank + offset)

    def agreed(self, number: float) -> float:
        """The number of the first process, on every process; all of them call this. No GPU waits for it."""
        if self.world == 1:
            return number
        held = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(held, src=0)
        return held.item()

    def clock(self) -> float:
        """The monotonic seconds of the first process, so that all processes do the same at the same step."""
        return self.agreed(time.monotonic())

    def autocast(self) -> torch.autocast:
        """bfloat16 over float32 weights on a GPU; float32 on the CPU, where bfloat16 is slow."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu")

    def synchronize(self) -> None:
        """Wait for the device, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
