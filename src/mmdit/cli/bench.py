"""`mmdit bench`: measure a step, its layers, a whole picture, samplers, quality of float8, or attention maps."""

from __future__ import annotations

import argparse

from mmdit.cli.console import note, say
from mmdit.cli.usage import DTYPES, dtype_name

_SIZE = "side of the picture in pixels (default: the model's; large and medium: 1024, demo: 128)"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The measurement; without a name it is that of a step."""
    parser.set_defaults(what="steps")
    more = parser.add_subparsers(title="instead of a step", metavar="layers, picture, samplers, quality, maps")
    for name, add, said in (
        ("layers", _layers, "each Linear of a block by itself, and native against emulated float8"),
        ("picture", _picture, "a whole picture with all models: seconds by stage, and memory"),
        ("samplers", _samplers, "what samplers cost and give on the embedded model, in tables and plots"),
        ("quality", _quality, "what each float8 recipe costs in quality on the embedded model"),
        ("maps", _maps, "what attention maps cost in time and memory; exit code 1 where outputs differ"),
    ):
        one = more.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
        one.set_defaults(what=name)
        add(one)
    _add_sizes(parser, "fp8", "fp8-static")
    add_option = parser.add_argument
    add_option("--batch", type=int, default=2, help="samples of a step (default: 2, the branches of guidance)")
    add_option("--text", type=int, default=333, help="text tokens (default: %(default)s, T5 at 256)")
    peers = "diffusers, torchao, torchao-tuned: in the same run"
    add_option("--against", nargs="*", default=[], metavar="PEER", help=peers)
    add_option("--eager", action="store_true", help="leave out the rows with compiled blocks")
    add_option("--fast", action="store_true", help="add rows of accelerated models, and the floor of each row")
    only = "rows by name, such as '*compiled' (default: all)"
    add_option("--only", nargs="+", default=["*"], metavar="GLOB", help=only)
    add_option("--repeats", type=int, default=20, help="steps of which the median is taken (default: %(default)s)")
    add_option("-o", "--output", metavar="FILE.json", help="all numbers as JSON")


def run(options: argparse.Namespace) -> int:
    """Measure and print tables, or say which files hold them; exit code 1 where a measure finds a difference."""
    from mmdit.cli.benches import BENCHES

    code = 0
    for line in BENCHES[options.what](options, note):
        if isinstance(line, int):
            code = line
        else:
            say(line)
    return code


def _add_sizes(parser: argparse.ArgumentParser, *recipes: str) -> None:
    say = parser.add_argument
    _add_model(parser)
    names = f"float8 recipes; NAME+exact sums without fast accumulation (default: {' '.join(recipes)})"
    say("--quant", nargs="*", default=list(recipes), metavar="NAME", help=names)


def _add_model(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    say("--model", default="large", help="large, medium or demo; random weights (default: %(default)s)")
    say("--size", type=int, metavar="PIXELS", help=_SIZE)
    say("--device", help="(default: cuda where there is one)")
    say("--dtype", type=dtype_name, choices=DTYPES, default="bfloat16", help="(default: %(default)s)")


def _layers(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, "fp8", "fp8-tensor")
    parser.add_argument("--batch", type=int, default=2, help="samples of a step (default: 2, the branches of guidance)")
    parser.add_argument("--text", type=int, default=333, help="text tokens (default: %(default)s, T5 at 256)")


def _picture(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, "fp8")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--against", nargs="*", default=[], metavar="PEER", help="diffusers: in the same run")
    parser.add_argument("--eager", action="store_true", help="leave out the rows with compiled blocks")


def _samplers(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    measures = "orders, error (against model calls), accuracy (sampler by schedule), steps (sampler by steps), page"
    say("--measure", nargs="+", default=["error"], metavar="NAME", help=f"{measures} (default: error)")
    say("--samplers", nargs="+", metavar="NAME", help="(default: all)")
    say("--schedules", nargs="+", metavar="NAME", help="for accuracy and page (default: normal karras beta)")
    say("--steps", nargs="+", type=int, metavar="N", help="(default: 20 for accuracy and page, several for the others)")
    say("--prompts", type=int, metavar="N", help="(default: 64, for error 4)")
    say("--guidance-scale", "--cfg", type=float, default=4.5, metavar="X", help="(default: %(default)s)")
    say("--fine", type=int, default=100, metavar="N", help="steps of heun that count as exact (default: %(default)s)")
    say("--batch", type=int, default=32, metavar="N", help="pictures drawn at once (default: %(default)s)")
    say("--minutes", type=float, default=float("inf"), metavar="X", help="start nothing that would end later")
    say("--workers", type=int, metavar="N", help="processes that score pictures (default: this one)")
    say("--model", metavar="FOLDER", help="of a model of the same grammar (default: the embedded one)")
    say("--profile", default="diffusers", metavar="NAME", help="(default: %(default)s)")
    say("--device", help="(default: cuda where there is one)")
    say("--dtype", type=dtype_name, choices=DTYPES, default="float32", help="(default: %(default)s)")
    say("-o", "--output", default="samplers", metavar="FOLDER", help="(default: %(default)s)")


def _quality(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    say("--prompts", type=int, default=512, metavar="N", help="held-out prompts that are scored (default: %(default)s)")
    say("--seeds", type=int, default=4, metavar="N", help="pictures of each prompt (default: %(default)s)")
    pictures = "for the Fréchet distance, the scored ones among them (default: %(default)s)"
    say("--pictures", type=int, default=4000, metavar="N", help=pictures)
    rows = "numbers of rows; 0, the model that is not quantized, comes first (default: all)"
    say("--rows", type=int, nargs="+", metavar="N", help=rows)
    say("--steps", type=int, default=20, metavar="N", help="(default: %(default)s)")
    prompts = "prompts that static scales are calibrated with, of no held-out combination (default: %(default)s)"
    say("--calibration", type=int, default=32, metavar="N", help=prompts)
    say("--batch", type=int, default=256, metavar="N", help="pictures drawn at once (default: %(default)s)")
    say("--workers", type=int, metavar="N", help="processes that score pictures (default: one per core)")
    say("--device", help="(default: cuda where there is one)")
    say("--dtype", type=dtype_name, choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    say("-o", "--output", default="fp8_quality", metavar="FOLDER", help="(default: %(default)s)")


def _maps(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    say = parser.add_argument
    say("--words", type=int, default=5, metavar="N", help="of two tokens each (default: %(default)s)")
    say("--blocks", nargs="+", type=int, metavar="N", help="(default: all)")
    say("--steps", type=int, default=20, metavar="N", help="(default: %(default)s)")
    say("--heads", default="mean", choices=("mean", "each"), help="(default: %(default)s)")
    say("--directions", nargs="+", default=["i2t"], choices=("i2t", "t2i"), help="(default: i2t)")
    say("--no-quadrants", action="store_true", help="without the shares of the four quadrants of attention")
    say("--text", type=int, default=333, metavar="N", help="text tokens (default: %(default)s)")
    say("--rounds", type=int, default=3, metavar="N", help="drawings of each kind (default: %(default)s)")
