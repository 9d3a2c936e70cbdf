"""DPM-Solver on levels that it chooses itself, between the first and the last level above 0."""

from __future__ import annotations

from collections.abc import Iterator
from math import atan, exp, expm1, log
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.solvers.arguments import solver
from samplers.solvers.common import phi_1, show, slope
from samplers.types import Denoise, Step


@solver
def dpm_fast(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver-fast in -ln sigma: steps of three model calls and a shorter remainder, as many calls as steps in all.

    Lu et al. 2022, arXiv 2206.00927, section 3.3 and appendix D.3. The steps are equal in -ln sigma and end at the last
    level above 0, so a little noise stays. Only the ends of `sigmas` and their number count.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    first, last = _ends(sigmas)
    calls = len(sigmas) - 1
    count = calls // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if calls % 3 == 0 else [3] * (count - 1) + [calls % 3]
    for i, order in enumerate(orders):
        t, t_next = (first + (last - first) * k / count for k in (i, i + 1))
        stage = _Stage.at(denoise, x, t)
        x = stage.to(denoise, t_next, order)
        x = yield from show(i, exp(-t_next), x, stage.denoised)


@solver
def dpm_adaptive(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05
) -> Iterator[Step]:
    """DPM-Solver-23 in -ln sigma, with steps as wide as the difference of its second and third order allows.

    Lu et al. 2022, arXiv 2206.00927, appendix C, with k-diffusion's control of the width: factor
    1 + atan(error^(-1/3) - 1), accepted from 0.81 on. It ends at the last level above 0, so a little noise stays. Only
    the ends of `sigmas` count. The error is that of the whole batch: its pictures share their steps.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        rtol, atol: tolerances of the error, relative to the latent and absolute.
        h_init: the first width, in -ln sigma.
    """
    t, last = _ends(sigmas)
    h, i, low_before = h_init, 0, x
    while t < last - 1e-5:
        t_next = min(last, t + h)
        if h < 1e-9:
            raise ValueError(f"dpm_adaptive finds no step small enough for rtol={rtol}, atol={atol}: give larger ones")
        stage = _Stage.at(denoise, x, t)
        low, high = stage.pair(denoise, t_next)
        allowed = torch.clamp(rtol * torch.maximum(low.abs(), low_before.abs()), min=atol)
        error = float(torch.linalg.vector_norm((low - high) / allowed).detach()) / x.numel() ** 0.5
        factor = 1 + atan((1 / (error + 1e-8)) ** (1 / 3) - 1)
        h *= factor
        if factor < 0.81:
            continue  # refused: the same step again, with the smaller width
        x = yield from show(i, exp(-t_next), high, stage.denoised)
        t, low_before, i = t_next, low, i + 1


def _ends(sigmas: Tensor) -> tuple[float, float]:
    """Return -ln sigma of the first level and of the last above 0.

    Raises:
        ValueError: there are not two levels above 0, so that there is nothing to solve.
    """
    levels = [sigma for sigma in sigmas.tolist() if sigma > 0]
    if len(levels) < 2:
        raise ValueError(
            f"dpm_fast and dpm_adaptive solve between levels above 0, of which {sigmas.tolist()} has {len(levels)}; "
            "give at least two, so at least 2 steps"
        )
    return -log(levels[0]), -log(levels[-1])


class _Stage(NamedTuple):
    """The beginning of a step at t = -ln sigma."""

    x: Tensor
    t: float
    denoised: Tensor
    noise: Tensor  # the predicted noise

    @classmethod
    def at(cls, denoise: Denoise, x: Tensor, t: float) -> _Stage:
        """Call the model at x and t."""
        denoised = denoise(x, exp(-t))
        return cls(x, t, denoised, slope(x, exp(-t), denoised))

    def first(self, t: float) -> Tensor:
        """Return the first-order step to t: DPM-Solver-1, formula 3.7."""
        return self.x - exp(-t) * expm1(t - self.t) * self.noise

    def to(self, denoise: Denoise, t: float, order: int) -> Tensor:
        """Return the step of this order to t: algorithms 1 and 2 for order 2 and 3."""
        if order == 1:
            return self.first(t)
        if order == 3:
            return self.pair(denoise, t)[1]
        return self.second(t, self.beyond(denoise, self.first(self.part(t, 1 / 2)), self.part(t, 1 / 2)), 1 / 2)

    def pair(self, denoise: Denoise, t: float) -> tuple[Tensor, Tensor]:
        """Return the steps of second and third order to t, with middles at 1/3 and 2/3."""
        one, two = self.part(t, 1 / 3), self.part(t, 2 / 3)
        early = self.beyond(denoise, self.first(one), one)
        ahead = self.first(two) - exp(-two) * 2 * (phi_1(two - self.t) - 1) * early
        late = self.beyond(denoise, ahead, two)
        return self.second(t, early, 1 / 3), self.first(t) - exp(-t) * 3 / 2 * (phi_1(t - self.t) - 1) * late

    def part(self, t: float, share: float) -> float:
        """Return the time after this share of the way to t."""
        return self.t + share * (t - self.t)

    def second(self, t: float, change: Tensor, share: float) -> Tensor:
        """Return the second-order step to t, by the change of the predicted noise up to `share` of the way."""
        return self.first(t) - exp(-t) / (2 * share) * expm1(t - self.t) * change

    def beyond(self, denoise: Denoise, x: Tensor, t: float) -> Tensor:
        """Return the predicted noise at x and t minus the one at the beginning."""
        return slope(x, exp(-t), denoise(x, exp(-t))) - self.noise
