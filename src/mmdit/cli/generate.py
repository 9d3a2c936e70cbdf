"""`mmdit generate`: draw pictures of prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmdit.cli.console import note_of, say
from mmdit.cli.usage import (
    DTYPES,
    SAMPLERS,
    SCHEDULES,
    dtype_name,
    exists,
    sampler_name,
    schedule_name,
    seed_value,
    shift_value,
)

_OF_PROMPTS = "--prompts FILE draws each line of a file"
_OF_PICTURES = "--settings PICTURE.png draws a picture again"
_OF_MODELS = "-m MODEL draws with a model"
_FILES = (
    dict.fromkeys((".txt", ".csv", ".json", ".jsonl"), _OF_PROMPTS)
    | dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), _OF_PICTURES)
    | dict.fromkeys((".safetensors", ".sft", ".gguf", ".ckpt"), _OF_MODELS)
)
USAGE = """mmdit generate PROMPT [PROMPT ...] [options]
       mmdit generate --prompts FILE [options]
       mmdit generate --settings PICTURE.png [options]"""
EXAMPLES = """examples:
  the embedded model, without any download:
    mmdit generate "a large red circle above a blue star, on a white background"
  weights of your own, to a file of your own:
    mmdit generate "a cat on a red chair" -m sd3.5-large/ -o cat.png
  from the Hugging Face Hub, two prompts with three seeds each, and a grid:
    mmdit generate "a cat" "a dog" --seed 1 2 3 --grid \\
      -m stabilityai/stable-diffusion-3.5-medium
  a Turbo model, which takes 4 steps without guidance:
    mmdit generate "a cat" -m sd3.5_large_turbo.safetensors --preset turbo
  many prompts on a small GPU, to pets/cat-0.png, pets/cat-1.png ...:
    mmdit generate --prompts cats.txt -m sd3.5-large/ -o pets/cat.png \\
      --offload stages --vae-tile 256
  a picture once more, with its own seed and settings but more steps:
    mmdit generate --settings cat.png --steps 50 -o finer.png

Every picture holds its settings; `mmdit inspect PICTURE.png` shows them.
Each picture is reported on stdout: wrote PATH (W x H, seed S; picture 3 of 12)
Exit code: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""

