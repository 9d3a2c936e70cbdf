"""Tensors that are not read yet: a checkpoint can be mapped and checked before a byte of its data is read.

`LazyTensor` is any stored tensor, `Codes` the float8 one whose scales are known and whose codes are read on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from typing import Self

import torch
from torch import Tensor

from quant.formats import DTYPES, FLOAT8
from quant.recipe import Granularity, Recipe
from quant.scaling import has_float8
from quant.tensor import Float8Tensor

Load = Callable[[torch.dtype, torch.device], Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """A stored tensor that is not read: its shape, its dtype, and a function that reads it to a dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Load
    codes: Codes | None = None  # the float8 codes and their scale, for readers that keep them
    widened: bool = False  # it was scaled float8, and what was made of it has no codes with the same values

    @property
    def nbytes(self) -> int:
        """Bytes at the stored dtype."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read the values, at the stored dtype unless another is asked for."""
        return self.load(dtype or self.dtype, torch.device(device))

    def as_dtype(self, dtype: torch.dtype) -> LazyTensor:
        """The same values, as if they had been stored at `dtype`."""
        return LazyTensor(self.shape, dtype, self.load)

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """A tensor in memory as a lazy one."""
        if isinstance(tensor, Float8Tensor):
            return cls(tuple(tensor.shape), tensor.dtype, partial(_dequantized, tensor), Codes.of(tensor))
        return cls(tuple(tensor.shape), tensor.dtype, lambda dtype, device: tensor.to(device, dtype))

    @classmethod
    def derived(cls, operation: Callable[..., Tensor], *sources: LazyTensor) -> Self:
        """The result of `operation`, which only moves elements, on other lazy tensors.

        Elements are cast before they are moved, because float8 has hardly any operations of its own.
        """
        made = operation(*(torch.empty(source.shape, dtype=torch.uint8, device="meta") for source in sources))

        def load(dtype: torch.dtype, device: torch.device) -> Tensor:
            return moved(operation, [source.load(dtype, device) for source in sources])

        shape, dtypes = tuple(made.shape), {source.dtype for source in sources}
        codes = Codes.derived(operation, shape, [source.codes for source in sources])
        if codes is None and dtypes <= set(FLOAT8) and any(source.codes or source.widened for source in sources):
            return cls(shape, torch.bfloat16, load, widened=True)
        return cls(shape, _common(dtypes), load, codes)


def _dequantized(tensor: Float8Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.dequantize(dtype).to(device)


def _common(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype that holds the numbers of all of these dtypes; float8 beside wider ones is upcast."""
    wide = sorted(dtypes - set(FLOAT8), key=str)
    return reduce(torch.promote_types, wide) if wide else min(dtypes, key=str)


@dataclass(frozen=True, eq=False)
class Codes:
    """The parts of a float8 tensor of shape [out, in] or more; Linears compute with matrices."""

    shape: tuple[int, ...]
    load: Callable[[torch.device], Tensor]  # the codes, of the recipe's float8 dtype
    scale: Tensor  # float32, () or [out, 1] (or with more ones)
    input_scale: Tensor | None  # float32, ()
    recipe: Recipe
    plain: bool = False  # the file stores no scale, so that it is 1
    logical: torch.dtype = torch.bfloat16  # the dtype that the weight stands for, where the reader asks for none

    @property
    def dtype(self) -> torch.dtype:
        """The float8 dtype of the codes."""
        return DTYPES[self.recipe.format]

    def read(self, dtype: torch.dtype, device: torch.device) -> Float8Tensor:
        """Read a weight whose logical dtype is `dtype`."""
        codes = self.load(device if has_float8(device) else torch.device("cpu"))
        if not has_float8(device):
            codes = codes.view(torch.uint8).to(device)
        input_scale = None if self.input_scale is None else self.input_scale.to(device)
        return Float8Tensor(codes, self.scale.to(device), input_scale, self.recipe, dtype)

    @classmethod
    def of(cls, tensor: Float8Tensor) -> Self:
        """The parts of a weight in memory."""
        dtype = DTYPES[tensor.recipe.format]

        def load(device: torch.device) -> Tensor:
            codes = tensor.qdata.to(device if tensor.qdata.dtype == dtype else "cpu")
            return codes.view(dtype).to(device)

        scales = (None if scale is None else scale.detach().cpu() for scale in (tensor.scale, tensor.input_scale))
        scale, input_scale = scales
        assert scale is not None
        return cls(tuple(tensor.shape), load, scale, input_scale, tensor.recipe, logical=tensor.dtype)

    @classmethod
    def derived(
        cls, operation: Callable[..., Tensor], shape: tuple[int, ...], parts: Sequence[Codes | None]
    ) -> Self | None:
        """The result of `operation`, which only moves elements, on other codes; None where rows do not stay whole.

        A scale that all parts share stays one scale; different ones become one per row. A layer has one scale for its
        input: where the parts do not agree on it, activations are not rounded (weight-only).
        """
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or len({part.dtype for part in known}) > 1:
            return None
        scale = _derived_scale(operation, known)
        if scale.ndim and scale.shape != _rows(shape):
            return None
        first, agreed = known[0], agree(known)
        granularity: Granularity = "row" if scale.ndim else "tensor"
        together = first.recipe if agreed else replace(first.recipe, activation="none", backend="auto")
        recipe = replace(together, granularity=granularity)

        def load(device: torch.device) -> Tensor:
            return moved(operation, [part.load(device) for part in known])

        plain, input_scale = all(part.plain for part in known), first.input_scale if agreed else None
        return cls(shape, load, scale, input_scale, recipe, plain, first.logical)


def agree(parts: Sequence[Codes]) -> bool:
    """Whether the activations of all parts are treated alike, under the same scale."""
    same = parts[0].input_scale
    recipes = {replace(part.recipe, granularity="row") for part in parts}
    return len(recipes) == 1 and all(
        part.input_scale is same
        or (part.input_scale is not None and same is not None and torch.equal(part.input_scale, same))
        for part in parts
    )


def moved(operation: Callable[..., Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The result of an operation that only moves elements on tensors of one dtype, which may be float8."""
    dtype = parts[0].dtype
    if dtype.itemsize > 1 or not dtype.is_floating_point:
        return operation(*parts)
    return operation(*(part.view(torch.uint8) for part in parts)).contiguous().view(dtype)


def _derived_scale(operation: Callable[..., Tensor], parts: Sequence[Codes]) -> Tensor:
    first = parts[0].scale
    if not first.ndim and all(torch.equal(part.scale, first) for part in parts):
        return first
    return operation(*(part.scale.expand(_rows(part.shape)) for part in parts)).contiguous()


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], *[1] * (len(shape) - 1)
