"""Two pipelines over the same prompt and the same noise, stage by stage: where they differ beyond rounding, and why.

How a fault is located: one side runs first, and the values of all its stages are kept. Then the other runs, and after
every stage goes on with the kept value in place of its own. So both compute each stage from the same inputs: its error
is its own, no error reaches the next stage, and every fault shows, not only the first. A second run of the other side,
by itself, says how far the two drift apart in all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from encoders import Conditioning
from mmdit.checkpoints.components import Component
from mmdit.parity.explain import component_of, differing_ids, explain
from mmdit.parity.measure import Against, Kept, Score
from mmdit.parity.report import Comparison, Stage
from mmdit.parity.sides import OurSide, Side, side_of
from mmdit.parity.taps import Job, Run, Tap, tapped
from mmdit.runtime.precision import full_float32
from mmdit.utils import whole

T = TypeVar("T")

_EXACT = 0.0  # ids are right or wrong, and so are the 8-bit levels of equal pixels
# eps that a stage may be off by, from equal inputs: a block rounds some 16 times one after the other, which makes
# 16**0.5 halves of eps; four times that for what layers make of it. Seen: 1.6 in blocks of full width with outliers of
# 300, 2.8 in a pooled vector of the embedded model.
_STAGE = 8
_FLOAT32 = float(torch.finfo(torch.float32).eps)  # of sums, schedules, sinusoids and pixels, at every dtype


@torch.no_grad()
def compare(
    a: Any,
    b: Any,
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
    on the CPU; the other runs twice. In bfloat16 a fault below some 6 % of a stage passes for rounding: use float32.

    Args:
        a, b: a `Pipeline`, or a live diffusers `StableDiffusion3Pipeline`, whose own scheduler then is its sampler.
        prompt, negative_prompt: what both read.
        num_inference_steps, guidance_scale: of both; None is a's profile's.
        seed: of the noise.
        sampler: of ours; None is each profile's.
        steps: whose embeddings, blocks and guidance are looked into; negative numbers count from the end.
        height, width: of the picture in pixels; None is a's default.

    Raises:
        TypeError: a or b is no such pipeline.
        ValueError: a step that there is not, or latents of different shapes.
    """
    sides = side_of(a), side_of(b)
    profile, size = sides[0].profile, sides[0].default_size
    count = whole("num_inference_steps", profile.steps if num_inference_steps is None else num_inference_steps, 1)
    guidance = profile.guidance_scale if guidance_scale is None else guidance_scale
    looked = _looked(steps, count)
    job = Job(prompt, negative_prompt, count, guidance, seed, sampler, height or size, width or size, looked)
    noise = _common_noise(*sides, job)
    runs = _Runs.of(*sides, job, noise)
    rounding, depth = _rounding(*sides), max(len(side.modules.blocks) for side in sides)
    stages = tuple(_stage(name, runs, _tolerance(name, rounding, job, depth)) for name in runs.names)
    failed = [stage.name for stage in stages if not stage.ok]
    return Comparison(str(sides[0]), str(sides[1]), _settings(job), stages, explain(*sides, failed, runs.tokens))


