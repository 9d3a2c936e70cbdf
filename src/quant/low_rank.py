"""Products with the up projection of low-rank factors: by our kernels where the result is large, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.emulation import HAS_TRITON

LARGE = 2**26  # bytes; below it, the host takes longer to launch our kernels than torch's products take more
_RANKS = (16, 32, 64)


def add_up(output: Tensor, low: Tensor, up: Tensor) -> None:
    """Add low [rows, r] times the transposed up projection [out, r] to a contiguous output [rows, out], in place."""
    if _by_kernels(output.nbytes, low, up):
        from quant import low_rank_kernels

        low_rank_kernels.add_up(output, low, up.unsqueeze(0))
    else:
        output.addmm_(low, up.t())


def up_and_bias(low: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """low [rows, r] times the transposed up projection [out, r], plus the bias [out]: [rows, out]."""
    if _by_kernels(len(low) * len(up) * up.itemsize, low, up):
        from quant import low_rank_kernels

        return low_rank_kernels.up_and_bias(low, up, bias)
    return torch.addmm(bias, low, up.t())


def _by_kernels(nbytes: int, low: Tensor, up: Tensor) -> bool:
    """Whether our kernels compute it; they have no gradient, and a compiler fuses torch's products itself."""
    if nbytes < LARGE or not low.is_cuda or not HAS_TRITON or torch.compiler.is_compiling():
        return False
    return up.shape[1] in _RANKS and up.is_contiguous() and low.is_contiguous() and not torch.is_grad_enabled()
