"""A kernel of LoRAs that the library does not use, measured by `mmdit.bench.lora_kernels`.

It writes what `quant.low_rank_kernels.add_up` adds, has no gradient, and needs the bias of the Linear.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.current import on_its_device

_ROWS, _COLUMNS = 64, 128  # of a program


@on_its_device
def up_and_bias(low: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """low [rows, r] times the transposed up projection [out, r], plus the bias [out]: [rows, out], in one pass.

    r is 16, 32 or 64, and the rows of `low` and `up` are contiguous.
    """
    (rows, rank), columns = low.shape, len(up)
    out = torch.empty((rows, columns), dtype=up.dtype, device=up.device)
    grid = triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS)
    _up_and_bias[grid](out, bias, low, up, rows, columns, low.stride(0), rank, _ROWS, _COLUMNS, num_warps=4)
    return out


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["rows"])
def _up_and_bias(
    out,
    bias,
    low,
    up,
    rows,
    columns,
    low_stride,
    rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    start, column = tl.program_id(1) * block, tl.program_id(0) * wide + tl.arange(0, wide)
    local, r = tl.arange(0, block), tl.arange(0, rank)
    there, inside = start + local < rows, column < columns
    a = tl.load(low + (start + local)[:, None] * low_stride + r[None, :], mask=there[:, None], other=0.0)
    b = tl.load(up + column[None, :] * rank + r[:, None], mask=inside[None, :], other=0.0)
    value = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    value += tl.dot(a, b, input_precision="ieee")
    place = out + (start.to(tl.int64) + local)[:, None] * columns + column[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])
