"""Guidance: combine the predictions under several conditionings into one.

`guide` runs the model's passes at a noise level and combines them; the other functions are its parts, one formula each.
They work on x0, the predicted picture. A formula that its paper gives for the model's output is applied to the velocity
here, which is x - x0 up to the factor 1 / sigma; that factor cancels in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from samplers.checks import number, tensor
from samplers.types import Denoise, Guide, Guided, Mix, Predict
from samplers.windows import ALWAYS, Window


class Within(NamedTuple):
    """A conditioning, and the window of noise levels in which it is used."""

    conditioning: Any
    window: Window = ALWAYS


@dataclass(frozen=True)
class Weaker:
    """A pass of a weakened model; guidance adds scale (cond - weaker).

    Skip-layer guidance (Stability-AI/sd3.5) and perturbed attention (Ahn et al. 2024, arXiv 2403.17377) work so.
    """

    conditioning: Any
    scale: float
    window: Window = ALWAYS
    rescale: float = 0.0  # the share of `rescaled`, on x0, as in ComfyUI's SkipLayerGuidanceDiT

    def __post_init__(self) -> None:
        number("scale of a weaker pass", self.scale)
        number("rescale of a weaker pass", self.rescale)


def guide(
    predict: Predict,
    cond: object,
    uncond: object,
    mix: Mix,
    *,
    window: Window = ALWAYS,
    weaker: Sequence[Weaker] = (),
    rescale: float = 0.0,
    read_uncond: bool = False,
) -> Guide:
    """Return the function that a solver calls: (latent, noise level) -> `Guided`.

    Args:
        predict: (latent, noise level, conditionings) -> the predicted x0 of each conditioning.
        cond: the conditioning of the prompt.
        uncond: the conditioning of the negative prompt; None for no unconditional pass.
        mix: how the two predictions are combined: `plain`, `projected`, `zero_star`.
        window: noise levels at which they are combined; elsewhere the result is the conditional prediction
            (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        weaker: passes of weakened models.
        rescale: the share of `rescaled`, on the velocity, which is what the paper and diffusers rescale.
        read_uncond: run the unconditional pass outside of the window too, for solvers that take it (`Solver.guided`).

    Raises:
        ValueError: a number is not finite; or, when called, `predict` returns another number of predictions.
    """
    rescale = number("rescale", rescale)

    def guided(x: Tensor, sigma: float) -> Guided:
        mixed = uncond is not None and sigma in window
        without = [uncond] if mixed or (read_uncond and uncond is not None) else []
        worse = [one for one in weaker if sigma in one.window]
        asked = [*without, cond, *(one.conditioning for one in worse)]
        predictions = predict(x, sigma, asked)
        if len(predictions) != len(asked):
            raise ValueError(f"predict returned {len(predictions)} predictions for {len(asked)} conditionings")
        found = iter(predictions)
        away = next(found) if without else None
        given = next(found)
        x0 = mix(x, given, away) if mixed and away is not None else given
        for one, weak in zip(worse, found, strict=True):
            x0 = rescaled(x0 + one.scale * (given - weak), given, one.rescale)
        return Guided(x - rescaled(x - x0, x - given, rescale) if rescale else x0, away)

    return guided


def cfg(predict: Predict, cond: object, uncond: object, scale: float) -> Guide:
    """Return plain classifier-free guidance, see `guide` and `plain`."""
    return guide(predict, cond, uncond, plain(scale))


def plain(scale: float) -> Mix:
    """Return classifier-free guidance: u + scale (c - u) (Ho & Salimans 2022, arXiv 2207.12598; scale as in Imagen)."""
    scale = number("scale", scale)
    return lambda x, cond, uncond: uncond + scale * (cond - uncond)


def projected(
    scale: float,
    *,
    eta: float = 0.0,
    threshold: float = 0.0,
    momentum: float = 0.0,
    kept: list[Tensor] | None = None,
) -> Mix:
    """Return adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1), for one drawing.

        d = c - u + momentum d_before;  d <- d min(1, threshold / |d|);  c + (scale - 1) (d_orthogonal + eta d_parallel)

    where d_parallel is the part of d in the direction of c, which saturates colours, and d_orthogonal the rest. As the
    paper advises, x0 is projected (diffusers' guider projects the model's output, here the velocity). The result keeps
    d_before, so each drawing needs a new one.

    Args:
        scale: as in `plain`, which this equals at eta 1 without threshold and momentum.
        eta: the factor of the parallel part.
        threshold: the largest norm of d, over a whole latent; 0 for none. It grows with the size of the picture.
        momentum: the factor of the d before; negative in the paper. A solver that calls the model several times a step
            updates it at each call.
        kept: where d_before is kept, empty before the first call; for a drawing that goes on with a new result of this,
            such as at another scale. None is a list of its own.
    """
    scale, eta, momentum = number("scale", scale), number("eta", eta), number("momentum", momentum)
    threshold = number("threshold", threshold, 0)
    last = [] if kept is None else kept

    def mix(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        push = cond - uncond + momentum * (last[0] if last else 0.0)
        last[:] = [push]
        if threshold:
            push = push * (threshold / _dot(push, push).sqrt()).clamp(max=1)
        along = _dot(push, cond) / _dot(cond, cond) * cond
        return cond + (scale - 1) * (push - along + eta * along)

    return mix


def zero_star(scale: float) -> Mix:
    """Return CFG-Zero*: s u + scale (c - s u) on velocities, s = <c, u> / |u|^2 (Fan et al. 2025, arXiv 2503.18886)."""
    scale = number("scale", scale)

    def mix(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        given, without = x - cond, x - uncond
        without = _dot(given, without) / _dot(without, without) * without
        return x - (without + scale * (given - without))

    return mix


def zero_init(guided: Guide, window: Window) -> Guide:
    """Return CFG-Zero*'s zero-init: in the window of the first steps the velocity is 0 and no model runs. For Euler."""
    return lambda x, sigma: Guided(x, x) if sigma in window else guided(x, sigma)


