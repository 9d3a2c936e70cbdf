"""`mmdit verify`: compare a checkpoint with diffusers on the same weights."""

from __future__ import annotations

import argparse

from mmdit.cli.console import note, say
from mmdit.cli.usage import JSON, dtype_name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and the options of the comparison."""
    say = parser.add_argument
    say("folder", help="the checkpoint: a folder or file of any layout, or demo for the embedded model")
    say("--device", default="cpu", help="device of both sides (default: %(default)s)")
    wide = ("float32", "float64")
    dtype = "dtype of both sides, to which stored weights are upcast (default: %(default)s)"
    say("--dtype", type=dtype_name, default="float32", choices=wide, help=dtype)
    say("--steps", type=int, default=3, metavar="N", help="number of sampler steps (default: %(default)s)")
    say("--json", action="store_true", help=JSON)


def run(options: argparse.Namespace) -> int:
    """Print the comparison; the exit code is 1 where a stage is beyond its limit."""
    import torch

    from mmdit.cli.devices import device_of, path_of
    from mmdit.cli.usage import usage_errors
    from mmdit.parity.verify import verify
    from mmdit.utils import whole

    with usage_errors():
        whole("--steps", options.steps, 1)
    dtype: torch.dtype = getattr(torch, options.dtype)
    found = verify(path_of(options.folder), device=device_of(options.device, note), dtype=dtype, steps=options.steps)
    say(found.to_json() if options.json else found)
    return 0 if found.passed else 1
