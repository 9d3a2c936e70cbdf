"""Launches of Triton kernels without Triton's search for the compiled one, which takes longer than the launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pieces(count: int, size: int) -> int:
    """How many pieces of this size there are, the last one of which may be smaller."""
    return -(-count // size)


class Launcher:
    """Launches a Triton kernel that takes tensors first, then values: numbers, and what is known when it is compiled.

    In each launch Triton binds the arguments and looks for the kernel that it has compiled for such arguments: for
    their dtypes, for addresses and integers that are multiples of 16 or not, for integers that are one, and for the
    values of constants. Here the compiled kernel is looked up by the values of all numbers, one entry for each
    combination, so a number should take few values, and always have the same type.

    Args:
        kernel: the result of `triton.jit`. A compiler that traces a launch, and Triton's interpreter, use it directly.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], values: tuple[Any, ...], *, warps: int
    ) -> None:
        """Launch on the current GPU, which is that of the tensors.

        Args:
            grid: the number of programs along three dimensions.
            tensors: the first arguments.
            values: the other arguments.
            warps: of a program.
        """
        if torch.compiler.is_compiling():
            self.kernel[grid](*tensors, *values, num_warps=warps)
            return
        kinds = [(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
        key = (tensors[0].get_device(), warps, values, *kinds)
        if (compiled := self._compiled.get(key)) is not None:
            compiled[grid](*tensors, *values)
            return
        # The interpreter compiles nothing, and gives None.
        self._compiled[key] = self.kernel[grid](*tensors, *values, num_warps=warps)
