"""Exponential integrators: exact where the prediction is constant, with a polynomial in log-SNR (or in -ln sigma)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import exp, expm1, log, sqrt

from torch import Tensor

from samplers.noise import Noise
from samplers.solvers.arguments import solver
from samplers.solvers.common import (
    Churn,
    ancestral,
    at_half_log_snr,
    below_one,
    comfyui_start,
    half_log_snr,
    log_ratio,
    phi_1,
    phi_2,
    show,
    toward,
)
from samplers.types import Denoise, Step


@solver
def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2M): one model call a step, second order from the second step on; the last step is Euler's.

    Lu et al. 2022, arXiv 2211.01095, algorithm 2, with -ln sigma in place of the half log-SNR: so Stability's code and
    ComfyUI run it on flows too. `flow_dpmpp_2m` takes the half log-SNR and gives other numbers.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    before: Tensor | None = None  # the prediction of the step before, and that step's width
    h_before = 0.0
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = log(sigma / sigma_next)
            better = denoised if before is None else _extrapolated(denoised, before, h / (2 * h_before))
            x = toward(better, x, sigma_next / sigma)
            before, h_before = denoised, h
        x = yield from show(i, sigma_next, x, denoised)


@solver
def flow_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2M) in the flow's half log-SNR. From level 1, where it is infinite, Euler's step.

    Lu et al. 2022, arXiv 2211.01095, algorithm 2. diffusers: DPMSolverMultistepScheduler with `use_flow_sigmas`.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    before: Tensor | None = None  # the prediction of the step before, and that step's width
    h_before = 0.0
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = half_log_snr(sigma_next) - half_log_snr(sigma)
            better = denoised if before is None else _extrapolated(denoised, before, h / (2 * h_before))
            x = toward(better, x, sigma_next / sigma)
            before, h_before = denoised, h
        x = yield from show(i, sigma_next, x, denoised)


def _extrapolated(denoised: Tensor, before: Tensor, share: float) -> Tensor:
    """Return the line through the last two predictions, `share` of the step before further on."""
    return (1 + share) * denoised - share * before


@solver
def res_multistep(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """RES, the refined exponential solver, as a multistep method of order 2 in -ln sigma.

    Zhang et al. 2023, arXiv 2308.02157, table 2 (order 2, c2 from the step before).

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    before: Tensor | None = None  # the prediction of the step before
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if before is None or sigma_next == 0:
            x = toward(denoised, x, sigma_next / sigma) if sigma_next else denoised
        else:
            x = res_step(x, sigma, sigma_next, denoised, before, log(sigma / levels[i - 1]))
        before = denoised
        x = yield from show(i, sigma_next, x, denoised)


@solver
def res_multistep_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """`res_multistep` with ancestral noise in the variance exploding form, as ComfyUI runs it: wrong on a flow.

    Use `dpmpp_2m_sde_heun` on flows: it is the closest solver that samples them correctly.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `samplers.euler_ancestral`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    before: Tensor | None = None  # the prediction of the step before, and the level that the step went down to
    down_before, levels = 0.0, sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            down, up = ancestral(sigma, sigma_next, eta)
            if before is None or not down:
                x = toward(denoised, x, down / sigma)
            else:
                x = res_step(x, sigma, down, denoised, before, log_ratio(down_before, levels[i - 1]))
            x = x + up * (s_noise * churn.noise(sigma, sigma_next)) if eta else x
            before, down_before = denoised, down
        x = yield from show(i, sigma_next, x, denoised)


def res_step(x: Tensor, sigma: float, down: float, denoised: Tensor, before: Tensor, place: float) -> Tensor:
    """Return the second-order step of RES from level `sigma` to `down`.

    Args:
        x, denoised: the latent and its prediction, at `sigma`.
        sigma, down: the ends of the step, `down` above 0.
        before: the prediction of the step before.
        place: where that prediction lies before this step, in -ln sigma: below 0.
    """
    h = log(sigma / down)
    c2 = place / h
    share = phi_2(-h) / c2
    return exp(-h) * x + h * ((phi_1(-h) - share) * denoised + share * before)


@solver
def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """DPM-Solver++ (SDE): an ancestral step to the middle, whose prediction serves the whole step. Two calls a step.

    Lu et al. 2022, arXiv 2211.01095, algorithm 1 with r = 1/2, each half with DDIM's noise (k-diffusion); the steps are
    in the flow's half log-SNR, as ComfyUI has it.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `samplers.euler_ancestral`.
        shift: the schedule's, from which `comfyui_start` finds what replaces a first level of 1.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    levels = below_one(sigmas.tolist(), comfyui_start(shift))
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            start, end = half_log_snr(sigma), half_log_snr(sigma_next)
            middle = at_half_log_snr(start + (end - start) / 2)
            better = denoise(_ancestral_step(x, denoised, sigma, middle, churn), middle)
            x = _ancestral_step(x, better, sigma, sigma_next, churn)
        x = yield from show(i, sigma_next, x, denoised)


