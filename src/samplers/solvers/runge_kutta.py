"""Solvers that call the model more than once a step and remember nothing of the step before."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import sqrt

from torch import Tensor

from samplers.noise import Noise
from samplers.solvers.arguments import solver
from samplers.solvers.common import (
    Churn,
    at_half_log_snr,
    descent,
    half_log_snr,
    show,
    slope,
    toward,
    weighted_sum,
)
from samplers.types import Denoise, Step


@solver
def heun(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Heun's method: Euler's step, then the mean of the slopes at both ends; the step to 0 is Euler's. Second order.

    Karras et al. 2022, arXiv 2206.00364, algorithm 1. diffusers: FlowMatchHeunDiscreteScheduler.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            width, first = sigma_next - sigma, slope(x, sigma, denoised)
            ahead = x + first * width
            second = slope(ahead, sigma_next, denoise(ahead, sigma_next))
            x = x + (first + second) / 2 * width
        x = yield from show(i, sigma_next, x, denoised)


flow_heun = heun  # diffusers' FlowMatchHeunDiscreteScheduler


@solver
def heunpp2(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Heun++: the slopes at this level and the next two, weighted by sigma; near the end at fewer levels.

    Weights: sigma' / (k sigma_0) for the slope at each of the k - 1 levels ahead, the rest for the slope here, as in
    ComfyUI's `sample_heunpp2`. They satisfy no order condition: the method is first order.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            ahead, slopes = x, [slope(x, sigma, denoised)]
            ends = levels[i : min(i + 3, len(levels) - 1)]  # no slope is asked for at the last level
            for a, b in pairwise(ends):
                ahead = ahead + slopes[-1] * (b - a)
                slopes.append(slope(ahead, b, denoise(ahead, b)))
            shares = [level / (len(ends) * levels[0]) for level in ends[1:]]
            x = x + weighted_sum([1.0 - sum(shares), *shares], slopes) * (sigma_next - sigma)
        x = yield from show(i, sigma_next, x, denoised)


@solver
def dpm_2(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """The midpoint method with the middle at sqrt(sigma sigma'). Second order.

    Karras et al. 2022, arXiv 2206.00364, algorithm 2 without its churn, and DPM-Solver-2's middle (Lu et al. 2022,
    arXiv 2206.00927, algorithm 1).

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        x = midpoint(denoise, x, denoised, sigma, sigma_next) if sigma_next else denoised
        x = yield from show(i, sigma_next, x, denoised)


@solver
def dpm_2_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """`dpm_2` to below the next level, then fresh noise up to it: see `descent`.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `samplers.euler_ancestral`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            down, grow, renoise = descent(sigma, sigma_next, eta)
            x = grow * midpoint(denoise, x, denoised, sigma, down)
            x = churn.add(x, renoise, sigma, sigma_next)
        x = yield from show(i, sigma_next, x, denoised)


def midpoint(denoise: Denoise, x: Tensor, denoised: Tensor, sigma: float, to: float) -> Tensor:
    """Return the latent at level `to`, by the slope at sqrt(sigma to)."""
    middle = sqrt(sigma * to)
    halfway = x + slope(x, sigma, denoised) * (middle - sigma)
    return x + slope(halfway, middle, denoise(halfway, middle)) * (to - sigma)


@solver
def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2S) to below the next level, then fresh noise up to it: see `descent`. Two model calls a step.

    Lu et al. 2022, arXiv 2211.01095, algorithm 1: Euler's step to the middle in half log-SNR, whose prediction is used
    for the whole step. From level 1, where the half log-SNR is infinite, the middle is 0.9999.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `samplers.euler_ancestral`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            down, grow, renoise = descent(sigma, sigma_next, eta)
            middle = at_half_log_snr((half_log_snr(sigma) + half_log_snr(down)) / 2) if sigma < 1 else 0.9999
            better = denoise(toward(denoised, x, middle / sigma), middle)
            x = grow * toward(better, x, down / sigma)
            x = churn.add(x, renoise, sigma, sigma_next)
        x = yield from show(i, sigma_next, x, denoised)
