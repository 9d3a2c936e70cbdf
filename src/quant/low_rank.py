"""Products with low-rank factors: by our kernels where they move much memory, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.emulation import HAS_TRITON

LARGE = 2**26  # bytes; below it, the host takes longer to launch our kernels than torch's products take more
_RANKS = (16, 32, 64)


def low(x: Tensor, down: Tensor) -> Tensor:
    """x [rows, in] times the transposed down projection [r, in]: [rows, r]."""
    if x.nbytes >= LARGE and by_kernels(x, down, len(down)) and x.is_contiguous():
        from quant import low_rank_kernels

        return low_rank_kernels.low(None, (x, None), down.unsqueeze(0), None, x.dtype)
    return x.mm(down.mT)


def add_up(output: Tensor, low: Tensor, up: Tensor) -> None:
    """Add low [rows, r] times the transposed up projection [out, r] to a contiguous output [rows, out], in place."""
    if output.nbytes >= LARGE and by_kernels(low, up, up.shape[1]):
        from quant import low_rank_kernels

        low_rank_kernels.add_up(output, low, up.unsqueeze(0))
    else:
        output.addmm_(low, up.mT)


def up_and_bias(low: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """low [rows, r] times the transposed up projection [out, r], plus the bias [out]: [rows, out]."""
    if len(low) * len(up) * up.itemsize >= LARGE and by_kernels(low, up, up.shape[1]):
        from quant import low_rank_kernels

        return low_rank_kernels.up_and_bias(low, up, bias)
    return torch.addmm(bias, low, up.mT)


def by_kernels(x: Tensor, factor: Tensor, rank: int) -> bool:
    """Whether our kernels can multiply x [rows, n] by a factor of this rank.

    They have no gradient, know nothing of autocast, and a compiler fuses torch's products itself.
    """
    if not x.is_cuda or not HAS_TRITON or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if x.dtype == torch.float64:  # the kernels have sums in float32
        return False
    return rank in _RANKS and factor.is_contiguous() and x.is_contiguous() and not torch.is_autocast_enabled("cuda")
