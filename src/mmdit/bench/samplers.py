"""Cost and quality of samplers on the embedded model or another model of its grammar: `mmdit bench samplers`.

    orders    observed orders on a flow with a known solution (`samplers.convergence`); no model is loaded
    error     distance from the exact end of the guided ODE against calls of the model, without fresh noise
    accuracy  how many statements of prompts come true, for every sampler with every schedule
    steps     the same for every sampler with fewer and more steps: how few it needs
    page      one picture of every sampler with every schedule, from the same noise
    graphs    how an accelerated pipeline runs the loop of every sampler; no model is loaded

Each writes NAME.json, and what it shows as NAME.md or NAME.png, into a folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.bench.sampler_plots import curves, heat_map, needs_matplotlib, page
from mmdit.demo.captions import prompts as make_prompts
from mmdit.demo.evaluate import SEED, Setting, evaluate
from mmdit.pipeline.passes import Branch
from mmdit.pipeline.pipeline import Pipeline
from mmdit.utils import make_folder, markdown_table, write_text
from samplers import SOLVERS, Solver, cfg, only_x0, pick, sigmas
from samplers.convergence import orders_markdown
from samplers.schedules import SCHEDULES

MEASURES = ("orders", "error", "accuracy", "steps", "page", "graphs")
_FAMILIES = {  # by the file of samplers/solvers
    "first_order": "first order",
    "runge_kutta": "Runge-Kutta: several calls a step",
    "adams": "Adams: linear multistep",
    "dpm_solver": "DPM-Solver: own steps",
    "exponential": "exponential integrators",
    "predictor_corrector": "predictor and corrector",
    "stochastic": "SEEDS, without noise",
}
PLAIN = "a large red circle above a small blue star, on a white background"


@dataclass(frozen=True)
class Plan:
    """The samplers and sizes of a measurement; None is the measure's own default."""

    samplers: tuple[str, ...] = tuple(SOLVERS)
    schedules: tuple[str, ...] = ("normal", "karras", "beta")
    steps: tuple[int, ...] | None = None
    prompts: int | None = None
    guidance: float = 4.5
    fine: int = 100  # steps of the run that counts as exact
    batch: int = 32
    minutes: float = float("inf")  # no run is started that would end after this time
    pool: Executor | None = field(default=None, compare=False)  # processes that score pictures

    def __post_init__(self) -> None:
        for names, known, what in ((self.samplers, SOLVERS, "sampler"), (self.schedules, SCHEDULES, "schedule")):
            for name in names:
                pick(dict.fromkeys(known), name, what)


@dataclass(frozen=True)
class Point:
    """One run of one sampler: its cost and its distance from the exact end, relative to it."""

    sampler: str
    steps: int
    calls: int
    error: float


def measure(name: str, pipe: Callable[[], Pipeline], plan: Plan, folder: Path) -> list[Path]:
    """Run one of `MEASURES` and write what it found.

    Args:
        name: A name of `MEASURES`.
        pipe: Loads the model.
        plan: The samplers and sizes.
        folder: The folder to write to; it is made where it is missing.

    Raises:
        ValueError: an unknown name.
        ImportError: it draws plots, and matplotlib is not installed; before anything is measured.
    """
    pick(dict.fromkeys(MEASURES), name, "measure")
    if name in ("error", "accuracy", "steps"):
        needs_matplotlib()
    make_folder(folder)
    if name == "orders":
        return [_text(folder / "orders.md", orders_markdown() + "\n")]
    if name == "graphs":
        return [_text(folder / "graphs.md", graphs_markdown() + "\n")]
    return {"error": _error, "accuracy": _accuracy, "steps": _few_steps, "page": _page}[name](pipe(), plan, folder)


