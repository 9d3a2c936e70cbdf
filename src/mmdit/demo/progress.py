"""Small things that both trainings share: averaged weights, rates by elapsed time, the log, files written whole."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.utils import replacing

__all__ = ["Budget", "Ema", "Every", "Journal", "learning_rate", "save_whole"]


class Budget:
    """The share of a stage that is done: by time, so that it always ends, or by steps where they end first.

    Args:
        seconds: Time that the stage may take.
        steps: The number of steps after which the stage ends; None is no limit.
        done: The share that an earlier run has done.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self, seconds: float, steps: int | None = None, done: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if seconds <= 0 or not 0 <= done <= 1:
            raise ValueError(f"a budget needs seconds > 0 and 0 <= done <= 1, got {seconds} and {done}")
        self.seconds, self.steps, self.done, self.clock = seconds, steps, done, clock
        self.start = clock()

    def fraction(self, step: int) -> float:
        """0 at the start, 1 at the end."""
        by_time = self.done + (1 - self.done) * (self.clock() - self.start) / self.seconds
        by_steps = step / self.steps if self.steps else 0.0
        return min(1.0, max(by_time, by_steps))

    def rounds(self, first: int = 0) -> Iterator[tuple[int, float]]:
        """(step, fraction) until the budget is spent; at least one."""
        step = first
        yield step, self.fraction(step)
        while (fraction := self.fraction(step := step + 1)) < 1:
            yield step, fraction


def learning_rate(fraction: float, step: int, *, peak: float, warmup: int, decay: float) -> float:
    """The rate after `fraction` of the time: linear from 0 over `warmup` steps, linear to 0 over the last `decay`."""
    return peak * min(1.0, (step + 1) / max(warmup, 1)) * min(1.0, (1 - fraction) / decay)


class Ema:
    """An exponential average of a module's parameters, kept in float32 beside it.

    The decay grows to its value as (1 + n) / (10 + n), so that the average forgets the start early on.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.live = list(module.parameters())
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's parameters into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def write_to(self, module: nn.Module) -> None:
        """Give another module of the same shape the averaged parameters."""
        for into, value in zip(module.parameters(), self.average, strict=True):
            into.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        return {"average": self.average, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved average."""
        self.updates = state["updates"]
        for into, value in zip(self.average, state["average"], strict=True):
            into.copy_(value)


class Every:
    """A timer that is due once in a given number of seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.last = seconds, clock, clock()

    def due(self) -> bool:
        """Whether the interval has passed; if it has, the next interval starts."""
        if (now := self.clock()) - self.last < self.seconds:
            return False
        self.last = now
        return True


class Journal:
    """The log of a run: lines for people on the screen and in log.txt, rows for programs in progress.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Write one line with the seconds since the start."""
        line = f"[{time.monotonic() - self.start:7.1f} s] {text}"
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


def save_whole(value: object, path: Path) -> None:
    """torch.save under a random name first, so that a killed run leaves the old file or the new one."""
    with replacing(path) as part, part.open("wb") as file:  # torch.save takes no name that begins with a dot
        torch.save(value, file)


def mean_of(values: Iterable[Tensor]) -> float:
    """The mean of scalar tensors, with one copy from their device."""
    return float(torch.stack(list(values)).mean())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
