"""`mmdit convert`: write a checkpoint in another layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmdit.cli.console import say
from mmdit.cli.usage import DTYPES, dtype_name, usage_errors


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint to read, the one to write, and its layout and dtype."""
    parser.add_argument("source", help="a safetensors file or folder of any layout, or demo for the embedded model")
    parser.add_argument("target", help="a new folder, or a new .safetensors file for --layout single")
    parser.add_argument(
        "--layout",
        required=True,
        help="layout to write: official, diffusers, comfyui or single; of a LoRA file diffusers, kohya or comfyui",
    )
    dtype = "dtype that all tensors are cast to (default: none, every byte is kept)"
    parser.add_argument("--dtype", type=dtype_name, choices=DTYPES, help=dtype)


def run(options: argparse.Namespace) -> int:
    """Write the checkpoint and say where it is."""
    from mmdit.checkpoints.lora import is_lora_file
    from mmdit.checkpoints.write import OUT_LAYOUTS, convert
    from mmdit.cli.devices import dtype_of, path_of
    from samplers import pick

    if is_lora_file(options.source):
        say(f"wrote {_converted_lora(options)}")
        return 0
    with usage_errors():
        pick(dict.fromkeys(OUT_LAYOUTS), options.layout, "layout")
    source = path_of(options.source)
    say(f"wrote {convert(source, options.target, options.layout, dtype=dtype_of(options.dtype))}")
    return 0


def _converted_lora(options: argparse.Namespace) -> Path:
    """A LoRA in other names."""
    from typing import get_args

    from mmdit.checkpoints.lora_convert import LoraLayout, convert_lora
    from samplers import pick

    with usage_errors():
        pick(dict.fromkeys(get_args(LoraLayout)), options.layout, "layout")
        if options.dtype is not None:
            raise ValueError("--dtype is for checkpoints; a LoRA keeps its dtype")
    return convert_lora(options.source, options.target, options.layout)