LAYOUT = {"usage": USAGE, "epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is not given is None, so that the settings of a picture can stand in for it."""
    parser.set_defaults(wrong=parser.error)
    _add_what(parser.add_argument_group("what to draw"))
    _add_model(parser.add_argument_group("with which model"))
    _add_how(parser.add_argument_group("how to draw"))
    _add_where(parser.add_argument_group("where to write"))


def _add_what(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    say("prompt", nargs="*", metavar="PROMPT", help="what to draw; every prompt is drawn with every seed")
    lines = "instead: a text file with one prompt a line, without lines that begin with #; - is standard input"
    say("--prompts", metavar="FILE", help=lines)
    say("-n", "--negative-prompt", metavar="TEXT", help="what to draw away from (default: nothing)")
    seed = "start of each picture: another seed, another picture; the same seed, the same picture (default: 0)"
    say("--seed", nargs="+", type=seed_value, metavar="N", help=seed)
    again = "draw this picture again, exactly as mmdit drew it; other options count more than what it says"
    say("--settings", metavar="PICTURE.png", help=again)


def _add_model(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    model = "folder, .safetensors file, or owner/name to download from the Hugging Face Hub (default: demo, the "
    say("-m", "--model", help=f"{model}small embedded model, which knows a few shapes and colours)")
    say("--revision", metavar="NAME", help="with owner/name: branch, tag or commit (default: main)")
    say("--variant", choices=("fp16",), help="with owner/name: files of half precision (default: the plain ones)")
    for name in ("clip-l", "clip-g", "t5", "vae"):
        say(f"--{name}", metavar="FILE", help=f"with a .safetensors file: where {name} is (default: in or beside it)")
    tokenizers = "with a .safetensors file: what holds tokenizer, tokenizer_2, tokenizer_3 (default: beside it)"
    say("--tokenizers", metavar="FOLDER", help=tokenizers)


def _add_how(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    for side in ("height", "width"):
        say(f"--{side}", type=int, metavar="PIXELS", help="a multiple of 16 (default: the model's own)")
    say(
        "--steps", type=int, metavar="N", help="more take longer and draw finer (default: the profile's; diffusers: 28)"
    )
    scale = "how strongly the prompt counts; 1 turns guidance off (default: the profile's; diffusers: 7)"
    say("--guidance-scale", "--cfg", type=float, metavar="X", help=scale)
    more = "what else guides, such as 'skip_guidance_layers=7,8,9' (SD3.5-Medium) or 'kind=apg momentum=-0.5'; a wrong "
    say("--guidance", metavar="'NAME=VALUE ...'", help=f"{more}name lists all (default: nothing)")
    preset = "turbo, sd3_medium, sd3.5_medium, sd3.5_large, sd3.5_large_turbo: steps, guidance and sampler that suit "
    say("--preset", metavar="NAME", help=f"{preset}such a model (default: the profile's)")
    profile = "diffusers, comfyui, reference: whose defaults and small choices to follow (default: diffusers)"
    say("--profile", metavar="NAME", help=profile)
    say("--sampler", type=sampler_name, metavar="NAME", help=f"{SAMPLERS} (default: the profile's; diffusers: euler)")
    schedule = f"noise levels of the steps: {SCHEDULES} (default: the profile's; diffusers: normal)"
    say("--schedule", type=schedule_name, metavar="NAME", help=schedule)
    shift = "more of the steps at high noise: a number above 0, or resolution, for what suits the size of the picture "
    say("--shift", type=shift_value, metavar="X", help=f"{shift}(default: the model's; SD3.5: 3)")
    length = "how much of a long prompt T5 reads (default: the profile's; diffusers: 256)"
    say("--max-sequence-length", type=int, metavar="TOKENS", help=length)
    say("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    say(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        help="what to compute in (default: float32 on the CPU, else bfloat16)",
    )
    threads = "of a CPU (default: 1 for the embedded model, where more wait for each other; else torch's, all cores)"
    say("--threads", type=int, metavar="N", help=threads)
    say("--quant", metavar="NAME", help="float8 for transformer and T5: fp8, fp8-weight-only ... (default: none)")
    batch = "pictures drawn at once: faster on a GPU, and rounded a little differently (default: 1)"
    say("--batch", type=int, default=1, metavar="N", help=batch)
    offload = "for small GPUs: text encoders, transformer and VAE take turns on it (default: all stay)"
    say("--offload", choices=("stages",), help=offload)
    fast = "on a GPU: fused kernels, CUDA graphs and the quickest attention that is installed (default: off)"
    say("--fast", action="store_true", help=fast)
    say("--vae-tile", type=int, metavar="PIXELS", help="for small GPUs: decode in such tiles, say 256 (default: whole)")


def _add_where(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    output = "several pictures become FILE-0.png, FILE-1.png ...; what exists is replaced (default: picture.png here; "
    more = "what exists is kept, and the next free one of picture-1.png, picture-2.png ... is taken)"
    say("-o", "--output", metavar="FILE.png", help=output + more)
    grid = "also write all pictures in one, a row for each prompt, a column for each seed (default name: FILE-grid.png)"
    say("--grid", nargs="?", const="", metavar="FILE.png", help=grid)
    say("--quiet", action="store_true", help="no progress bar and no notes")


def run(options: argparse.Namespace) -> int:
    """Draw the pictures and say where they are."""
    check_usage(options)
    from mmdit.cli.drawing import draw

    for line in draw(options, note_of(options)):
        say(line)
    return 0


def check_usage(options: argparse.Namespace) -> None:
    """Leave with exit code 2 where options do not go together; this needs no torch."""
    if options.prompt and options.prompts is not None:
        options.wrong("a PROMPT and --prompts FILE are both given; give one of them")
    if not options.prompt and options.prompts is None and options.settings is None:
        hint = " (prompts go before --grid)" if options.grid else ""
        options.wrong(f"there is no prompt; give a PROMPT, --prompts FILE or --settings PICTURE.png{hint}")
    if options.settings is not None and options.preset is not None:
        options.wrong("--settings and --preset are both given; a picture's settings hold what a preset sets")
    for text in (*options.prompt, options.negative_prompt or ""):
        ending = Path(text).suffix.lower()
        if ending in _FILES and (len(text.split()) == 1 or exists(text)):
            hint = f"--settings takes one picture, {options.settings}" if options.settings else _FILES[ending]
            options.wrong(f"the prompt {text!r} is the name of a file; {hint} (as words to draw, put it into a file)")