def rescaled(value: Tensor, like: Tensor, share: float) -> Tensor:
    """Return share value std(like) / std(value) + (1 - share) value (Lin et al. 2023, arXiv 2305.08891, eq. 14-16).

    Large guidance scales increase the standard deviation of the prediction, and colours overexpose. The deviations are
    those of each sample (in ComfyUI's SkipLayerGuidanceDiT of the whole batch, which is equal for one picture).

    Args:
        value: the guided prediction [b, ...].
        like: the conditional prediction [b, ...].
        share: 0 returns `value`, 1 gives it the deviation of `like`.
    """
    if not share:
        return value
    value, like = tensor("value", value), tensor("like", like)
    dims = tuple(range(1, value.ndim))
    ratio = like.std(dims, keepdim=True) / value.std(dims, keepdim=True)
    return (share * ratio + (1 - share)) * value


def one_by_one(predict: Predict) -> Predict:
    """Return `predict` with one pass for each conditioning instead of one batch: slower, with the least memory."""
    return lambda x, sigma, conditionings: [predict(x, sigma, [one])[0] for one in conditionings]


def averaged(predict: Predict) -> Predict:
    """Return `predict` for conditionings that are several `Within` each: the mean over those in whose window sigma is.

    ComfyUI's ConditioningCombine with ConditioningSetTimestepRange (`comfy/samplers.py`, equal weights).
    """

    def mean(x: Tensor, sigma: float, conditionings: Sequence[Sequence[Within]]) -> list[Tensor]:
        counting = [[one.conditioning for one in several if sigma in one.window] for several in conditionings]
        if not all(counting):
            at = counting.index([])
            raise ValueError(f"no window of conditioning {at} holds sigma {sigma}: give windows that cover every level")
        found = iter(predict(x, sigma, [one for several in counting for one in several]))
        parts = [[next(found) for _ in several] for several in counting]
        return [sum(part[1:], start=part[0]) / len(part) for part in parts]

    return mean


def only_x0(guided: Guide) -> Denoise:
    """Return the guided prediction alone, which is what solvers other than CFG++ take."""
    return lambda x, sigma: guided(x, sigma).x0


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each sample, [b, 1, ...]."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)
