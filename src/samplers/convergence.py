"""The observed order of every solver, on a flow with a known solution: pictures are numbers, of two Gaussians.

In one dimension a flow keeps the order of points, so the cumulative probability of a point is the same at every level.
Its place at a level follows by bisection.
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

SHARES, MEANS, SPREADS = (0.4, 0.6), (-0.8, 0.9), (0.5, 0.4)  # of the two Gaussians
START, END = 0.9, 0.1


@dataclass(frozen=True)
class Row:
    """Errors of one solver in runs with increasing numbers of steps."""

    name: str
    steps: tuple[int, ...]
    calls: tuple[int, ...]  # model calls (NFE) of each run
    errors: tuple[float, ...]  # the largest error of all points

    @property
    def order(self) -> float:
        """The observed order, from the last two runs: log2 of the ratio of errors per doubling of the steps."""
        if not self.errors[-1]:
            return inf
        return log2(self.errors[-2] / self.errors[-1]) / log2(self.steps[-1] / self.steps[-2])


def two_gaussians(x: Tensor, sigma: float) -> Tensor:
    """Return the exact prediction of x0: the mean of the pictures given x."""
    weights, means = [], []
    for share, mean, spread in zip(SHARES, MEANS, SPREADS, strict=True):
        middle, variance = (1 - sigma) * mean, ((1 - sigma) * spread) ** 2 + sigma**2
        weights.append(log(share) - log(variance) / 2 - (x - middle) ** 2 / (2 * variance))
        means.append(mean + (1 - sigma) * spread**2 / variance * (x - middle))
    return (torch.stack(weights).softmax(0) * torch.stack(means)).sum(0)


def below(x: Tensor, sigma: float) -> Tensor:
    """Return the cumulative probability of x at a level."""
    total = torch.zeros_like(x)
    for share, mean, spread in zip(SHARES, MEANS, SPREADS, strict=True):
        deviation = (((1 - sigma) * spread) ** 2 + sigma**2) ** 0.5
        total = total + share * torch.special.ndtr((x - (1 - sigma) * mean) / deviation)
    return total


def solution(x: Tensor, start: float, end: float) -> Tensor:
    """Return the point at level `end` to which the flow carries x: the one with the same cumulative probability."""
    wanted = below(x, start)
    low, high = torch.full_like(x, -10), torch.full_like(x, 10)
    for _ in range(64):
        middle = (low + high) / 2
        short = below(middle, end) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (low + high) / 2


def levels(solver: Solver, steps: int) -> Tensor:
    """Return levels from `START` to `END`, evenly spaced in the variable in which the solver steps."""
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu").tolist()
    if solver.steps_in == "sigma":
        return torch.tensor([START + (END - START) * share for share in even], dtype=torch.float64, device="cpu")
    if solver.steps_in == "variance_exploding":
        levels = [exp(log(START) + log(END / START) * share) for share in even]
        return torch.tensor(levels, dtype=torch.float64, device="cpu")
    a, b = half_log_snr(START), half_log_snr(END)
    return torch.tensor([at_half_log_snr(a + (b - a) * share) for share in even], dtype=torch.float64, device="cpu")


def observed(name: str, steps: tuple[int, ...] = (48, 96, 192)) -> Row:
    """Run a solver without fresh noise, with increasing numbers of steps.

    Args:
        name: a key of `SOLVERS`.
        steps: the number of steps of each run. `dpm_adaptive`, which chooses its steps, gets a tolerance of steps^-3.

    Raises:
        ValueError: the solver always adds noise, so it does not solve the ODE.
    """
    solver = SOLVERS[name]
    if solver.is_stochastic and not solver.eta:
        raise ValueError(f"{name} always adds noise: it has no order as a solver of the ODE")
    x = torch.linspace(-1, 1, 7, dtype=torch.float64, device="cpu")
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
        x0 = two_gaussians(x, sigma)
        return Guided(x0, x0) if solver.guided else x0

    options: dict[str, Any] = {"eta": 0.0} if solver.eta else {}
    if adaptive:
        options |= {"rtol": steps**-3.0, "atol": steps**-3.0}
    *_, last = solver(denoise, x, levels(solver, steps), **options)
    return last, calls


def orders_markdown() -> str:
    """Return a Markdown table of the observed order of every solver that can run without fresh noise."""
    words = {"sigma": "sigma", "log_snr": "log-SNR", "variance_exploding": "-ln sigma"}
    lines = ["| sampler | steps even in | error at 48, 96, 192 steps | NFE | observed order |", "| --- " * 5 + "|"]
    for name, solver in SOLVERS.items():
        if solver.is_stochastic and not solver.eta:
            continue
        row = observed(name)
        errors, calls = ", ".join(f"{e:.1e}" for e in row.errors), ", ".join(map(str, row.calls))
        suffix = ", eta 0" if solver.eta else ""
        lines.append(f"| {name}{suffix} | {words[solver.steps_in]} | {errors} | {calls} | {row.order:.2f} |")
    return "\n".join(lines)
