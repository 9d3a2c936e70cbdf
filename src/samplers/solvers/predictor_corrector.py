"""Predictor-corrector solvers: multistep methods in which the prediction at a level also corrects the latent there.

The latent of a `Step` is the predictor's. The correction is added at the beginning of the next step, when the model's
prediction at that level is known, so that a change of `step.x` is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import exp, expm1, log, sqrt

import numpy as np
from torch import Tensor

from samplers.noise import Noise
from samplers.solvers.arguments import solver
from samplers.solvers.common import Churn, below_one, comfyui_start, half_log_snr, show, weighted_sum
from samplers.types import Denoise, Step
from samplers.windows import level_at

LAST = 0.001  # the level that ComfyUI puts in place of 0 for UniPC


@solver
def uni_pc(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """UniPC of order 3 with B(h) = h, in -ln sigma, as ComfyUI runs it.

    Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8 (multistep, data prediction, UniP and UniC). ComfyUI goes to
    level 0.001 instead of 0 and then divides by 0.999; so does this. `flow_uni_pc` is in the flow's half log-SNR.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _comfyui_unipc(denoise, x, sigmas.tolist(), lambda h: -h)


@solver
def uni_pc_bh2(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`uni_pc` with B(h) = e^h - 1.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _comfyui_unipc(denoise, x, sigmas.tolist(), lambda h: expm1(-h))


@solver
def flow_uni_pc(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 2) -> Iterator[Step]:
    """UniPC with B(h) = e^h - 1, in the flow's half log-SNR.

    Zhao et al. 2023, arXiv 2302.04867. diffusers: UniPCMultistepScheduler with `use_flow_sigmas`. A first level of 1,
    at which the half log-SNR is infinite, becomes 1 - 1e-6, as there.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        order: the highest order.
    """
    levels = below_one(sigmas.tolist(), 1 - 1e-6)
    return _unipc(denoise, x, levels, half_log_snr, lambda sigma: 1 - sigma, lambda h: expm1(-h), order)


def _comfyui_unipc(denoise: Denoise, x: Tensor, levels: list[float], b: Callable[[float], float]) -> Iterator[Step]:
    """Run UniPC to level 0.001 in place of 0, and divide the last latent by 0.999."""
    ends_at_0 = levels[-1] == 0
    levels = [*levels[:-1], LAST] if ends_at_0 else levels
    order = min(3, max(len(levels) - 2, 1))
    for step in _unipc(denoise, x, levels, lambda sigma: -log(sigma), lambda sigma: 1.0, b, order):
        if ends_at_0 and step.i == len(levels) - 2:
            step.x, step.sigma = step.x / (1 - LAST), 0.0
        yield step


def _unipc(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[float],
    half_log_snr_of: Callable[[float], float],
    alpha: Callable[[float], float],
    b: Callable[[float], float],
    order: int,
) -> Iterator[Step]:
    """Run UniPC: UniC corrects the latent of the step before, UniP predicts the next one.

    Args:
        denoise, x, levels: see `samplers.euler`.
        half_log_snr_of: the half log-SNR of a level.
        alpha: the share of the picture at a level.
        b: B of a width.
        order: the highest order.
    """
    places, past = [half_log_snr_of(sigma) for sigma in levels], list[Tensor]()  # predictions, the latest first
    used = 0  # order of the last step
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if used:
            h, nodes = _nodes(places, i, used)
            first, then = _unip_weights(nodes, h, b), _unic_weights(nodes, h, b)
            changes = [a - b for a, b in zip(then, [*first, 0.0], strict=True)]
            x = x - alpha(sigma) * b(h) * weighted_sum(changes, [*_slopes(past, nodes), denoised - past[0]])
        past = [denoised, *past][:order]
        used = min(i + 1, order, len(levels) - 1 - i)
        if sigma_next == 0:
            x = denoised
        else:
            h, nodes = _nodes(places, i + 1, used)
            x = sigma_next / sigma * x - alpha(sigma_next) * expm1(-h) * denoised
            if nodes:
                terms = weighted_sum(_unip_weights(nodes, h, b), _slopes(past, nodes))
                x = x - alpha(sigma_next) * b(h) * terms
        x = yield from show(i, sigma_next, x, denoised)


def _nodes(places: Sequence[float], k: int, order: int) -> tuple[float, list[float]]:
    """Return the width of the step that ends at k, and the places of the predictions before its start, in widths."""
    h = places[k] - places[k - 1]
    return h, [(places[k - 1 - j] - places[k - 1]) / h for j in range(1, order)]


def _slopes(past: Sequence[Tensor], nodes: Sequence[float]) -> list[Tensor]:
    return [(before - past[0]) / node for before, node in zip(past[1:], nodes, strict=False)]


def _unip_weights(nodes: Sequence[float], h: float, b: Callable[[float], float]) -> list[float]:
    if len(nodes) == 1:
        return [0.5]  # as the paper and every implementation set it
    return _solved(nodes, h, b) if nodes else []


def _unic_weights(nodes: Sequence[float], h: float, b: Callable[[float], float]) -> list[float]:
    return _solved([*nodes, 1.0], h, b) if nodes else [0.5]


def _solved(nodes: Sequence[float], h: float, b: Callable[[float], float]) -> list[float]:
    """Return the weights with which powers of the nodes integrate exactly: formula 10, phi_(k + 1)(-h) k! / B(h)."""
    wanted, phi, factorial = [], expm1(-h) / -h - 1, 1
    for k in range(1, len(nodes) + 1):
        wanted.append(phi * factorial / b(h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return [float(one) for one in np.linalg.solve(np.vander(nodes, increasing=True).T, wanted)]


@solver
def sa_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """SA-Solver: stochastic Adams methods, predictor of order 3, corrector of order 4. One model call a step.

    Xue et al. 2023, arXiv 2309.05019, algorithm 1 with formulas 15 and 18; tau is eta from 20 % to 80 % of the
    timesteps and 0 outside; orders go down to 1 at the end (ComfyUI, `sample_sa_solver`).

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `samplers.dpmpp_sde`.
    """
    return _sa(denoise, x, sigmas.tolist(), Churn.of(x, noise, eta, s_noise), shift, evaluate_again=False)


@solver
def sa_solver_pece(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    shift: float = 3.0,
) -> Iterator[Step]:
    """`sa_solver` with one more model call after the correction: predict, evaluate, correct, evaluate.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `samplers.dpmpp_sde`.
    """
    return _sa(denoise, x, sigmas.tolist(), Churn.of(x, noise, eta, s_noise), shift, evaluate_again=True)


def _sa(
    denoise: Denoise, x: Tensor, levels: list[float], churn: Churn, shift: float, *, evaluate_again: bool
) -> Iterator[Step]:
    """Run SA-Solver; `evaluate_again` calls the model after the correction too."""
    start, end = level_at(0.2, shift), level_at(0.8, shift)
    levels = below_one(levels, comfyui_start(shift))
    places, steps = [half_log_snr(sigma) for sigma in levels], len(levels) - 1
    lowers = levels[-1] == 0  # orders go down to the end
    past: list[Tensor] = []  # predictions, the latest last
    tau, drift = 0.0, x  # of the step before: its tau, and what its predictions added
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        past = [*past[-3:], denoised]
        order = min(4, len(past), steps - i if lowers else 4)
        if i and (sigma_next or evaluate_again):
            x = x + _adams(past, places, i, i, order, tau, 1 - sigma) - drift
            if evaluate_again:
                past[-1] = denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h, tau = places[i + 1] - places[i], churn.eta if start >= sigma_next >= end else 0.0
            order = min(3, len(past), steps - 1 - i if lowers else 3)
            drift = _adams(past, places, i, i + 1, order, tau, 1 - sigma_next)
            x = sigma_next / sigma * exp(-(tau**2) * h) * x + drift
            if tau:
                x = churn.add(x, sigma_next * sqrt(-expm1(-2 * tau**2 * h)), sigma, sigma_next)
        x = yield from show(i, sigma_next, x, denoised)


def _adams(
    past: Sequence[Tensor], places: Sequence[float], latest: int, target: int, order: int, tau: float, alpha: float
) -> Tensor:
    """Return what the last `order` predictions add over the step that ends at `target`.

    alpha times the integral of (1 + tau^2) e^(-(1 + tau^2) (end - l)) over the polynomial through them.

    Args:
        past: predictions, the latest last.
        places: the half log-SNR of all levels.
        latest: the index of the latest prediction's level.
        target: the index of the level at which the step ends.
        order: how many predictions the polynomial goes through.
        tau, alpha: the strength of the noise, and the share of the picture at `target`.
    """
    begin, h, k = places[target - 1], places[target] - places[target - 1], 1 + tau**2
    moments = [-expm1(-k * h)]
    for power in range(1, order):
        moments.append(h**power - power / k * moments[-1])
    nodes = np.array(places[latest - order + 1 : latest + 1]) - begin
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    return weighted_sum([alpha * float(weight) for weight in weights], past[-order:])
