"""Learning rates by step or by elapsed time, and timers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "linear", "cosine"]


def rate_at(step: int, steps: int, *, peak: float, warmup: int, schedule: Schedule) -> float:
    """The learning rate of a step, counted from 0: it rises linearly over `warmup` steps, then follows the schedule.

    "constant" stays at the peak; "linear" and "cosine" fall to 0 at the end of the run.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


def learning_rate(fraction: float, step: int, *, peak: float, warmup: int, decay: float) -> float:
    """The rate after `fraction` of the time: linear from 0 over `warmup` steps, linear to 0 over the last `decay`."""
    return peak * min(1.0, (step + 1) / max(warmup, 1)) * min(1.0, (1 - fraction) / decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # an optimizer in a graph, or of torchao
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
