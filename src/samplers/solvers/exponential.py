"""Exponential integrators: exact where the prediction is constant, with a polynomial in the log ratio."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from math import exp, expm1, log, sqrt

from torch import Tensor

from samplers.noise import Fresh, Noise
from samplers.solvers.common import (
    Interval,
    ancestral,
    at_half_log_snr,
    below_one,
    comfyui_start,
    half_log_snr,
    phi_1,
    phi_2,
    toward,
    walk,
)
from samplers.types import Denoise, Step


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2M): one model call a step, second order from the second step on; the last step is Euler's.

    Lu et al. 2022, arXiv 2211.01095, algorithm 2, with -ln sigma in the place of the half log signal-to-noise ratio:
    so Stability's code and ComfyUI run it on flows too. `flow_dpmpp_2m` takes the true ratio: other numbers.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _second_order(denoise, x, sigmas, lambda over: over.log_h)


def flow_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """DPM-Solver++(2M) in the flow's half log signal-to-noise ratio. From level 1, where it has none, Euler's step.

    Lu et al. 2022, arXiv 2211.01095, algorithm 2. diffusers: DPMSolverMultistepScheduler with `use_flow_sigmas`.

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _second_order(denoise, x, sigmas, lambda over: over.h)


def _second_order(denoise: Denoise, x: Tensor, sigmas: Tensor, width_of: Callable[[Interval], float]) -> Iterator[Step]:
    past: list[tuple[Tensor, float]] = []  # the prediction of the step before, and that step's width

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        width, better = width_of(over), denoised
        if past:
            before, width_before = past.pop()
            share = width / (2 * width_before)
            better = (1 + share) * denoised - share * before
        past.append((denoised, width))
        return toward(better, x, over.ratio)

    return walk(denoise, x, sigmas.tolist(), move)


