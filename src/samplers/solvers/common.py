"""What solvers share: showing a step, the arithmetic of noise levels, and churn, the fresh noise of stochastic solvers.

A noise level `sigma` is the share of noise in a latent, `1 - sigma` the share of the picture. The half log-SNR of a
level is ln((1 - sigma) / sigma), the lambda of the DPM-Solver papers. Solvers that ComfyUI runs in the variance
exploding form have -ln sigma in its place: they treat sigma as noise that was added to an unscaled picture. On a flow
both are the same ODE, because dx/dsigma = (x - x0) / sigma in both; the noise that a stochastic solver adds is not.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import exp, expm1, inf, log, sqrt
from typing import NamedTuple

from torch import Tensor

from samplers.noise import Fresh, Noise
from samplers.types import Step
from samplers.windows import level_at


def show(i: int, sigma: float, x: Tensor, denoised: Tensor) -> Generator[Step, None, Tensor]:
    """Yield the `Step`, and return its latent, which the caller may have changed."""
    step = Step(i, sigma, x, denoised)
    yield step
    return step.x


def slope(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    """Return dx/dsigma of the flow at x, which is the velocity: (x - x0) / sigma."""
    return (x - denoised) / sigma


def toward(denoised: Tensor, x: Tensor, ratio: float) -> Tensor:
    """Return the Euler step that keeps `ratio` of the noise of x. It is exact where the prediction is constant."""
    return ratio * x + (1 - ratio) * denoised


def weighted_sum(weights: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of weight * part, in order. Parts beyond the last weight are ignored."""
    first, *rest = (weight * part for weight, part in zip(weights, parts, strict=False))
    for one in rest:
        first = first + one
    return first


def half_log_snr(sigma: float) -> float:
    """Return ln((1 - sigma) / sigma): -inf at level 1, inf at level 0."""
    if not 0 < sigma < 1:
        return inf if sigma <= 0 else -inf
    return log((1 - sigma) / sigma)


def at_half_log_snr(value: float) -> float:
    """Return the level with this half log-SNR."""
    return 1 / (1 + exp(value))


def log_ratio(low: float, high: float) -> float:
    """Return ln(low / high), -inf where low is 0."""
    return log(low / high) if low else -inf


def phi_1(h: float) -> float:
    """Return (e^h - 1) / h, the weight of a constant in an exponential integrator."""
    return expm1(h) / h


def phi_2(h: float) -> float:
    """Return (phi_1(h) - 1) / h, the weight of a slope in an exponential integrator."""
    return (phi_1(h) - 1) / h


@dataclass(frozen=True)
class Churn:
    """The fresh noise of a stochastic solver.

    Args:
        eta: how much of the noise is exchanged for fresh noise: 0 exchanges nothing, 1 is the paper's amount.
        s_noise: a factor of the fresh noise.
        noise: (sigma, sigma_next) -> noise of unit variance, of the latent's shape.
    """

    eta: float
    s_noise: float
    noise: Noise

    @classmethod
    def of(cls, x: Tensor, noise: Noise | None, eta: float = 1.0, s_noise: float = 1.0) -> Churn:
        """Return the churn for latents like x; without `noise` it draws from torch's global state."""
        return cls(eta, s_noise, noise or Fresh(x))

    def add(self, x: Tensor, deviation: float, sigma: float, sigma_next: float) -> Tensor:
        """Return x with fresh noise of this standard deviation; x as it is at eta 0, where nothing is drawn."""
        return x + deviation * self.s_noise * self.noise(sigma, sigma_next) if self.eta else x


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return (down, up) in the variance exploding form: go down to `down`, then add noise of deviation `up`.

    Song et al. 2020, arXiv 2010.02502, formula 16 with its sigma; eta 1 is the posterior of DDPM, eta 0 adds nothing.
    Flows use it on the ratio of noise to picture, which at level 1 is infinite.
    """
    up = min(sigma_next, eta * sigma_next * sqrt(1 - (sigma_next / sigma) ** 2))
    return sqrt(sigma_next**2 - up**2), up


class Descent(NamedTuple):
    """An Euler step to a level below the next one, and the way back up with fresh noise."""

    down: float  # the level to go down to
    grow: float  # the factor of the latent on the way up
    renoise: float  # the standard deviation of the fresh noise


def descent(sigma: float, sigma_next: float, eta: float) -> Descent:
    """Return the ancestral step of rectified flows: down to sigma' (1 + (sigma' / sigma - 1) eta), then up to sigma'.

    ComfyUI, `sample_euler_ancestral_RF`: after both, the shares of picture and noise are those of sigma'.

    Raises:
        ValueError: eta is so far above 1 that the step would go below level 0.
    """
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    if down <= 0:
        raise ValueError(f"eta = {eta} goes below level 0 from {sigma} to {sigma_next}; give eta from 0 to 1")
    grow = (1 - sigma_next) / (1 - down)
    return Descent(down, grow, sqrt(max(sigma_next**2 - (down * grow) ** 2, 0.0)))


def below_one(levels: Sequence[float], start: float) -> list[float]:
    """Return the levels, with `start` in place of a first level of 1, at which the half log-SNR is infinite.

    Where the second level is above `start`, the first becomes the middle between 1 and the second, so that levels fall.
    """
    if levels[0] < 1:
        return list(levels)
    return [start if levels[1] < start else (1 + levels[1]) / 2, *levels[1:]]


def comfyui_start(shift: float) -> float:
    """Return the level that ComfyUI puts in place of 1: the one after 0.01 % of the shifted timesteps."""
    return level_at(1e-4, shift)
