"""A note before a run that takes long: on a CPU, models of official size take minutes to hours."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable

import torch

from mmdit.cli.console import Note
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from samplers import SOLVERS

_LONG = 120.0  # runs of more seconds are announced
_SMALL = 3e8  # transformers with fewer parameters are not timed


def note_long_run(pipe: Pipeline, ask: Namespace, pictures: int, note: Note) -> None:
    """Say how long the transformer will take for the pictures of `mmdit generate` on a CPU, if that is long."""
    model = pipe.transformer
    if pipe.device.type != "cpu" or sum(parameter.numel() for parameter in model.parameters()) < _SMALL:
        return
    profile, config = pipe.profile, model.config
    default = (config.sample_size or 128) * pipe.vae.config.downscale
    steps = ask.steps or profile.steps
    scale = profile.guidance_scale if ask.guidance_scale is None else ask.guidance_scale
    branches = 2 if scale != 1 else 1
    calls = steps * pictures * SOLVERS[ask.sampler or profile.sampler].calls
    side = int(((ask.height or default) * (ask.width or default)) ** 0.5)
    seconds = calls * seconds_of(model, side, branches, pipe.dtype)
    if seconds > _LONG:
        note(
            f"on this CPU {pictures} pictures of {steps} steps will take about {duration(seconds)}, judged by the "
            "speed of one matrix product; a GPU (--device cuda), fewer --steps or a smaller --height and --width help"
        )


def seconds_of(model: MMDiT, size: int, batch: int, dtype: torch.dtype, *, text: int = 333) -> float:
    """Estimate the seconds of a step on this CPU: its operations divided by the measured speed of a matrix product."""
    from mmdit.bench.step import Work

    work = Work.of(model, size, text, batch)
    return (work.linear_flops + work.other_flops) / _flops_per_second(dtype)


def duration(seconds: float) -> str:
    """Seconds in words: "40 minutes"."""
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"


def _flops_per_second(dtype: torch.dtype, size: int = 768) -> float:
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2.0 * size**3 / min(_seconds(lambda: a @ b) for _ in range(3))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
