"""`mmdit merge`: write a checkpoint with LoRAs merged into its weights."""

from __future__ import annotations

import argparse

from mmdit.cli.console import say
from mmdit.cli.loras import lora_option
from mmdit.cli.usage import usage_errors


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the LoRAs, the checkpoint that is written, and how files are read."""
    add = parser.add_argument
    add("base", help="safetensors file or folder of any layout, or demo for the embedded model")
    files = "LoRA files, merged in this order, with their weights on the transformer and the text encoders (default: 1)"
    add("loras", nargs="+", type=lora_option, metavar="LORA[:WEIGHT[:TEXT_WEIGHT]]", help=files)
    add("target", help="a new .safetensors file, or, for a folder, a new folder in the same layout")
    profile = "diffusers, comfyui, reference: the program whose reading of LoRA files to follow (default: diffusers)"
    add("--profile", metavar="NAME", default="diffusers", help=profile)
    rounding = "rounding of float8 weights: nearest, comfyui, comfyui-new-scale (default: the profile's)"
    add("--rounding", metavar="NAME", help=rounding)


def run(options: argparse.Namespace) -> int:
    """Write the checkpoint and say where it is."""
    from typing import get_args

    from mmdit.checkpoints.lora import load_lora
    from mmdit.checkpoints.lora_checkpoint import Strengths, merge_checkpoint
    from mmdit.checkpoints.lora_merge import Rounding
    from mmdit.checkpoints.lora_rules import rules_of
    from mmdit.cli.devices import path_of
    from samplers import pick

    with usage_errors():
        rules_of(options.profile)
        if options.rounding is not None:
            pick(dict.fromkeys(get_args(Rounding)), options.rounding, "rounding")
    loras = [(load_lora(one.file, options.profile), Strengths(one.weight, one.text_weight)) for one in options.loras]
    say(f"wrote {merge_checkpoint(path_of(options.base), loras, options.target, rounding=options.rounding)}")
    return 0
