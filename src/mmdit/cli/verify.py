"""`mmdit verify`: compare a checkpoint with diffusers on the same weights."""

from __future__ import annotations

import argparse

from mmdit.cli.console import say
from mmdit.cli.usage import dtype_name


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and how it is compared."""
    say = parser.add_argument
    say("folder", help="checkpoint to verify: a folder or file of any layout, or demo for the embedded model")
    say("--device", default="cpu", help="(default: %(default)s)")
    wide = ("float32", "float64")
    say("--dtype", type=dtype_name, default="float32", choices=wide, help="(default: %(default)s)")
    say("--steps", type=int, default=3, metavar="N", help="sampler steps to compare (default: %(default)s)")
    say("--json", action="store_true", help="print everything as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the comparison; exit code 1 where a stage is beyond its limit."""
    import torch

    from mmdit.cli.devices import device_of, path_of
    from mmdit.cli.usage import usage_errors
    from mmdit.parity.verify import verify
    from mmdit.utils import whole

    with usage_errors():
        whole("--steps", options.steps, 1)
    dtype: torch.dtype = getattr(torch, options.dtype)
    found = verify(path_of(options.folder), device=device_of(options.device), dtype=dtype, steps=options.steps)
    say(found.to_json() if options.json else found)
    return 0 if found.passed else 1
