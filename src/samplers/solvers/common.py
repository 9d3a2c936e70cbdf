"""What solvers share: the step they show, the walk along the levels, and the arithmetic of levels.

`sigma` is the share of noise, `1 - sigma` that of the picture; `half_log_snr` is the logarithm of their ratio, the
lambda of the DPM-Solver papers. What is written with `-ln sigma` in its place treats sigma as noise added to a whole
picture: on a flow that is the same ODE, because dx/dsigma = (x - x0) / sigma in both, but not the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import exp, expm1, inf, log, sqrt
from typing import Any, NamedTuple

from torch import Tensor

from samplers.types import Step


class Interval(NamedTuple):
    """The levels that a step lies between."""

    i: int
    sigma: float
    following: float

    @property
    def width(self) -> float:
        """Of the step in sigma: below 0."""
        return self.following - self.sigma

    @property
    def ratio(self) -> float:
        """What is left of the noise."""
        return self.following / self.sigma

    @property
    def h(self) -> float:
        """Width in the half log signal-to-noise ratio, above 0; infinite from level 1 and to level 0."""
        return half_log_snr(self.following) - half_log_snr(self.sigma)

    @property
    def log_h(self) -> float:
        """Width in -ln sigma."""
        return log(self.sigma / self.following)


Move = Callable[[Tensor, Any, Interval], Tensor]


def walk(denoise: Callable[[Tensor, float], Any], x: Tensor, levels: Sequence[float], move: Move) -> Iterator[Step]:
    """One step after the other: predict, then go where `move(x, prediction, interval)` says; to level 0, where the
    prediction is the picture itself.

    Args:
        denoise: gives x0, or `samplers.Guided`, which is handed on to `move`.
        x: where to start.
        levels: falling.
        move: the solver's own; called for all steps but one that ends at 0.
    """
    for i, (sigma, following) in enumerate(pairwise(levels)):
        prediction = denoise(x, sigma)
        denoised = prediction if isinstance(prediction, Tensor) else prediction.x0
        moved = move(x, prediction, Interval(i, sigma, following)) if following else denoised
        step = Step(i, following, moved, denoised)
        yield step
        x = step.x


def slope(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    """dx/dsigma of the flow at x, which is the velocity: (x - x0) / sigma."""
    return (x - denoised) / sigma


def toward(denoised: Tensor, x: Tensor, ratio: float) -> Tensor:
    """Euler's step: `ratio` of the noise of x is left. It is exact where the prediction stays as it is."""
    return ratio * x + (1 - ratio) * denoised


def mixed(weights: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    """The weighted sum of parts; parts beyond the weights do not count."""
    first, *rest = (weight * part for weight, part in zip(weights, parts, strict=False))
    for one in rest:
        first = first + one
    return first


def half_log_snr(sigma: float) -> float:
    """ln((1 - sigma) / sigma): -inf at 1, inf at 0."""
    if not 0 < sigma < 1:
        return inf if sigma <= 0 else -inf
    return log((1 - sigma) / sigma)


def at_half_log_snr(value: float) -> float:
    """The level with this half log signal-to-noise ratio."""
    return 1 / (1 + exp(value))


def phi_1(h: float) -> float:
    """(e^h - 1) / h, the weight of a constant in an exponential integrator."""
    return expm1(h) / h


def phi_2(h: float) -> float:
    """(phi_1(h) - 1) / h, the weight of a slope."""
    return (phi_1(h) - 1) / h


def ancestral(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """Where to go down to, and how much noise to add to be at `following`, for noise added to a whole picture.

    Song et al. 2020, arXiv 2010.02502, formula 16 with its sigma; eta 1 is the posterior of DDPM, eta 0 adds nothing.
    Flows use it on the ratio of noise to picture, which at level 1 is infinite.
    """
    up = min(following, eta * following * sqrt(1 - (following / sigma) ** 2))
    return sqrt(following**2 - up**2), up


class Descent(NamedTuple):
    """An Euler step to a lower level than the next, and the way back up with fresh noise."""

    down: float  # level to go down to
    grow: float  # what the latent is then multiplied with
    renoise: float  # the share of fresh noise


def descent(over: Interval, eta: float) -> Descent:
    """The ancestral step of rectified flows: down to sigma' (1 + (sigma' / sigma - 1) eta), then up to sigma'.

    ComfyUI, `sample_euler_ancestral_RF`: the shares of picture and noise after both are those of sigma'.
    """
    down = over.following * (1 + (over.ratio - 1) * eta)
    grow = (1 - over.following) / (1 - down)
    return Descent(down, grow, sqrt(max(over.following**2 - (down * grow) ** 2, 0.0)))


def below_one(levels: Sequence[float], level: float) -> list[float]:
    """The levels, with `level` in the place of a first one of 1, whose signal-to-noise ratio has no logarithm."""
    return [level, *levels[1:]] if levels[0] >= 1 else list(levels)


def comfyui_start(shift: float) -> float:
    """What ComfyUI puts in the place of level 1: the level after 0.01 % of the shifted timesteps."""
    return at_percent(1e-4, shift)


def at_percent(percent: float, shift: float) -> float:
    """The level after this share of all timesteps, shifted."""
    t = 1 - percent
    return shift * t / (1 + (shift - 1) * t)
