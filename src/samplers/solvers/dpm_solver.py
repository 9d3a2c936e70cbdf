"""DPM-Solver on levels of its own: between the first and the last level above 0, at which it ends."""

from __future__ import annotations

from collections.abc import Iterator
from math import atan, exp, expm1, log
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.solvers.common import phi_1, slope
from samplers.types import Denoise, Step


def dpm_fast(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver-fast in -ln sigma: steps of three model calls and a rest, in all as many calls as there are levels.

    Lu et al. 2022, arXiv 2206.00927, section 3.3 and appendix D.3. The steps are equal in -ln sigma and end at the last
    level above 0, so a little noise stays; of `sigmas` only the ends and the number count.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    first, last = _ends(sigmas)
    calls = len(sigmas) - 1
    count = calls // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if calls % 3 == 0 else [3] * (count - 1) + [calls % 3]
    for i, order in enumerate(orders):
        t, following = (first + (last - first) * k / count for k in (i, i + 1))
        stage = _Stage.at(denoise, x, t)
        step = Step(i, exp(-following), stage.to(denoise, following, order), stage.denoised)
        yield step
        x = step.x


def dpm_adaptive(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05
) -> Iterator[Step]:
    """DPM-Solver-23 in -ln sigma, with steps as wide as the difference of its second and third order allows.

    Lu et al. 2022, arXiv 2206.00927, appendix C, with k-diffusion's controller of the width: factor
    1 + atan(error^(-1/3) - 1), accepted from 0.81 on. It ends at the last level above 0, so a little noise stays; of
    `sigmas` only the ends count. The error is that of the whole batch: its pictures share their steps.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        rtol, atol: of the error, relative to the latent and in itself.
        h_init: first width.
    """
    t, last = _ends(sigmas)
    h, i, low_before = h_init, 0, x
    while t < last - 1e-5:
        following = min(last, t + h)
        stage = _Stage.at(denoise, x, t)
        low, high = stage.pair(denoise, following)
        allowed = torch.clamp(rtol * torch.maximum(low.abs(), low_before.abs()), min=atol)
        error = float(torch.linalg.vector_norm((low - high) / allowed).detach()) / x.numel() ** 0.5
        factor = 1 + atan((1 / (error + 1e-8)) ** (1 / 3) - 1)
        h *= factor
        if factor < 0.81:
            continue
        step = Step(i, exp(-following), high, stage.denoised)
        yield step
        x, t, low_before, i = step.x, following, low, i + 1


def _ends(sigmas: Tensor) -> tuple[float, float]:
    """-ln sigma of the first level and of the last above 0.

    Raises:
        ValueError: they are the same, which leaves nothing to solve.
    """
    levels = [sigma for sigma in sigmas.tolist() if sigma > 0]
    if len(levels) < 2:
        raise ValueError(
            f"dpm_fast and dpm_adaptive solve between levels above 0, but of {sigmas.tolist()} that is one"
        )
    return -log(levels[0]), -log(levels[-1])


class _Stage(NamedTuple):
    """The beginning of a step at t = -ln sigma."""

    x: Tensor
    t: float
    denoised: Tensor
    noise: Tensor  # predicted

    @classmethod
    def at(cls, denoise: Denoise, x: Tensor, t: float) -> _Stage:
        denoised = denoise(x, exp(-t))
        return cls(x, t, denoised, slope(x, exp(-t), denoised))

    def first(self, t: float) -> Tensor:
        """DPM-Solver-1, formula 3.7."""
        return self.x - exp(-t) * expm1(t - self.t) * self.noise

    def to(self, denoise: Denoise, t: float, order: int) -> Tensor:
        """DPM-Solver of this order to t: algorithms 1 and 2 for order 2 and 3."""
        if order == 1:
            return self.first(t)
        if order == 3:
            return self.pair(denoise, t)[1]
        return self.second(t, self.beyond(denoise, self.first(self.part(t, 1 / 2)), self.part(t, 1 / 2)), 1 / 2)

    def pair(self, denoise: Denoise, t: float) -> tuple[Tensor, Tensor]:
        """Second and third order to t, with middles at 1/3 and 2/3."""
        one, two = self.part(t, 1 / 3), self.part(t, 2 / 3)
        early = self.beyond(denoise, self.first(one), one)
        ahead = self.first(two) - exp(-two) * 2 * (phi_1(two - self.t) - 1) * early
        late = self.beyond(denoise, ahead, two)
        return self.second(t, early, 1 / 3), self.first(t) - exp(-t) * 3 / 2 * (phi_1(t - self.t) - 1) * late

    def part(self, t: float, share: float) -> float:
        return self.t + share * (t - self.t)

    def second(self, t: float, change: Tensor, share: float) -> Tensor:
        return self.first(t) - exp(-t) / (2 * share) * expm1(t - self.t) * change

    def beyond(self, denoise: Denoise, x: Tensor, t: float) -> Tensor:
        """How the predicted noise at x and t differs from that at the beginning."""
        return slope(x, exp(-t), denoise(x, exp(-t))) - self.noise
