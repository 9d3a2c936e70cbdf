"""Linear multistep solvers: one model call a step, and a polynomial through the slopes of the steps before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import log, sqrt

import numpy as np
from torch import Tensor

from samplers.solvers.arguments import solver
from samplers.solvers.common import below_one, show, slope, toward, weighted_sum
from samplers.types import Denoise, Step

# Adams-Bashforth weights for equal steps, by the number of slopes; the latest slope comes first.
EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@solver
def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep: Adams-Bashforth over sigma, with the weights of unequal steps.

    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, III.5: the integral over the step of the
    polynomial through the last slopes. The first steps have fewer of them, which leaves second order overall.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        order: the largest number of slopes, at least 1.
    """
    levels, slopes = sigmas.tolist(), list[Tensor]()  # the latest slope first
    points, shares = np.polynomial.legendre.leggauss(order)  # exact for these polynomials
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        slopes = [slope(x, sigma, denoised), *slopes][:order]
        if sigma_next == 0:
            x = denoised
        else:
            width, nodes = sigma_next - sigma, _nodes(levels, i, len(slopes))
            at = sigma + (points + 1) / 2 * width
            weights = [float(shares @ lagrange(nodes, j, at)) / 2 for j in range(len(nodes))]
            x = x + width * weighted_sum(weights, slopes)
        x = yield from show(i, sigma_next, x, denoised)


