"""`mmdit bench`: measure a step, layers, LoRAs, ControlNets, a picture, memory, samplers, quality, maps, training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmdit.cli.console import note, say
from mmdit.cli.usage import DEFAULT_DEVICE, DTYPES, dtype_name

_SIZE = "side of the picture in pixels (default: 1024 for large and medium, 128 for demo)"
_BATCH = "samples in a batch (default: 2, the two branches of guidance)"
_TEXT = "number of text tokens (default: %(default)s, CLIP's 77 and T5's 256)"
_STEPS = "number of sampler steps (default: %(default)s)"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the measurements as subcommands, and the options of the default one, which measures a step."""
    parser.set_defaults(what="steps")
    more = parser.add_subparsers(
        title="other measurements", metavar="speed, layers, ways, picture, lora, controlnet, ..."
    )
    for name, add, said in (
        ("speed", _speed, "measure a step of accelerated models at all sizes, and their peers, in one run"),
        ("layers", _layers, "measure each Linear of a block alone, and native against emulated float8"),
        ("ways", _ways, "measure the ways to multiply by float8 weights on a GPU's 16-bit units"),
        (
            "errors",
            _errors,
            "measure the errors of accelerated models against float64, and hold them to the plain ones",
        ),
        ("loading", _loading, "measure loading of full-size files to the device, and quantizing meanwhile"),
        ("picture", _picture, "draw a whole picture with all models: time of each stage, and memory"),
        ("memory", _memory, "draw a whole picture within memory budgets: time, measured memory, what was streamed"),
        ("samplers", _samplers, "measure error and accuracy of samplers on the embedded model, as tables and plots"),
        ("quality", _quality, "measure the quality that each float8 recipe loses on the embedded model"),
        ("lora", _lora, "measure a step with an attached LoRA, and how long merging one takes"),
        (
            "controlnet",
            _controlnet,
            "measure a step with a ControlNet of full size, beside the floor of its operations",
        ),
        (
            "parallel",
            _parallel,
            "measure pictures on several GPUs, started by torchrun: times, memory, bytes exchanged",
        ),
        ("maps", _maps, "measure time and memory of attention maps; exit code 1 where outputs differ"),
        ("training", _training, "measure a training step of a LoRA and of the whole model, beside diffusers and peft"),
    ):
        one = more.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
        one.set_defaults(what=name)
        add(one)
    _add_sizes(parser, "fp8", "fp8-static")
    add_option = parser.add_argument
    add_option("--batch", type=int, default=2, help=_BATCH)
    add_option("--text", type=int, default=333, help=_TEXT)
    peers = "also measure diffusers, torchao or torchao-tuned in the same run"
    add_option("--against", nargs="*", default=[], metavar="PEER", help=peers)
    add_option("--eager", action="store_true", help="skip the rows with compiled blocks")
    add_option("--fast", action="store_true", help="add rows of accelerated models, and a lower bound for each row")
    only = "measure only the rows whose names match, such as '*compiled' (default: all)"
    add_option("--only", nargs="+", default=["*"], metavar="GLOB", help=only)
    add_option("--repeats", type=int, default=20, help="timed steps, whose median is shown (default: %(default)s)")
    _add_seconds(parser)
    add_option("-o", "--output", metavar="FILE.json", help="also write all numbers to this file")


def run(options: argparse.Namespace) -> int:
    """Measure, and print tables or the names of their files; the exit code is 1 where `maps` or `errors` fails."""
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
    names = "float8 recipes; NAME+exact without fast accumulation, NAME:emulated without float8 units "
    names += f"(default: {' '.join(recipes)})"
    say("--quant", nargs="*", default=list(recipes), metavar="NAME", help=names)


