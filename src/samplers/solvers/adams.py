"""Linear multistep solvers: one model call a step, and a polynomial through the slopes of the steps before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import log, sqrt

import numpy as np
from torch import Tensor

from samplers.solvers.common import Interval, below_one, mixed, slope, toward, walk
from samplers.types import Denoise, Step

# Adams-Bashforth for equal steps, by the number of slopes; the latest comes first.
EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
Weigh = Callable[[Interval, Sequence[float]], Sequence[float]]


def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep: Adams-Bashforth over sigma, with the weights of unequal steps.

    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, III.5: the integral over the step of the
    polynomial through the last slopes. The first steps have fewer of them, which leaves second order overall.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        order: most slopes to use.
    """
    points, weights = np.polynomial.legendre.leggauss(order)  # exact for these polynomials

    def weigh(over: Interval, nodes: Sequence[float]) -> list[float]:
        at = over.sigma + (points + 1) / 2 * over.width
        return [float(weights @ lagrange(nodes, j, at)) / 2 for j in range(len(nodes))]

    return _multistep(denoise, x, sigmas.tolist(), weigh, order)


def ipndm(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Improved PNDM: Adams-Bashforth of order 4 with the weights of equal steps, whatever the steps.

    Zhang & Chen 2022, arXiv 2204.13902, section 3.3 (iPNDM); Liu et al. 2022, arXiv 2202.09778, formula 12.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _multistep(denoise, x, sigmas.tolist(), lambda over, nodes: EQUAL_STEPS[len(nodes) - 1], 4)


def ipndm_v(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`ipndm` with weights that follow the widths of the steps, as ComfyUI and its origin have them.

    The weights of three slopes are Adams-Bashforth's for equal steps only (a bracket of the formula is missing there,
    and kept so); `lms` has the true ones.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _multistep(denoise, x, sigmas.tolist(), _variable_weights, 4)


def gradient_estimation(denoise: Denoise, x: Tensor, sigmas: Tensor, *, gamma: float = 2.0) -> Iterator[Step]:
    """Euler's method with the slope d + (gamma - 1) (d - d of the step before). First order.

    Permenter & Yuan 2023, arXiv 2306.04848, section 4 (second-order estimation of the gradient).

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        gamma: 1 is `euler`; 1.5 would be Adams-Bashforth of order 2.
    """

    def weigh(over: Interval, nodes: Sequence[float]) -> Sequence[float]:
        return (gamma, 1 - gamma) if len(nodes) > 1 else (1.0,)

    return _multistep(denoise, x, sigmas.tolist(), weigh, 2)


def _multistep(denoise: Denoise, x: Tensor, levels: Sequence[float], weigh: Weigh, order: int) -> Iterator[Step]:
    """x + width * the weighted mean of the last slopes.

    Args:
        denoise, x, levels: see `walk`.
        weigh: the weights for an interval and the levels of the slopes, the latest first.
        order: most slopes.
    """
    slopes: deque[Tensor] = deque(maxlen=order)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        slopes.appendleft(slope(x, over.sigma, denoised))
        nodes = [levels[over.i - k] for k in range(len(slopes))]
        return x + over.width * mixed(weigh(over, nodes), list(slopes))

    return walk(denoise, x, levels, move)


def _variable_weights(over: Interval, nodes: Sequence[float]) -> list[float]:
    """Weights of the slopes at `nodes`: Newton's form, a divided difference more for each node."""
    weights = [1.0, 0.0, 0.0, 0.0]
    h, *gaps = [over.following - nodes[0], *(a - b for a, b in pairwise(nodes))]
    if len(nodes) > 1:
        first = h / gaps[0] / 2
        weights = [w + first * d for w, d in zip(weights, (1, -1, 0, 0), strict=True)]
    if len(nodes) > 2:
        a, b = gaps[:2]
        second = (
            1 - h / (3 * (h + a)) * (h * (h + a)) / (a * (a + b))
        ) / 2  # the bracket would close before the last *
        weights = [w + second * d for w, d in zip(weights, (1, -1 - a / b, a / b, 0), strict=True)]
    if len(nodes) > 3:
        a, b, c = gaps
        third = (1 - h / (3 * (h + a))) / 2 + (1 - h / (2 * (h + a))) * h / (6 * (h + a + b))
        third *= h * (h + a) * (h + a + b) / (a * (a + b) * (a + b + c))
        far = a * (a + b) / (b * (b + c))
        differences = (1, -1 - a / b - far, a / b + far * (1 + b / c), -far * a / b)
        weights = [w + third * d for w, d in zip(weights, differences, strict=True)]
    return weights


def lagrange(nodes: Sequence[float], j: int, at: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at node j and 0 at the others."""
    others = [node for k, node in enumerate(nodes) if k != j]
    return np.prod([(at - node) / (nodes[j] - node) for node in others], axis=0) if others else np.ones_like(at)


def deis(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 3) -> Iterator[Step]:
    """DEIS with polynomials in the time of a variance-preserving diffusion, as ComfyUI runs it.

    Zhang & Chen 2022, arXiv 2204.13902, formula 15 (tAB-DEIS): the integral of the polynomial through the last noise
    predictions, in the t at which a linear VP schedule from sigma 0.002 to 80 has this sigma, by a sum over 10000
    points. On a flow this is an ODE solver like the others, in a time of its own; `flow_deis` has the flow's.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
        order: most predictions to use.
    """
    levels = sigmas.tolist()
    times = _vp_times(levels)

    def weigh(over: Interval, nodes: Sequence[float]) -> list[float]:
        if len(nodes) == 1:
            return [1.0]
        at = np.linspace(times[over.i], times[over.i + 1], 10000)
        step = (times[over.i + 1] - times[over.i]) / 10000
        shares, past = _vp_integrand(at), times[over.i + 1 - len(nodes) : over.i + 1][::-1]
        return [float((shares * lagrange(past, j, at)).sum() * step) / over.width for j in range(len(nodes))]

    return _multistep(denoise, x, levels, weigh, order)


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
    noises: deque[Tensor] = deque(maxlen=2)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        noises.appendleft(slope(x, over.sigma, (1 - over.sigma) * denoised))
        x = toward(denoised, x, over.ratio)  # what the latest noise gives alone
        if len(noises) == 1:
            return x
        before, here, to = rho[over.i - 1 : over.i + 2]
        share = (to * (log(to / here) - 1) + here) / log(here / before)  # the integral of ln(rho / here), normed
        return x + (1 - over.following) * share * (noises[0] - noises[1])

    return walk(denoise, x, levels, move)
