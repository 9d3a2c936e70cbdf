"""Solvers that call the model more than once a step and keep nothing from the step before."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import sqrt

from torch import Tensor

from samplers.noise import Fresh, Noise
from samplers.solvers.common import Interval, at_half_log_snr, descent, half_log_snr, mixed, slope, toward, walk
from samplers.types import Denoise, Step


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Heun's method: Euler's step, then the mean of the slopes at both ends; the step to 0 is Euler's. Second order.

    Karras et al. 2022, arXiv 2206.00364, algorithm 1. diffusers: FlowMatchHeunDiscreteScheduler.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        first = slope(x, over.sigma, denoised)
        ahead = x + first * over.width
        second = slope(ahead, over.following, denoise(ahead, over.following))
        return x + (first + second) / 2 * over.width

    return walk(denoise, x, sigmas.tolist(), move)


def heunpp2(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Heun++: the slopes at this level and the next two, weighted by sigma; near the end at fewer levels.

    Weights: sigma' / (k sigma_0) for the slope at each of the k - 1 levels ahead, the rest for the slope here, as in
    ComfyUI's `sample_heunpp2`. They are not those of an order condition: the method is first order.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    levels = sigmas.tolist()

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        ahead, here = x, slope(x, over.sigma, denoised)
        slopes, ends = [here], levels[over.i : over.i + 3]
        if ends[-1] == levels[-1]:
            ends = ends[:-1]  # no slope is asked for at the last level
        for sigma, following in pairwise(ends):
            ahead = ahead + slopes[-1] * (following - sigma)
            slopes.append(slope(ahead, following, denoise(ahead, following)))
        shares = [following / (len(ends) * levels[0]) for following in ends[1:]]
        return x + mixed([1.0 - sum(shares), *shares], slopes) * over.width

    return walk(denoise, x, levels, move)


def dpm_2(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """The midpoint method with the middle at sqrt(sigma sigma'). Second order.

    Karras et al. 2022, arXiv 2206.00364, algorithm 2 without its churn, and DPM-Solver-2's middle (Lu et al. 2022,
    arXiv 2206.00927, algorithm 1).

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        return _midpoint(denoise, x, denoised, over.sigma, over.following)

    return walk(denoise, x, sigmas.tolist(), move)


def dpm_2_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """`dpm_2` to below the next level, then fresh noise up to it: see `descent`.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `first_order.euler_ancestral`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        to = descent(over, eta)
        x = to.grow * _midpoint(denoise, x, denoised, over.sigma, to.down)
        return x + to.renoise * s_noise * noise(over.sigma, over.following)

    return walk(denoise, x, sigmas.tolist(), move)


def _midpoint(denoise: Denoise, x: Tensor, denoised: Tensor, sigma: float, following: float) -> Tensor:
    middle = sqrt(sigma * following)
    halfway = x + slope(x, sigma, denoised) * (middle - sigma)
    return x + slope(halfway, middle, denoise(halfway, middle)) * (following - sigma)


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2S) to below the next level, then fresh noise up to it: see `descent`. Two model calls a step.

    Lu et al. 2022, arXiv 2211.01095, algorithm 1: Euler's step to the middle in half log signal-to-noise ratio, whose
    prediction is used for the whole step. From level 1, where that ratio has no logarithm, the middle is 0.9999.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `first_order.euler_ancestral`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        to = descent(over, eta)
        middle = 0.9999
        if over.sigma < 1:
            middle = at_half_log_snr((half_log_snr(over.sigma) + half_log_snr(to.down)) / 2)
        better = denoise(toward(denoised, x, middle / over.sigma), middle)
        x = to.grow * toward(better, x, to.down / over.sigma)
        return x + to.renoise * s_noise * noise(over.sigma, over.following) if eta else x

    return walk(denoise, x, sigmas.tolist(), move)
