"""Tensors that are read on demand, so that a checkpoint is mapped and checked before any of its data is read.

`LazyTensor` is any stored tensor; `Codes` is a float8 tensor whose scales are known and whose codes are read on demand.
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
    """A stored tensor before it is read: its shape, its dtype, and a function that reads it to a dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Load
    codes: Codes | None = None  # the float8 codes and their scale, for readers that keep them
    widened: bool = False  # derived from scaled float8 by an operation whose result no codes represent

    @property
    def nbytes(self) -> int:
        """Its size in bytes at the stored dtype."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read the values, in the stored dtype unless another one is given."""
        return self.load(dtype or self.dtype, torch.device(device))

    def as_dtype(self, dtype: torch.dtype) -> LazyTensor:
        """The same values, as if they were stored in `dtype`."""
        return LazyTensor(self.shape, dtype, self.load)

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """A lazy tensor that returns a tensor in memory."""
        if isinstance(tensor, Float8Tensor):
            return cls(tuple(tensor.shape), tensor.dtype, partial(_dequantized, tensor), Codes.of(tensor))
        return cls(tuple(tensor.shape), tensor.dtype, lambda dtype, device: tensor.to(device, dtype))

    @classmethod
    def derived(cls, operation: Callable[..., Tensor], *sources: LazyTensor) -> Self:
        """The result of `operation`, which only moves elements, on lazy tensors.

        Elements are cast before they are moved, because torch implements few operations for float8.
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
    """The common dtype of these dtypes; float8 is upcast where another dtype is wider."""
    wide = sorted(dtypes - set(FLOAT8), key=str)
    return reduce(torch.promote_types, wide) if wide else min(dtypes, key=str)


@dataclass(frozen=True)
class AsStored:
    """Reads a stored tensor without a cast, as float8 codes are read."""

    lazy: LazyTensor

    def __call__(self, device: torch.device) -> Tensor:
        """The values on a device."""
        return self.lazy.read(device=device)


@dataclass(frozen=True, eq=False)
class Codes:
    """The parts of a float8 tensor of at least two dimensions, [..., out, in]."""

    shape: tuple[int, ...]
    load: Callable[[torch.device], Tensor]  # the codes, of the recipe's float8 dtype
    scale: Tensor  # float32, () or [out, 1] (or with more ones)
    input_scale: Tensor | None  # float32, ()
    recipe: Recipe
    plain: bool = False  # the file stores no scale, which then is 1
    logical: torch.dtype = torch.bfloat16  # the dtype that the weight stands for, where the reader asks for none

    @property
    def dtype(self) -> torch.dtype:
        """The float8 dtype of the codes."""
        return DTYPES[self.recipe.format]

    def read(self, dtype: torch.dtype, device: torch.device) -> Float8Tensor:
        """Read the weight with `dtype` as its logical dtype."""
        codes = self.load(device if has_float8(device) else torch.device("cpu"))
        if not has_float8(device):
            codes = codes.view(torch.uint8).to(device)
        return self.around(codes, dtype)

    def around(self, codes: Tensor, dtype: torch.dtype) -> Float8Tensor:
        """The weight of these codes, which have been read, with `dtype` as its logical dtype."""
        input_scale = None if self.input_scale is None else self.input_scale.to(codes.device)
        return Float8Tensor(codes, self.scale.to(codes.device), input_scale, self.recipe, dtype)

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
        """The result of `operation`, which only moves elements, on codes; None where it does not keep rows whole.

        If all parts share one scale, so does the result; otherwise it has one scale per row. A layer has a single input
        scale: where the parts disagree on it, activations are not rounded (weight-only).
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
    """Whether all parts round their input in the same way and with the same scale."""
    same = parts[0].input_scale
    recipes = {replace(part.recipe, granularity="row") for part in parts}
    return len(recipes) == 1 and all(
        part.input_scale is same
        or (part.input_scale is not None and same is not None and torch.equal(part.input_scale, same))
        for part in parts
    )


def moved(operation: Callable[..., Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The result of an operation that only moves elements; all tensors have one dtype, which may be float8."""
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
