"""`mmdit generate`: draw pictures of prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmdit._imports import without_collections
from mmdit.cli.console import note_of, say
from mmdit.cli.controls import FORM, control_option
from mmdit.cli.loras import lora_option
from mmdit.cli.process import small_steps
from mmdit.cli.usage import (
    DEFAULT_DEVICE,
    DEFAULT_DTYPE,
    DTYPES,
    QUIET,
    SAMPLERS,
    SCHEDULES,
    dtype_name,
    exists,
    memory_size,
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
  with the embedded model, which needs no download:
    mmdit generate "a large red circle above a blue star, on a white background"
  with your own weights, written to cat.png:
    mmdit generate "a cat on a red chair" -m sd3.5-large/ -o cat.png
  with weights from the Hugging Face Hub; two prompts, three seeds each, a grid:
    mmdit generate "a cat" "a dog" --seed 1 2 3 --grid \\
      -m stabilityai/stable-diffusion-3.5-medium
  with a Turbo model, which needs 4 steps and no guidance:
    mmdit generate "a cat" -m sd3.5_large_turbo.safetensors --preset turbo
  many prompts on a small GPU, written to pets/cat-0.png, pets/cat-1.png ...:
    mmdit generate --prompts cats.txt -m sd3.5-large/ -o pets/cat.png \\
      --memory 8GB
  a picture of your own, drawn anew where a mask is white:
    mmdit generate "a red hat" -m sd3.5-large/ --image cat.jpg \\
      --mask head.png --strength 0.8
  64 pixels more at the left and the right:
    mmdit generate "a cat in a room" -m sd3.5-large/ --image cat.jpg \\
      --outpaint 64,0,64,0
  a second pass at one and a half times the size:
    mmdit generate "a cat" -m sd3.5-large/ --hires 1.5
  one picture on two GPUs; --data-parallel draws many prompts on them instead:
    torchrun --nproc-per-node 2 -m mmdit generate "a cat" -m sd3.5-large/ \\
      --fast --quant fp8 --parallel cfg -o cat.png
  the same picture again, with its seed and settings but more steps:
    mmdit generate --settings cat.png --steps 50 -o finer.png

Every PNG contains its settings; `mmdit inspect PICTURE.png` shows them.
Each picture is reported on stdout: wrote PATH (W x H, seed S; picture 3 of 12)
Exit codes: 0 success, 1 error, 2 wrong usage, 130 Ctrl-C."""

