"""What `mmdit bench` does: steps, layers, pictures, samplers; each yields the lines to print."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mmdit.bench import layers as bench_layers
from mmdit.bench import picture as bench_picture
from mmdit.bench import step as bench
from mmdit.bench.samplers import MEASURES, Plan, measure
from mmdit.cli.devices import device_of, dtype_of
from mmdit.demo.data import workers
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.pipeline import Pipeline
from mmdit.utils import whole
from samplers import pick

Note = Callable[[str], None]


def _steps(options: Namespace, note: Note) -> Iterator[str]:
    sizes = {"size": options.size, "text": options.text, "batch": options.batch}
    work, rows = bench.work_of(options.model, **sizes), []
    for row in bench.bench(
        options.model,
        **sizes,
        recipes=options.quant,
        against=options.against,
        compiled=not options.eager,
        only=options.only,
        repeats=options.repeats,
        **_where(options),
    ):
        rows.append(row)
        note(f"{row.name}: {row.milliseconds:.1f} ms")
        if options.output is not None:
            bench.save(Path(options.output), work, rows)
    yield bench.table(work, rows)


def _layers(options: Namespace, note: Note) -> Iterator[str]:
    shapes = bench_layers.shapes_of(options.model, options.size, options.text, options.batch)
    yield bench_layers.table(list(bench_layers.layers(shapes, options.quant, **_where(options))))


def _picture(options: Namespace, note: Note) -> Iterator[str]:
    rows = []
    for row in bench_picture.pictures(
        options.model,
        options.quant,
        steps=options.steps,
        size=options.size,
        compiled=not options.eager,
        against=options.against,
        **_where(options),
    ):
        rows.append(row)
        note(f"{row.name}: {row.seconds['picture']:.2f} s")
    yield bench_picture.table(rows)


def _where(options: Namespace) -> dict[str, Any]:
    return {"device": device_of(options.device), "dtype": dtype_of(options.dtype)}


def _samplers(options: Namespace, note: Note) -> Iterator[str]:
    """Measure; yields a line for each file that is written.

    Args:
        options: of the command line.

    Raises:
        ValueError, OSError, ImportError: one sentence that says what is wrong; before anything is measured.
    """
    for name in options.measure:
        pick(dict.fromkeys(MEASURES), name, "measure")
    for option in ("prompts", "fine", "batch", "workers"):
        if (value := getattr(options, option)) is not None:
            whole(f"--{option}", value, 1)
    for steps in options.steps or ():
        whole("--steps", steps, 1)
    plan = _plan(options)

    @cache
    def load() -> Pipeline:
        device, dtype = device_of(options.device), dtype_of(options.dtype)
        model = EMBEDDED if options.model is None else options.model
        return Pipeline.from_pretrained(model, device=device, dtype=dtype, profile=options.profile)

    with workers(options.workers) if options.workers else nullcontext() as pool:
        for name in options.measure:
            for path in measure(name, load, replace(plan, pool=pool), Path(options.output)):
                yield f"wrote {path}"


def _plan(options: Namespace) -> Plan:
    return Plan(
        samplers=tuple(options.samplers or Plan.samplers),
        schedules=tuple(options.schedules or Plan.schedules),
        steps=None if options.steps is None else tuple(options.steps),
        prompts=options.prompts,
        guidance=options.guidance_scale,
        fine=options.fine,
        batch=options.batch,
        minutes=options.minutes,
    )


BENCHES = {"steps": _steps, "layers": _layers, "picture": _picture, "samplers": _samplers}
