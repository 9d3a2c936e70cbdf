"""The command line: `mmdit generate | inspect | verify | quantize | convert | compare | bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mmdit.cli import options as option_table
from mmdit.cli.devices import device_of, dtype_of

# What users can do something about; anything else is our bug and shows its traceback.
USER_ERRORS = (ValueError, OSError, MemoryError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, or 1 after an error, 2 for wrong usage (argparse), 130 after Ctrl-C, 141 where
    nobody reads on (`| head`).
    """
    options = _parser().parse_args(arguments)
    try:
        with _warnings_shown_by(_silent if getattr(options, "quiet", False) else _note):
            code = int(options.run(options))
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at exit
        return 141
    except (*USER_ERRORS, RuntimeError) as error:
        if options.debug or not _is_for_users(error):
            raise
        print(f"mmdit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmdit: stopped", file=sys.stderr)
        return 130


def generate(options: argparse.Namespace) -> int:
    """Draw pictures and say where they are."""
    _check_usage(options)
    from mmdit.cli.generate import draw

    for line in draw(options, _silent if options.quiet else _note):
        print(line, flush=True)
    return 0


def _check_usage(options: argparse.Namespace) -> None:
    """Leave with exit code 2 where options do not go together."""
    if options.prompt and options.prompts is not None:
        options.wrong("a PROMPT and --prompts FILE are both given; give one of them")
    if not options.prompt and options.prompts is None and options.settings is None:
        hint = " (prompts go before --grid)" if options.grid else ""
        options.wrong(f"there is no prompt; give a PROMPT, --prompts FILE or --settings PICTURE.png{hint}")
    if options.settings is not None and options.preset is not None:
        options.wrong("--settings and --preset are both given; a picture's settings hold what a preset sets")


def inspect(options: argparse.Namespace) -> int:
    """Say what a checkpoint is, or how a picture was drawn."""
    path = Path(options.path)
    if path.suffix.lower() == ".png" and not path.is_dir():
        from mmdit.pipeline.settings import read_settings

        shows_all = (sys.stdout.encoding or "").lower().startswith("utf")
        print(json.dumps(read_settings(path), indent=2, ensure_ascii=not shows_all))
        return 0
    from mmdit.checkpoints.describe import describe

    print(describe(path))
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write a checkpoint in another layout."""
    from mmdit.checkpoints.write import convert as write

    target = write(options.source, options.target, options.layout, dtype=dtype_of(options.dtype))
    print(f"wrote {target}")
    return 0


def quantize(options: argparse.Namespace) -> int:
    """Write a checkpoint with its Linears in float8."""
    from mmdit.cli.quantize import quantized

    print(f"wrote {quantized(options, _silent if options.quiet else _note)}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare a checkpoint with diffusers; exit code 1 where they differ."""
    import torch

    from mmdit.parity.verify import verify as compare

    found = compare(
        options.folder, device=device_of(options.device), dtype=getattr(torch, options.dtype), steps=options.steps
    )
    print(found)
    return 0 if found.passed else 1


def compare(options: argparse.Namespace) -> int:
    """Find where two pipelines differ; exit code 1 where they do beyond rounding."""
    from mmdit.cli.compare import compared

    found = compared(options)
    print(found.to_json() if options.json else found)
    return 0 if found.first is None else 1


def bench(options: argparse.Namespace) -> int:
    """Measure: steps, layers or whole pictures on random weights, or samplers on the embedded model."""
    from mmdit.cli.bench import BENCHES

    for line in BENCHES[options.what](options, _note):
        print(line, flush=True)
    return 0


def _is_for_users(error: Exception) -> bool:
    """Whether users can do something about an error; the hub's are RuntimeErrors of its own kind."""
    if isinstance(error, USER_ERRORS):
        return True
    from mmdit.checkpoints.hub import HubError

    return isinstance(error, HubError)


def _note(text: str) -> None:
    print(f"mmdit: note: {text}", file=sys.stderr)


def _silent(text: str) -> None:
    """Say nothing: what --quiet puts in the place of notes."""


@contextmanager
def _warnings_shown_by(note: Callable[[str], None]) -> Iterator[None]:
    """Warnings as notes, without the line of code that they come from."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        note(str(message))

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _parser() -> argparse.ArgumentParser:
    from mmdit._version import __version__

    parser = argparse.ArgumentParser(
        prog="mmdit",
        description="Stable Diffusion 3 / 3.5 for research.",
        epilog='Begin with: mmdit generate "a large red circle above a blue star". Each command has its own --help.',
    )
    parser.add_argument("--version", action="version", version=f"mmdit-lab {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], said: str, **more: Any) -> None:
        words = f"{said[0].upper()}{said[1:]}."
        one = commands.add_parser(run.__name__, parents=[common], help=said, description=words, **more)
        one.set_defaults(run=run)
        getattr(option_table, run.__name__)(one)

    layout = argparse.RawDescriptionHelpFormatter
    examples = {"usage": option_table.USAGE, "epilog": option_table.EXAMPLES, "formatter_class": layout}
    command(generate, "draw pictures of prompts", **examples)
    command(inspect, "say what a checkpoint holds, or how a picture was drawn")
    command(convert, "write a checkpoint in another layout")
    command(quantize, "write a checkpoint in float8, for here and for ComfyUI")
    command(verify, "compare your weights with diffusers")
    command(compare, "find the first stage at which two pipelines differ, and why")
    command(bench, "measure a step, its layers, a whole picture, or samplers; beside other libraries")
    return parser
