"""Solvers of the reverse SDE with several stages, or with noise of their own."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, expm1, sqrt

import torch
from torch import Tensor

from samplers.noise import Fresh, Noise
from samplers.solvers.common import Interval, at_half_log_snr, below_one, comfyui_start, half_log_snr, phi_2, walk
from samplers.solvers.exponential import decayed
from samplers.types import Denoise, Step

POINTS = 200  # of the sums of ER-SDE


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
        denoise, x, sigmas, s_noise, noise, shift: see `exponential.dpmpp_sde`.
    """
    noise = noise or Fresh(x)
    levels = below_one(sigmas.tolist(), comfyui_start(shift))
    ratios = [sigma / (1 - sigma) for sigma in levels]
    past: list[Tensor] = []  # the prediction before, and its first divided difference

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        i, alpha = over.i, 1 - over.following
        here, to = ratios[i], ratios[i + 1]
        scale = _er_phi(to)
        keep = scale / _er_phi(here)
        x = alpha * (keep / (1 - over.sigma) * x + (1 - keep) * denoised)
        first, second = _er_integrals(here, to)
        later = [denoised]
        if past:
            later.append((denoised - past[0]) / (here - ratios[i - 1]))
            x = x + alpha * (to - here + first * scale) * later[1]
        if len(past) > 1:
            curve = (later[1] - past[1]) / ((here - ratios[i - 2]) / 2)
            x = x + alpha * ((to - here) ** 2 / 2 + second * scale) * curve
        past[:] = later
        up = sqrt(max(to**2 - (here * keep) ** 2, 0.0))
        return x + alpha * up * s_noise * noise(over.sigma, over.following)

    return walk(denoise, x, levels, move)


def _er_phi(ratio: float) -> float:
    return ratio * (exp(ratio**0.3) + 10)


def _er_integrals(here: float, to: float) -> tuple[float, float]:
    """The integrals of 1 / phi(l) and (l - here) / phi(l) from `to` to `here`, as ComfyUI sums them."""
    width = (here - to) / POINTS
    points = to + torch.arange(POINTS, dtype=torch.float32) * width
    shares = 1 / (points * (torch.exp(points**0.3) + 10))
    return float(shares.sum()) * width, float(((points - here) * shares).sum()) * width


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
    """SEEDS-2: two stages in the half log signal-to-noise ratio, whose noises are parts of one path.

    Gonzalez et al. 2023, arXiv 2305.14267, algorithm 2 (data prediction, variance preserving), the middle at 1/2.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `exponential.dpmpp_sde`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        path = _Path(over, eta, s_noise, noise)
        middle = path.level(1 / 2)
        ahead = decayed(x, denoised, Interval(over.i, over.sigma, middle), eta)
        better = denoise(path.noised(ahead, middle), middle)
        return path.noised(decayed(x, better, over, eta), over.following)

    return walk(denoise, x, below_one(sigmas.tolist(), comfyui_start(shift)), move)


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
        denoise, x, sigmas, eta, s_noise, noise, shift: see `exponential.dpmpp_sde`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        path = _Path(over, eta, s_noise, noise)
        first, second = (path.level(share) for share in (1 / 3, 2 / 3))
        ahead = decayed(x, denoised, Interval(over.i, over.sigma, first), eta)
        better = denoise(path.noised(ahead, first), first)
        ahead = path.sloped(x, denoised, better, 1 / 3, 2 / 3)
        better = denoise(path.noised(ahead, second), second)
        return path.noised(path.sloped(x, denoised, better, 2 / 3, 1.0), over.following)

    return walk(denoise, x, below_one(sigmas.tolist(), comfyui_start(shift)), move)


class _Path:
    """The noise of one SEEDS step: what a stage adds is the noise of the stage before, decayed, and a fresh part."""

    def __init__(self, over: Interval, eta: float, s_noise: float, noise: Noise) -> None:
        self.over, self.eta, self.s_noise, self.noise = over, eta, s_noise, noise
        self.at = over.sigma  # where the path has got to
        self.sum: Tensor | None = None  # its noise there, as a multiple of the level

    def level(self, share: float) -> float:
        """The level after this share of the step."""
        return at_half_log_snr(half_log_snr(self.over.sigma) + share * self.over.h)

    def noised(self, x: Tensor, level: float) -> Tensor:
        """x with the path's noise at a level."""
        if not self.eta:
            return x
        part = Interval(self.over.i, self.at, level)
        fresh = sqrt(-expm1(-2 * self.eta * part.h)) * self.noise(self.at, level)
        self.sum = fresh if self.sum is None else exp(-self.eta * part.h) * self.sum + fresh
        self.at = level
        return x + level * self.s_noise * self.sum

    def sloped(self, x: Tensor, denoised: Tensor, better: Tensor, known: float, share: float) -> Tensor:
        """The step to a share of the whole, with the line through the predictions at the start and at `known`."""
        over = Interval(self.over.i, self.over.sigma, self.level(share) if share < 1 else self.over.following)
        wide = share * (1 + self.eta) * self.over.h
        slope = -wide * phi_2(-wide) * share / known * (better - denoised)
        return decayed(x, denoised, over, self.eta) - (1 - over.following) * slope