LAYOUT = {"usage": USAGE, "epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options. Options that are not given are None, so that the settings of a picture can fill them in."""
    parser.set_defaults(wrong=parser.error)
    _add_what(parser.add_argument_group("what to draw"))
    _add_from(parser.add_argument_group("from which picture"))
    model = parser.add_argument_group("with which model")
    _add_model(model)
    _add_loras(model)
    _add_controls(model)
    _add_how(parser.add_argument_group("how to draw"))
    _add_where(parser.add_argument_group("where to write"))


def _add_what(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    say("prompt", nargs="*", metavar="PROMPT", help="the prompts; every prompt is drawn with every seed")
    lines = "read prompts from a text file, one per line; lines that begin with # are ignored; - reads standard input"
    say("--prompts", metavar="FILE", help=lines)
    say("-n", "--negative-prompt", metavar="TEXT", help="what the pictures should not show (default: empty)")
    seed = "seeds of the starting noise; each seed draws one picture of every prompt (default: 0)"
    say("--seed", nargs="+", type=seed_value, metavar="N", help=seed)
    again = "draw this picture again with the settings stored in it; options on the command line take precedence"
    say("--settings", metavar="PICTURE.png", help=again)


def _add_from(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    image = "a picture to start from: PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM (default: noise alone)"
    say("--image", metavar="FILE", help=image)
    strength = "how much of it is drawn anew, 0 to 1 (default: the profile's; diffusers: 0.6; with --outpaint: 1)"
    say("--strength", type=float, metavar="X", help=strength)
    mask = "where it is drawn anew: a picture of the same size, white is drawn and black stays (default: everywhere)"
    say("--mask", metavar="FILE", help=mask)
    crop = "draw only the part around the mask, with so many pixels more on each side, and paste it back (default: all)"
    say("--padding-mask-crop", type=int, metavar="PIXELS", help=crop)
    outside = "lay the given picture over the drawing outside of the mask, pixel by pixel (default: off)"
    say("--keep-outside", action="store_true", default=None, help=outside)
    grays = "let the grays of the mask say how late a place may change; with a number, that share of it (default: off)"
    say("--differential", nargs="?", type=float, const=1.0, metavar="X", help=grays)
    borders = "enlarge the picture by these pixels and draw there, such as 64,0,64,0 (default: none)"
    say("--outpaint", metavar="LEFT,TOP,RIGHT,BOTTOM", help=borders)
    fit = "how the picture comes to --height and --width: cut, filled up with its border lines, or stretched (default: "
    say("--fit", choices=("crop", "pad", "stretch"), help=f"{fit}as the profile has it)")
    hires = "draw again, larger by this factor: 1.5, or '1.5 strength=0.4 steps=14 filter=bislerp space=latent'; an "
    say("--hires", metavar="'X NAME=VALUE ...'", help=f"{hires}unknown name lists them all (default: once)")


def _add_model(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    model = "a folder, a .safetensors file, or owner/name to download from the Hugging Face Hub (default: demo, the "
    say("-m", "--model", help=f"{model}small embedded model, which draws a few shapes and colours)")
    say("--revision", metavar="NAME", help="for owner/name: the branch, tag or commit (default: main)")
    say("--variant", choices=("fp16",), help="for owner/name: the half-precision files (default: the plain files)")
    for name in ("clip-l", "clip-g", "t5", "vae"):
        where = "(default: in that file or in a folder beside it)"
        say(f"--{name}", metavar="FILE", help=f"for a .safetensors file: the file or folder of {name} {where}")
    tokenizers = "for a .safetensors file: the folder of tokenizer, tokenizer_2 and tokenizer_3 (default: beside it)"
    say("--tokenizers", metavar="FOLDER", help=tokenizers)


def _add_controls(group: argparse._ArgumentGroup) -> None:
    nets = "ControlNet files or folders, which make the drawing follow hints (default: none)"
    group.add_argument("--controlnet", nargs="+", metavar="FILE", help=nets)
    hints = (
        "the hint of each: a picture of edges, depth ..., what it is (canny, depth, blur, tile, pose), the factor of "
    )
    group.add_argument(
        "--control",
        nargs="+",
        type=control_option,
        metavar=FORM,
        help=f"{hints}the net, and the part of the way in which it acts, such as edges.png:canny:0.7:0:0.8",
    )


def _add_loras(group: argparse._ArgumentGroup) -> None:
    files = "LoRA files with their weights on the transformer and the text encoders, such as style.safetensors:0.8 "
    group.add_argument(
        "--lora", nargs="+", type=lora_option, metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]", help=f"{files}(default: none)"
    )


def _add_how(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    for side in ("height", "width"):
        size = f"{side} of the pictures, a multiple of 16 (default: the model's own size)"
        say(f"--{side}", type=int, metavar="PIXELS", help=size)
    say("--steps", type=int, metavar="N", help="number of sampler steps (default: the profile's; diffusers: 28)")
    scale = "weight of classifier-free guidance; 1 turns it off (default: the profile's; diffusers: 7)"
    say("--guidance-scale", "--cfg", type=float, metavar="X", help=scale)
    more = (
        "other kinds of guidance, such as 'skip_guidance_layers=7,8,9' (SD3.5-Medium) or 'kind=apg momentum=-0.5'; an "
    )
    say("--guidance", metavar="'NAME=VALUE ...'", help=f"{more}unknown name lists them all (default: none)")
    preset = "turbo, sd3_medium, sd3.5_medium, sd3.5_large, sd3.5_large_turbo: steps, guidance and sampler of "
    say("--preset", metavar="NAME", help=f"{preset}a kind of model (default: those of the profile)")
    profile = "diffusers, comfyui, reference: the program whose defaults and details to follow (default: diffusers)"
    say("--profile", metavar="NAME", help=profile)
    say("--sampler", type=sampler_name, metavar="NAME", help=f"{SAMPLERS} (default: the profile's; diffusers: euler)")
    schedule = f"spacing of the noise levels: {SCHEDULES} (default: the profile's; diffusers: normal)"
    say("--schedule", type=schedule_name, metavar="NAME", help=schedule)
    shift = "shift of the schedule to high noise: a number above 0, or resolution: by the picture's size "
    say("--shift", type=shift_value, metavar="X", help=f"{shift}(default: the model's; SD3.5: 3)")
    length = "number of T5 tokens that prompts are padded or cut to (default: the profile's; diffusers: 256)"
    say("--max-sequence-length", type=int, metavar="TOKENS", help=length)
    say("--device", metavar="NAME", help=f"cpu, cuda, cuda:1 ... {DEFAULT_DEVICE}")
    say("--dtype", type=dtype_name, choices=DTYPES, help=f"dtype of weights and arithmetic {DEFAULT_DTYPE}")
    threads = "CPU threads (default: 2 for the embedded model, whose steps are too small for more; else one per core)"
    say("--threads", type=int, metavar="N", help=threads)
    quant = "float8 recipe for the transformer and T5: fp8, fp8-weight-only ... (default: no quantization)"
    say("--quant", metavar="NAME", help=quant)
    batch = "pictures drawn at once; more are faster on a GPU and round a little differently (default: 1)"
    say("--batch", type=int, default=1, metavar="N", help=batch)
    offload = "for small GPUs: move text encoders, transformer and VAE to the GPU in turn (default: keep all there)"
    either = group.add_mutually_exclusive_group()
    either.add_argument("--offload", choices=("stages",), help=offload)
    memory = "budget of GPU memory that is never exceeded, such as 8GB: what does not fit takes turns or is streamed"
    either.add_argument("--memory", type=memory_size, metavar="SIZE", help=f"{memory} (default: none)")
    fast = "on a GPU: fused kernels, CUDA graphs and the fastest installed attention kernel (default: off)"
    say("--fast", action="store_true", help=fast)
    parallel = "in processes of torchrun: split each picture, its guidance over two processes (cfg), its image tokens "
    more = "over all (sequence), or as its guidance needs (auto) (default: off)"
    say("--parallel", choices=("cfg", "sequence", "auto"), help=parallel + more)
    data = "in processes of torchrun: each draws a share of the pictures (default: off)"
    say("--data-parallel", action="store_true", help=data)
    tile = "for small GPUs: decode in tiles with sides of this many pixels, such as 256 (default: all at once)"
    say("--vae-tile", type=int, metavar="PIXELS", help=tile)


def _add_where(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    output = "file of the picture, which is overwritten; several pictures become FILE-0.png, FILE-1.png ... (default: "
    more = "picture.png in this folder, or the next free of picture-1.png, picture-2.png ...; nothing is overwritten)"
    say("-o", "--output", metavar="FILE.png", help=output + more)
    grid = "also write all pictures into one file, a row per prompt and a column per seed (default name: FILE-grid.png)"
    say("--grid", nargs="?", const="", metavar="FILE.png", help=grid)
    say("--quiet", action="store_true", help=QUIET)


def run(options: argparse.Namespace) -> int:
    """Draw the pictures and say where they are."""
    check_usage(options)
    with small_steps(options.model), without_collections():
        from mmdit.cli.drawing import draw

    for line in draw(options, note_of(options)):
        say(line)
    return 0


def check_usage(options: argparse.Namespace) -> None:
    """Exit with code 2 where options exclude each other; this check needs no torch."""
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
            options.wrong(f"the prompt {text!r} is the name of a file; {hint} (to draw the words, use --prompts FILE)")
