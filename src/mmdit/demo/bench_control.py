"""What a training step of a ControlNet costs: `python -m mmdit.demo.bench_control --device cuda`, in half a minute.

Each row is a profile and a way to compute steps: eager, recorded as CUDA graphs, and recorded with compiled blocks.
Steps are those of `mmdit.demo.train_control`, on scenes of its kind, with drawing of batches, clipping, optimizer and
averages; they train the shipped net further. All ways begin with the same weights and batches, so that their losses are
close. The column "left out" counts the batches without finite gradients, and "peak GiB" is the most memory of the
device that was allocated since its way began.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mmdit.demo.control_data import Data, make_data
from mmdit.demo.control_recipe import GPU, ControlRecipe
from mmdit.demo.control_step import Stepper, trainer_of
from mmdit.demo.train_control import KINDS
from mmdit.embedded import CANNY_NET, EMBEDDED
from mmdit.models.controlnet import ControlKind
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import PROFILES
from mmdit.training.journal import Journal

__all__ = ["main"]

RATE = 1e-4
WAYS = {"eager": (False, False), "recorded": (True, False), "compiled": (True, True)}  # whether recorded, compiled


def _data(pipe: Pipeline, kind: ControlKind, recipe: ControlRecipe) -> Data:
    """Scenes for four batches, encoded as those of a training."""
    with TemporaryDirectory() as folder:
        return make_data(pipe, kind, replace(recipe, scenes=4 * recipe.batch), Journal(Path(folder), quiet=True))


def rows(
    pipe: Pipeline, kind: ControlKind, recipe: ControlRecipe, ways: Sequence[str], steps: int
) -> Iterator[tuple[str, ...]]:
    """Cells of the table; a way that fails is reported as failed, with the first line of its error."""
    data = _data(pipe, kind, recipe)
    for way in ways:
        _start_peak(pipe.device)
        try:
            yield from _rows_of(pipe, kind, recipe, way, data, steps)
        except (RuntimeError, ValueError) as error:
            yield way, "failed", str(error).partition("\n")[0], "", "", "", ""


def _rows_of(
    pipe: Pipeline, kind: ControlKind, recipe: ControlRecipe, way: str, data: Data, steps: int
) -> Iterator[tuple[str, ...]]:
    """Cells of one way, whose net, states and graphs are freed at the end."""
    recorded, compiled = WAYS[way]
    chosen = replace(recipe, recorded=recorded, compiled=compiled)
    torch.manual_seed(0)
    stepper = Stepper(trainer_of(pipe, kind, chosen, CANNY_NET.parent), "together", data, chosen)
    for name in dict.fromkeys(recipe.profiles):
        first, ms, loss, left_out = _timed(stepper, name, steps)
        yield way, name, f"{first:.1f}", f"{ms:.2f}", f"{loss:.4f}", f"{left_out}", f"{_gib(pipe.device):.1f}"


def _timed(stepper: Stepper, profile: str, steps: int) -> tuple[float, float, float, int]:
    """Seconds of the first step, milliseconds of a further one, the mean loss, and how many batches were left out."""
    started, before = time.monotonic(), int(stepper.left_out)
    stepper.step(PROFILES[profile], RATE).item()
    first = time.monotonic()
    losses = [stepper.step(PROFILES[profile], RATE).clone() for _ in range(steps)]
    loss = torch.stack(losses).mean().item()
    ms = 1000 * (time.monotonic() - first) / steps
    return first - started, ms, loss, int(stepper.left_out) - before


def _start_peak(device: torch.device) -> None:
    """Free what the way before has left, and measure the peak of a GPU anew."""
    gc.collect()  # compiled modules are in reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: prints a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kind", choices=KINDS, default="canny")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager", "recorded"])
    parser.add_argument("--batch", type=int, default=GPU.batch)
    parser.add_argument("--steps", type=int, default=100, help="timed, for each profile")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    pipe = Pipeline.from_pretrained(EMBEDDED, device=options.device, dtype=torch.float32)
    recipe = replace(GPU, batch=options.batch)
    print("| way | profile | first step, s | ms a step | loss | left out | peak GiB |\n|---|---|---|---|---|---|---|")  # noqa: T201
    for cells in rows(pipe, options.kind, recipe, options.ways, options.steps):
        print("| " + " | ".join(cells) + " |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
