"""`mmdit compare`: find the first stage at which two pipelines differ, and why."""

from __future__ import annotations

import argparse
from typing import Any

from mmdit._imports import without_collections
from mmdit.cli.console import note, say
from mmdit.cli.process import small_steps
from mmdit.cli.usage import DEFAULT_DEVICE, DEFAULT_DTYPE, DTYPES, JSON, dtype_name, sampler_name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of each side and those of both."""
    parser.add_argument("prompt", help="the prompt that both sides draw")
    parser.add_argument("-n", "--negative-prompt", default="", help="negative prompt of both sides (default: empty)")
    for side, model in (("a", "demo, the embedded model"), ("b", "that of a")):
        group = parser.add_argument_group(f"side {side}")
        add = group.add_argument
        add(f"--model-{side}", metavar="MODEL", help=f"folder, file, or owner/name on the hub (default: {model})")
        profile = "the program whose behaviour to follow: diffusers, comfyui, reference (default: %(default)s)"
        add(f"--profile-{side}", metavar="PROFILE", default="diffusers", help=profile)
        dtype = f"dtype of weights and arithmetic {DEFAULT_DTYPE}"
        add(f"--dtype-{side}", type=dtype_name, choices=DTYPES, help=dtype)
        add(f"--device-{side}", metavar="DEVICE", help=f"cpu, cuda, cuda:1 ... {DEFAULT_DEVICE}")
        if side == "b":
            add("--diffusers", action="store_true", help="run diffusers as side b, on a checkpoint of any layout")
    both = parser.add_argument_group("both sides").add_argument
    both("--steps", type=int, metavar="N", help="number of sampler steps (default: that of a's profile)")
    look = "steps whose blocks are compared; negative numbers count from the end (default: first and last)"
    both("--look", type=int, nargs="+", default=[0, -1], metavar="N", help=look)
    scale = "weight of classifier-free guidance (default: that of a's profile)"
    both("--guidance-scale", "--cfg", type=float, metavar="X", help=scale)
    both("--sampler", type=sampler_name, metavar="NAME", help="sampler of ours (default: that of each profile)")
    both("--seed", type=int, default=0, metavar="N", help="seed of the starting noise (default: %(default)s)")
    both("--height", type=int, metavar="PIXELS", help="height of the picture (default: the model's own size)")
    both("--width", type=int, metavar="PIXELS", help="width of the picture (default: the model's own size)")
    both("--json", action="store_true", help=JSON)


def run(options: argparse.Namespace) -> int:
    """Print the comparison; exit code 1 where a stage differs beyond rounding."""
    with small_steps(options.model_a), without_collections():
        from mmdit.parity.compare import compare

    _check(options)
    found = compare(
        _side(options, "a"),
        _side(options, "b"),
        options.prompt,
        options.negative_prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        sampler=options.sampler,
        steps=options.look,
        height=options.height,
        width=options.width,
    )
    say(found.to_json() if options.json else found)
    return 0 if found.passed else 1


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError for options that are wrong for every model."""
    from mmdit.cli.usage import usage_errors
    from mmdit.pipeline.arguments import profile_of
    from mmdit.utils import whole
    from samplers import SOLVERS, pick

    with usage_errors():
        for option in ("steps", "height", "width"):
            if (value := getattr(options, option)) is not None:
                whole(f"--{option}", value, 1)
        if options.sampler is not None:
            pick(SOLVERS, options.sampler, "sampler")
        for profile in (options.profile_a, options.profile_b):
            profile_of(profile, None)


def _side(options: argparse.Namespace, side: str) -> Any:
    from mmdit.cli.devices import DEMO, choose_threads, load, path_of, place_of

    model, profile, device = (getattr(options, f"{what}_{side}") for what in ("model", "profile", "device"))
    model = (options.model_a if model is None else model) or DEMO
    device, dtype = place_of(device, getattr(options, f"dtype_{side}"), note)
    if side == "b" and options.diffusers:
        from mmdit.parity.reference import load_diffusers

        return load_diffusers(path_of(model), device, dtype)[0]
    choose_threads(None, model, device)
    return load(model, device=device, dtype=dtype, profile=profile)
