"""Verify a checkpoint: compare our pipeline with diffusers' on the same weights, from the prompt to the pixels.

`verify` is `compare` of our pipeline with diffusers' on the same weights. It holds every stage to a fixed limit instead
of one that follows from the dtype, and latents and pixels of the two whole runs to limits of their own.
It needs the extra `test`, which brings diffusers and transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmdit.parity.compare import settings_of
from mmdit.parity.reference import libraries, load_diffusers
from mmdit.parity.report import Comparison, Limits
from mmdit.parity.runs import keep, measure
from mmdit.parity.sides import OurSide, TheirSide
from mmdit.parity.taps import Job
from mmdit.pipeline.pipeline import Pipeline
from mmdit.utils import whole
from quant.quantize import dequantize_

PROMPT, NEGATIVE = 'A photo of a red fox beside 3 blue birds, and a sign that says "wow!"', "blurry, Low quality"
DTYPES = (torch.float32, torch.float64)
GUIDANCE = 7.0  # diffusers' default
SEED = 0


class Limit(NamedTuple):
    """The largest relative L2 error of a group of stages that passes, and the reason for it."""

    value: float
    reason: str


_MODEL = "rounding of float32 layers; in float64 too, where diffusers computes parts in float32"
LIMITS = {  # by group, in the order of computation; tokens of the negative prompt follow the prompt's last stage
    "tokens": Limit(0.0, "token ids are right or wrong"),
    "encoders": Limit(1e-5, _MODEL),
    "conditioning": Limit(1e-5, "the encoders' outputs, only moved"),
    "noise": Limit(0.0, "the same draws of the same generator"),
    "schedule": Limit(1e-6, "diffusers keeps its sigmas in float32"),
    "embedders": Limit(1e-5, _MODEL),
    "blocks": Limit(1e-5, _MODEL),
    "velocity": Limit(1e-5, _MODEL),
    "latents": Limit(1e-4, "per step, of whole runs: each step adds the velocities' errors, times the guidance"),
    "vae": Limit(1e-5, _MODEL),
    "pixels": Limit(1e-4, "of whole runs: the last latent's error, and rounding in the VAE"),
    "uint8": Limit(0.0, "8-bit values of equal pixels are right or wrong"),
}
GROUPS = tuple(LIMITS)
_WHOLE = (
    "latents",
    "pixels",
)  # their limits are those of whole runs; from equal inputs they are held to that of layers
_WHOLE_FLOAT64 = 1e-6  # instead of 1e-4; diffusers' scheduler steps in float32
_BEFORE_SAMPLING = ("tokens", "encoders", "conditioning", "noise", "schedule")
_PATTERNS = {
    r"\w+ \w+ tokens": "tokens",
    r"\w+ \w+ (embedding|layer \d+)": "encoders",
    r"\w+ \w+ (context|pooled)": "conditioning",
    r"noise": "noise",
    r"sigmas|timesteps": "schedule",
    r"step \d+ block .*": "blocks",
    r"step \d+ (final_layer|velocity .*)": "velocity",
    r"step \d+ (latent|guided)|final latent": "latents",
    r"step \d+ .*": "embedders",
    r"vae .*": "vae",
    r"pixels": "pixels",
    r"uint8": "uint8",
}
_ADVICE = (
    "An error of only a few times its limit: run again in float64, where rounding nearly vanishes and a fault stays.",
    "`mmdit compare PROMPT --model-a FOLDER --model-b DIFFUSERS_FOLDER --diffusers` says more: it holds both sides in "
    "memory and compares their configs and weights.",
)


def verify(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prompt: str = PROMPT,
    negative_prompt: str = NEGATIVE,
    steps: int = 3,
    size: int | tuple[int, int] | None = None,
    ours: Pipeline | None = None,
) -> Comparison:
    """Compare our pipeline (a) with diffusers' `StableDiffusion3Pipeline` (b) on the same weights, stage by stage.

    It takes the memory of one side's models at `dtype`: diffusers' are freed before ours are read. A checkpoint that
    diffusers cannot read as it is is rewritten for it in a temporary folder, which takes its size on disk.

    Args:
        folder: A checkpoint that is enough for a picture, in any layout; or a single file.
        device: The device of both sides.
        dtype: float32 or float64. Stored weights of any dtype are upcast to it without loss.
        prompt, negative_prompt: The texts that both sides encode.
        steps: Number of sampler steps, with guidance; layers are compared in the first and the last.
        size: Size of the picture in pixels, a side or (height, width). None is 192 x 256, or less for a small model.
        ours: Our pipeline, where it is loaded already; it must be on `device` and in `dtype`.

    Raises:
        ImportError: diffusers or transformers is missing; the message names the extra.
        ValueError: a dtype whose rounding would hide faults, or a size that does not fit the model.
        FileNotFoundError, mmdit.CheckpointError: see `Pipeline.from_pretrained`.
    """
    diffusers, transformers = libraries()
    _check_dtype(dtype, ours)
    steps = whole("steps", steps, 1)
    pipe, how = load_diffusers(folder, device, dtype)
    theirs, (height, width) = TheirSide(pipe), _pixels(pipe, size)
    job = Job(prompt, negative_prompt, steps, GUIDANCE, SEED, None, height, width, frozenset({0, steps - 1}))
    noise = theirs.noise(job)
    kept, name_b = keep(theirs, job, noise), str(theirs)
    del theirs, pipe  # before ours is read
    side = OurSide(_loaded(Path(folder), device, dtype) if ours is None else ours)
    runs = measure(side, job, noise, kept, a_is_kept=False)
    settings = (
        settings_of(job),
        f"reference: diffusers {diffusers.__version__} with transformers {transformers.__version__}",
        f"its weights: {how}",
    )
    stages = tuple(runs.stage(name, limits_of(name, steps, dtype)) for name in runs.names)
    explanation = () if all(stage.ok for stage in stages) else _ADVICE
    return Comparison(str(side), name_b, "\n".join(settings), stages, explanation, _reasons())


def group_of(name: str) -> str:
    """The group of a stage, which is one of `GROUPS`."""
    return next(group for pattern, group in _PATTERNS.items() if re.fullmatch(pattern, name))


def limits_of(name: str, steps: int, dtype: torch.dtype) -> Limits:
    """The limits of a stage in a run of so many steps.

    The errors of two whole runs are limited before sampling, where they have not grown, and for latents and pixels.
    """
    group = group_of(name)
    limit = LIMITS[group].value
    if group not in _WHOLE:
        return Limits(limit, limit) if group in _BEFORE_SAMPLING else Limits(limit)
    per_step = limit if dtype == torch.float32 else _WHOLE_FLOAT64
    if group == "pixels":
        return Limits(LIMITS["vae"].value, per_step)
    step = re.match(r"step (\d+)", name)
    return Limits(LIMITS["blocks"].value, per_step * (int(step[1]) + 1 if step else steps))


def _reasons() -> tuple[str, ...]:
    lines = (f"  {group:<13} {limit.value:<6.0e} {limit.reason}" for group, limit in LIMITS.items())
    return ("Limits are fixed:", *lines)


def _loaded(path: Path, device: torch.device | str, dtype: torch.dtype) -> Pipeline:
    pipe = Pipeline.load(path, device=device, dtype=dtype)
    for model in pipe.models.values():  # the reference has no float8
        dequantize_(model)
    return pipe


def _pixels(pipe: Any, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width; by default they differ, so that exchanged axes show."""
    if size is not None:
        return (size, size) if isinstance(size, int) else size
    config = pipe.transformer.config
    unit = pipe.vae_scale_factor * config.patch_size
    side = min(256, config.pos_embed_max_size * unit)
    return side * 3 // 4 // unit * unit, side


def _check_dtype(dtype: torch.dtype, ours: Pipeline | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"verify runs in float32 or float64, got {dtype}: in 16 bits two correct implementations differ by more "
            "than a faulty one would. Stored 16-bit weights are upcast without loss"
        )
    if ours is not None and ours.dtype != dtype:
        raise ValueError(f"the given pipeline is in {ours.dtype}, verify was asked for {dtype}")
