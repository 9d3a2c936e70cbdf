"""Schedules: the noise levels of the steps, float64 [steps + 1], falling from 1, or nearly 1, to 0.

Flow matching: x = sigma * noise + (1 - sigma) * picture, and the model's timestep is 1000 * sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import atan, exp, gamma, inf, log
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from samplers.checks import MAX_STEPS, MIN_GAP, as_levels, check_apart, number, tensor, whole
from samplers.names import pick

TRAIN_STEPS = 1000  # the models were trained with a table of timesteps: 1/1000 ... 1


def shifted(t: Tensor, shift: float) -> Tensor:
    """Return shift t / (1 + (shift - 1) t), which moves timesteps towards noise; any shape.

    Esser et al. 2024, arXiv 2403.03206, section 5.3.2. The result is 1 exactly at t = 1, and at most 1 below, for every
    shift and dtype, which the formula alone is not: with shift 0.1 it gives 1.0000000000000002.

    Args:
        t: timesteps in [0, 1].
        shift: above 0; 1 changes nothing.

    Raises:
        TypeError: t is no tensor.
    """
    t = tensor("t", t)
    moved = shift * t / (1 + (shift - 1) * t)
    return torch.where(t == 1, t, moved.clamp(max=1))


def checked_sigmas(levels: Sequence[float] | np.ndarray | Tensor) -> Tensor:
    """Return given noise levels as a schedule, float64 [steps + 1]. No shift is applied.

    Args:
        levels: falling noise levels, the first at most 1, the last 0.

    Raises:
        ValueError: the levels break this rule; the message names the first position that does.
    """
    schedule = as_levels(levels)
    if schedule[0] > 1 or schedule[-1] != 0:
        raise ValueError(
            f"sigmas go from {float(schedule[0])} to {float(schedule[-1])}, expected from at most 1 to 0: append 0.0, "
            "and divide timesteps by 1000"
        )
    check_apart(schedule)
    return schedule


def normal(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """Even timesteps between the ends of the shifted table, shifted once more; then 0.

    The default of the three references (Stability `get_sigmas`, ComfyUI `normal`, diffusers
    FlowMatchEulerDiscreteScheduler). The ends are rounded to float32, as in these.
    """
    return _to_zero(_stretched(_even_shifted(steps, shift), terminal))


def sgm_uniform(steps: int, shift: float) -> Tensor:
    """`normal` with one step more, without its last level: the step to 0 is as wide as the others (ComfyUI)."""
    return _to_zero(_even_shifted(steps + 1, shift)[:-1])


def simple(steps: int, shift: float) -> Tensor:
    """Every 1000 / steps-th timestep of the table from the top, rounded down, shifted once; then 0 (ComfyUI)."""
    back = (torch.arange(steps, dtype=torch.float64, device="cpu") * (TRAIN_STEPS / steps)).long()
    return _to_zero(_table(shift)[TRAIN_STEPS - 1 - back])


def ddim_uniform(steps: int, shift: float) -> Tensor:
    """Every (1000 // steps)-th timestep of the table from the second on, shifted once; then 0 (ComfyUI).

    It starts below 1, and has more steps than asked for where 1000 is not a multiple of steps.
    """
    return _to_zero(_table(shift)[1 :: max(TRAIN_STEPS // steps, 1)].flip(0))


def beta(steps: int, shift: float) -> Tensor:
    """Timesteps of the table at the quantiles of a beta distribution (0.6, 0.6), without repeats; then 0.

    Lee et al. 2024, arXiv 2407.12173. With many steps timesteps repeat, which leaves fewer steps (ComfyUI).
    """
    at = (TRAIN_STEPS - 1) * beta_quantile(1 - torch.arange(steps, dtype=torch.float64, device="cpu") / steps)
    return _to_zero(_table(shift)[at.round().long().unique_consecutive()])


def karras(steps: int, shift: float) -> Tensor:
    """Even in sigma^(1/7) between the ends of the table; then 0. Karras et al. 2022, arXiv 2206.00364, formula 5."""
    return _to_zero(_karras(steps, _lowest(shift)))


def exponential(steps: int, shift: float) -> Tensor:
    """Even in ln sigma between the ends of the table; then 0 (k-diffusion)."""
    return _to_zero(_exponential(steps, _lowest(shift)))


def linear_quadratic(steps: int, shift: float) -> Tensor:
    """Half of the steps over the first 2.5 % of the noise, the rest increasingly wide; the shift is ignored.

    Polyak et al. 2024 (Movie Gen), arXiv 2410.13720, section 3.4.2, with ComfyUI's threshold of 0.025.
    """
    if steps == 1:
        return torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")
    linear, threshold = steps // 2, 0.025
    left, slow = steps - linear, threshold / linear
    square = (1 - threshold - slow * left) / left**2  # the parabola starts with the line's slope and ends at 1
    even = torch.arange(linear + 1, dtype=torch.float64, device="cpu")
    later = torch.arange(1, left + 1, dtype=torch.float64, device="cpu")
    done = torch.cat([slow * even, threshold + slow * later + square * later**2])
    return torch.cat([1 - done[:-1], torch.zeros(1, dtype=torch.float64, device="cpu")])


def kl_optimal(steps: int, shift: float) -> Tensor:
    """Even in arctan sigma between the ends of the table; then 0. Sabour et al. 2024, arXiv 2404.14507, appendix."""
    levels = (atan(1) + _even(steps) * (atan(_lowest(shift)) - atan(1))).tan()
    levels[0] = 1  # rounding gives the float below 1
    return _to_zero(levels)


def diffusers_karras(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """`karras` between the ends of `normal`: FlowMatchEulerDiscreteScheduler with `use_karras_sigmas`."""
    return _to_zero(_karras(steps, _last(normal(steps, shift, terminal))))


def diffusers_exponential(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """`exponential` between the ends of `normal`: FlowMatchEulerDiscreteScheduler with `use_exponential_sigmas`."""
    return _to_zero(_exponential(steps, _last(normal(steps, shift, terminal))))


def diffusers_beta(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """Quantiles of the beta distribution between the ends of `normal`: the same with `use_beta_sigmas`."""
    return _to_zero(_beta(steps, _last(normal(steps, shift, terminal))))


def diffusers_dynamic(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """Even timesteps from 1 to 1/1000, shifted once; then 0: the same with `use_dynamic_shifting`.

    The shift is then `resolution_shift` of the picture.
    """
    return _to_zero(_stretched(shifted(1 - _even(steps) * (1 - 1 / TRAIN_STEPS), shift), terminal))


def diffusers_dynamic_karras(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """`karras` between the ends of `diffusers_dynamic`."""
    return _to_zero(_karras(steps, _last(diffusers_dynamic(steps, shift, terminal))))


def diffusers_dynamic_exponential(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """`exponential` between the ends of `diffusers_dynamic`."""
    return _to_zero(_exponential(steps, _last(diffusers_dynamic(steps, shift, terminal))))


def diffusers_dynamic_beta(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """Quantiles of the beta distribution between the ends of `diffusers_dynamic`."""
    return _to_zero(_beta(steps, _last(diffusers_dynamic(steps, shift, terminal))))


def diffusers_dpm(steps: int, shift: float) -> Tensor:
    """Even timesteps from 0.999 to 0, shifted once: DPMSolverMultistepScheduler with `use_flow_sigmas`.

    It starts below 1. DEISMultistepScheduler has the same levels except for the 0.
    """
    return shifted((1 - _even(steps + 1)) * (1 - 1 / TRAIN_STEPS), shift)


def diffusers_uni_pc(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """Even timesteps from 1 to 1/1000, one more than steps, shifted once, with 0 in place of the last.

    UniPCMultistepScheduler with `use_flow_sigmas`. It replaces the first level by 1 - 1e-6, as `flow_uni_pc` does.
    """
    return _to_zero(_stretched(shifted(1 - _even(steps + 1) * (1 - 1 / TRAIN_STEPS), shift)[:-1], terminal))


SCHEDULES: dict[str, Callable[..., Tensor]] = {  # (steps, shift) -> levels; some take a terminal too
    "normal": normal,
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "ddim_uniform": ddim_uniform,
    "beta": beta,
    "karras": karras,
    "exponential": exponential,
    "linear_quadratic": linear_quadratic,
    "kl_optimal": kl_optimal,
    "diffusers_karras": diffusers_karras,
    "diffusers_exponential": diffusers_exponential,
    "diffusers_beta": diffusers_beta,
    "diffusers_dynamic": diffusers_dynamic,
    "diffusers_dynamic_karras": diffusers_dynamic_karras,
    "diffusers_dynamic_exponential": diffusers_dynamic_exponential,
    "diffusers_dynamic_beta": diffusers_dynamic_beta,
    "diffusers_dpm": diffusers_dpm,
    "diffusers_uni_pc": diffusers_uni_pc,
}
WITH_TERMINAL = tuple(
    name for name in SCHEDULES if name == "normal" or (name.startswith("diffusers") and name != "diffusers_dpm")
)


def sigmas(name: str, steps: int, *, shift: float = 3.0, terminal: float | None = None) -> Tensor:
    """Return the noise levels of a schedule, float64 [steps + 1], falling, the last one 0.

    `ddim_uniform` may have more steps than asked for, `beta` fewer.

    Args:
        name: a key of `SCHEDULES`.
        steps: the number of steps, from 1 to 10,000.
        shift: above 0; 3.0 for SD3 and SD3.5; 1 leaves the timesteps even.
        terminal: stretch the levels so that the last above 0 is this one (diffusers' `shift_terminal`); only for
            `normal` and diffusers' schedules.

    Raises:
        ValueError: an unknown name, no step, more steps than there are levels, or a number out of its bounds.
    """
    schedule = pick(SCHEDULES, name, "schedule")
    steps, shift = whole("steps", steps, 1, MAX_STEPS), number("shift", shift, 0, above=True)
    try:
        if terminal is None:
            return checked_sigmas(schedule(steps, shift))
        return checked_sigmas(schedule(steps, shift, _checked_terminal(name, steps, terminal)))
    except (ValueError, OverflowError) as error:  # a logarithm of 0, or levels that are equal after rounding
        raise ValueError(f"schedule {name!r} with {steps} steps and shift {shift:g} cannot be made: {error}") from error


def _checked_terminal(name: str, steps: int, terminal: float) -> float:
    if name not in WITH_TERMINAL:
        raise ValueError(f"terminal is given, which only {', '.join(WITH_TERMINAL)} take")
    if steps < 2:
        raise ValueError("a terminal level needs at least 2 steps")
    return number("terminal", terminal, 0, 1 - MIN_GAP, above=True)


def resolution_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    kind: Literal["exponential", "linear"] = "exponential",
) -> float:
    """Return the shift for a picture of so many tokens: larger pictures need a larger shift to be as noisy.

    Esser et al. 2024, arXiv 2403.03206, section 5.3.2, formula 23, in diffusers' form: a number mu that is linear in
    the number of tokens, and the shift e^mu, or mu itself. The defaults are those of `calculate_shift` and of
    FlowMatchEulerDiscreteScheduler with `use_dynamic_shifting`.

    Args:
        tokens: the number of image tokens, (height / 16) (width / 16).
        base_tokens, max_tokens: the numbers of tokens at which mu is `base_shift` and `max_shift`.
        base_shift, max_shift: mu at these.
        kind: "exponential" for e^mu, "linear" for mu.

    Raises:
        ValueError: a number is out of its bounds, or the shift is.
    """
    pick({"exponential": kind, "linear": kind}, kind, "kind of resolution_shift")
    tokens = whole("tokens", tokens, 1, 2**53)
    base_shift, max_shift = number("base_shift", base_shift), number("max_shift", max_shift)
    base_tokens, max_tokens = whole("base_tokens", base_tokens, 1, 2**53), whole("max_tokens", max_tokens, 1, 2**53)
    if base_tokens == max_tokens:
        raise ValueError(f"base_tokens and max_tokens are both {base_tokens}, expected two numbers")
    mu = base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)
    shift = (exp(mu) if mu < 700 else inf) if kind == "exponential" else mu
    return number(f"the shift for {tokens} tokens", shift, 0, above=True)


def beta_quantile(shares: Tensor) -> Tensor:
    """Return quantiles of the beta distribution (0.6, 0.6), by bisection of the regularized incomplete beta."""
    low, high = torch.zeros_like(shares), torch.ones_like(shares)
    for _ in range(64):
        middle = (low + high) / 2
        above = _beta_below(middle) < shares
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def _beta_below(x: Tensor, a: float = 0.6) -> Tensor:
    """Return the cumulative probability of x: x^a sum_n (1 - a)_n x^n / (n! (a + n)), from the nearer end."""
    near = torch.minimum(x, 1 - x)
    powers = near.numpy()  # few numbers and thousands of operations, which numpy starts in a third of torch's time
    total, term = np.zeros_like(powers), np.ones_like(powers)
    for n in range(60):  # near is at most 1/2, so each term is at most half of the one before
        total, term = total + term / (a + n), term * powers * (1 - a + n) / (n + 1)
    share = near**a * torch.from_numpy(total) * gamma(2 * a) / gamma(a) ** 2
    return torch.where(x < 1 / 2, share, 1 - share)


def _table(shift: float) -> Tensor:
    """Return the levels of all timesteps that the models were trained with, rising."""
    return shifted(torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float64, device="cpu") / TRAIN_STEPS, shift)


def _lowest(shift: float) -> float:
    """Return the first level of the table, rounded to float32 as in the references."""
    return float(np.float32(shifted(torch.tensor(1 / TRAIN_STEPS, dtype=torch.float64, device="cpu"), shift).item()))


def _even(steps: int) -> Tensor:
    """Return `steps` even values from 0 to 1; [0] for one."""
    return torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")


def _even_shifted(steps: int, shift: float) -> Tensor:
    lowest = _lowest(shift) * TRAIN_STEPS
    return shifted(torch.linspace(TRAIN_STEPS, lowest, steps, dtype=torch.float64, device="cpu") / TRAIN_STEPS, shift)


def _last(levels: Tensor) -> float:
    """Return the last level above 0."""
    return float(levels[-2])


def _stretched(levels: Tensor, terminal: float | None) -> Tensor:
    """Return the levels stretched from 1 so that the last is `terminal`; as they are for None (`shift_terminal`)."""
    return levels if terminal is None else 1 - (1 - levels) / ((1 - levels[-1]) / (1 - terminal))


def _karras(steps: int, lowest: float) -> Tensor:
    return (1 - _even(steps) * (1 - lowest ** (1 / 7))) ** 7


def _exponential(steps: int, lowest: float) -> Tensor:
    return (log(lowest) * _even(steps)).exp()


def _beta(steps: int, lowest: float) -> Tensor:
    return lowest + (1 - lowest) * beta_quantile(1 - _even(steps))


def _to_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64, device="cpu")])