def _ancestral_step(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, churn: Churn) -> Tensor:
    """Return the latent at `sigma_next`: the ancestral step in the ratio of noise to picture."""
    alpha, alpha_next = 1 - sigma, 1 - sigma_next
    down, up = ancestral(sigma / alpha, sigma_next / alpha_next, churn.eta)
    ratio = down * alpha / sigma
    x = alpha_next * (ratio / alpha * x + (1 - ratio) * denoised)
    return churn.add(x, alpha_next * up, sigma, sigma_next)


@solver
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), midpoint form: one model call a step.

    Lu et al. 2022, arXiv 2211.01095, formula 18 and section 5 (SDE-DPM-Solver++(2M)), in the flow's half log-SNR; eta 0
    is `flow_dpmpp_2m`.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `dpmpp_sde`.
    """
    return _sde_2m(denoise, x, sigmas, Churn.of(x, noise, eta, s_noise), shift, lambda wide: -expm1(-wide) / 2)


@solver
def dpmpp_2m_sde_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """`dpmpp_2m_sde` with the weight of the slope integrated exactly, phi_2, instead of taken at the middle.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `dpmpp_sde`.
    """
    return _sde_2m(denoise, x, sigmas, Churn.of(x, noise, eta, s_noise), shift, lambda wide: 1 - phi_1(-wide))


def _sde_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, churn: Churn, shift: float, slope_weight: Callable[[float], float]
) -> Iterator[Step]:
    """Run SDE-DPM-Solver++(2M).

    Args:
        denoise, x, sigmas, churn, shift: see `dpmpp_sde`.
        slope_weight: the weight of the slope, by the width of the step with its noise.
    """
    before: Tensor | None = None  # the prediction of the step before, and that step's width
    h_before, levels = 0.0, below_one(sigmas.tolist(), comfyui_start(shift))
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = half_log_snr(sigma_next) - half_log_snr(sigma)
            x = decayed(x, denoised, sigma, sigma_next, churn.eta)
            if before is not None:
                weight = slope_weight((1 + churn.eta) * h) * h / h_before
                x = x + (1 - sigma_next) * (weight * (denoised - before))
            x = churn.add(x, added_deviation(sigma, sigma_next, churn.eta), sigma, sigma_next)
            before, h_before = denoised, h
        x = yield from show(i, sigma_next, x, denoised)


@solver
def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """SDE-DPM-Solver++(3M): a parabola through the last three predictions. One model call a step.

    The noise of Lu et al. 2022, arXiv 2211.01095, with the third-order terms of DPM-Solver-3 for data prediction
    (k-diffusion, `sample_dpmpp_3m_sde`), in the flow's half log-SNR.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `dpmpp_sde`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    levels = below_one(sigmas.tolist(), comfyui_start(shift))
    past, widths = list[Tensor](), list[float]()  # predictions, and widths of the steps between them; the latest first
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        past = [denoised, *past][:3]
        if sigma_next == 0:
            x = denoised
        else:
            h = half_log_snr(sigma_next) - half_log_snr(sigma)
            x = decayed(x, denoised, sigma, sigma_next, eta)
            if widths:
                x = x + (1 - sigma_next) * _higher_order((1 + eta) * h, h, past, widths)
            x = churn.add(x, added_deviation(sigma, sigma_next, eta), sigma, sigma_next)
            widths = [h, *widths][:2]
        x = yield from show(i, sigma_next, x, denoised)


def _higher_order(wide: float, h: float, past: Sequence[Tensor], widths: Sequence[float]) -> Tensor:
    """Return the terms of second and third order, of a step of width h, `wide` with its noise."""
    second = 1 - phi_1(-wide)
    if len(widths) < 2:
        return second * h / widths[0] * (past[0] - past[1])
    r0, r1 = widths[0] / h, widths[1] / h
    late, early = (past[0] - past[1]) / r0, (past[1] - past[2]) / r1
    curve = (late - early) / (r0 + r1)
    return second * (late + r0 * curve) - (second / wide - 0.5) * curve


def decayed(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, eta: float) -> Tensor:
    """Return sigma'/sigma e^(-eta h) x + alpha' (1 - e^(-(1 + eta) h)) x0: exact where the prediction is constant."""
    h = half_log_snr(sigma_next) - half_log_snr(sigma)
    keep = sigma_next / sigma * exp(-eta * h)
    return keep * x - (1 - sigma_next) * expm1(-(1 + eta) * h) * denoised


def added_deviation(sigma: float, sigma_next: float, eta: float) -> float:
    """Return the standard deviation of the noise that a step adds: sigma' (1 - e^(-2 eta h))^(1/2)."""
    h = half_log_snr(sigma_next) - half_log_snr(sigma)
    return sigma_next * sqrt(-expm1(-2 * eta * h))
