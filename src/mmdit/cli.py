"""The command line: `mmdit generate | inspect | convert | verify`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import torch

    from mmdit.pipeline import Pipeline

DTYPES = ("float32", "bfloat16", "float16", "float64")
# What users can do something about; anything else is our bug and shows its traceback.
USER_ERRORS = (ValueError, OSError, MemoryError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 after an error, or 2 for wrong usage (argparse)."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        return int(options.run(options))
    except USER_ERRORS as error:
        if options.debug:
            raise
        print(f"mmdit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmdit: stopped", file=sys.stderr)
        return 130


def generate(options: argparse.Namespace) -> int:
    """Draw a picture and say where it is."""
    from mmdit.pictures import png_path, save_png

    png_path(options.output)  # said before the drawing, not after it
    pipe = _pipeline(options)
    picture = pipe(
        options.prompt,
        options.negative_prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        sampler=options.sampler,
        schedule=options.schedule,
        seed=options.seed,
    ).images[0]
    print(f"wrote {save_png(picture, options.output)} ({picture.width} x {picture.height})")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Say what a checkpoint is."""
    from mmdit.describe import describe

    print(describe(options.path))
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write a checkpoint in another layout."""
    from mmdit.convert import convert as write

    target = write(options.source, options.target, options.layout, dtype=_dtype(options.dtype))
    print(f"wrote {target}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare a checkpoint with diffusers; exit code 1 where they differ."""
    import torch

    from mmdit.verify import verify as compare

    report = compare(
        options.folder, device=_device(options.device), dtype=getattr(torch, options.dtype), steps=options.steps
    )
    print(report.text())
    return 0 if report.first_failure is None else 1


def _pipeline(options: argparse.Namespace) -> Pipeline:
    from mmdit.pipeline import Pipeline

    device = _device(options.device)
    dtype = _dtype(options.dtype or _default_dtype(device))
    others = {name: getattr(options, name) for name in ("clip_l", "clip_g", "t5", "vae", "tokenizers")}
    given = [name for name, value in others.items() if value is not None]
    if options.model is None and not given:
        print(
            "no --model given: drawing with the embedded model, which knows a few shapes and colours", file=sys.stderr
        )
        return Pipeline.demo(device=device, dtype=dtype, profile=options.profile)
    if options.model is None:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with a single file as --model, and no --model is given")
    if Path(options.model).is_file():
        return Pipeline.from_single_file(options.model, **others, device=device, dtype=dtype, profile=options.profile)
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with a single file as --model, got {options.model}")
    return Pipeline.from_pretrained(options.model, device=device, dtype=dtype, profile=options.profile)


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is none that torch knows: use cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
    return device


def _default_dtype(device: torch.device) -> str:
    return "float32" if device.type == "cpu" else "bfloat16"


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"mmdit: note: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from mmdit import __version__

    parser = argparse.ArgumentParser(prog="mmdit", description="Stable Diffusion 3 / 3.5 for research.")
    parser.add_argument("--version", action="version", version=f"mmdit-lab {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", parents=[common], help="draw a picture of a prompt"))
    _add_inspect(commands.add_parser("inspect", parents=[common], help="say what a checkpoint is and what it lacks"))
    _add_convert(commands.add_parser("convert", parents=[common], help="write a checkpoint in another layout"))
    _add_verify(commands.add_parser("verify", parents=[common], help="compare your weights with diffusers"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=generate)
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("-m", "--model", help="folder of any layout, or safetensors file (default: the embedded model)")
    parser.add_argument("-o", "--output", default="picture.png", help="where the PNG goes (default: %(default)s)")
    parser.add_argument("-n", "--negative-prompt", default="", help="what to draw away from")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: what the model was trained on)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the profile's)")
    parser.add_argument("--guidance-scale", type=float, help="how strongly the prompt counts; 1 turns guidance off")
    parser.add_argument("--sampler", default="euler", help="solver (default: %(default)s)")
    parser.add_argument("--schedule", help="noise schedule (default: the profile's)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    parser.add_argument("--profile", default="diffusers", help="whose small choices to follow (default: %(default)s)")
    for name in ("clip-l", "clip-g", "t5", "vae"):
        parser.add_argument(f"--{name}", metavar="FILE", help=f"take {name} from here (with a single model file)")
    parser.add_argument("--tokenizers", metavar="FOLDER", help="folder of tokenizer, tokenizer_2 and tokenizer_3")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on the CPU, else bfloat16)")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=inspect)
    parser.add_argument("path", help="safetensors file, shard index or folder")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=convert)
    parser.add_argument("source", help="safetensors file or folder of any layout")
    parser.add_argument("target", help="a new folder, or a new .safetensors file for --layout single")
    parser.add_argument("--layout", required=True, help="official, diffusers, comfyui or single")
    parser.add_argument("--dtype", choices=DTYPES, help="cast (default: keep every byte)")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=verify)
    parser.add_argument("folder", help="checkpoint to verify")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="sampler steps to compare (default: %(default)s)")
