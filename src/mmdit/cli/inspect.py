"""`mmdit inspect`: say what a checkpoint holds, or how a picture was drawn."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mmdit.cli.console import say
from mmdit.cli.usage import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the path of the checkpoint or picture."""
    what = "a safetensors file (a LoRA too), a shard index, a folder, a PNG that mmdit wrote, or demo for the embedded "
    what += "model"
    parser.add_argument("path", help=what)
    model = "for a LoRA file: the checkpoint that it is held against, for norms of its changes"
    parser.add_argument("--model", metavar="PATH", help=model)


def run(options: argparse.Namespace) -> int:
    """Print the description of a checkpoint or the settings of a picture; 1 where the loader refuses the checkpoint."""
    path = Path(options.path)
    if path.suffix.lower() == ".png" and not path.is_dir():
        from mmdit.pipeline.settings import read_settings

        shows_all = (sys.stdout.encoding or "").lower().startswith("utf")
        say(json.dumps(read_settings(path), indent=2, ensure_ascii=not shows_all))
        return 0
    from mmdit.checkpoints.lora import is_lora_file
    from mmdit.cli.devices import path_of

    if is_lora_file(path):
        from mmdit.checkpoints.lora_describe import describe_lora

        say(describe_lora(path, model=None if options.model is None else path_of(options.model)))
        return 0
    if options.model is not None:
        raise UsageError(f"--model goes with a LoRA file, and {path} is none")
    from mmdit.checkpoints.describe import inspect

    found = inspect(path_of(options.path))
    say(found.text)
    return 1 if found.problems else 0
