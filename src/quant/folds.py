"""Moving scales and means between Linears without changing what a model computes, and correcting biases.

A fold names the Linears that read a tensor (consumers) and the rows that make it (producers). Both functions map
`{key: tensor}` to the tensors that change; apply them with `load_state_dict(..., strict=False)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of a Linear, [start, stop), that make a tensor which others read, channel by channel.

    "value": the rows are the tensor, or are added to it. "gain": one plus the rows multiplies it, like adaLN's scale.
    """

    linear: str
    start: int
    stop: int
    role: Literal["value", "gain"] = "value"


@dataclass(frozen=True)
class Fold:
    """A tensor between Linears: who makes it, who reads it (their input channels are its channels)."""

    producers: tuple[Rows, ...]
    consumers: tuple[str, ...]


def smoothing(channel_amax: Tensor, weights: Iterable[Tensor], strength: float = 0.5) -> Tensor:
    """Factors per channel by which activations are divided and weights multiplied: both have smaller outliers then.

    s = amax(x)**strength / amax(W)**(1 - strength), then scaled to a geometric mean of 1; SmoothQuant, Xiao et al.
    2022, arXiv 2211.10438, equation 4.

    Args:
        channel_amax: of the activations, [in].
        weights: of the consumers, each [out, in].
        strength: 0 leaves activations their range, 1 takes it all to the weights.
    """
    columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    least = torch.finfo(torch.float32).tiny
    logs = strength * channel_amax.clamp(min=least).log() - (1 - strength) * columns.clamp(min=least).log()
    dead = (channel_amax <= least) | (columns <= least)
    logs = torch.where(dead, 0.0, logs - logs[~dead].mean() if not dead.all() else logs)
    return logs.exp()


def fold_scale(state: Mapping[str, Tensor], fold: Fold, factors: Tensor) -> dict[str, Tensor]:
    """What changes when the tensor is divided by `factors` [channels] and its consumers make up for it.

    Args:
        state: `{key: tensor}` with the weights and biases that the fold names.
        fold: where.
        factors: per channel, above zero.
    """
    changed: dict[str, Tensor] = {}
    for rows in fold.producers:
        weight, bias = (_wide(state, changed, f"{rows.linear}.{name}") for name in ("weight", "bias"))
        part = slice(rows.start, rows.stop)
        one = 1.0 if rows.role == "gain" else 0.0
        weight[part] = weight[part] / factors[:, None].double()
        bias[part] = (bias[part] + one) / factors.double() - one
        changed |= {f"{rows.linear}.weight": weight, f"{rows.linear}.bias": bias}
    for name in fold.consumers:
        changed[f"{name}.weight"] = _wide(state, changed, f"{name}.weight") * factors.double()
    return _as_stored(state, changed)


def fold_mean(state: Mapping[str, Tensor], fold: Fold, mean: Tensor) -> dict[str, Tensor]:
    """What changes when `mean` [channels] is taken from the tensor and its consumers make up: W (x - mean) + W mean.

    Args:
        state, fold: see `fold_scale`.
        mean: of the tensor, per channel.
    """
    changed: dict[str, Tensor] = {}
    for rows in (rows for rows in fold.producers if rows.role == "value"):
        bias = _wide(state, changed, f"{rows.linear}.bias")
        bias[rows.start : rows.stop] -= mean.double()
        changed[f"{rows.linear}.bias"] = bias
    for name in fold.consumers:
        bias = _wide(state, changed, f"{name}.bias")
        changed[f"{name}.bias"] = bias + _wide(state, changed, f"{name}.weight") @ mean.double()
    return _as_stored(state, changed)


def corrected_bias(bias: Tensor, weight: Tensor, quantized: Tensor, mean: Tensor) -> Tensor:
    """The bias that takes back what rounding the weight adds on average: b - (W' - W) mean.

    Nagel et al. 2019, arXiv 1906.04721, section 4.2, with means that were observed.

    Args:
        bias: [out].
        weight: [out, in], before.
        quantized: [out, in], the values of its codes.
        mean: of the input, [in].
    """
    drift = (quantized.double() - weight.double()) @ mean.double()
    return (bias.double() - drift).to(bias.dtype)


def _wide(state: Mapping[str, Tensor], changed: Mapping[str, Tensor], key: str) -> Tensor:
    return changed.get(key, state[key]).detach().double().clone()


def _as_stored(state: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(state[key].dtype) for key, value in changed.items()}
