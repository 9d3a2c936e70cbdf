"""The values that solvers, guidance and noise hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Predict = Callable[[Tensor, float, Sequence[Any]], list[Tensor]]
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, x0 with the prompt, x0 without it) -> x0


@dataclass
class Step:
    """What a solver shows after a step. Changing `x` changes what it goes on from."""

    i: int
    sigma: float  # the level of x: sigmas[i + 1], but for solvers that choose levels of their own
    x: Tensor
    denoised: Tensor  # the prediction at the step's beginning, sigmas[i], that the step was made with


class Guided(NamedTuple):
    """The combined prediction and the unconditional one that it was made with, where one ran."""

    x0: Tensor
    uncond: Tensor | None


Guide = Callable[[Tensor, float], Guided]