@solver
def ipndm(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Improved PNDM: Adams-Bashforth of order 4 with the weights of equal steps, whatever the steps.

    Zhang & Chen 2022, arXiv 2204.13902, section 3.3 (iPNDM); Liu et al. 2022, arXiv 2202.09778, formula 12.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    slopes: list[Tensor] = []  # the latest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        slopes = [slope(x, sigma, denoised), *slopes][:4]
        x = x + (sigma_next - sigma) * weighted_sum(EQUAL_STEPS[len(slopes) - 1], slopes) if sigma_next else denoised
        x = yield from show(i, sigma_next, x, denoised)


@solver
def ipndm_v(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`ipndm` with weights that follow the widths of the steps, as ComfyUI and its origin have them.

    The weights of three slopes are Adams-Bashforth's for equal steps only (a bracket of the formula is missing there,
    and left out here too); `lms` has the correct ones.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    levels, slopes = sigmas.tolist(), list[Tensor]()  # the latest slope first
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        slopes = [slope(x, sigma, denoised), *slopes][:4]
        if sigma_next == 0:
            x = denoised
        else:
            weights = _variable_weights(sigma_next, _nodes(levels, i, len(slopes)))
            x = x + (sigma_next - sigma) * weighted_sum(weights, slopes)
        x = yield from show(i, sigma_next, x, denoised)


@solver
def gradient_estimation(denoise: Denoise, x: Tensor, sigmas: Tensor, *, gamma: float = 2.0) -> Iterator[Step]:
    """Euler's method with the slope gamma d + (1 - gamma) d_before. First order.

    Permenter & Yuan 2023, arXiv 2306.04848, section 4 (second-order estimation of the gradient).

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        gamma: 1 is `euler`; 1.5 would be Adams-Bashforth of order 2.
    """
    before: Tensor | None = None  # the slope of the step before
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        here = slope(x, sigma, denoised)
        estimate = here if before is None else gamma * here + (1 - gamma) * before
        x = x + (sigma_next - sigma) * estimate if sigma_next else denoised
        before = here
        x = yield from show(i, sigma_next, x, denoised)


@solver
def deis(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 3) -> Iterator[Step]:
    """DEIS with polynomials in the time of a variance preserving diffusion, as ComfyUI runs it.

    Zhang & Chen 2022, arXiv 2204.13902, formula 15 (tAB-DEIS): the integral of the polynomial through the last noise
    predictions, in the t at which a linear VP schedule from sigma 0.002 to 80 has this sigma, by a sum over 10000
    points. On a flow this is an ODE solver like the others, only in another time; `flow_deis` has the flow's.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        order: the largest number of predictions, at least 1.
    """
    levels, slopes = sigmas.tolist(), list[Tensor]()  # the latest slope first
    times = _vp_times(levels)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        slopes = [slope(x, sigma, denoised), *slopes][:order]
        if sigma_next == 0:
            x = denoised
        else:
            width, nodes = sigma_next - sigma, _nodes(times, i, len(slopes))
            x = x + width * weighted_sum(_deis_weights(nodes, times[i + 1], width), slopes)
        x = yield from show(i, sigma_next, x, denoised)


@solver
def flow_deis(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DEIS on a flow: the line through two noise predictions in ln rho, integrated over rho = sigma / (1 - sigma).

    Zhang & Chen 2022, arXiv 2204.13902, formula 15 with log-rho for t. diffusers: DEISMultistepScheduler with
    `use_flow_sigmas`, whose order is 2 (and which stays at the last level above 0). A first level of 1, where rho is
    infinite, becomes 1 - 1e-6.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    levels = below_one(sigmas.tolist(), 1 - 1e-6)
    rho = [sigma / (1 - sigma) for sigma in levels]
    before: Tensor | None = None  # the noise prediction of the step before
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        noise = slope(x, sigma, (1 - sigma) * denoised)
        if sigma_next == 0:
            x = denoised
        else:
            x = toward(denoised, x, sigma_next / sigma)  # what the latest prediction gives alone
            if before is not None:
                last, here, to = rho[i - 1 : i + 2]
                share = (to * (log(to / here) - 1) + here) / log(here / last)  # the integral of ln(rho / here), scaled
                x = x + (1 - sigma_next) * share * (noise - before)
        before = noise
        x = yield from show(i, sigma_next, x, denoised)


def _nodes(places: Sequence[float], i: int, count: int) -> list[float]:
    """Return the places of the last `count` slopes, the latest, at step i, first."""
    return [places[i - k] for k in range(count)]


def lagrange(nodes: Sequence[float], j: int, at: np.ndarray) -> np.ndarray:
    """Return the polynomial that is 1 at node j and 0 at the others, at these points."""
    others = [node for k, node in enumerate(nodes) if k != j]
    return np.prod([(at - node) / (nodes[j] - node) for node in others], axis=0) if others else np.ones_like(at)


def _variable_weights(sigma_next: float, nodes: Sequence[float]) -> list[float]:
    """Return weights of the slopes at `nodes` in Newton's form: one more divided difference for each node."""
    weights = [1.0, 0.0, 0.0, 0.0]
    h, *gaps = [sigma_next - nodes[0], *(a - b for a, b in pairwise(nodes))]
    if len(nodes) > 1:
        first = h / gaps[0] / 2
        weights = [w + first * d for w, d in zip(weights, (1, -1, 0, 0), strict=True)]
    if len(nodes) > 2:
        a, b = gaps[:2]
        # The missing bracket: it would close before the second *.
        second = (1 - h / (3 * (h + a)) * (h * (h + a)) / (a * (a + b))) / 2
        weights = [w + second * d for w, d in zip(weights, (1, -1 - a / b, a / b, 0), strict=True)]
    if len(nodes) > 3:
        a, b, c = gaps
        third = (1 - h / (3 * (h + a))) / 2 + (1 - h / (2 * (h + a))) * h / (6 * (h + a + b))
        third *= h * (h + a) * (h + a + b) / (a * (a + b) * (a + b + c))
        far = a * (a + b) / (b * (b + c))
        differences = (1, -1 - a / b - far, a / b + far * (1 + b / c), -far * a / b)
        weights = [w + third * d for w, d in zip(weights, differences, strict=True)]
    return weights


def _deis_weights(nodes: Sequence[float], end: float, width: float) -> list[float]:
    """Return the weights of the slopes at the times `nodes`, the latest first, for a step to the time `end`."""
    if len(nodes) == 1:
        return [1.0]
    at = np.linspace(nodes[0], end, 10000)
    step, shares = (end - nodes[0]) / 10000, _vp_integrand(at)
    return [float((shares * lagrange(nodes, j, at)).sum() * step) / width for j in range(len(nodes))]


# log(sigma^2 + 1) = BETA_D t^2 / 2 + BETA_MIN t, from sigma 0.002 at t = 0.001 to 80 at t = 1 (Karras et al. 2022,
# arXiv 2206.00364, formula 152 onwards)
_LOW, _HIGH = log(0.002**2 + 1), log(80**2 + 1)
BETA_D = 2 * (_LOW / 0.001 - _HIGH) / (0.001 - 1)
BETA_MIN = _HIGH - BETA_D / 2


def _vp_times(levels: Sequence[float]) -> list[float]:
    return [(sqrt(BETA_MIN**2 + 2 * BETA_D * log(sigma**2 + 1)) - BETA_MIN) / BETA_D for sigma in levels]


def _vp_integrand(t: np.ndarray) -> np.ndarray:
    """dsigma / dt over sqrt(alpha) for alpha = 1 / (1 + sigma^2)."""
    exponent = BETA_D * t**2 / 2 + BETA_MIN * t
    alpha = np.exp(-exponent)
    return (BETA_D * t + BETA_MIN) / 2 / np.sqrt(alpha * (1 - alpha))