class _Runs(NamedTuple):
    """One side's values, and the other side measured against them: stage by stage, and in a whole run."""

    kept: Kept
    alone: Against
    whole: Against
    a_is_kept: bool

    @classmethod
    def of(cls, a: Side, b: Side, job: Job, noise: Tensor) -> _Runs:
        """Run both; diffusers is the one that is kept, because it draws with no prompts of different lengths."""
        a_is_kept = isinstance(b, OurSide) and not isinstance(a, OurSide)
        first, second = (a, b) if a_is_kept else (b, a)
        kept = Kept()
        alone, whole_run = Against(kept, feed=True), Against(kept, feed=False)
        with full_float32():
            _run(first, job, noise, kept)
            _run(second, job, noise, alone)
            _run(second, job, noise, whole_run)
        return cls(kept, alone, whole_run, a_is_kept)

    def pair(self, measured: T, kept: T) -> tuple[T, T]:
        """Of a, of b."""
        return (kept, measured) if self.a_is_kept else (measured, kept)

    @property
    def names(self) -> list[str]:
        """All stages: one side's in its order, and what only the other has after what it has before it."""
        names = list(self.alone.scores)
        for before, name in pairwise(["", *self.kept.rows]):
            if name not in names:
                names.insert(names.index(before) + 1 if before else 0, name)
        return names

    @property
    def tokens(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Ids of a and of b, by stage."""
        measured, kept = self.alone.ids.rows, self.kept.rows
        shared = [name for name in measured if name.endswith(" tokens") and name in kept]
        return {name: self.pair(measured[name][0], kept[name][0]) for name in shared}


def _run(side: Side, job: Job, noise: Tensor, tap: Tap) -> None:
    run = Run(tap, job)
    with tapped(side.modules, run):
        cond = _text(side, run, "prompt", job.prompt)
        uncond = _text(side, run, "negative", job.negative_prompt)
        run.branches = {"uncond": uncond.context, "cond": cond.context}
        tap("noise", side.noise(job))
        pixels = tap("pixels", side.draw(run, cond, uncond, noise).float())
        if pixels.isfinite().all():
            tap("uint8", side.eight_bits(pixels))


def _text(side: Side, run: Run, which: str, prompt: str) -> Conditioning:
    """What the transformer reads, each encoder's part tapped by itself."""
    run.prompt, run.tokens = which, {}
    found = side.encode(prompt)
    length, (width, pooled_width) = _clip_tokens(side, run, found), _clip_l_widths(side, found)
    of_clip, t5 = found.context[:, :length], found.context[:, length:]
    channels = [
        run.of_text("clip_l context")(of_clip[..., :width]),
        run.of_text("clip_g context")(of_clip[..., width:]),  # with the zeros that fill the channels
    ]
    context = torch.cat([torch.cat(channels, dim=-1), run.of_text("t5 context")(t5)], dim=1)
    pooled = [
        run.of_text("clip_l pooled")(found.pooled[:, :pooled_width]),
        run.of_text("clip_g pooled")(found.pooled[:, pooled_width:]),
    ]
    return replace(found, context=context, pooled=torch.cat(pooled, dim=-1))


def _clip_tokens(side: Side, run: Run, found: Conditioning) -> int:
    """How many tokens of the context are CLIP's; T5's, or those that stand for them, follow."""
    rules = side.profile.text
    missing = rules.t5_length if rules.missing_t5 == "zeros" else 0
    return found.context.shape[1] - run.tokens.get("t5", missing)


def _clip_l_widths(side: Side, found: Conditioning) -> tuple[int, int]:
    """Channels of CLIP-L in the context and in the pooled vector; of a missing tower, what the other leaves."""
    if "clip_l" in side.models:
        config = side.config("clip_l")
        return config["hidden_size"], config["projection_dim"]
    rest = found.pooled.shape[-1] - side.config("clip_g")["projection_dim"] if "clip_g" in side.models else 0
    return rest, rest


def _common_noise(a: Side, b: Side, job: Job) -> Tensor:
    """a's noise, in numbers that both sides' dtypes hold."""
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
    """What rounding explains of the relative error of a stage of each component, on the less precise side."""
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
        return own * math.sqrt(depth)  # nothing was replaced inside: the blocks add up
    if re.fullmatch(r"step \d+ (guided|latent)", name):
        return own * (1 + job.guidance / _STAGE)  # guidance takes 2 x scale - 1 times the halves of eps of both halves
    return own


def _stage(name: str, runs: _Runs, tolerance: float) -> Stage:
    score, kept = runs.alone.scores.get(name), runs.kept.shape(name)
    if score is None or kept is None:
        shapes = runs.pair(None if score is None else score.shape, kept)
        note = f"only {'b' if shapes[0] is None else 'a'} has it"
        return Stage(name, *shapes, math.inf, math.inf, tolerance, ok=False, note=note, carried=math.inf)
    base = runs.pair(0, 1)[1]
    whole_run = runs.whole.scores.get(name, score)  # not there: a picture that is not finite has no 8 bits
    relative, carried = score.relative(base), whole_run.relative(base)
    ok = score.fits and len(score.shapes) == kept[0] and relative <= tolerance
    shapes = runs.pair(whole_run.shape, kept)
    return Stage(name, *shapes, relative, score.maximum, tolerance, ok, _note(name, runs, score), carried)


def _note(name: str, runs: _Runs, score: Score) -> str:
    finite = runs.pair(*score.finite)
    if not all(finite):
        return f"not finite in {' and '.join(who for who, good in zip('ab', finite, strict=True) if not good)}"
    if name in runs.tokens:
        return differing_ids(*runs.tokens[name])
    return "" if score.fits else "shapes differ"


def _settings(job: Job) -> str:
    looked = ", ".join(map(str, sorted(job.looked))) or "none"
    size = f"{job.height} x {job.width} pixels, {job.steps} steps, guidance {job.guidance:g}, seed {job.seed}"
    return f"{size}, sampler {job.sampler or 'of each'}; steps looked into: {looked}"
