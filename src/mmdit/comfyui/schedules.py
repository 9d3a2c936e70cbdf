"""The noise schedules of nodes that have parameters of their own: Karras and beta."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from samplers import shifted

_TABLE = 1000  # number of training timesteps
_TERMS, _HALVINGS = 300, 60


def karras(steps: int, sigma_max: float, sigma_min: float, rho: float) -> Tensor:
    """Sigmas evenly spaced in sigma^(1/rho), then 0, float64 [steps + 1] (Karras et al., arXiv 2206.00364, eq. 5)."""
    if rho <= 0 or sigma_min <= 0:
        raise ValueError(f"rho is {rho:g} and sigma_min {sigma_min:g}; both must be above 0")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def beta_sampling(steps: int, shift: float, alpha: float, beta: float) -> Tensor:
    """The sigmas at the timesteps given by quantiles of a beta distribution, without repeats, then 0.

    Source: ComfyUI `beta_scheduler`; Lee et al. 2024, arXiv 2407.12173.
    """
    if alpha <= 0 or beta <= 0:
        raise ValueError(f"alpha is {alpha:g} and beta {beta:g}; both must be above 0")
    places = [round((_TABLE - 1) * _quantile(1 - i / steps, alpha, beta)) for i in range(steps)]
    timesteps = torch.tensor(list(dict.fromkeys(places)), dtype=torch.float64)
    levels = shifted((timesteps + 1) / _TABLE, shift)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def _quantile(share: float, a: float, b: float) -> float:
    """The quantile function of the beta distribution, computed by bisection."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, a, b) < share else (low, middle)
    return (low + high) / 2


def _below(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (Lentz's method).

    Press et al., Numerical Recipes, section 6.4.
    """
    if not 0 < x < 1:
        return max(0.0, min(1.0, x))
    if x > (a + 1) / (a + b + 2):  # here the fraction for I_(1-x)(b, a) converges faster
        return 1 - _below(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, _TERMS):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + numerator * d)
            c = _away(1 + numerator / c)
            found *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * found


def _away(value: float) -> float:
    """Replace a value close to 0, so that it can be divided by."""
    return value if abs(value) > 1e-300 else 1e-300


def level_of_table(timestep: int, shift: float) -> float:
    """The sigma of a training timestep; timestep 0 gives ComfyUI's `sigma_min`."""
    return float(shifted(torch.tensor((timestep + 1) / _TABLE, dtype=torch.float64), shift))