def res_multistep(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """RES, the refined exponential solver, as a multistep method of order 2 in -ln sigma.

    Zhang et al. 2023, arXiv 2308.02157, table 2 (order 2, c2 from the step before).

    Args:
        denoise, x, sigmas: see `samplers.euler`.
    """
    return _res(denoise, x, sigmas, 0.0, None)


def res_multistep_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """`res_multistep` with the ancestral noise of a whole picture, as ComfyUI runs it: not a flow's.

    `dpmpp_2m_sde_heun` is right on flows.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `first_order.euler_ancestral`.
    """
    noise = noise or Fresh(x)
    return _res(denoise, x, sigmas, eta, lambda sigma, following: s_noise * noise(sigma, following))


def _res(denoise: Denoise, x: Tensor, sigmas: Tensor, eta: float, noise: Noise | None) -> Iterator[Step]:
    past: list[tuple[Tensor, float]] = []  # the prediction of the step before, and where that step went down to
    levels = sigmas.tolist()

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        down, up = ancestral(over.sigma, over.following, eta)
        before, down_before = past.pop() if past else (None, 0.0)
        past.append((denoised, down))
        x = res_step(x, over, down, denoised, before, levels[over.i - 1], down_before)
        return x if noise is None else x + up * noise(over.sigma, over.following)

    return walk(denoise, x, levels, move)


def res_step(
    x: Tensor,
    over: Interval,
    down: float,
    denoised: Tensor,
    before: Tensor | None,
    level_before: float,
    down_before: float,
) -> Tensor:
    """From `over.sigma` to `down`: the second-order step, or Euler's where there is no prediction before or down is 0.

    Args:
        x, denoised: at `over.sigma`.
        before: the prediction at `level_before`, from where the step went to `down_before`.
    """
    if before is None or not down:
        return toward(denoised, x, down / over.sigma)
    h = log(over.sigma / down)
    c2 = log(down_before / level_before) / h
    share = phi_2(-h) / c2
    return exp(-h) * x + h * ((phi_1(-h) - share) * denoised + share * before)


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
    """DPM-Solver++ (SDE): an ancestral step to the middle, whose prediction is used for the whole. Two calls a step.

    Lu et al. 2022, arXiv 2211.01095, algorithm 1 with r = 1/2, each half with DDIM's noise (k-diffusion); the steps are
    in the flow's half log signal-to-noise ratio, which is that of ComfyUI.

    Args:
        denoise, x, sigmas, eta, s_noise, noise: see `first_order.euler_ancestral`.
        shift: of the schedule, which says what stands for a first level of 1: see `comfyui_start`.
    """
    noise = noise or Fresh(x)

    def to(x: Tensor, denoised: Tensor, sigma: float, following: float) -> Tensor:
        alpha, alpha_following = 1 - sigma, 1 - following
        down, up = ancestral(sigma / alpha, following / alpha_following, eta)
        ratio = down * alpha / sigma
        x = alpha_following * (ratio / alpha * x + (1 - ratio) * denoised)
        return x + alpha_following * up * s_noise * noise(sigma, following) if eta else x

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        middle = at_half_log_snr(half_log_snr(over.sigma) + over.h / 2)
        better = denoise(to(x, denoised, over.sigma, middle), middle)
        return to(x, better, over.sigma, over.following)

    return walk(denoise, x, below_one(sigmas.tolist(), comfyui_start(shift)), move)


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

    Lu et al. 2022, arXiv 2211.01095, formula 18 and section 5 (SDE-DPM-Solver++(2M)), in the flow's half log
    signal-to-noise ratio; eta 0 is `flow_dpmpp_2m`.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `dpmpp_sde`.
    """
    return _sde(denoise, x, sigmas, eta, s_noise, noise, shift, _midpoint_terms)


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
    return _sde(denoise, x, sigmas, eta, s_noise, noise, shift, _heun_terms)


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
    (k-diffusion, `sample_dpmpp_3m_sde`), in the flow's half log signal-to-noise ratio.

    Args:
        denoise, x, sigmas, eta, s_noise, noise, shift: see `dpmpp_sde`.
    """
    return _sde(denoise, x, sigmas, eta, s_noise, noise, shift, _third_order_terms)


# (width with noise, width, the last predictions, the widths of the steps between them) -> what adds to the first order
Terms = Callable[[float, float, Sequence[Tensor], Sequence[float]], Tensor | None]


def _sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    eta: float,
    s_noise: float,
    noise: Noise | None,
    shift: float,
    terms: Terms,
) -> Iterator[Step]:
    noise = noise or Fresh(x)
    past: deque[Tensor] = deque(maxlen=3)
    widths: deque[float] = deque(maxlen=2)

    def move(x: Tensor, denoised: Tensor, over: Interval) -> Tensor:
        h, alpha = over.h, 1 - over.following
        past.appendleft(denoised)
        x = decayed(x, denoised, over, eta)
        if (more := terms((1 + eta) * h, h, past, widths)) is not None:
            x = x + alpha * more
        widths.appendleft(h)
        return x + added(over, eta) * s_noise * noise(over.sigma, over.following) if eta else x

    return walk(denoise, x, below_one(sigmas.tolist(), comfyui_start(shift)), move)


def decayed(x: Tensor, denoised: Tensor, over: Interval, eta: float) -> Tensor:
    """The exact step where the prediction is constant: sigma'/sigma e^(-eta h) x + alpha' (1 - e^(-(1 + eta) h)) x0."""
    keep = over.ratio * exp(-eta * over.h)
    return keep * x - (1 - over.following) * expm1(-(1 + eta) * over.h) * denoised


def added(over: Interval, eta: float) -> float:
    """The standard deviation of the noise that comes on the way: sigma' (1 - e^(-2 eta h))^(1/2)."""
    return over.following * sqrt(-expm1(-2 * eta * over.h))


def _midpoint_terms(wide: float, h: float, past: Sequence[Tensor], widths: Sequence[float]) -> Tensor | None:
    if not widths:
        return None
    return -expm1(-wide) * h / (2 * widths[0]) * (past[0] - past[1])


def _heun_terms(wide: float, h: float, past: Sequence[Tensor], widths: Sequence[float]) -> Tensor | None:
    if not widths:
        return None
    return (1 - phi_1(-wide)) * h / widths[0] * (past[0] - past[1])


def _third_order_terms(wide: float, h: float, past: Sequence[Tensor], widths: Sequence[float]) -> Tensor | None:
    if len(widths) < 2:
        return _heun_terms(wide, h, past, widths)
    r0, r1 = widths[0] / h, widths[1] / h
    late, early = (past[0] - past[1]) / r0, (past[1] - past[2]) / r1
    curve = (late - early) / (r0 + r1)
    second = 1 - phi_1(-wide)
    return second * (late + r0 * curve) - (second / wide - 0.5) * curve
