"""What a training step of a ControlNet costs: `python -m mmdit.demo.bench_control --device cuda`, in half a minute.

Each row is a profile and a way to compute steps: eager, recorded as CUDA graphs, and recorded with compiled blocks.
Steps are those of `mmdit.demo.train_control`, with drawing of batches, clipping, optimizer and averages; pictures and
hints are noise. All ways begin with the same weights and batches, so that their losses are close.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmdit.demo.control_data import Data, encoded, vague_caption
from mmdit.demo.control_recipe import GPU, ControlRecipe
from mmdit.demo.control_step import Stepper, trainer_of
from mmdit.demo.scenes import sample
from mmdit.demo.train_control import KINDS
from mmdit.embedded import CANNY_NET, EMBEDDED
from mmdit.models.controlnet import ControlKind
from mmdit.pipeline.control_inputs import hint_rules
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import PROFILES
from mmdit.training import control

__all__ = ["main"]

WAYS = {"eager": (False, False), "recorded": (True, False), "compiled": (True, True)}  # whether recorded, compiled


def noise_data(pipe: Pipeline, kind: ControlKind, count: int, recipe: ControlRecipe) -> Data:
    """Noise of the shapes of a net's pictures and hints, with captions, on the pipeline's device."""
    g, side = torch.Generator(pipe.device).manual_seed(0), pipe.transformer.config.sample_size or 16

    def latents() -> Tensor:
        return torch.randn(count, 16, side, side, generator=g, device=pipe.device)

    config, rng = control.new_config(pipe.transformer, 1, kind), random.Random(0)
    values: set[str] = {hint_rules(config, PROFILES[name]).values for name in recipe.profiles}
    captions = [vague_caption(scene, rng) for scene in sample(64, 0).words()]
    texts, nothing = encoded(pipe, captions), encoded(pipe, [""])
    which = torch.arange(count, device=pipe.device) % len(captions)
    hints = {one: (latents(), torch.ones(count, 16, side, side, device=pipe.device)) for one in sorted(values)}
    return Data(latents(), hints, texts[0][which], texts[1][which], nothing)


def rows(
    pipe: Pipeline, kind: ControlKind, recipe: ControlRecipe, ways: Sequence[str], steps: int
) -> Iterator[tuple[str, ...]]:
    """Cells of the table; a way that fails is reported as failed, with the first line of its error."""
    data = noise_data(pipe, kind, 4 * recipe.batch, recipe)
    for way in ways:
        recorded, compiled = WAYS[way]
        chosen = replace(recipe, recorded=recorded, compiled=compiled)
        torch.manual_seed(0)
        try:
            stepper = Stepper(trainer_of(pipe, kind, chosen, CANNY_NET.parent), "together", data, chosen)
            for name in dict.fromkeys(recipe.profiles):
                first, ms, loss = _timed(stepper, name, steps)
                yield way, name, f"{first:.1f}", f"{ms:.2f}", f"{loss:.4f}", f"{_gib(pipe.device):.1f}"
        except RuntimeError as error:
            yield way, "failed", str(error).partition("\n")[0], "", "", ""


def _timed(stepper: Stepper, profile: str, steps: int) -> tuple[float, float, float]:
    """Seconds of the first step, milliseconds of a further one, and the last loss."""
    started = time.monotonic()
    stepper.step(PROFILES[profile], 1e-4).item()
    first = time.monotonic()
    losses = [stepper.step(PROFILES[profile], 1e-4) for _ in range(steps)]
    loss = losses[-1].item()
    return first - started, 1000 * (time.monotonic() - first) / steps, loss


def _gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


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
    print("| way | profile | first step, s | ms a step | loss | peak GiB |\n|---|---|---|---|---|---|")  # noqa: T201
    for cells in rows(pipe, options.kind, recipe, options.ways, options.steps):
        print("| " + " | ".join(cells) + " |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
