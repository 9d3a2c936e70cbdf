"""The options of every command, with their help."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16", "float64")
# Names of samplers.SOLVERS and SCHEDULES, for help without torch.
SAMPLERS = (
    "euler, euler_ancestral, ddim, heun, heunpp2, dpm_2, dpm_2_ancestral, lms, ipndm, ipndm_v, gradient_estimation, "
    "dpmpp_2m, res_multistep, deis, uni_pc, uni_pc_bh2, dpm_fast, dpm_adaptive, dpmpp_2s_ancestral, dpmpp_sde, "
    "dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m_sde, er_sde, seeds_2, seeds_3, sa_solver, sa_solver_pece, lcm, ddpm, "
    "res_multistep_ancestral, euler_cfg_pp, euler_ancestral_cfg_pp, dpmpp_2m_cfg_pp, dpmpp_2s_ancestral_cfg_pp, "
    "res_multistep_cfg_pp, res_multistep_ancestral_cfg_pp, gradient_estimation_cfg_pp, flow_heun, flow_dpmpp_2m, "
    "flow_uni_pc, flow_deis, flow_ddpm"
)
SCHEDULES = (
    "normal, simple, sgm_uniform, ddim_uniform, beta, karras, exponential, linear_quadratic, kl_optimal, "
    "diffusers_karras, diffusers_exponential, diffusers_beta, diffusers_dynamic, diffusers_dpm"
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
Each picture is reported on stdout: wrote PATH (W x H, seed S)
Exit code: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""


def generate(parser: argparse.ArgumentParser) -> None:
    """What is not given is None, so that the settings of a picture can stand in for it."""
    parser.set_defaults(wrong=parser.error)
    _add_what(parser.add_argument_group("what to draw"))
    _add_model(parser.add_argument_group("with which model"))
    _add_how(parser.add_argument_group("how to draw"))
    _add_where(parser.add_argument_group("where to write"))


def _add_what(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    say("prompt", nargs="*", metavar="PROMPT", help="what to draw; every prompt is drawn with every seed")
    say("--prompts", metavar="FILE", help="instead: a text file with one prompt a line; - is standard input")
    say("-n", "--negative-prompt", metavar="TEXT", help="what to draw away from (default: nothing)")
    seed = "start of each picture: another seed, another picture; the same seed, the same picture (default: 0)"
    say("--seed", nargs="+", type=_seed, metavar="N", help=seed)
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
    say("--guidance-scale", type=float, metavar="X", help=scale)
    more = "what else guides, such as 'skip_guidance_layers=7,8,9' (SD3.5-Medium) or 'kind=apg momentum=-0.5'; a wrong "
    say("--guidance", metavar="'NAME=VALUE ...'", help=f"{more}name lists all (default: nothing)")
    preset = "turbo, sd3_medium, sd3.5_medium, sd3.5_large, sd3.5_large_turbo: steps, guidance and sampler that suit "
    say("--preset", metavar="NAME", help=f"{preset}such a model (default: the profile's)")
    profile = "diffusers, comfyui, reference: whose defaults and small choices to follow (default: diffusers)"
    say("--profile", metavar="NAME", help=profile)
    say("--sampler", metavar="NAME", help=f"{SAMPLERS} (default: the profile's; diffusers: euler)")
    schedule = f"noise levels of the steps: {SCHEDULES} (default: the profile's; diffusers: normal)"
    say("--schedule", metavar="NAME", help=schedule)
    shift = "more of the steps at high noise: a number above 0, or resolution, for what suits the size of the picture "
    say("--shift", type=_shift, metavar="X", help=f"{shift}(default: the model's; SD3.5: 3)")
    length = "how much of a long prompt T5 reads (default: the profile's; diffusers: 256)"
    say("--max-sequence-length", type=int, metavar="TOKENS", help=length)
    say("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    say("--dtype", choices=DTYPES, help="what to compute in (default: float32 on the CPU, else bfloat16)")
    say("--quant", metavar="NAME", help="float8 for transformer and T5: fp8, fp8-weight-only ... (default: none)")
    batch = "pictures drawn at once: faster on a GPU, and rounded a little differently (default: 1)"
    say("--batch", type=int, default=1, metavar="N", help=batch)
    offload = "for small GPUs: text encoders, transformer and VAE take turns on it (default: all stay)"
    say("--offload", choices=("stages",), help=offload)
    say("--vae-tile", type=int, metavar="PIXELS", help="for small GPUs: decode in such tiles, say 256 (default: whole)")


def _add_where(group: argparse._ArgumentGroup) -> None:
    say = group.add_argument
    output = "several pictures become FILE-0.png, FILE-1.png ...; what exists is replaced (default: picture.png here; "
    more = "what exists is kept, and the next free one of picture-1.png, picture-2.png ... is taken)"
    say("-o", "--output", metavar="FILE.png", help=output + more)
    grid = "also write all pictures in one, a row for each prompt, a column for each seed (default name: FILE-grid.png)"
    say("--grid", nargs="?", const="", metavar="FILE.png", help=grid)
    say("--quiet", action="store_true", help="no progress bar and no notes")


def _shift(text: str) -> float | str:
    return text if text.isalpha() else float(text)


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; prompts go before --seed") from error


def inspect(parser: argparse.ArgumentParser) -> None:
    """What to look into."""
    parser.add_argument("path", help="safetensors file, shard index, folder, or a PNG that mmdit wrote")


def convert(parser: argparse.ArgumentParser) -> None:
    """From where to where."""
    parser.add_argument("source", help="safetensors file or folder of any layout")
    parser.add_argument("target", help="a new folder, or a new .safetensors file for --layout single")
    parser.add_argument("--layout", required=True, help="official, diffusers, comfyui or single")
    parser.add_argument("--dtype", choices=DTYPES, help="cast (default: keep every byte)")


def quantize(parser: argparse.ArgumentParser) -> None:
    """From where to where, and how."""
    say = parser.add_argument
    say("source", help="safetensors file or folder of any layout; all models in it are written")
    say("target", help="a new .safetensors file, or, for a folder, a new folder in the same layout")
    recipes = "fp8, fp8-tensor, fp8-static, fp8-weight-only, fp8-e5m2 (default: %(default)s, the one for ComfyUI)"
    say("--recipe", default="fp8-tensor", metavar="NAME", help=recipes)
    spelling = "how scales are written: comfyui, or comfyui-old for versions of before late 2025 (default: %(default)s)"
    say("--spelling", default="comfyui", metavar="NAME", help=spelling)
    select = "names of Linears, such as 'joint_blocks.*' or 't5.*' (default: the large ones of transformer and T5)"
    say("--select", nargs="+", metavar="GLOB", help=select)
    static = parser.add_argument_group("calibration, for fp8-static")
    static.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line, some tens")
    static.add_argument("--steps", type=int, metavar="N", help="as pictures will be drawn (default: the profile's)")
    static.add_argument("--guidance-scale", type=float, metavar="X", help="likewise")
    percentile = "of absolute values that the scales reach (default: 100, all)"
    static.add_argument("--percentile", type=float, default=100.0, metavar="X", help=percentile)
    static.add_argument("--device", metavar="NAME", help="(default: cuda where there is one)")
    static.add_argument("--dtype", choices=DTYPES, help="to draw in (default: as stored)")
    say("--quiet", action="store_true", help="no progress bar and no notes")


def verify(parser: argparse.ArgumentParser) -> None:
    """What to compare with diffusers."""
    parser.add_argument("folder", help="checkpoint to verify")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="sampler steps to compare (default: %(default)s)")


def compare(parser: argparse.ArgumentParser) -> None:
    """Two sides."""
    parser.add_argument("prompt", help="what both draw")
    parser.add_argument("-n", "--negative-prompt", default="", help="what both draw away from")
    for side, model in (("a", "the embedded model"), ("b", "that of a")):
        group = parser.add_argument_group(f"side {side}")
        group.add_argument(f"--model-{side}", metavar="MODEL", help=f"folder, file or hub id (default: {model})")
        group.add_argument(f"--profile-{side}", metavar="PROFILE", default="diffusers", help="(default: %(default)s)")
        group.add_argument(f"--dtype-{side}", choices=DTYPES, help="(default: float32 on the CPU, else bfloat16)")
        group.add_argument(f"--device-{side}", metavar="DEVICE", help="(default: cuda where there is one)")
        if side == "b":
            group.add_argument("--diffusers", action="store_true", help="b is diffusers itself, on a diffusers folder")
    both = parser.add_argument_group("both sides")
    both.add_argument("--steps", type=int, help="sampler steps (default: those of a's profile)")
    both.add_argument("--look", type=int, nargs="+", default=[0, -1], help="steps to look into (default: first, last)")
    both.add_argument("--guidance-scale", type=float, help="(default: that of a's profile)")
    both.add_argument("--sampler", help="(default: that of each profile)")
    both.add_argument("--seed", type=int, default=0, help="of the noise that both start from (default: %(default)s)")
    both.add_argument("--height", type=int, help="pixels")
    both.add_argument("--width", type=int, help="pixels")
    both.add_argument("--json", action="store_true", help="print everything as JSON")


def bench(parser: argparse.ArgumentParser) -> None:
    """What to measure: by itself, a step."""
    parser.set_defaults(what="steps")
    more = parser.add_subparsers(title="instead of a step", metavar="layers, picture, samplers")
    for name, add, said in (
        ("layers", _bench_layers, "each Linear of a block by itself, and native against emulated float8"),
        ("picture", _bench_picture, "a whole picture with all models: seconds by stage, and memory"),
        ("samplers", _bench_samplers, "what samplers cost and give on the embedded model, in tables and plots"),
    ):
        add(more.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}."))
    _add_sizes(parser, "fp8", "fp8-static")
    say = parser.add_argument
    say("--batch", type=int, default=2, help="samples of a step (default: 2, the branches of guidance)")
    say("--text", type=int, default=333, help="text tokens (default: %(default)s, T5 at 256)")
    say("--against", nargs="*", default=[], metavar="PEER", help="diffusers, torchao, torchao-tuned: in the same run")
    say("--eager", action="store_true", help="leave out the rows with compiled blocks")
    say("--only", nargs="+", default=["*"], metavar="GLOB", help="rows by name, such as '*compiled' (default: all)")
    say("--repeats", type=int, default=20, help="steps of which the median is taken")
    say("-o", "--output", metavar="FILE.json", help="all numbers as JSON")


def _add_sizes(parser: argparse.ArgumentParser, *recipes: str) -> None:
    say = parser.add_argument
    say("--model", default="large", help="large, medium or demo; random weights (default: %(default)s)")
    say("--size", type=int, default=1024, help="of the picture in pixels (default: %(default)s)")
    names = f"float8 recipes; NAME+exact sums without fast accumulation (default: {' '.join(recipes)})"
    say("--quant", nargs="*", default=list(recipes), metavar="NAME", help=names)
    say("--device", help="(default: cuda where there is one)")
    say("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")


def _bench_layers(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(what="layers")
    _add_sizes(parser, "fp8", "fp8-tensor")
    parser.add_argument("--batch", type=int, default=2, help="samples of a step (default: 2, the branches of guidance)")
    parser.add_argument("--text", type=int, default=333, help="text tokens (default: %(default)s, T5 at 256)")


def _bench_picture(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(what="picture")
    _add_sizes(parser, "fp8")
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--against", nargs="*", default=[], metavar="PEER", help="diffusers: in the same run")
    parser.add_argument("--eager", action="store_true", help="leave out the rows with compiled blocks")


def _bench_samplers(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(what="samplers")
    say = parser.add_argument
    measures = "orders, error (against model calls), accuracy (sampler by schedule), steps (sampler by steps), page"
    say("--measure", nargs="+", default=["error"], metavar="NAME", help=f"{measures} (default: error)")
    say("--samplers", nargs="+", metavar="NAME", help="(default: all)")
    say("--schedules", nargs="+", metavar="NAME", help="for accuracy and page (default: normal karras beta)")
    say("--steps", nargs="+", type=int, metavar="N", help="(default: 20 for accuracy and page, several for the others)")
    say("--prompts", type=int, metavar="N", help="(default: 64, for error 4)")
    say("--guidance-scale", type=float, default=4.5, metavar="X", help="(default: %(default)s)")
    say("--fine", type=int, default=100, metavar="N", help="steps of heun that count as exact (default: %(default)s)")
    say("--batch", type=int, default=32, metavar="N", help="pictures drawn at once (default: %(default)s)")
    say("--minutes", type=float, default=float("inf"), metavar="X", help="start nothing that would end later")
    say("--workers", type=int, metavar="N", help="processes that score pictures (default: this one)")
    say("--model", metavar="FOLDER", help="of a model of the same grammar (default: the embedded one)")
    say("--profile", default="diffusers", metavar="NAME", help="(default: %(default)s)")
    say("--device", help="(default: cuda where there is one)")
    say("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    say("-o", "--output", default="samplers", metavar="FOLDER", help="(default: %(default)s)")
