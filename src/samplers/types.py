"""The types of the values that are passed between solvers, guidance and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from samplers.checks import summary

Denoise = Callable[[Tensor, float], Tensor]  # (latent, noise level) -> predicted x0, of the latent's shape
# (latent, noise level, conditionings) -> the predicted x0 of each conditioning
Predict = Callable[[Tensor, float, Sequence[Any]], list[Tensor]]
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, x0 with the prompt, x0 without it) -> x0


@dataclass(repr=False)
class Step:
    """What a solver yields after a step. It continues from `x`, which the caller may change."""

    i: int  # the number of the step, from 0
    sigma: float  # the noise level of x: sigmas[i + 1], except in solvers that choose their own levels
    x: Tensor  # the latent after the step
    denoised: Tensor  # the x0 predicted at the beginning of the step, at sigmas[i]

    def __repr__(self) -> str:
        return f"Step(i={self.i}, sigma={self.sigma:.6g}, x: {summary(self.x)}, denoised: {summary(self.denoised)})"


class Guided(NamedTuple):
    """The guided prediction of x0, and the unconditional prediction if the pass was run."""

    x0: Tensor
    uncond: Tensor | None

    def __repr__(self) -> str:
        return f"Guided(x0: {summary(self.x0)}, uncond: {summary(self.uncond)})"


Guide = Callable[[Tensor, float], Guided]
