"""Tensors that are not there yet: a checkpoint can be mapped and checked before a byte of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from typing import Self

import torch
from torch import Tensor

from mmdit.checkpoints.lazy_codes import Codes, moved
from quant.spellings import FLOAT8
from quant.tensor import Float8Tensor

Load = Callable[[torch.dtype, torch.device], Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype of a stored tensor, and how to bring its values to a dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Load
    codes: Codes | None = None  # of float8, for those who keep it
    widened: bool = False  # it was float8 with scales, and has no codes that keep its values

    @property
    def nbytes(self) -> int:
        """Bytes at the stored dtype."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The values, at the stored dtype unless another is asked for."""
        return self.load(dtype or self.dtype, torch.device(device))

    def as_dtype(self, dtype: torch.dtype) -> LazyTensor:
        """The same values, as if they had been stored at `dtype`."""
        return LazyTensor(self.shape, dtype, self.load)

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """A tensor that is there already."""
        if isinstance(tensor, Float8Tensor):
            return cls(tuple(tensor.shape), tensor.dtype, partial(_dequantized, tensor), Codes.of(tensor))
        return cls(tuple(tensor.shape), tensor.dtype, lambda dtype, device: tensor.to(device, dtype))

    @classmethod
    def derived(cls, operation: Callable[..., Tensor], *sources: LazyTensor) -> Self:
        """What `operation`, which only moves elements around, makes of other lazy tensors.

        The elements are cast first: float8 has hardly any operations of its own.
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
    """The dtype that holds numbers of all of these; float8 beside wider ones is widened."""
    wide = sorted(dtypes - set(FLOAT8), key=str)
    return reduce(torch.promote_types, wide) if wide else min(dtypes, key=str)
