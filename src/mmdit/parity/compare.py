"""Run two pipelines on the same prompt and noise, and find the stages that differ beyond rounding, and the reasons."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmdit.checkpoints.components import Component
from mmdit.parity.explain import component_of, explain
from mmdit.parity.report import Comparison, Limits
from mmdit.parity.runs import Runs, keep, measure
from mmdit.parity.sides import OurSide, Side, side_of
from mmdit.parity.taps import Job
from mmdit.utils import whole

_EXACT = 0.0  # token ids are right or wrong, and so are the 8-bit values of equal pixels
# The relative error allowed for a stage with equal inputs, in units of eps. A block rounds about 16 times in sequence,
# each time by half an eps, which adds up to 16**0.5 halves; a factor of four allows for amplification in layers.
# Measured: 1.6 in blocks of full width with outliers of 300, 2.8 in a pooled vector of the embedded model.
_STAGE = 8
_FLOAT32 = float(torch.finfo(torch.float32).eps)  # sums, schedules, sinusoids and pixels are float32 at every dtype


@torch.no_grad()
def compare(
    a: object,
    b: object,
    prompt: str,
    negative_prompt: str = "",
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    sampler: str | None = None,
    steps: Sequence[int] = (0, -1),
    height: int | None = None,
    width: int | None = None,
) -> Comparison:
    """Compare two pipelines stage by stage: ours with other profiles, weights, dtypes or devices, or diffusers'.

    Both start from a's noise, rounded so that both hold the same numbers. One side runs once, and its values are kept
    on the CPU; the other side runs twice (see `mmdit.parity.runs`). In bfloat16 a fault of less than about 6 % of a
    stage cannot be told from rounding; use float32 to find it.

    Args:
        a, b: `Pipeline`s, or live diffusers `StableDiffusion3Pipeline`s, which sample with their own scheduler.
        prompt, negative_prompt: The texts that both encode.
        num_inference_steps, guidance_scale: Used by both sides; None takes those of a's profile.
        seed: Seed of the starting noise.
        sampler: Name of the sampler of our pipelines; None takes that of each profile.
        steps: Numbers of the steps in which embeddings, blocks and guidance are compared; negative numbers count from
            the end.
        height, width: Size of the picture in pixels; None takes a's default.

    Returns:
        All stages with their errors and limits; printed, it is a table with a verdict.

    Raises:
        TypeError: a or b is not a pipeline of either kind.
        ValueError: a step does not exist, or the two sides draw latents of different shapes.
    """
    sides = side_of(a), side_of(b)
    profile, size = sides[0].profile, sides[0].default_size
    count = whole("num_inference_steps", profile.steps if num_inference_steps is None else num_inference_steps, 1)
    guidance = profile.guidance_scale if guidance_scale is None else guidance_scale
    looked = _looked(steps, count)
    job = Job(prompt, negative_prompt, count, guidance, seed, sampler, height or size, width or size, looked)
    noise = _common_noise(*sides, job)
    runs = _runs(*sides, job, noise)
    rounding, depth = _rounding(*sides), max(len(side.modules.blocks) for side in sides)
    stages = tuple(runs.stage(name, Limits(_tolerance(name, rounding, job, depth))) for name in runs.names)
    failed = [stage.name for stage in stages if not stage.ok]
    return Comparison(str(sides[0]), str(sides[1]), settings_of(job), stages, explain(*sides, failed, runs.tokens))


def _runs(a: Side, b: Side, job: Job, noise: Tensor) -> Runs:
    """Run both sides. The values of diffusers' side are kept, because it cannot run prompts of different lengths."""
    a_is_kept = isinstance(b, OurSide) and not isinstance(a, OurSide)
    first, second = (a, b) if a_is_kept else (b, a)
    return measure(second, job, noise, keep(first, job, noise), a_is_kept=a_is_kept)


def _common_noise(a: Side, b: Side, job: Job) -> Tensor:
    """a's noise, rounded to values that the dtypes of both sides represent exactly."""
    noise, other = a.noise(job), b.noise(job)
    if noise.shape != other.shape:
        raise ValueError(
            f"a draws latents of shape {list(noise.shape)}, b {list(other.shape)}; they cannot be compared"
        )
    dtypes = a.dtype("transformer"), b.dtype("transformer")
    return noise.to(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))


def _looked(steps: Sequence[int], count: int) -> frozenset[int]:
    if wrong := [step for step in steps if not -count <= step < count]:
        raise ValueError(f"steps {wrong} do not exist; of {count} steps give numbers from {-count} to {count - 1}")
    return frozenset(step % count for step in steps)


def _rounding(a: Side, b: Side) -> dict[Component, float]:
    """The relative error that rounding explains in a stage of each component, at the less precise of the two dtypes."""
    found = {}
    for component in {**a.models, **b.models}:
        sides = [side for side in (a, b) if component in side.models]
        dtypes = (side.dtype(part) for side in sides for part in (component, "transformer"))
        eps = max(_FLOAT32, *(torch.finfo(dtype).eps for dtype in dtypes))
        terms = max(side.longest_sum(component) for side in sides)
        found[component] = _STAGE * eps + math.sqrt(terms) * _FLOAT32  # sums are float32, in any order
    return found


def _tolerance(name: str, rounding: Mapping[Component, float], job: Job, depth: int) -> float:
    if name.endswith(" tokens") or name == "uint8":
        return _EXACT
    if name in ("sigmas", "timesteps"):
        return _STAGE * _FLOAT32
    own = rounding.get(component_of(name) or "transformer", rounding["transformer"])
    step = re.match(r"step (\d+) velocity", name)
    if step and int(step[1]) not in job.looked:
        return own * math.sqrt(depth)  # no value was replaced inside: the errors of the blocks add up
    if re.fullmatch(r"step \d+ (guided|latent)", name):
        return own * (1 + job.guidance / _STAGE)  # guidance multiplies the rounding of both branches by 2 x scale - 1
    return own


def settings_of(job: Job) -> str:
    """The job in one line, without its prompts."""
    looked = ", ".join(map(str, sorted(job.looked))) or "none"
    size = f"{job.height} x {job.width} pixels, {job.steps} steps, guidance {job.guidance:g}, seed {job.seed}"
    return f"{size}, sampler {job.sampler or 'of each'}; steps looked into: {looked}"
