"""Moving scales and means between Linears without changing what a model computes, and correcting biases.

A fold names the Linears that read a tensor (consumers) and the rows of Linears that compute it (producers). Both
functions take a state dict and return its tensors that change; apply these with `load_state_dict(..., strict=False)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a Linear that compute a tensor between Linears, one row per channel.

    Role "value": the rows are the tensor, or are added to it. Role "gain": the tensor is multiplied by one plus the
    rows, as by adaLN's scale.
    """

    linear: str
    start: int
    stop: int
    role: Literal["value", "gain"] = "value"


@dataclass(frozen=True)
class Fold:
    """A tensor between Linears: the rows that compute it, and the Linears whose input it is."""

    producers: tuple[Rows, ...]
    consumers: tuple[str, ...]


def smoothing(channel_amax: Tensor, weights: Iterable[Tensor], strength: float = 0.5) -> Tensor:
    """Factors per channel, [in], by which activations are divided and weights multiplied, so that outliers shrink.

    s = amax(x)**strength / amax(W)**(1 - strength), then scaled to a geometric mean of 1; SmoothQuant, Xiao et al.
    2022, arXiv 2211.10438, equation 4.

    Args:
        channel_amax: The largest absolute activation of each channel, [in].
        weights: The weights of the consumers, each [out, in].
        strength: How much of the activations' range moves to the weights: 0 is none of it, 1 all of it.
    """
    columns = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    least = torch.finfo(torch.float32).tiny
    logs = strength * channel_amax.clamp(min=least).log() - (1 - strength) * columns.clamp(min=least).log()
    dead = (channel_amax <= least) | (columns <= least)
    logs = torch.where(dead, 0.0, logs - logs[~dead].mean() if not dead.all() else logs)
    return logs.exp()


def fold_scale(state: Mapping[str, Tensor], fold: Fold, factors: Tensor) -> dict[str, Tensor]:
    """The weights and biases that divide a tensor by `factors` and multiply the consumers' weights by them.

    Args:
        state: A state dict with the weights and biases that the fold names.
        fold: The producers and consumers of the tensor.
        factors: Positive factors, [channels].

    Returns:
        The tensors that change, by key.
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
    """The biases that subtract `mean` from a tensor and add it back in the consumers: W (x - mean) + W mean.

    Args:
        state, fold: As in `fold_scale`.
        mean: The mean of the tensor, [channels].

    Returns:
        The tensors that change, by key.
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
    """The bias, [out], that cancels the mean error of a quantized weight: b - (W' - W) mean.

    Nagel et al. 2019, arXiv 1906.04721, section 4.2, with observed means.

    Args:
        bias: The bias of the Linear, [out].
        weight: The weight before quantization, [out, in].
        quantized: The dequantized weight, [out, in].
        mean: The mean of the input, [in].
    """
    drift = (quantized.double() - weight.double()) @ mean.double()
    return (bias.double() - drift).to(bias.dtype)


def _wide(state: Mapping[str, Tensor], changed: Mapping[str, Tensor], key: str) -> Tensor:
    return changed.get(key, state[key]).detach().double().clone()


def _as_stored(state: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(state[key].dtype) for key, value in changed.items()}
