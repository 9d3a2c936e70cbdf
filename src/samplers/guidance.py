"""Combining predictions under several conditionings into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from samplers.solvers import Denoise

Predict = Callable[[Tensor, float, Sequence[Any]], list[Tensor]]


class Guided(NamedTuple):
    """The combined prediction and the unconditional one that it was made with, where one ran."""

    x0: Tensor
    uncond: Tensor | None


def cfg(predict: Predict, cond: Any, uncond: Any, scale: float) -> Callable[[Tensor, float], Guided]:
    """Classifier-free guidance: u + scale * (c - u) on the predicted pictures (Ho & Salimans 2022, arXiv 2207.12598).

    Args:
        predict: x0 predictions of a latent at a level, one for each conditioning of a list.
        cond: the prompt.
        uncond: the negative prompt; None for no unconditional pass, whatever the scale.
        scale: guidance scale.
    """

    def guided(x: Tensor, sigma: float) -> Guided:
        if uncond is None:
            return Guided(predict(x, sigma, [cond])[0], None)
        without, given = predict(x, sigma, [uncond, cond])
        return Guided(without + scale * (given - without), without)

    return guided


def only_x0(guided: Callable[[Tensor, float], Guided]) -> Denoise:
    """What plain solvers take: the combined prediction alone."""
    return lambda x, sigma: guided(x, sigma).x0
