"""Low-rank factors beside a weight: adding the up projection's product to what is there."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.emulation import HAS_TRITON

MOST_RANK = 64  # that our kernel takes
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def add_up(out: Tensor, low: Tensor, up: Tensor) -> None:
    """Add low [rows, r] times the transposed up [out, r] to a contiguous matrix [rows, out], in place.

    On GPUs with Triton, up to rank 64, our kernel does it at the speed of a copy; torch's product takes 1.7 times as
    long for wide matrices, and adds in all other cases and in what `torch.compile` compiles.
    """
    if torch.compiler.is_compiling() or not _has_kernel(out, low, up):
        out.addmm_(low, up.t())
        return
    from quant import low_rank_kernels

    low_rank_kernels.add_up(out, low, up.contiguous().unsqueeze(0))


def _has_kernel(out: Tensor, low: Tensor, up: Tensor) -> bool:
    same = out.dtype == low.dtype == up.dtype and out.dtype in _DTYPES
    return HAS_TRITON and out.is_cuda and out.numel() > 0 and same and low.shape[1] <= MOST_RANK
