"""Windows of noise levels in which a part of guidance applies.

The reference implementations count steps, or percents of the timesteps. Both are converted to noise levels when
guidance is built, so that a window means the same for every schedule and for solvers with several model calls a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

from samplers.checks import as_levels, number, whole
from samplers.schedules import shifted


@dataclass(frozen=True)
class Window:
    """The levels from `high` down to `low`; `low` itself belongs to the window only if it is `closed`.

    So the model calls of step i are those in Window(sigmas[i], sigmas[i + 1]), wherever in the step they are made.
    """

    high: float = inf
    low: float = -inf
    closed: bool = False

    def __contains__(self, sigma: float) -> bool:
        return self.low < sigma <= self.high or (self.closed and sigma == self.low)


ALWAYS = Window()
NEVER = Window(-inf, -inf)


def steps_inside(sigmas: Sequence[float] | np.ndarray | Tensor, start: float, stop: float) -> Window:
    """Return the window of the steps i of n with start n < i < stop n.

    diffusers and Stability's code count so for skip-layer guidance.

    Args:
        sigmas: [n + 1] falling levels.
        start, stop: shares of the steps, 0 to 1. Both ends are outside: with start 0 the first step is outside.
    """
    levels, start, stop = as_levels(sigmas).tolist(), number("start", start), number("stop", stop)
    count = len(levels) - 1
    inside = [i for i in range(count) if count * start < i < count * stop]
    return Window(levels[inside[0]], levels[inside[-1] + 1]) if inside else NEVER


def first_steps(sigmas: Sequence[float] | np.ndarray | Tensor, count: int) -> Window:
    """Return the window of the first `count` steps of the levels `sigmas`.

    Raises:
        ValueError: there are not so many steps.
    """
    levels = as_levels(sigmas)
    count = whole("count", count, 0, len(levels) - 1)
    return Window(low=float(levels[count])) if count else NEVER


def percents(start: float, stop: float, shift: float) -> Window:
    """Return the window from `start` to `stop`, both ends inside, as ComfyUI's ranges of timesteps.

    Args:
        start, stop: shares of the even timesteps before they are shifted, 0 to 1.
        shift: the shift of the schedule, see `samplers.sigmas`.
    """
    return Window(level_at(start, shift), level_at(stop, shift), closed=True)


def level_at(percent: float, shift: float) -> float:
    """Return the level at this share of the timesteps: 1 - percent, shifted (ComfyUI `ModelSamplingDiscreteFlow`)."""
    rest = torch.tensor(min(max(1 - number("percent", percent), 0), 1), dtype=torch.float64, device="cpu")
    return float(shifted(rest, number("shift", shift, 0, above=True)))


def gap(windows: Sequence[Window], high: float, low: float) -> tuple[float, float] | None:
    """Return the first interval of levels between `high` and `low` that is in no window; None if there is none."""
    reached = high
    for window in sorted(windows, key=lambda one: one.high, reverse=True):
        if window.high < reached:
            return reached, window.high
        reached = min(reached, window.low)
    return (reached, low) if reached > low or (reached == low and not any(low in one for one in windows)) else None
