"""The order of every solver, observed on a flow whose solution is known: pictures are single numbers from two humps.

In one dimension a flow keeps the order of points, so that the share of the distribution below a point stays: that gives
its place at every level by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log, log2
from typing import Any

import torch
from torch import Tensor

from samplers.solvers import SOLVERS, Solver
from samplers.solvers.common import at_half_log_snr, half_log_snr
from samplers.types import Guided, Step

SHARES, MEANS, SPREADS = (0.4, 0.6), (-0.8, 0.9), (0.5, 0.4)  # of the two humps
START, END = 0.9, 0.1


@dataclass(frozen=True)
class Row:
    """Errors of one solver over runs with more and more steps."""

    name: str
    steps: tuple[int, ...]
    calls: tuple[int, ...]  # of the model
    errors: tuple[float, ...]  # the largest of all points

    @property
    def order(self) -> float:
        """By how many powers of 2 the error falls when steps double, from the last two runs."""
        if not self.errors[-1]:
            return inf
        return log2(self.errors[-2] / self.errors[-1]) / log2(self.steps[-1] / self.steps[-2])


def two_humps(x: Tensor, sigma: float) -> Tensor:
    """The exact x0 prediction, the mean of the pictures that x may come from."""
    weights, means = [], []
    for share, mean, spread in zip(SHARES, MEANS, SPREADS, strict=True):
        middle, variance = (1 - sigma) * mean, ((1 - sigma) * spread) ** 2 + sigma**2
        weights.append(log(share) - log(variance) / 2 - (x - middle) ** 2 / (2 * variance))
        means.append(mean + (1 - sigma) * spread**2 / variance * (x - middle))
    return (torch.stack(weights).softmax(0) * torch.stack(means)).sum(0)


def below(x: Tensor, sigma: float) -> Tensor:
    """The share of latents of a level that lie below x."""
    total = torch.zeros_like(x)
    for share, mean, spread in zip(SHARES, MEANS, SPREADS, strict=True):
        deviation = (((1 - sigma) * spread) ** 2 + sigma**2) ** 0.5
        total = total + share * torch.special.ndtr((x - (1 - sigma) * mean) / deviation)
    return total


def solution(x: Tensor, start: float, end: float) -> Tensor:
    """Where the flow carries x from one level to another: the place with the same share below it."""
    wanted = below(x, start)
    low, high = torch.full_like(x, -10), torch.full_like(x, 10)
    for _ in range(64):
        middle = (low + high) / 2
        short = below(middle, end) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (low + high) / 2


def levels(solver: Solver, steps: int) -> Tensor:
    """From `START` to `END`, even in the variable that the solver steps in."""
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()
    if solver.on_flows == "sigma":
        return torch.tensor([START + (END - START) * share for share in even], dtype=torch.float64)
    if solver.on_flows == "as_added":
        return torch.tensor([exp(log(START) + log(END / START) * share) for share in even], dtype=torch.float64)
    a, b = half_log_snr(START), half_log_snr(END)
    return torch.tensor([at_half_log_snr(a + (b - a) * share) for share in even], dtype=torch.float64)


def observed(name: str, steps: tuple[int, ...] = (48, 96, 192)) -> Row:
    """Run a solver, without its fresh noise, with more and more steps.

    Args:
        name: of `SOLVERS`.
        steps: of the runs. What chooses its steps itself gets a tolerance of steps^-3 instead.

    Raises:
        ValueError: the solver is none of the ODE, whatever its options.
    """
    solver = SOLVERS[name]
    if solver.is_stochastic and not solver.eta:
        raise ValueError(f"{name} always adds noise: it has no order as a solver of the ODE")
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    wanted, made, calls, errors = solution(x, START, END), [], [], []
    for count in steps:
        last, used = _run(solver, x, count, name == "dpm_adaptive")
        made.append(last.i + 1)
        calls.append(used)
        errors.append(float((last.x - wanted).abs().max()))
    return Row(name, tuple(made), tuple(calls), tuple(errors))


def _run(solver: Solver, x: Tensor, steps: int, adaptive: bool) -> tuple[Step, int]:
    calls = 0

    def denoise(x: Tensor, sigma: float) -> Tensor | Guided:
        nonlocal calls
        calls += 1
        x0 = two_humps(x, sigma)
        return Guided(x0, x0) if solver.guided else x0

    options: dict[str, Any] = {"eta": 0.0} if solver.eta else {}
    if adaptive:
        options |= {"rtol": steps**-3.0, "atol": steps**-3.0}
    *_, last = solver(denoise, x, levels(solver, steps), **options)
    return last, calls


def orders_markdown() -> str:
    """The observed order of every solver that can be one of the ODE, as a table."""
    words = {"sigma": "sigma", "ratio": "ln((1 - sigma) / sigma)", "as_added": "-ln sigma"}
    lines = ["| solver | steps even in | error at 48, 96, 192 steps | calls | observed order |", "| --- " * 5 + "|"]
    for name, solver in SOLVERS.items():
        if solver.is_stochastic and not solver.eta:
            continue
        row = observed(name)
        errors, calls = ", ".join(f"{e:.1e}" for e in row.errors), ", ".join(map(str, row.calls))
        suffix = ", eta 0" if solver.eta else ""
        lines.append(f"| {name}{suffix} | {words[solver.on_flows]} | {errors} | {calls} | {row.order:.2f} |")
    return "\n".join(lines)
