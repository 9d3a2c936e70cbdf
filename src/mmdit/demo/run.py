"""One training run: its recipe, device, clock, log, processes, and folder of states."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import torch

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
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - self.start)

    def generator(self, offset: int) -> torch.Generator:
        """A generator on the device, whose seed differs from stage to stage."""
        return torch.Generator(self.device).manual_seed(1000 * self.recipe.seed + offset)

    def autocast(self) -> torch.autocast:
        """bfloat16 over float32 weights on a GPU; float32 on the CPU, where bfloat16 is slow."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu")

    def synchronize(self) -> None:
        """Wait for the device, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
