"""Run two pipelines: the values of one are kept, and the other is measured against them, stage by stage.

One side runs first, and the values of all its stages are kept. The other side then runs twice. In the first run it
continues after every stage with the kept value instead of its own. Both sides thus compute each stage from the same
inputs, and a fault in one stage does not hide faults in later ones. The second run is undisturbed and shows how far the
two pipelines drift apart in total.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from encoders import Conditioning
from mmdit.parity.explain import differing_ids
from mmdit.parity.measure import Against, Kept, Score
from mmdit.parity.report import Limits, Stage
from mmdit.parity.sides import Side
from mmdit.parity.taps import Job, Run, Tap, tapped
from mmdit.runtime.precision import full_float32

T = TypeVar("T")


class Runs(NamedTuple):
    """The values of one side, and the other side measured against them."""

    kept: Kept
    alone: Against  # every stage computed from the kept inputs
    whole: Against  # an undisturbed run
    a_is_kept: bool

    def pair(self, measured: T, kept: T) -> tuple[T, T]:
        """Order a measured and a kept value as (value of a, value of b)."""
        return (kept, measured) if self.a_is_kept else (measured, kept)

    @property
    def names(self) -> list[str]:
        """All stages: those of the measured side in order, and each stage that only the kept side has after its
        predecessor there.
        """
        names = list(self.alone.scores)
        for before, name in pairwise(["", *self.kept.rows]):
            if name not in names:
                names.insert(names.index(before) + 1 if before else 0, name)
        return names

    @property
    def tokens(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Token ids of a and of b, by stage."""
        measured, kept = self.alone.ids.rows, self.kept.rows
        shared = [name for name in measured if name.endswith(" tokens") and name in kept]
        return {name: self.pair(measured[name][0], kept[name][0]) for name in shared}

    def stage(self, name: str, limits: Limits) -> Stage:
        """The comparison of one stage."""
        score, kept = self.alone.scores.get(name), self.kept.shape(name)
        if score is None or kept is None:
            shapes = self.pair(None if score is None else score.shape, kept)
            note = f"only {'b' if shapes[0] is None else 'a'} has it"
            return Stage(name, *shapes, math.inf, math.inf, limits.alone, False, note, math.inf, limits.carried)
        base = self.pair(0, 1)[1]
        whole = self.whole.scores.get(name, score)  # a picture that is not finite has no 8-bit values in a whole run
        relative, carried = score.relative(base), whole.relative(base)
        fits = score.fits and len(score.shapes) == kept[0]
        ok = fits and relative <= limits.alone and carried <= limits.carried
        shapes, note = self.pair(whole.shape, kept), self._note(name, score)
        return Stage(name, *shapes, relative, score.maximum, limits.alone, ok, note, carried, limits.carried)

    def _note(self, name: str, score: Score) -> str:
        finite = self.pair(*score.finite)
        if not all(finite):
            return f"not finite in {' and '.join(who for who, good in zip('ab', finite, strict=True) if not good)}"
        if name in self.tokens:
            return differing_ids(*self.tokens[name])
        return "" if score.fits else "shapes differ"


@torch.no_grad()
def keep(side: Side, job: Job, noise: Tensor) -> Kept:
    """Run a side and keep the values of all its stages, on the CPU."""
    kept = Kept()
    with full_float32():
        run(side, job, noise, kept)
    return kept


@torch.no_grad()
def measure(side: Side, job: Job, noise: Tensor, kept: Kept, *, a_is_kept: bool) -> Runs:
    """Run a side twice against the values that were kept of the other side."""
    alone, whole = Against(kept, feed=True), Against(kept, feed=False)
    with full_float32():
        run(side, job, noise, alone)
        run(side, job, noise, whole)
    return Runs(kept, alone, whole, a_is_kept)


def run(side: Side, job: Job, noise: Tensor, tap: Tap) -> None:
    """Draw the job's picture from `noise`, latents of shape [1, c, h, w], and pass every stage through the tap."""
    state = Run(tap, job)
    with tapped(side.modules, state):
        cond = _text(side, state, "prompt", job.prompt)
        uncond = _text(side, state, "negative", job.negative_prompt)
        state.branches = {"uncond": uncond.context, "cond": cond.context}
        tap("noise", side.noise(job))
        pixels = tap("pixels", side.draw(state, cond, uncond, noise).float())
        if pixels.isfinite().all():
            tap("uint8", side.eight_bits(pixels))


def _text(side: Side, run: Run, which: str, prompt: str) -> Conditioning:
    """The conditioning of a prompt, with the part of each encoder passed through the tap by itself."""
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
    """The number of CLIP tokens at the start of the context; T5's tokens, or zeros in place of T5, follow."""
    rules = side.profile.text
    missing = rules.t5_length if rules.missing_t5 == "zeros" else 0
    return found.context.shape[1] - run.tokens.get("t5", missing)


def _clip_l_widths(side: Side, found: Conditioning) -> tuple[int, int]:
    """Channels of CLIP-L in the context and in the pooled vector; without CLIP-L, those that CLIP-G does not fill."""
    if "clip_l" in side.models:
        config = side.config("clip_l")
        return config["hidden_size"], config["projection_dim"]
    rest = found.pooled.shape[-1] - side.config("clip_g")["projection_dim"] if "clip_g" in side.models else 0
    return rest, rest
