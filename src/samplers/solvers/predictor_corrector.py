"""Multistep solvers whose every prediction also corrects the latent that it was made of.

The latent of a `Step` is the predicted one. The correction is added to it when its own prediction is known, so that a
change of `step.x` goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import exp, expm1, log, sqrt

import numpy as np
from torch import Tensor

from samplers.noise import Fresh, Noise
from samplers.solvers.common import Interval, at_percent, below_one, comfyui_start, half_log_snr, mixed
from samplers.types import Denoise, Step

LAST = 0.001  # the level that ComfyUI puts in the place of 0 for UniPC


def uni_pc(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """UniPC of order 3 with B(h) = h, in -ln sigma, as ComfyUI runs it.

    Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8 (multistep, data prediction, UniP and UniC). ComfyUI goes to
    level 0.001 instead of 0 and then divides by 0.999; so does this. `flow_uni_pc` is in the flow's own ratio.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _comfyui_unipc(denoise, x, sigmas.tolist(), lambda h: -h)


def uni_pc_bh2(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`uni_pc` with B(h) = e^h - 1.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _comfyui_unipc(denoise, x, sigmas.tolist(), lambda h: expm1(-h))


def flow_uni_pc(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """UniPC of order 2 with B(h) = e^h - 1, in the flow's half log signal-to-noise ratio.

    Zhao et al. 2023, arXiv 2302.04867. diffusers: UniPCMultistepScheduler with `use_flow_sigmas`. A first level of 1,
    where the ratio has no logarithm, becomes 1 - 1e-6, as there.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    levels = below_one(sigmas.tolist(), 1 - 1e-6)
    return _unipc(denoise, x, levels, half_log_snr, lambda sigma: 1 - sigma, lambda h: expm1(-h), 2)


def _comfyui_unipc(denoise: Denoise, x: Tensor, levels: list[float], b: Callable[[float], float]) -> Iterator[Step]:
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
    ratio: Callable[[float], float],
    alpha: Callable[[float], float],
    b: Callable[[float], float],
    order: int,
) -> Iterator[Step]:
    """The loop of UniPC.

    Args:
        denoise, x, levels: see `samplers.euler`.
        ratio: half log signal-to-noise ratio of a level.
        alpha: share of the picture at a level.
        b: B of a width.
        order: highest.
    """
    places, past = [ratio(sigma) for sigma in levels], list[Tensor]()  # predictions, the latest first
    used = 0  # order of the last step
    for i, (sigma, following) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if used:
            h, nodes = _nodes(places, i, used)
            first, then = _unip_weights(nodes, h, b), _unic_weights(nodes, h, b)
            changes = [a - b for a, b in zip(then, [*first, 0.0], strict=True)]
            x = x - alpha(sigma) * b(h) * mixed(changes, [*_slopes(past, nodes), denoised - past[0]])
        past = [denoised, *past][:order]
        used = min(i + 1, order, len(levels) - 1 - i)
        moved = denoised
        if following:
            h, nodes = _nodes(places, i + 1, used)
            moved = following / sigma * x - alpha(following) * expm1(-h) * denoised
            if nodes:
                terms = mixed(_unip_weights(nodes, h, b), _slopes(past, nodes))
                moved = moved - alpha(following) * b(h) * terms
        step = Step(i, following, moved, denoised)
        yield step
        x = step.x


def _nodes(places: Sequence[float], k: int, order: int) -> tuple[float, list[float]]:
    """The width of the step that ends at k, and where predictions before its start lie, in widths from there."""
    h = places[k] - places[k - 1]
    return h, [(places[k - 1 - j] - places[k - 1]) / h for j in range(1, order)]


def _slopes(past: Sequence[Tensor], nodes: Sequence[float]) -> list[Tensor]:
    return [(before - past[0]) / node for before, node in zip(past[1:], nodes, strict=False)]


def _unip_weights(nodes: Sequence[float], h: float, b: Callable[[float], float]) -> list[float]:
    if len(nodes) == 1:
        return [0.5]  # formula 10 asks for nothing more
    return _solved(nodes, h, b) if nodes else []


def _unic_weights(nodes: Sequence[float], h: float, b: Callable[[float], float]) -> list[float]:
    return _solved([*nodes, 1.0], h, b) if nodes else [0.5]


def _solved(nodes: Sequence[float], h: float, b: Callable[[float], float]) -> list[float]:
    """Weights that make the powers of the nodes integrate exactly: formula 10, with phi_(k + 1)(-h) k! / B(h)."""
    wanted, phi, factorial = [], expm1(-h) / -h - 1, 1
    for k in range(1, len(nodes) + 1):
        wanted.append(phi * factorial / b(h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return [float(one) for one in np.linalg.solve(np.vander(nodes, increasing=True).T, wanted)]


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
        denoise, x, sigmas, eta, s_noise, noise, shift: see `exponential.dpmpp_sde`.
    """
    return _sa(denoise, x, sigmas.tolist(), eta, s_noise, noise or Fresh(x), shift, again=False)


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
    """`sa_solver` that predicts once more after the correction: two model calls a step.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `exponential.dpmpp_sde`.
    """
    return _sa(denoise, x, sigmas.tolist(), eta, s_noise, noise or Fresh(x), shift, again=True)


def _sa(
    denoise: Denoise,
    x: Tensor,
    levels: list[float],
    eta: float,
    s_noise: float,
    noise: Noise,
    shift: float,
    *,
    again: bool,
) -> Iterator[Step]:
    """The loop of SA-Solver; `again` predicts after the correction too."""
    start, end = at_percent(0.2, shift), at_percent(0.8, shift)
    levels = below_one(levels, comfyui_start(shift))
    places, steps = [half_log_snr(sigma) for sigma in levels], len(levels) - 1
    lowers = levels[-1] == 0  # orders go down to the end
    past: list[Tensor] = []  # predictions, the latest last
    tau, drift = 0.0, x  # of the step before: its tau, and what the predictions gave
    for i, (sigma, following) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        past = [*past[-3:], denoised]
        order = min(4, len(past), steps - i if lowers else 4)
        if i and (following or again):
            x = x + _adams(past, places, i, i, order, tau, 1 - sigma) - drift
            if again:
                past[-1] = denoised = denoise(x, sigma)
        moved = denoised
        if following:
            tau = eta if start >= following >= end else 0.0
            order = min(3, len(past), steps - 1 - i if lowers else 3)
            drift = _adams(past, places, i, i + 1, order, tau, 1 - following)
            over = Interval(i, sigma, following)
            moved = over.ratio * exp(-(tau**2) * over.h) * x + drift
            if tau:
                moved = moved + following * sqrt(-expm1(-2 * tau**2 * over.h)) * s_noise * noise(sigma, following)
        step = Step(i, following, moved, denoised)
        yield step
        x = step.x


def _adams(
    past: Sequence[Tensor], places: Sequence[float], latest: int, target: int, order: int, tau: float, alpha: float
) -> Tensor:
    """What the last `order` predictions, of which the latest lies at `latest`, add over the step that ends at `target`.

    alpha times the integral of (1 + tau^2) e^(-(1 + tau^2) (end - l)) over the polynomial through them.
    """
    begin, h, k = places[target - 1], places[target] - places[target - 1], 1 + tau**2
    moments = [-expm1(-k * h)]
    for power in range(1, order):
        moments.append(h**power - power / k * moments[-1])
    nodes = np.array(places[latest - order + 1 : latest + 1]) - begin
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    return mixed([alpha * float(weight) for weight in weights], past[-order:])
