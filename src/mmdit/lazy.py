"""Tensors that are not there yet: a checkpoint can be mapped and checked before a byte of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

Load = Callable[[torch.dtype, torch.device], Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype of a stored tensor, and how to bring it to a dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Load

    @property
    def nbytes(self) -> int:
        """Bytes at the stored dtype."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The tensor, at its stored dtype unless another is asked for."""
        return self.load(dtype or self.dtype, torch.device(device))

    def as_dtype(self, dtype: torch.dtype) -> LazyTensor:
        """The same tensor, as if it had been stored at `dtype`."""
        return LazyTensor(self.shape, dtype, self.load)

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda dtype, device: tensor.to(device, dtype))

    @classmethod
    def derived(cls, operation: Callable[..., Tensor], *sources: LazyTensor) -> Self:
        """What `operation`, which only moves elements around, makes of other lazy tensors.

        The elements are cast first: float8 has hardly any operations of its own.
        """
        made = operation(*(torch.empty(source.shape, dtype=torch.uint8, device="meta") for source in sources))

        def load(dtype: torch.dtype, device: torch.device) -> Tensor:
            parts = [source.load(dtype, device) for source in sources]
            if dtype.itemsize > 1 or not dtype.is_floating_point:
                return operation(*parts)
            return operation(*(part.view(torch.uint8) for part in parts)).contiguous().view(dtype)

        return cls(tuple(made.shape), sources[0].dtype, load)