def graphs_markdown() -> str:
    """For every sampler, how an accelerated pipeline runs its loop on a GPU: as one CUDA graph, or step by step.

    Every loop runs step by step: a call of the model is one graph, which is replayed, and the solver's arithmetic of a
    few small kernels is launched between the replays. The host is done with a step of SD3.5-Large in 0.9 to 1.7 ms,
    where the GPU takes 20 to 87 ms, so that a graph of the whole loop would save nothing. It would have to be recorded
    anew for other noise levels, guidance or numbers of steps, and could not be stopped or changed between steps.
    """
    rows = []
    for name, solver in SOLVERS.items():
        beside = []
        if solver.is_stochastic:
            beside.append("fresh noise is drawn by the host")
        if name == "dpm_adaptive":
            beside.append("waits for the error of each step, which decides the next one")
        replays = "chosen by the solver" if solver.own_steps else str(solver.calls)
        rows.append((f"`{name}`", "step by step", replays, "; ".join(beside)))
    return "\n".join(markdown_table(("sampler", "graph", "replays a step", "beside the graph"), rows))


# ---- distance from the exact end


@torch.no_grad()
def errors(pipe: Pipeline, plan: Plan) -> Iterator[Point]:
    """The distance of every sampler that can go without fresh noise, for every number of steps.

    Exact is a run of heun with `plan.fine` steps of the schedule `normal`. CFG++ solves another equation, so it is left
    out, and so is what needs noise.
    """
    denoise, noise = _ode(pipe, plan)
    *_, exact = SOLVERS["heun"](denoise, noise, sigmas("normal", plan.fine, shift=pipe.shift))
    for name in plan.samplers:
        solver = SOLVERS[name]
        if solver.guided or (solver.is_stochastic and not solver.eta):
            continue
        for steps in plan.steps or (4, 6, 8, 12, 20, 30):
            yield _point(name, solver, denoise, noise, exact.x, steps, pipe.shift)


def _ode(pipe: Pipeline, plan: Plan) -> tuple[Callable[[Tensor, float], Tensor], Tensor]:
    """The guided prediction for some prompts, and the noise to start from."""
    texts = make_prompts(plan.prompts or 4, SEED, held_out=True)
    cond, uncond = (Branch(one) for one in (pipe.encode(texts), pipe.encode([""] * len(texts))))
    noise = pipe.noise(list(range(len(texts))), count=len(texts))
    return only_x0(cfg(pipe.predict, cond, uncond, plan.guidance)), noise.to(
        torch.promote_types(noise.dtype, torch.float32)
    )


