"""What `mmdit compare` does: build two pipelines from the options of either side, compare, print."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from mmdit.checkpoints.hub import is_repo_id
from mmdit.cli.devices import device_of
from mmdit.parity.compare import compare
from mmdit.parity.report import Comparison
from mmdit.pipeline.pipeline import Pipeline


def compared(options: Namespace) -> Comparison:
    """The comparison that the options ask for.

    Raises:
        ValueError, OSError, ImportError: an option is wrong, or a model cannot be loaded.
    """
    a, b = _side(options, "a"), _side(options, "b")
    return compare(
        a,
        b,
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


def _side(options: Namespace, side: str) -> Any:
    model, profile, device = (getattr(options, f"{what}_{side}") for what in ("model", "profile", "device"))
    model = options.model_a if model is None else model
    device = device_of(device)
    dtype = getattr(torch, getattr(options, f"dtype_{side}") or ("float32" if device.type == "cpu" else "bfloat16"))
    if side == "b" and options.diffusers:
        return _theirs(model, device, dtype)
    if model is None:
        return Pipeline.demo(device=device, dtype=dtype, profile=profile)
    one_file = model.endswith(".safetensors") and not is_repo_id(model)
    load: Any = Pipeline.from_single_file if one_file else Pipeline.from_pretrained
    return load(model, device=device, dtype=dtype, profile=profile)


def _theirs(model: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    if model is None:
        raise ValueError("--diffusers needs --model-b, a diffusers folder: mmdit convert writes one of any checkpoint")
    try:
        from diffusers import StableDiffusion3Pipeline
    except ImportError as error:
        raise ImportError('--diffusers needs diffusers: pip install "mmdit-lab[test]"') from error
    pipe = StableDiffusion3Pipeline.from_pretrained(model).to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
