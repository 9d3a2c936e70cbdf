"""`mmdit quantize`: write a checkpoint in float8, with calibration where the recipe needs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit.cli.console import Note, note_of, say
from mmdit.cli.usage import DEFAULT_DEVICE, DEFAULT_DTYPE, DTYPES, QUIET, UsageError, dtype_name, usage_errors

if TYPE_CHECKING:
    from torch import Tensor


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint to read, the one to write, the recipe, and the options of calibration."""
    say = parser.add_argument
    source = "a safetensors file or folder of any layout, or demo; all models in it are written"
    say("source", help=source)
    say("target", help="a new .safetensors file, or, for a folder, a new folder in the same layout")
    recipes = "fp8, fp8-tensor, fp8-static, fp8-weight-only, fp8-e5m2 (default: %(default)s, which ComfyUI reads)"
    say("--recipe", default="fp8-tensor", metavar="NAME", help=recipes)
    spelling = "spelling of the scales: comfyui, or comfyui-old for ComfyUI before late 2025 (default: %(default)s)"
    say("--spelling", default="comfyui", metavar="NAME", help=spelling)
    select = "globs over names of Linears, such as 'joint_blocks.*' or 't5.*' (default: the large Linears of "
    select += "transformer and T5)"
    say("--select", nargs="+", metavar="GLOB", help=select)
    static = parser.add_argument_group("calibration, for fp8-static")
    static.add_argument("--prompts", metavar="FILE", help="a text file with some tens of prompts, one per line")
    steps = "number of sampler steps; take the number that you will draw with (default: the profile's)"
    static.add_argument("--steps", type=int, metavar="N", help=steps)
    scale = "guidance scale; take the one that you will draw with (default: the profile's)"
    static.add_argument("--guidance-scale", "--cfg", type=float, metavar="X", help=scale)
    percentile = "percentile of the absolute inputs that the scales cover (default: 100, all of them)"
    static.add_argument("--percentile", type=float, default=100.0, metavar="X", help=percentile)
    static.add_argument("--device", metavar="NAME", help=f"cpu, cuda, cuda:1 ... {DEFAULT_DEVICE}")
    dtype = f"dtype of weights and arithmetic {DEFAULT_DTYPE}"
    static.add_argument("--dtype", type=dtype_name, choices=DTYPES, help=dtype)
    say("--quiet", action="store_true", help=QUIET)


def run(options: argparse.Namespace) -> int:
    """Write the checkpoint and print a line about it."""
    say(f"wrote {quantized(options, note_of(options))}")
    return 0


def quantized(options: argparse.Namespace, note: Note) -> str:
    """Write the quantized checkpoint and return one line that says what was written.

    Raises:
        ValueError: Prompts are given for a recipe without calibration, or missing for one with; see
            `quantize_checkpoint`.
    """
    from mmdit.checkpoints.quantize import quantize_checkpoint
    from mmdit.cli.devices import path_of
    from quant.recipe import as_recipe

    with usage_errors():
        recipe = as_recipe(options.recipe)
    settings: dict[str, Any] = {"spelling": options.spelling, "select": options.select}
    static = recipe.activation == "static"
    if static and options.prompts is None:
        raise UsageError(
            f"--recipe {options.recipe} needs --prompts FILE, a text file with one prompt per line: its activation "
            "scales are the largest inputs of the transformer's Linears while these prompts are drawn"
        )
    if options.prompts is not None and not static:
        raise UsageError(
            f"--prompts is for recipes with static scales; {options.recipe} finds its scales in every call"
        )
    if Path(options.target).exists():  # before an hour of drawing, not after it
        raise FileExistsError(f"{options.target} exists already; give another place, or remove it first")
    if options.prompts is not None:
        scales = input_scales(options, recipe.activation_format, note)
        note(f"calibrated {len(scales)} Linears of the transformer; those of other models stay as they are")
        settings |= {"input_scales": scales, "select": options.select or list(scales)}
    progress = False if options.quiet else None
    return str(quantize_checkpoint(path_of(options.source), options.target, recipe, progress=progress, **settings))


def input_scales(options: argparse.Namespace, format: Any, note: Note) -> dict[str, Tensor]:
    """The scale of the input of each of the transformer's Linears while the prompts are drawn, by "transformer.<name>".

    Raises:
        ValueError: The file of prompts is empty.
    """
    from mmdit.cli.devices import load, place_of
    from mmdit.cli.drawing import read_prompts
    from mmdit.pipeline.calibration import calibrate
    from quant.scaling import scale_of

    prompts = read_prompts(options.prompts, note)
    device, dtype = place_of(options.device, options.dtype, note)
    pipe = load(options.source, device=device, dtype=dtype)
    note(f"drawing {len(prompts)} prompts on {pipe.device}")
    seen = calibrate(pipe, prompts, options.steps, guidance_scale=options.guidance_scale, batch=1)
    return {f"transformer.{name}": scale_of(amax, format) for name, amax in seen.amax(options.percentile).items()}
