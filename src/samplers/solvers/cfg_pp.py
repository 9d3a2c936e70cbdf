"""CFG++ forms: go to the guided picture, but reckon the noise from the unconditional one.

Chung et al. 2024, arXiv 2406.08070, algorithm 2. `denoise` of these solvers returns `samplers.Guided`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import expm1, sqrt

from torch import Tensor

from samplers.noise import Fresh, Noise
from samplers.solvers.common import Interval, ancestral, slope, toward, walk
from samplers.solvers.exponential import res_step
from samplers.solvers.first_order import posterior
from samplers.types import Guided, Step

DenoiseGuided = Callable[[Tensor, float], Guided]


def uncond_of(guided: Guided) -> Tensor:
    """The unconditional prediction.

    Raises:
        ValueError: it did not run.
    """
    if guided.uncond is None:
        raise ValueError("a *_cfg_pp sampler needs the unconditional prediction, but guidance ran without one: give it")
    return guided.uncond


def euler_cfg_pp(denoise: DenoiseGuided, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`euler` to (1 - sigma') x0 + sigma' n, where n is the noise beside the unconditional picture.

    Args:
        denoise: gives `samplers.Guided`.
        x, sigmas: see `samplers.euler`.
    """
    return euler_ancestral_cfg_pp(denoise, x, sigmas, eta=0.0)


def euler_ancestral_cfg_pp(
    denoise: DenoiseGuided,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """`flow_ddpm` with the noise reckoned from the unconditional picture.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
        eta, s_noise, noise: see `first_order.euler_ancestral`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, guided: Guided, over: Interval) -> Tensor:
        return posterior(over, eta, x, guided.x0, uncond_of(guided), s_noise, noise)

    return walk(denoise, x, sigmas.tolist(), move)


def dpmpp_2m_cfg_pp(denoise: DenoiseGuided, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`dpmpp_2m` with CFG++ for noise added to a whole picture, as ComfyUI runs it: not a flow's.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
    """
    past: list[tuple[Tensor, float]] = []  # the unconditional prediction of the step before, and that step's width

    def move(x: Tensor, guided: Guided, over: Interval) -> Tensor:
        uncond, h = uncond_of(guided), over.log_h
        moved = guided.x0 + over.ratio * (x - uncond)
        if past:
            before, width = past.pop()
            moved = moved - expm1(-h) * h / (2 * width) * (guided.x0 - before)
        past.append((uncond, h))
        return moved

    return walk(denoise, x, sigmas.tolist(), move)


def dpmpp_2s_ancestral_cfg_pp(
    denoise: DenoiseGuided,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2S) with ancestral noise and CFG++, for noise added to a whole picture: not a flow's.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
        eta, s_noise, noise: see `first_order.euler_ancestral`.
    """
    noise = noise or Fresh(x)

    def move(x: Tensor, guided: Guided, over: Interval) -> Tensor:
        down, up = ancestral(over.sigma, over.following, eta)
        if not down:  # only where all of the next level is fresh noise
            return guided.x0 + up * s_noise * noise(over.sigma, over.following)
        moved, middle = x + guided.x0 - uncond_of(guided), sqrt(over.sigma * down)
        better = denoise(toward(guided.x0, moved, middle / over.sigma), middle).x0
        x = toward(better, moved, down / over.sigma)
        return x + up * s_noise * noise(over.sigma, over.following)

    return walk(denoise, x, sigmas.tolist(), move)


def res_multistep_cfg_pp(denoise: DenoiseGuided, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`res_multistep` with CFG++ for noise added to a whole picture, as ComfyUI runs it: not a flow's.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
    """
    return res_multistep_ancestral_cfg_pp(denoise, x, sigmas, eta=0.0)


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
        eta, s_noise, noise: see `first_order.euler_ancestral`.
    """
    noise, levels = noise or Fresh(x), sigmas.tolist()
    past: list[tuple[Tensor, float]] = []  # the unconditional prediction before, and where that step went down to

    def move(x: Tensor, guided: Guided, over: Interval) -> Tensor:
        uncond = uncond_of(guided)
        down, up = ancestral(over.sigma, over.following, eta)
        before, down_before = past.pop() if past else (None, 0.0)
        past.append((uncond, down))
        if before is None or not down:
            x = guided.x0 + down * slope(x, over.sigma, uncond)
        else:
            x = res_step(x + guided.x0 - uncond, over, down, uncond, before, levels[over.i - 1], down_before)
        return x + up * s_noise * noise(over.sigma, over.following) if eta else x

    return walk(denoise, x, levels, move)


def gradient_estimation_cfg_pp(
    denoise: DenoiseGuided, x: Tensor, sigmas: Tensor, *, gamma: float = 2.0
) -> Iterator[Step]:
    """`gradient_estimation` with CFG++ for noise added to a whole picture, as ComfyUI runs it: not a flow's.

    Args:
        denoise, x, sigmas: see `euler_cfg_pp`.
        gamma: see `adams.gradient_estimation`.
    """
    past: list[Tensor] = []  # the slope before

    def move(x: Tensor, guided: Guided, over: Interval) -> Tensor:
        here = slope(x, over.sigma, uncond_of(guided))
        x = guided.x0 + here * over.following
        if past:
            x = x + (gamma - 1) * over.width * (here - past.pop())
        past.append(here)
        return x

    return walk(denoise, x, sigmas.tolist(), move)