def _add_model(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    say(
        "--model",
        default="large",
        help="size of the model with random weights: large, medium, demo (default: large)",
    )
    say("--size", type=int, metavar="PIXELS", help=_SIZE)
    _add_device(parser, DTYPES, "bfloat16")


def _add_device(parser: argparse.ArgumentParser, dtypes: Sequence[str], default: str) -> None:
    parser.add_argument("--device", help=f"cpu, cuda, cuda:1 ... {DEFAULT_DEVICE}")
    dtype = "dtype of weights and arithmetic (default: %(default)s)"
    parser.add_argument("--dtype", type=dtype_name, choices=dtypes, default=default, help=dtype)


def _speed(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    cases = "MODEL:SIZE:BATCH, such as large:1024:2 (default: large:1024:2 large:1024:1 large:512:2 medium:1024:2)"
    say("--cases", nargs="+", metavar="CASE", help=cases)
    peers = "also measure diffusers, eager and compiled, or torchao, compiled, in the same run"
    say("--against", nargs="*", default=[], metavar="PEER", help=peers)
    say("--repeats", type=int, default=20, help="timed steps, whose median is shown (default: %(default)s)")
    say("--minutes", type=float, default=float("inf"), metavar="X", help="start no row after so many minutes")
    _add_device(parser, DTYPES, "bfloat16")
    say("-o", "--output", metavar="FILE.json", help="also write all numbers to this file")


def _errors(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, "fp8", "fp8-static")
    parser.set_defaults(size=512)
    parser.add_argument("--text", type=int, default=333, help=_TEXT)
    parser.add_argument("--steps", type=int, default=8, help=_STEPS)


def _layers(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, "fp8", "fp8-tensor")
    parser.add_argument("--batch", type=int, default=2, help=_BATCH)
    parser.add_argument("--text", type=int, default=333, help=_TEXT)


def _ways(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--batch", type=int, default=2, help=_BATCH)
    parser.add_argument("--text", type=int, default=333, help=_TEXT)
    _add_seconds(parser)


def _loading(parser: argparse.ArgumentParser) -> None:
    model = "size of the transformer whose file is written: large, medium, demo (default: large)"
    parser.add_argument("--model", default="large", help=model)
    _add_device(parser, DTYPES, "bfloat16")
    add_option = parser.add_argument
    add_option("--blocks", type=int, metavar="N", help="write so many blocks only (default: all)")
    readers = "numbers of threads that fill the tensors, a row for each (default: 1 2 4 8)"
    add_option("--readers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help=readers)
    add_option("--folder", metavar="FOLDER", help="where to write (default: the system's temporary folder)")
    ways = "instead compare ways of reading the float8 file from the disk, each on a part that is not in the page cache"
    add_option("--cold", action="store_true", help=ways)
    said = "start no further row after so many seconds (default: %(default)s)"
    add_option("--seconds", type=float, default=80.0, metavar="X", help=said)


def _add_seconds(parser: argparse.ArgumentParser) -> None:
    said = "start no further row after so many seconds (default: no limit)"
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="X", help=said)


def _picture(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, "fp8")
    parser.add_argument("--steps", type=int, default=20, help=_STEPS)
    peers = "diffusers: also measure its pipeline in the same run"
    parser.add_argument("--against", nargs="*", default=[], metavar="PEER", help=peers)
    parser.add_argument("--eager", action="store_true", help="skip the rows with compiled blocks")
    parser.add_argument("--fast", action="store_true", help="add rows of accelerated pipelines")
    first = "also measure the time from the start of a process to its first picture, plain and accelerated"
    parser.add_argument("--first", action="store_true", help=first)
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="X", help="start no row after that")


def _lora(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, "fp8")
    _add_batch(parser)
    _add_pace(parser)
    ranks = "rank of the LoRA that is attached, and of the one that is merged (default: 16 32)"
    parser.add_argument("--ranks", type=int, nargs=2, default=(16, 32), metavar="N", help=ranks)


def _controlnet(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, "fp8")
    _add_batch(parser)
    _add_pace(parser)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=2, metavar="N", help=_BATCH)
    parser.add_argument("--text", type=int, default=333, metavar="N", help=_TEXT)


def _add_pace(parser: argparse.ArgumentParser) -> None:
    repeats = "timed steps, whose median is shown (default: %(default)s)"
    parser.add_argument("--repeats", type=int, default=8, metavar="N", help=repeats)
    seconds = "start no row after so many seconds (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=90.0, metavar="X", help=seconds)


def _memory(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    sizes = "sizes of models with random weights: large, medium, demo (default: large medium)"
    say("--models", nargs="+", default=["large", "medium"], metavar="NAME", help=sizes)
    names = "float8 recipes, and 16 for 16-bit weights (default: fp8 16)"
    say("--quant", nargs="+", default=["fp8", "16"], metavar="NAME", help=names)
    budgets = "budgets, and 'stages' for --offload stages (default: %(default)s)"
    say("--budgets", nargs="+", default=["8GB", "6GB", "4GB", "12GB", "16GB", "24GB"], metavar="SIZE", help=budgets)
    say("--steps", type=int, default=20, metavar="N", help=_STEPS)
    say("--size", type=int, metavar="PIXELS", help=_SIZE)
    run = "run only so many steps of each picture, and count the others as long as these (default: all)"
    say("--run-steps", type=int, metavar="N", help=run)
    fast = "draw with the accelerated forward; 'too' draws with the plain one first, and accelerated with float8 only"
    say("--fast", nargs="?", const="only", choices=("only", "too"), help=fast)
    host = "show the process's own memory by stage instead, with the first model, weights and budget that are given"
    say("--host", action="store_true", help=host)
    seconds = "start no row after so many seconds (default: %(default)s)"
    say("--seconds", type=float, default=240.0, metavar="X", help=seconds)
    _add_device(parser, DTYPES, "bfloat16")


def _samplers(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    measures = (
        "orders, error (against model calls), accuracy (sampler by schedule), steps (sampler by steps), page, graphs"
    )
    say("--measure", nargs="+", default=["error"], metavar="NAME", help=f"{measures} (default: error)")
    say("--samplers", nargs="+", metavar="NAME", help="samplers to measure (default: all)")
    say("--schedules", nargs="+", metavar="NAME", help="schedules of accuracy and page (default: normal karras beta)")
    steps = "numbers of sampler steps (default: 20 for accuracy and page, several for the other measures)"
    say("--steps", nargs="+", type=int, metavar="N", help=steps)
    say("--prompts", type=int, metavar="N", help="number of prompts (default: 64, and 4 for error)")
    scale = "weight of classifier-free guidance (default: %(default)s)"
    say("--guidance-scale", "--cfg", type=float, default=4.5, metavar="X", help=scale)
    say("--fine", type=int, default=100, metavar="N", help="steps of heun in the reference run (default: %(default)s)")
    say("--batch", type=int, default=32, metavar="N", help="pictures drawn at once (default: %(default)s)")
    minutes = "start no run that would end after so many minutes (default: no limit)"
    say("--minutes", type=float, default=float("inf"), metavar="X", help=minutes)
    say("--workers", type=int, metavar="N", help="processes that score pictures (default: this one)")
    say("--model", metavar="FOLDER", help="a model that draws the same grammar (default: the embedded model)")
    profile = "the program whose behaviour to follow (default: %(default)s)"
    say("--profile", default="diffusers", metavar="NAME", help=profile)
    _add_device(parser, DTYPES, "float32")
    say("-o", "--output", default="samplers", metavar="FOLDER", help="folder of the results (default: %(default)s)")


def _quality(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    say("--prompts", type=int, default=512, metavar="N", help="held-out prompts that are scored (default: %(default)s)")
    say("--seeds", type=int, default=4, metavar="N", help="pictures of each prompt (default: %(default)s)")
    pictures = "pictures for the Fréchet distance, including those that are scored (default: %(default)s)"
    say("--pictures", type=int, default=4000, metavar="N", help=pictures)
    rows = "numbers of the table's rows; the first must be 0, the model that is not quantized (default: all)"
    say("--rows", type=int, nargs="+", metavar="N", help=rows)
    say("--fast", action="store_true", help="also draw with each row's accelerated pipeline, as a row of its own")
    tuned = "also measure a fine-tuned model in float8, such as python -m mmdit.demo.train_float8 writes"
    say("--tuned", nargs="+", default=[], metavar="NAME=FOLDER", help=tuned)
    say("--steps", type=int, default=20, metavar="N", help=_STEPS)
    prompts = "prompts, none of them held out, that static scales are calibrated on (default: %(default)s)"
    say("--calibration", type=int, default=32, metavar="N", help=prompts)
    say("--batch", type=int, default=256, metavar="N", help="pictures drawn at once (default: %(default)s)")
    say("--workers", type=int, metavar="N", help="processes that score pictures (default: one per core)")
    _add_device(parser, ("bfloat16", "float32"), "bfloat16")
    say("-o", "--output", default="fp8_quality", metavar="FOLDER", help="folder of the results (default: %(default)s)")


def _parallel(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    say = parser.add_argument
    say("--quant", default="fp8", metavar="NAME", help="float8 recipe, or none (default: %(default)s)")
    say("--steps", type=int, default=28, metavar="N", help="steps of a guided picture (default: %(default)s)")
    say("--prompts", type=int, default=64, metavar="N", help="prompts of the data-parallel row (default: %(default)s)")
    say("--repeats", type=int, default=2, metavar="N", help="timed pictures, whose median counts (default: 2)")
    only = "measure only the rows whose names contain one of these texts (default: all)"
    say("--only", nargs="+", default=[], metavar="TEXT", help=only)
    only_links = "measure only the links between the GPUs, by way and size, in less than half a minute"
    say("--links", action="store_true", help=only_links)
    seconds = "start no row after so many seconds, and stop after a quarter more (default: %(default)s)"
    say("--seconds", type=float, default=90.0, metavar="X", help=seconds)


def _maps(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    say = parser.add_argument
    say("--words", type=int, default=5, metavar="N", help="number of words, of two tokens each (default: %(default)s)")
    say("--blocks", nargs="+", type=int, metavar="N", help="blocks whose maps are kept (default: all)")
    say("--steps", type=int, default=20, metavar="N", help=_STEPS)
    heads = "keep the mean over heads, or each head (default: %(default)s)"
    say("--heads", default="mean", choices=("mean", "each"), help=heads)
    directions = "image patches that read words, or words that read patches (default: i2t)"
    say("--directions", nargs="+", default=["i2t"], choices=("i2t", "t2i"), help=directions)
    say("--no-quadrants", action="store_true", help="do not sum up the four quadrants of attention")
    say("--text", type=int, default=333, metavar="N", help=_TEXT)
    rounds = "runs with maps, and as many without, whose medians are shown (default: %(default)s)"
    say("--rounds", type=int, default=3, metavar="N", help=rounds)


def _training(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    say = parser.add_argument
    full = "size of the model that is trained in full: large, medium, demo (default: %(default)s)"
    say("--full", default="medium", metavar="MODEL", help=full)
    say("--batch", type=int, default=1, help="samples of a step (default: %(default)s)")
    say("--text", type=int, default=333, metavar="N", help=_TEXT)
    say("--rank", type=int, default=16, metavar="N", help="rank of the LoRA (default: %(default)s)")
    ahead = "steps whose modulation is computed at once in the rows with 'ahead' (default: %(default)s)"
    say("--ahead", type=int, default=32, metavar="N", help=ahead)
    say("--repeats", type=int, default=5, metavar="N", help="timed steps, whose median is shown (default: %(default)s)")
    only = "measure only the rows whose names match, such as 'lora:*' (default: all)"
    say("--only", nargs="+", default=["*"], metavar="GLOB", help=only)
    say("--seconds", type=float, default=85.0, metavar="X", help="start no row later than this (default: %(default)s)")
