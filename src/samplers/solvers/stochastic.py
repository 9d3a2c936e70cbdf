"""Solvers of the reverse SDE with several stages, or with integrals of a noise scaling function."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import exp, expm1, sqrt

import torch
from torch import Tensor

from samplers.noise import Noise
from samplers.solvers.arguments import solver
from samplers.solvers.common import Churn, at_half_log_snr, below_one, comfyui_start, half_log_snr, phi_2, show
from samplers.solvers.exponential import decayed
from samplers.types import Denoise, Step

POINTS = 200  # of the sums of ER-SDE


@solver
def er_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """ER-SDE-Solver-3 in lambda = sigma / (1 - sigma), with phi(l) = l (e^(l^0.3) + 10): one model call a step.

    Cui et al. 2023, arXiv 2309.06169, algorithm 3 (VP) with phi of section 5; the integrals are sums over 200 points.

    Args:
        denoise, x, sigmas, s_noise, noise, shift: see `samplers.dpmpp_sde`.
    """
    churn = Churn.of(x, noise, s_noise=s_noise)
    levels = below_one(sigmas.tolist(), comfyui_start(shift))
    ratios = [sigma / (1 - sigma) for sigma in levels]
    before: Tensor | None = None  # the prediction of the step before, and its first divided difference
    slope_before: Tensor | None = None
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            here, to, alpha = ratios[i], ratios[i + 1], 1 - sigma_next
            scale = _er_phi(to)
            keep = scale / _er_phi(here)
            x = alpha * (keep / (1 - sigma) * x + (1 - keep) * denoised)
            first, second = _er_integrals(here, to)
            slope = None if before is None else (denoised - before) / (here - ratios[i - 1])
            if slope is not None:
                x = x + alpha * (to - here + first * scale) * slope
            if slope is not None and slope_before is not None:
                curve = (slope - slope_before) / ((here - ratios[i - 2]) / 2)
                x = x + alpha * ((to - here) ** 2 / 2 + second * scale) * curve
            x = churn.add(x, alpha * sqrt(max(to**2 - (here * keep) ** 2, 0.0)), sigma, sigma_next)
            before, slope_before = denoised, slope
        x = yield from show(i, sigma_next, x, denoised)


def _er_phi(ratio: float) -> float:
    return ratio * (exp(ratio**0.3) + 10)


def _er_integrals(here: float, to: float) -> tuple[float, float]:
    """Return the integrals of 1 / phi(l) and (l - here) / phi(l) from `to` to `here`, as ComfyUI sums them."""
    width = (here - to) / POINTS
    points = to + torch.arange(POINTS, dtype=torch.float32, device="cpu") * width
    shares = 1 / (points * (torch.exp(points**0.3) + 10))
    return float(shares.sum()) * width, float(((points - here) * shares).sum()) * width


@solver
def seeds_2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """SEEDS-2: two stages in half log-SNR, whose noises are parts of one path.

    Gonzalez et al. 2023, arXiv 2305.14267, algorithm 2 (data prediction, variance preserving), the middle at 1/2.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `samplers.dpmpp_sde`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    levels = below_one(sigmas.tolist(), comfyui_start(shift))
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            path, middle = _Path(churn, sigma), _between(sigma, sigma_next, 1 / 2)
            ahead = path.add(decayed(x, denoised, sigma, middle, eta), middle)
            better = denoise(ahead, middle)
            x = path.add(decayed(x, better, sigma, sigma_next, eta), sigma_next)
        x = yield from show(i, sigma_next, x, denoised)


@solver
def seeds_3(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """SEEDS-3: three stages at 1/3, 2/3 and the end of the step, whose noises are parts of one path.

    Gonzalez et al. 2023, arXiv 2305.14267, algorithm 3 (data prediction, variance preserving).

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `samplers.dpmpp_sde`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    levels = below_one(sigmas.tolist(), comfyui_start(shift))
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            path, h = _Path(churn, sigma), _width(sigma, sigma_next)
            third, two_thirds = (_between(sigma, sigma_next, share) for share in (1 / 3, 2 / 3))
            ahead = path.add(decayed(x, denoised, sigma, third, eta), third)
            change = denoise(ahead, third) - denoised
            ahead = decayed(x, denoised, sigma, two_thirds, eta) - (1 - two_thirds) * _slope_term(
                change, h, eta, 1 / 3, 2 / 3
            )
            ahead = path.add(ahead, two_thirds)
            change = denoise(ahead, two_thirds) - denoised
            x = decayed(x, denoised, sigma, sigma_next, eta) - (1 - sigma_next) * _slope_term(
                change, h, eta, 2 / 3, 1.0
            )
            x = path.add(x, sigma_next)
        x = yield from show(i, sigma_next, x, denoised)


def _width(sigma: float, sigma_next: float) -> float:
    return half_log_snr(sigma_next) - half_log_snr(sigma)


def _between(sigma: float, sigma_next: float, share: float) -> float:
    """Return the level after this share of the step, in half log-SNR."""
    return at_half_log_snr(half_log_snr(sigma) + share * _width(sigma, sigma_next))


def _slope_term(change: Tensor, h: float, eta: float, known: float, share: float) -> Tensor:
    """Return what the slope of the prediction adds up to `share` of a step of width h; it changes so up to `known`."""
    wide = share * (1 + eta) * h
    return -wide * phi_2(-wide) * share / known * change


class _Path:
    """The noise of one SEEDS step: each stage has the noise of the stage before, decayed, and a fresh part."""

    def __init__(self, churn: Churn, sigma: float) -> None:
        self.churn, self.at = churn, sigma  # at: the level that the path has reached
        self.sum: Tensor | None = None  # its noise there, divided by the level

    def add(self, x: Tensor, level: float) -> Tensor:
        """Return x with the path's noise at a level below the last one."""
        eta = self.churn.eta
        if not eta:
            return x
        h = _width(self.at, level)
        fresh = sqrt(-expm1(-2 * eta * h)) * self.churn.noise(self.at, level)
        self.sum = fresh if self.sum is None else exp(-eta * h) * self.sum + fresh
        self.at = level
        return x + level * self.churn.s_noise * self.sum
