"""What `mmdit bench samplers` does: a plan from the options, and the measures one after the other."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

from mmdit.arguments import whole
from mmdit.bench_samplers import MEASURES, Plan, measure
from mmdit.cli import device_of, dtype_of
from mmdit.demo import EMBEDDED
from mmdit.demo.data import workers
from mmdit.pipeline import Pipeline
from samplers import pick


def benched(options: Namespace) -> Iterator[str]:
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
