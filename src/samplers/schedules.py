"""Noise levels of the steps. A schedule is a float64 tensor [steps + 1] that falls from 1 to 0.

Flow matching: x = sigma * noise + (1 - sigma) * picture, and the model's timestep is 1000 * sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from samplers.names import pick

TRAIN_STEPS = 1000  # the table of timesteps that the models were trained with: 1/1000 ... 1


def shifted(t: Tensor, shift: float) -> Tensor:
    """a t / (1 + (a - 1) t): more of the steps at high noise (Esser et al. 2024, arXiv 2403.03206, section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def checked_sigmas(levels: Sequence[float] | Tensor) -> Tensor:
    """Noise levels of one's own as a schedule, float64 [steps + 1], used as they are: no shift is applied.

    Args:
        levels: falling, the first at most 1, the last 0.

    Raises:
        ValueError: they are not.
    """
    schedule = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
    if schedule.ndim != 1 or len(schedule) < 2:
        raise ValueError(f"sigmas have shape {list(schedule.shape)}, expected [steps + 1] with at least one step")
    if not torch.isfinite(schedule).all():
        raise ValueError(f"sigmas hold {int((~torch.isfinite(schedule)).sum())} values that are not finite")
    if schedule[0] > 1 or schedule[-1] != 0:
        raise ValueError(
            f"sigmas go from {float(schedule[0])} to {float(schedule[-1])}, expected from at most 1 to 0: append 0.0, "
            "and divide timesteps by 1000"
        )
    if not (rises := schedule.diff() >= 0).any():
        return schedule
    at = int(rises.nonzero()[0])
    raise ValueError(f"sigmas must fall, but sigmas[{at + 1}] = {schedule[at + 1]} after {schedule[at]}")


def normal(steps: int, shift: float) -> Tensor:
    """Even timesteps between the ends of the shifted table, shifted once more; then 0.

    The default of the three references (Stability `get_sigmas`, ComfyUI `normal`, diffusers
    FlowMatchEulerDiscreteScheduler). The ends are rounded to float32 as theirs are.
    """
    lowest = np.float32(shifted(torch.tensor(1 / TRAIN_STEPS, dtype=torch.float64), shift).item())
    even = torch.linspace(TRAIN_STEPS, float(lowest) * TRAIN_STEPS, steps, dtype=torch.float64) / TRAIN_STEPS
    return torch.cat([shifted(even, shift), torch.zeros(1, dtype=torch.float64)])


SCHEDULES: dict[str, Callable[[int, float], Tensor]] = {"normal": normal}


def sigmas(name: str, steps: int, *, shift: float = 3.0) -> Tensor:
    """The noise levels of a schedule, float64 [steps + 1], the last one 0.

    Args:
        name: one of `SCHEDULES`.
        steps: model evaluations of a first-order solver; at least 1.
        shift: 3.0 for SD3 and SD3.5; 1 leaves the timesteps even.

    Raises:
        ValueError: an unknown name, no step, or a shift that is not above 0.
    """
    schedule = pick(SCHEDULES, name, "schedule")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if not shift > 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    return schedule(steps, shift)
