"""A note before a run that takes long: on a CPU, models of official size take minutes to hours."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from samplers import SOLVERS

_LONG = 120.0  # runs of more seconds are announced
_SMALL = 3e8  # transformers with fewer parameters are not timed


def note_long_run(
    pipe: Pipeline, ask: Namespace, arguments: Mapping[str, Any], pictures: int, note: Callable[[str], object]
) -> None:
    """Say how long the transformer will take for the pictures of `mmdit generate` on a CPU, if that is long.

    Args:
        pipe: the pipeline.
        ask: the options of the command line, filled in.
        arguments: further arguments of the call of the pipeline, about pictures, ControlNets and a second pass.
        pictures: number of pictures.
        note: prints a note.
    """
    model = pipe.transformer
    if pipe.device.type != "cpu" or sum(parameter.numel() for parameter in model.parameters()) < _SMALL:
        return
    passes = list(passes_of(pipe, ask, arguments))
    seconds = pictures * sum(
        one.calls * seconds_of(model, one.side, one.branches, pipe.dtype) * one.nets for one in passes
    )
    if seconds > _LONG:
        note(
            f"on this CPU {pictures} pictures of {' + '.join(str(one.steps) for one in passes)} steps will take about "
            f"{duration(seconds)}, judged by the speed of one matrix product; a GPU (--device cuda), fewer --steps or "
            "a smaller --height and --width help"
        )


class Pass(NamedTuple):
    """A pass of sampling, as far as its time depends on it."""

    steps: int
    calls: int  # of the transformer
    side: int  # of a square picture with as many pixels
    branches: int  # in each call
    nets: float  # the time of transformer and ControlNets, as a multiple of the transformer's


def passes_of(pipe: Pipeline, ask: Namespace, arguments: Mapping[str, Any]) -> Iterator[Pass]:
    """The passes of a drawing: steps that a strength leaves, branches of the guidance, and the work of ControlNets."""
    profile, model = pipe.profile, pipe.transformer
    default = (model.config.sample_size or 128) * pipe.vae.config.downscale
    side = ((ask.height or default) * (ask.width or default)) ** 0.5
    scale = profile.guidance_scale if ask.guidance_scale is None else ask.guidance_scale
    from_picture, hires = arguments.get("image") is not None, arguments.get("hires")
    strength = arguments.get("strength") if from_picture else None
    strength = profile.strength if from_picture and strength is None else strength
    steps = ask.steps or (profile.image_steps if from_picture else None) or profile.steps
    passes = [(steps, strength, side, ask.sampler)]
    if hires is not None:
        passes.append((hires.steps or steps, hires.strength, side * hires.scale, hires.sampler or ask.sampler))
    nets = arguments.get("controlnet") or ()
    windows = [arguments[name] for name in ("control_guidance_start", "control_guidance_end")] if nets else [(), ()]
    shares = [end - start for start, end in zip(*windows, strict=True)]
    share = sum(net.config.depth * part for net, part in zip(nets, shares, strict=True)) / model.config.depth
    for count, kept, wide, sampler in passes:
        solver = SOLVERS[sampler or profile.sampler]
        done = len(pipe.sigmas(count, ask.schedule, sampler=sampler, strength=kept)) - 1
        branches = 2 if profile.reads_negative(scale) or solver.guided else 1
        yield Pass(done, done * solver.calls, int(wide), branches, 1 + share)


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
