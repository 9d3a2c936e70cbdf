"""Guidance: predictions under several conditionings become one.

`guide` runs the passes of a level and puts their predictions together; the rest are its parts, each a formula. They
work on x0, the predicted picture. Formulas that their papers give for a model's output are on the velocity here, which
is x - x0 up to the factor 1 / sigma; that factor cancels in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from samplers.types import Denoise, Guide, Guided, Mix, Predict
from samplers.windows import ALWAYS, Window


class Within(NamedTuple):
    """A conditioning, and the levels at which it counts."""

    conditioning: Any
    window: Window = ALWAYS


@dataclass(frozen=True)
class Weaker:
    """A pass of the model made worse; guidance leads away from what it predicts, by scale (cond - weaker).

    Skip-layer guidance (Stability-AI/sd3.5) and perturbed attention (Ahn et al. 2024, arXiv 2403.17377) are it.
    """

    conditioning: Any
    scale: float
    window: Window = ALWAYS
    rescale: float = 0.0  # see `rescaled`, here on x0: ComfyUI's SkipLayerGuidanceDiT


def guide(
    predict: Predict,
    cond: Any,
    uncond: Any,
    mix: Mix,
    *,
    window: Window = ALWAYS,
    weaker: Sequence[Weaker] = (),
    rescale: float = 0.0,
    read_uncond: bool = False,
) -> Guide:
    """What a solver calls: the passes of a level, and their predictions in one.

    Args:
        predict: x0 predictions of a latent at a level, one for each conditioning of a list.
        cond: the prompt.
        uncond: the negative prompt; None for no unconditional pass.
        mix: how these two become one: `plain`, `projected`, `zero_star`.
        window: levels at which they are mixed, else cond counts alone (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        weaker: passes to be led away from.
        rescale: see `rescaled`, on the velocity: what the paper calls the model's output, and what diffusers rescales.
        read_uncond: run the unconditional pass outside of the window too, for solvers that take it (`Solver.guided`).
    """

    def guided(x: Tensor, sigma: float) -> Guided:
        mixed = uncond is not None and sigma in window
        without = [uncond] if mixed or (read_uncond and uncond is not None) else []
        worse = [one for one in weaker if sigma in one.window]
        found = iter(predict(x, sigma, [*without, cond, *(one.conditioning for one in worse)]))
        away = next(found) if without else None
        given = next(found)
        x0 = mix(x, given, away) if mixed and away is not None else given
        for one, weak in zip(worse, found, strict=True):
            x0 = rescaled(x0 + one.scale * (given - weak), given, one.rescale)
        return Guided(x - rescaled(x - x0, x - given, rescale) if rescale else x0, away)

    return guided


def cfg(predict: Predict, cond: Any, uncond: Any, scale: float) -> Guide:
    """Classifier-free guidance and nothing else, see `guide` and `plain`."""
    return guide(predict, cond, uncond, plain(scale))


def plain(scale: float) -> Mix:
    """Classifier-free guidance: u + scale (c - u) (Ho & Salimans 2022, arXiv 2207.12598, in Imagen's counting)."""
    return lambda x, cond, uncond: uncond + scale * (cond - uncond)


def projected(scale: float, *, eta: float = 0.0, threshold: float = 0.0, momentum: float = 0.0) -> Mix:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1): for one drawing, as it remembers.

        d = c - u + momentum d_before;  d <- d min(1, threshold / |d|);  c + (scale - 1) (d_across + eta d_along)

    where d_along is the part of d in the direction of c, which saturates colours, d_across the rest. The paper finds
    that x0 is what to project, so here it is (diffusers' guider projects what it is given, there the velocity).

    Args:
        scale: as in `plain`, whose result this is at eta 1 without threshold and momentum.
        eta: how much of the part along counts.
        threshold: longest d, in the norm over a whole latent; 0 is none. It goes with the size of the picture.
        momentum: the paper's is negative. A solver that calls several times a step moves it as often.
    """
    before: Tensor | float = 0.0

    def mix(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        nonlocal before
        before = push = cond - uncond + momentum * before
        if threshold:
            push = push * (threshold / _dot(push, push).sqrt()).clamp(max=1)
        along = _dot(push, cond) / _dot(cond, cond) * cond
        return cond + (scale - 1) * (push - along + eta * along)

    return mix


def zero_star(scale: float) -> Mix:
    """CFG-Zero*: s u + scale (c - s u) on velocities with s = <c, u> / |u|^2 (Fan et al. 2025, arXiv 2503.18886)."""

    def mix(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        given, without = x - cond, x - uncond
        without = _dot(given, without) / _dot(without, without) * without
        return x - (without + scale * (given - without))

    return mix


def zero_init(guided: Guide, window: Window) -> Guide:
    """CFG-Zero*'s other half: in the window, its first steps, the velocity is 0, so no model runs. Made for Euler."""
    return lambda x, sigma: Guided(x, x) if sigma in window else guided(x, sigma)


def rescaled(value: Tensor, like: Tensor, share: float) -> Tensor:
    """share value std(like) / std(value) + (1 - share) value (Lin et al. 2023, arXiv 2305.08891, eq. 14-16).

    Large guidance scales widen what is predicted, and colours overexpose; `like` is the conditional prediction. The
    deviations are each picture's own (in ComfyUI's SkipLayerGuidanceDiT that of a whole batch: equal for one picture).
    """
    if not share:
        return value
    dims = tuple(range(1, value.ndim))
    ratio = like.std(dims, keepdim=True) / value.std(dims, keepdim=True)
    return (share * ratio + (1 - share)) * value


def one_by_one(predict: Predict) -> Predict:
    """A pass for each conditioning, whatever could share a batch: slower, and the least memory."""
    return lambda x, sigma, conditionings: [predict(x, sigma, [one])[0] for one in conditionings]


def averaged(predict: Predict) -> Predict:
    """`predict` for conditionings that are several `Within` each: the mean over those that count at the level.

    ComfyUI's ConditioningCombine with ConditioningSetTimestepRange (`comfy/samplers.py`, equal weights).
    """

    def mean(x: Tensor, sigma: float, conditionings: Sequence[Sequence[Within]]) -> list[Tensor]:
        counting = [[one.conditioning for one in several if sigma in one.window] for several in conditionings]
        found = iter(predict(x, sigma, [one for several in counting for one in several]))
        parts = [[next(found) for _ in several] for several in counting]
        return [sum(part[1:], start=part[0]) / len(part) for part in parts]

    return mean


def only_x0(guided: Guide) -> Denoise:
    """What plain solvers take: the combined prediction alone."""
    return lambda x, sigma: guided(x, sigma).x0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, [b, 1, ...]."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)
