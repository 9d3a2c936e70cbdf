"""CFG++: go to the guided picture, but measure the noise in the latent from the unconditional one.

Chung et al. 2024, arXiv 2406.08070, algorithm 2. The `denoise` of these solvers returns `samplers.Guided`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import expm1, log, sqrt

from torch import Tensor

from samplers.noise import Noise
from samplers.solvers.arguments import guided_solver
from samplers.solvers.common import Churn, ancestral, log_ratio, show, slope, toward
from samplers.solvers.exponential import res_step
from samplers.solvers.first_order import posterior
from samplers.types import Guided, Step

DenoiseGuided = Callable[[Tensor, float], Guided]


def uncond_of(guided: Guided) -> Tensor:
    """Return the unconditional prediction.

    Raises:
        ValueError: guidance ran without an unconditional pass.
    """
    if guided.uncond is None:
        raise ValueError("a *_cfg_pp sampler needs the unconditional prediction, but guidance ran without one: give it")
    return guided.uncond


@guided_solver
def euler_cfg_pp(denoise: DenoiseGuided, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`euler` to (1 - sigma') x0 + sigma' n, where n is the noise that the unconditional prediction leaves in x.

    Args:
        denoise: (latent, noise level) -> `samplers.Guided`, the guided and the unconditional prediction.
        x, sigmas: see `samplers.euler`.
    """
    return euler_ancestral_cfg_pp(denoise, x, sigmas, eta=0.0)


@guided_solver
def euler_ancestral_cfg_pp(
    denoise: DenoiseGuided,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """`flow_ddpm` with the noise measured from the unconditional picture.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
        eta, s_noise, noise: see `samplers.euler_ancestral`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        guided = denoise(x, sigma)
        x = posterior(x, sigma, sigma_next, guided.x0, uncond_of(guided), churn) if sigma_next else guided.x0
        x = yield from show(i, sigma_next, x, guided.x0)


@guided_solver
def dpmpp_2m_cfg_pp(denoise: DenoiseGuided, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`dpmpp_2m` with CFG++ in the variance exploding form, as ComfyUI runs it: wrong on a flow.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
    """
    before: Tensor | None = None  # the unconditional prediction of the step before, and that step's width
    h_before = 0.0
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        guided = denoise(x, sigma)
        if sigma_next == 0:
            x = guided.x0
        else:
            uncond, h = uncond_of(guided), log(sigma / sigma_next)
            x = guided.x0 + sigma_next / sigma * (x - uncond)
            if before is not None:
                x = x - expm1(-h) * h / (2 * h_before) * (guided.x0 - before)
            before, h_before = uncond, h
        x = yield from show(i, sigma_next, x, guided.x0)


@guided_solver
def dpmpp_2s_ancestral_cfg_pp(
    denoise: DenoiseGuided,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2S) with ancestral noise and CFG++ in the variance exploding form: wrong on a flow.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
        eta, s_noise, noise: see `samplers.euler_ancestral`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        guided = denoise(x, sigma)
        if sigma_next == 0:
            x = guided.x0
        else:
            down, up = ancestral(sigma, sigma_next, eta)
            moved, middle = x + guided.x0 - uncond_of(guided), sqrt(sigma * down)
            if down:
                better = denoise(toward(guided.x0, moved, middle / sigma), middle).x0
                x = toward(better, moved, down / sigma)
            else:  # all of the next level is fresh noise
                x = guided.x0
            x = churn.add(x, up, sigma, sigma_next)
        x = yield from show(i, sigma_next, x, guided.x0)


@guided_solver
def res_multistep_cfg_pp(denoise: DenoiseGuided, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`res_multistep` with CFG++ in the variance exploding form, as ComfyUI runs it: wrong on a flow.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
    """
    return res_multistep_ancestral_cfg_pp(denoise, x, sigmas, eta=0.0)


@guided_solver
def res_multistep_ancestral_cfg_pp(
    denoise: DenoiseGuided,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """`res_multistep_ancestral` with CFG++.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
        eta, s_noise, noise: see `samplers.euler_ancestral`.
    """
    churn = Churn.of(x, noise, eta, s_noise)
    before: Tensor | None = None  # the unconditional prediction of the step before, and the level it went down to
    down_before, levels = 0.0, sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        guided = denoise(x, sigma)
        if sigma_next == 0:
            x = guided.x0
        else:
            uncond = uncond_of(guided)
            down, up = ancestral(sigma, sigma_next, eta)
            if before is None or not down:
                x = guided.x0 + down * slope(x, sigma, uncond)
            else:
                moved, place = x + guided.x0 - uncond, log_ratio(down_before, levels[i - 1])
                x = res_step(moved, sigma, down, uncond, before, place)
            x = churn.add(x, up, sigma, sigma_next)
            before, down_before = uncond, down
        x = yield from show(i, sigma_next, x, guided.x0)


@guided_solver
def gradient_estimation_cfg_pp(
    denoise: DenoiseGuided, x: Tensor, sigmas: Tensor, *, gamma: float = 2.0
) -> Iterator[Step]:
    """`gradient_estimation` with CFG++ in the variance exploding form, as ComfyUI runs it: wrong on a flow.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
        gamma: see `samplers.gradient_estimation`.
    """
    before: Tensor | None = None  # the slope of the step before
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        guided = denoise(x, sigma)
        if sigma_next == 0:
            x = guided.x0
        else:
            here = slope(x, sigma, uncond_of(guided))
            x = guided.x0 + here * sigma_next
            if before is not None:
                x = x + (gamma - 1) * (sigma_next - sigma) * (here - before)
            before = here
        x = yield from show(i, sigma_next, x, guided.x0)
