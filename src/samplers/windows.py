"""Where on the way from noise to picture something applies, said in noise levels.

Origins count steps, or percents of the way. Both become levels when guidance is built, so that a window means the same
to solvers that call the model several times a step, and to every schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from samplers.schedules import shifted


@dataclass(frozen=True)
class Window:
    """The levels from `high` down to `low`; `low` itself belongs to them where the window is `closed`.

    So the calls of step i are those in Window(sigmas[i], sigmas[i + 1]), wherever in the step a solver makes them.
    """

    high: float = inf
    low: float = -inf
    closed: bool = False

    def __contains__(self, sigma: float) -> bool:
        return self.low < sigma <= self.high or (self.closed and sigma == self.low)


ALWAYS = Window()
NEVER = Window(-inf, -inf)


def steps_inside(sigmas: Tensor, start: float, stop: float) -> Window:
    """The steps i of n with start n < i < stop n: so diffusers and Stability's code count for skip-layer guidance.

    Args:
        sigmas: [n + 1] falling levels.
        start, stop: shares of the steps. Both ends are outside: even with start 0 the first step is.
    """
    levels = sigmas.tolist()
    count = len(levels) - 1
    inside = [i for i in range(count) if count * start < i < count * stop]
    return Window(levels[inside[0]], levels[inside[-1] + 1]) if inside else NEVER


def first_steps(sigmas: Tensor, count: int) -> Window:
    """The first `count` steps."""
    return Window(low=float(sigmas[count])) if count else NEVER


def percents(start: float, stop: float, shift: float) -> Window:
    """From `start` to `stop` of the way, 0 to 1, both ends inside, as ComfyUI's ranges of timesteps.

    Args:
        start, stop: of the even timesteps, before they are shifted.
        shift: of the schedule, see `sigmas`.
    """
    return Window(level_at(start, shift), level_at(stop, shift), closed=True)


def level_at(percent: float, shift: float) -> float:
    """The level after this share of the way: 1 - percent, shifted (ComfyUI `ModelSamplingDiscreteFlow`)."""
    rest = torch.tensor(min(max(1 - percent, 0), 1), dtype=torch.float64)
    return float(shifted(rest, shift))


def gap(windows: Sequence[Window], high: float, low: float) -> tuple[float, float] | None:
    """The first stretch of levels from `high` down to `low` that is in no window; None where all are in one."""
    reached = high
    for window in sorted(windows, key=lambda one: one.high, reverse=True):
        if window.high < reached:
            return reached, window.high
        reached = min(reached, window.low)
    return (reached, low) if reached > low or (reached == low and not any(low in one for one in windows)) else None
