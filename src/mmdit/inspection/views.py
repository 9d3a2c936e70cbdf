"""How a point's value lies where it passes, and the form [batch, axes] in which it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmdit.inspection.points import Point
from quant.tensor import Float8Tensor


@dataclass
class Passing:
    """A call of a module that is under way: before it runs, `output` is None."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    changed: bool = False

    def raw(self, point: Point) -> Tensor:
        """The tensor that a point is a part of, as it passes."""
        if point.side == "input":
            return cast(Tensor, (*self.args, *self.kwargs.values())[point.argument])
        return cast(Tensor, self.output if isinstance(self.output, Tensor) else self.output[point.argument])

    def put(self, point: Point, raw: Tensor) -> None:
        """Another tensor in its place."""
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
    """The value as [b, axes]; of an attention pattern, which is computed, see `mmdit.inspection.attention_rows`."""
    value = passing.raw(point)
    if point.chunk is not None:
        value = value.chunk(point.chunk.of, -1)[point.chunk.part]
    if point.layout == "heads":
        return value.unflatten(-1, (point.heads, -1)).transpose(1, 2)
    if point.layout == "split":
        return value.transpose(1, 2)
    return by_head(passing.module, value, point.heads) if point.layout == "by_head" else value


def put_back(point: Point, passing: Passing, value: Tensor) -> None:
    """Let the call go on with another value, [b, axes]; the rest of its tensor keeps its bits."""
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
    """What each head adds to the output of a projection, [b, heads, l, out]; their sum and the bias are the output.

    Args:
        projection: a Linear; float8 weights count with the values they stand for.
        z: what it reads, [b, l, heads x d].
        heads: side by side in its input.
    """
    weight = cast(Tensor, projection.weight)
    weight = weight.dequantize(z.dtype) if isinstance(weight, Float8Tensor) else weight
    return torch.einsum("blhd,ohd->bhlo", z.unflatten(-1, (heads, -1)), weight.unflatten(-1, (heads, -1)))