def _point(name: str, solver: Solver, denoise: Any, noise: Tensor, exact: Tensor, steps: int, shift: float) -> Point:
    calls = 0

    def counted(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise(x, sigma)

    options: dict[str, Any] = {"eta": 0.0} if solver.eta else {}
    options |= {"shift": shift} if solver.shift else {}
    *_, last = solver(counted, noise, sigmas("normal", steps, shift=shift), **options)
    error = float((last.x - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return Point(name, steps, calls, error)


def _error(pipe: Pipeline, plan: Plan, folder: Path) -> list[Path]:
    points: list[Point] = []
    for point in errors(pipe, plan):
        points.append(point)
        _say(f"{point.sampler}, {point.steps} steps, {point.calls} calls: {point.error:.2e}")
        _json(folder / "error.json", plan, pipe, [asdict(one) for one in points])
    lines = {
        name: [(p.calls, p.error) for p in points if p.sampler == name]
        for name in dict.fromkeys(p.sampler for p in points)
    }
    families = {name: _FAMILIES[SOLVERS[name].run.__module__.rpartition(".")[2]] for name in lines}
    table = _text(folder / "error.md", _error_table(points))
    return [folder / "error.json", table, curves(lines, families, folder / "error.png")]


def _error_table(points: Sequence[Point]) -> str:
    steps = sorted({point.steps for point in points})
    rows = []
    for name in dict.fromkeys(point.sampler for point in points):
        found = {point.steps: point for point in points if point.sampler == name}
        cells = (f"{found[n].error:.1e} ({found[n].calls})" if n in found else "" for n in steps)
        rows.append((f"{name}{', eta 0' * SOLVERS[name].eta}", *cells))
    table = markdown_table(("sampler", *(f"{n} steps" for n in steps)), rows)
    return "\n".join(["Relative error of the final latent (calls of the model).", "", *table, ""])


# ---- statements that come true


def _accuracy(pipe: Pipeline, plan: Plan, folder: Path) -> list[Path]:
    steps = plan.steps[0] if plan.steps else 20
    cells = [
        (name, schedule, Setting("", steps, sampler=name, schedule=schedule))
        for name in plan.samplers
        for schedule in plan.schedules
    ]
    return _scored(pipe, plan, folder, "accuracy", cells, f"{steps} steps")


def _few_steps(pipe: Pipeline, plan: Plan, folder: Path) -> list[Path]:
    every, schedule = plan.steps or (2, 4, 6, 8, 12, 20), plan.schedules[0]
    cells = [
        (name, f"{steps}", Setting("", steps, sampler=name, schedule=schedule))
        for name in plan.samplers
        for steps in every
    ]
    return _scored(pipe, plan, folder, "steps", cells, f"by number of steps, schedule {schedule}")


def _scored(
    pipe: Pipeline, plan: Plan, folder: Path, name: str, cells: Sequence[tuple[str, str, Setting]], about: str
) -> list[Path]:
    """Score every cell (row, column, setting), and write the table and the heat map."""
    rows: list[dict[str, Any]] = []
    start, count = time.monotonic(), plan.prompts or 64
    for row, column, chosen in cells:
        slowest = max((one["seconds"] for one in rows), default=0.0)
        if time.monotonic() - start + slowest > 60 * plan.minutes:
            continue
        setting = replace(chosen, name=f"{row}, {column}", guidance=plan.guidance)
        found = evaluate(pipe, setting, count, 1, batch=plan.batch, pool=plan.pool)
        cell = {"row": row, "column": column, "macro": found.macro}
        rows.append(cell | {"by_kind": found.by_kind, "seconds": found.seconds})
        _say(f"{setting.name}: {100 * found.macro:.1f} % in {found.seconds:.0f} s")
        _json(folder / f"{name}.json", plan, pipe, rows)
    values = {(one["row"], one["column"]): one["macro"] for one in rows}
    title = f"statements that come true, in percent: {count} prompts, {about}"
    table = _text(folder / f"{name}.md", _heat_table(values, title))
    return [folder / f"{name}.json", table, heat_map(values, title, folder / f"{name}.png")]


def _heat_table(values: dict[tuple[str, str], float], title: str) -> str:
    columns = list(dict.fromkeys(column for _, column in values))
    rows = []
    for row in dict.fromkeys(row for row, _ in values):
        cells = (f"{100 * values[row, column]:.1f}" if (row, column) in values else "" for column in columns)
        rows.append((row, *cells))
    return "\n".join([title, "", *markdown_table(("sampler", *columns), rows), ""])


# ---- one page of pictures


def _page(pipe: Pipeline, plan: Plan, folder: Path) -> list[Path]:
    steps, pictures = plan.steps[0] if plan.steps else 20, {}
    draw = partial(pipe, PLAIN, num_inference_steps=steps, guidance_scale=plan.guidance, seed=0, progress=False)
    for name in plan.samplers:
        for schedule in plan.schedules:
            pictures[name, schedule] = draw(sampler=name, schedule=schedule).images[0]
        _say(f"{name}: drawn")
    title = f'"{PLAIN}", seed 0, {steps} steps, guidance {plan.guidance:g}; red with *: wrong on flows'
    wrong = [name for name in plan.samplers if not SOLVERS[name].fits_flows]
    return [page(pictures, title, folder / "page.png", wrong)]


# ---- writing


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _text(path: Path, text: str) -> Path:
    write_text(path, text)
    return path


def _json(path: Path, plan: Plan, pipe: Pipeline, rows: Sequence[dict[str, Any]]) -> None:
    about = {name: value for name, value in vars(plan).items() if name not in ("pool", "minutes")}
    about |= {"dtype": str(pipe.dtype).removeprefix("torch."), "device": pipe.device.type, "profile": pipe.profile.name}
    _text(path, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
