"""Solvers of the flow ODE. Each is a generator: it yields a `Step` after every step and goes on from `step.x`.

A solver calls `denoise(x, sigma)`, which gives the predicted picture x0, and knows nothing of prompts or guidance.
It leaves gradients as the caller has them: a graph grows only where weights or latents ask for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]


@dataclass
class Step:
    """What a solver shows after a step. Changing `x` changes what it goes on from."""

    i: int
    sigma: float  # the level of x: sigmas[i + 1]
    x: Tensor
    denoised: Tensor  # the prediction at sigmas[i] that the step was made with


Solver = Callable[[Denoise, Tensor, Tensor], Iterator[Step]]


def slope(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    """dx/dsigma of the flow at x, which is the velocity: (x - x0) / sigma."""
    return (x - denoised) / sigma


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Euler's method on dx/dsigma: one model call a step, first order.

    Args:
        denoise: x0 prediction of a latent at a noise level.
        x: the noise to start from, any shape.
        sigmas: [steps + 1] falling levels, see `samplers.sigmas`.
    """
    levels = sigmas.tolist()
    for i, (sigma, following) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        step = Step(i, following, x + slope(x, sigma, denoised) * (following - sigma), denoised)
        yield step
        x = step.x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2M): one model call a step, second order from the second step on; the last step is Euler's.

    Lu et al. 2022, arXiv 2211.01095, algorithm 2, with -ln sigma in the place of the log signal-to-noise ratio: so
    Stability's code and ComfyUI run it on flows too (diffusers' flow form takes the true ratio: other numbers).

    Args:
        denoise, x, sigmas: see `euler`.
    """
    levels = sigmas.tolist()
    before: Tensor | None = None  # the prediction of the step before, whose width in ln sigma is `width_before`
    width_before = 0.0
    for i, (sigma, following) in enumerate(pairwise(levels)):
        denoised = mixed = denoise(x, sigma)
        width = log(sigma / following) if following else inf
        if before is not None and following:
            share = width / (2 * width_before)
            mixed = (1 + share) * denoised - share * before
        ratio = following / sigma
        step = Step(i, following, ratio * x + (1 - ratio) * mixed, denoised)
        yield step
        x, before, width_before = step.x, denoised, width


SOLVERS: dict[str, Solver] = {"euler": euler, "dpmpp_2m": dpmpp_2m}
