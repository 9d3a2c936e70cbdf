"""`mmdit quantize`: write a checkpoint in float8, with calibration where the recipe needs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit.cli.console import Note, note_of, say
from mmdit.cli.usage import DTYPES, UsageError, dtype_name, usage_errors

if TYPE_CHECKING:
    from torch import Tensor


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint that is read, the one that is written, and the recipe."""
    say = parser.add_argument
    source = "safetensors file or folder of any layout, or demo; all models in it are written"
    say("source", help=source)
    say("target", help="a new .safetensors file, or, for a folder, a new folder in the same layout")
    recipes = "fp8, fp8-tensor, fp8-static, fp8-weight-only, fp8-e5m2 (default: %(default)s, the one for ComfyUI)"
    say("--recipe", default="fp8-tensor", metavar="NAME", help=recipes)
    spelling = "how scales are written: comfyui, or comfyui-old for versions of before late 2025 (default: %(default)s)"
    say("--spelling", default="comfyui", metavar="NAME", help=spelling)
    select = "names of Linears, such as 'joint_blocks.*' or 't5.*' (default: the large ones of transformer and T5)"
    say("--select", nargs="+", metavar="GLOB", help=select)
    static = parser.add_argument_group("calibration, for fp8-static")
    static.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line, some tens")
    static.add_argument("--steps", type=int, metavar="N", help="as pictures will be drawn (default: the profile's)")
    static.add_argument("--guidance-scale", "--cfg", type=float, metavar="X", help="likewise")
    percentile = "of absolute values that the scales reach (default: 100, all)"
    static.add_argument("--percentile", type=float, default=100.0, metavar="X", help=percentile)
    static.add_argument("--device", metavar="NAME", help="(default: cuda where there is one)")
    static.add_argument(
        "--dtype", type=dtype_name, choices=DTYPES, help="to draw in (default: float32 on the CPU, else bfloat16)"
    )
    say("--quiet", action="store_true", help="no progress bar and no notes")


def run(options: argparse.Namespace) -> int:
    """Write the checkpoint and say what was done."""
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
            f"--recipe {options.recipe} needs --prompts FILE, a text file with a prompt in each line: it scales "
            "activations by the largest values that the transformer's Linears read while these prompts are drawn"
        )
    if options.prompts is not None and not static:
        raise UsageError(
            f"--prompts is for recipes with static scales; {options.recipe} scales activations in every call"
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
    from mmdit.cli.devices import device_of, dtype_of, load
    from mmdit.cli.drawing import read_prompts
    from mmdit.pipeline.calibration import calibrate
    from quant.scaling import scale_of

    prompts = read_prompts(options.prompts, note)
    device = device_of(options.device)
    pipe = load(options.source, device=device, dtype=dtype_of(options.dtype, device))
    note(f"drawing {len(prompts)} prompts on {pipe.device}")
    seen = calibrate(pipe, prompts, options.steps, guidance_scale=options.guidance_scale, batch=1)
    return {f"transformer.{name}": scale_of(amax, format) for name, amax in seen.amax(options.percentile).items()}
