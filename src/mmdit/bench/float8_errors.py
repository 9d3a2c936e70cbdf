"""Where the error of the float8 model comes from: `python -m mmdit.bench.float8_errors --seconds 150`.

The first table rounds weights alone, activations alone and both, with nearest rounding and by second moments, with and
without folded means. The second trains for a short time with several settings. Both compare the drawings of held-out
prompts with those of the model in 16 bits: medians over drawings of the SNR of latents and of the PSNR of pictures.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.bench.metrics import psnr
from mmdit.demo.captions import prompts
from mmdit.demo.evaluate import MAIN
from mmdit.demo.train_float8 import CPU, Float8Recipe, calibrated, closeness, drawn, input_scales, student_of
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.calibration import Calibration
from mmdit.pipeline.pipeline import Pipeline
from mmdit.training.distil import distil, states_of
from mmdit.training.journal import mean_of
from mmdit.utils import markdown_table
from quant.quantize import dequantize_, quantize_
from quant.recipe import Recipe
from quant.scaling import from_codes, to_codes
from quant.training import quantize_trained_

__all__ = ["TRIALS", "main", "rounding_table", "training_table"]

# Settings of short trainings; those of `Float8Recipe` are the first.
TRIALS: tuple[Mapping[str, Any], ...] = (
    {},
    {"along": 1},
    {"along": 20},
    {"rate": 5e-6},
    {"rate": 4e-5},
    {"rate": 6e-5, "along": 1},
)


@contextmanager
def rounded_inputs(model: nn.Module, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the inputs of the named Linears are rounded to E4M3 with these scales and stay in the model's dtype."""

    def rounding(scale: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            return from_codes(to_codes(args[0], scale, "e4m3"), "e4m3", args[0].dtype) * scale

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(rounding(scale)) for name, scale in scales.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compared(pipe: Pipeline, base: Tensor, model: MMDiT, recipe: Float8Recipe) -> tuple[float, float]:
    """Medians over drawings: the SNR of latents and the PSNR of pictures, in dB."""
    latents = drawn(pipe, model, recipe)
    ratios = [
        psnr(*((pipe.vae.decode(part).float() / 2 + 0.5).clamp(0, 1) for part in pair))
        for pair in zip(latents.split(64), base.split(64), strict=True)
    ]
    return closeness(base, latents), float(torch.cat(ratios).median())


def rounding_table(
    pipe: Pipeline, parts: Sequence[tuple[str, MMDiT, Calibration]], base: Tensor, recipe: Float8Recipe
) -> list[tuple[str, ...]]:
    """Rows of folding, weights, activations and both medians, for models with their calibrations."""
    rows = []
    weight_only = Recipe(granularity="tensor", activation="none")
    both = Recipe(granularity="tensor", activation="static")
    for (name, model, seen), weights, rounds in itertools.product(
        parts, ("16 bits", "nearest", "by moments"), (False, True)
    ):
        scales = input_scales(seen)
        student = copy.deepcopy(model)
        moments = seen.moments() if weights == "by moments" else None
        if weights != "16 bits":
            given: dict[str, Any] = {"input_scales": scales} if rounds else {}
            quantize_(student, both if rounds else weight_only, moments=moments, **given)
            dequantize_(student)
        with rounded_inputs(student, scales if rounds else {}):
            close = compared(pipe, base, student, recipe)
        rows.append((name, weights, "E4M3" if rounds else "16 bits", *(f"{value:.2f}" for value in close)))
    return rows


def training_table(
    pipe: Pipeline,
    folded: MMDiT,
    seen: Calibration,
    base: Tensor,
    recipe: Float8Recipe,
    seconds: float,
    name: str = "fp8-static",
    trials: Sequence[Mapping[str, Any]] = TRIALS,
) -> list[tuple[str, ...]]:
    """Rows of settings, steps, losses and both medians; each training takes its share of the seconds."""
    teacher = pipe.transformer
    texts = prompts(min(recipe.prompts, 1024), 31, held_out=False)  # enough for short trainings
    given: dict[str, Any] = {"num_inference_steps": recipe.steps, "guidance_scale": MAIN.guidance}
    states = states_of(pipe, texts, **given, seed=10_000, batch=recipe.drawn).with_velocities(teacher, recipe.drawn)
    rows = []
    for trial in trials:
        one = replace(recipe, **trial)
        start = copy.deepcopy(folded)
        quantize_(start, name, input_scales=input_scales(seen), moments=seen.moments())
        student = student_of(start, name)
        settings: dict[str, Any] = {"rate": one.rate, "batch": one.batch, "along": one.along}
        losses = [found.loss for found in distil(student, teacher, states, seconds=seconds / len(trials), **settings)]
        student.requires_grad_(False)
        quantize_trained_(student)
        few = max(1, len(losses) // 10)
        close = compared(pipe, base, student, recipe)
        told = ", ".join(f"{key} {value}" for key, value in trial.items()) or "as in train_float8"
        fall = f"{mean_of(losses[:few]):.4f} to {mean_of(losses[-few:]):.4f}"
        rows.append((told, str(len(losses)), fall, *(f"{value:.2f}" for value in close)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mmdit.bench.float8_errors", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="of all short trainings; 0 for none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="in 16 bits (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")  # the mantissa of TF32 holds every float8 code
    _report(options.model, options.device, options.seconds, CPU if options.device == "cpu" else Float8Recipe())
    return 0


def _report(folder: Path, device: str, seconds: float, recipe: Float8Recipe) -> None:
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)  # noqa: T201

    pipe = Pipeline.from_pretrained(folder, device=device, dtype=torch.float32)
    pipe.transformer.requires_grad_(False)
    plain, folded = calibrated(pipe, recipe)
    base = drawn(pipe, pipe.transformer, recipe)
    say("calibrated")
    medians = ("SNR of latents, dB", "PSNR, dB")
    parts = [("no", pipe.transformer, plain), ("means", *folded)]
    rows = rounding_table(pipe, parts, base, recipe)
    say("\n" + "\n".join(markdown_table(("folded", "weights", "activations", *medians), rows)))
    if seconds > 0:
        rows = training_table(pipe, *folded, base, recipe, seconds)
        say("\n" + "\n".join(markdown_table(("training", "steps", "loss", *medians), rows)))


if __name__ == "__main__":
    raise SystemExit(main())
