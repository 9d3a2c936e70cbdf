"""The value of a point as it passes a module, its form [batch, axes] for users, and the part that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mmdit.inspection.addresses import Address, Rows
from mmdit.inspection.points import Point
from mmdit.inspection.reducers import Reducer, View, reduced_pattern
from mmdit.models.attention import Attended
from quant.tensor import Float8Tensor


@dataclass
class Passing:
    """A call of a module in progress; before the module runs, `output` is None.

    For a call of attention, `attention` is the computed attention, which may be replaced.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    changed: bool = False
    attention: Attended | None = None

    def raw(self, point: Point) -> Tensor:
        """The tensor that contains the point's value."""
        if point.side == "input":
            return cast(Tensor, (*self.args, *self.kwargs.values())[point.argument])
        return cast(Tensor, self.output if isinstance(self.output, Tensor) else self.output[point.argument])

    def put(self, point: Point, raw: Tensor) -> None:
        """Replace this tensor."""
        self.changed = True
        if point.side == "input":
            taken, argument = len(self.args), point.argument
            if argument < taken:
                self.args = (*self.args[:argument], raw, *self.args[argument + 1 :])
            else:
                self.kwargs = dict(self.kwargs) | {list(self.kwargs)[argument - taken]: raw}
        elif isinstance(self.output, Tensor):
            self.output = raw
        else:
            self.output = (*self.output[: point.argument], raw, *self.output[point.argument + 1 :])


def shown(point: Point, passing: Passing) -> Tensor:
    """The value as [b, axes]; attention patterns are computed by `kept_value` instead."""
    value = passing.raw(point)
    if point.chunk is not None:
        value = value.chunk(point.chunk.of, -1)[point.chunk.part]
    if point.layout == "heads":
        return value.unflatten(-1, (point.heads, -1)).transpose(1, 2)
    if point.layout == "split":
        return value.transpose(1, 2)
    return by_head(passing.module, value, point.heads) if point.layout == "by_head" else value


def put_back(point: Point, passing: Passing, value: Tensor) -> None:
    """Continue the call with another value, [b, axes]; the rest of its tensor stays bit-equal."""
    if point.layout == "heads":
        value = value.transpose(1, 2).flatten(2)
    elif point.layout == "split":
        value = value.transpose(1, 2)
    if point.chunk is not None:
        parts = list(passing.raw(point).chunk(point.chunk.of, -1))
        parts[point.chunk.part] = value
        value = torch.cat(parts, dim=-1)
    passing.put(point, value)


def by_head(projection: nn.Module, z: Tensor, heads: int) -> Tensor:
    """The contribution of each head to a projection's output, [b, heads, l, out]; the output is their sum plus bias.

    Args:
        projection: a Linear, whose float8 weight is dequantized.
        z: its input, [b, l, heads x d].
        heads: number of heads in the input.
    """
    weight = cast(Tensor, projection.weight)
    weight = weight.dequantize(z.dtype) if isinstance(weight, Float8Tensor) else weight
    return torch.einsum("blhd,ohd->bhlo", z.unflatten(-1, (heads, -1)), weight.unflatten(-1, (heads, -1)))


class Kept(NamedTuple):
    """The part of a value that is kept, [samples, axes]."""

    value: Tensor
    axes: tuple[str, ...]
    labels: dict[str, tuple[int, ...]]  # the labels along narrowed axes
    samples: tuple[int, ...]


def kept_value(
    point: Point, passing: Passing, rows: Rows, text_tokens: int, address: Address, reducer: Reducer | None
) -> Kept:
    """The part of a passing value that a capture keeps, which may be a view of the value.

    Args:
        point: the point that passes.
        passing: the call of its module.
        rows: the rows of the batch that belong to one branch.
        text_tokens: number of text tokens in the model's call.
        address: the part to keep.
        reducer: a reducer whose result is kept instead of the value; None keeps the value.
    """
    if point.layout == "pattern":
        return _kept_pattern(point, passing, rows, text_tokens, address, reducer)
    value = shown(point, passing)
    picked = address.pick(point, value.shape, rows)
    value = picked.read(value)
    if reducer is None:
        return Kept(value, point.axes, picked.labels, picked.samples)
    value, axes = reducer(value, View(point.axes, text_tokens))
    return Kept(value, axes, picked.labels, picked.samples)


def _kept_pattern(
    point: Point, passing: Passing, rows: Rows, text_tokens: int, address: Address, reducer: Reducer | None
) -> Kept:
    whole = passing.attention
    assert whole is not None
    picked = address.pick(point, torch.Size((*whole.q.shape[:3], whole.k.shape[2])), rows)
    heads, queries, keys = picked.places
    every = torch.arange(whole.q.shape[2]) if queries is None else queries
    view = View(point.axes, text_tokens, every, every, keys)
    value, axes = reduced_pattern(reducer, whole.part(picked.rows, heads), view)
    return Kept(value, axes, picked.labels, picked.samples)
