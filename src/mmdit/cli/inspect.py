"""`mmdit inspect`: say what a checkpoint holds, or how a picture was drawn."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mmdit.cli.console import say


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the path of the checkpoint or picture."""
    what = "a safetensors file, a shard index, a folder, a PNG that mmdit wrote, or demo for the embedded model"
    parser.add_argument("path", help=what)


def run(options: argparse.Namespace) -> int:
    """Print the description of a checkpoint or the settings of a picture; 1 where the loader refuses the checkpoint."""
    path = Path(options.path)
    if path.suffix.lower() == ".png" and not path.is_dir():
        from mmdit.pipeline.settings import read_settings

        shows_all = (sys.stdout.encoding or "").lower().startswith("utf")
        say(json.dumps(read_settings(path), indent=2, ensure_ascii=not shows_all))
        return 0
    from mmdit.checkpoints.describe import inspect
    from mmdit.cli.devices import path_of

    found = inspect(path_of(options.path))
    say(found.text)
    return 1 if found.problems else 0
