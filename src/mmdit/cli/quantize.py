"""`mmdit quantize`: a checkpoint in float8, with calibration where the recipe needs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdit.checkpoints.quantize import quantize_checkpoint
from mmdit.cli.devices import device_of, dtype_of
from mmdit.pipeline.calibration import calibrate
from mmdit.pipeline.pipeline import Pipeline
from quant.recipe import as_recipe
from quant.scaling import scale_of


def quantized(options: argparse.Namespace, note: Callable[[str], None]) -> str:
    """Write the quantized checkpoint and return one line that says what was written.

    Raises:
        ValueError: Prompts are given for a recipe without calibration, or missing for one with; see
            `quantize_checkpoint`.
    """
    recipe = as_recipe(options.recipe)
    settings: dict[str, Any] = {"spelling": options.spelling, "select": options.select}
    static = recipe.activation == "static"
    if static and options.prompts is None:
        raise ValueError(
            f"--recipe {options.recipe} needs --prompts FILE, a text file with a prompt in each line: it scales "
            "activations by the largest values that the transformer's Linears read while these prompts are drawn"
        )
    if options.prompts is not None and not static:
        raise ValueError(
            f"--prompts is for recipes with static scales; {options.recipe} scales activations in every call"
        )
    if Path(options.target).exists():  # before an hour of drawing, not after it
        raise FileExistsError(f"{options.target} exists already; give another place, or remove it first")
    if options.prompts is not None:
        scales = input_scales(options, recipe.activation_format, note)
        note(f"calibrated {len(scales)} Linears of the transformer; those of other models stay as they are")
        settings |= {"input_scales": scales, "select": options.select or list(scales)}
    progress = False if options.quiet else None
    return str(quantize_checkpoint(options.source, options.target, recipe, progress=progress, **settings))


def input_scales(options: argparse.Namespace, format: Any, note: Callable[[str], None]) -> dict[str, Tensor]:
    """The scale of the input of each of the transformer's Linears while the prompts are drawn, by "transformer.<name>".

    Raises:
        ValueError: The file of prompts is empty.
    """
    lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{options.prompts} holds no prompt; give one a line, some tens, like those to be drawn")
    source = Path(options.source)
    load = Pipeline.from_pretrained if source.is_dir() else Pipeline.from_single_file
    pipe = load(source, device=device_of(options.device), dtype=dtype_of(options.dtype))
    note(f"drawing {len(prompts)} prompts on {pipe.device}")
    seen = calibrate(pipe, prompts, options.steps, guidance_scale=options.guidance_scale, batch=1)
    return {f"transformer.{name}": scale_of(amax, format) for name, amax in seen.amax(options.percentile).items()}
