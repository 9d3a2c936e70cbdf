"""Triton kernels of the native backend: activations to float8 codes in one pass over them.

They give the codes and scales of `quant.scaling` bit for bit (division rounded to nearest, NaN kept), and read and
write every value once, where eager torch takes nine passes. Loaded only on GPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.recipe import Format
from quant.scaling import DTYPES, LARGEST, SMALLEST_SCALE

_BLOCK = 4096  # values that a program of `_divide` rounds


def quantize_rows(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Codes [m, k] and scales float32 [m, 1] of a matrix whose rows are contiguous."""
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=DTYPES[format], device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _rows[(rows,)](
        x,
        codes,
        scales,
        columns,
        x.stride(0),
        LARGEST[format],
        SMALLEST_SCALE,
        block,
        num_warps=min(block // 512, 16) or 1,
    )
    return codes, scales


def quantize_with(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Codes of a contiguous tensor under one scale, float32 ()."""
    codes = torch.empty_like(x, dtype=DTYPES[format])
    _divide[(triton.cdiv(x.numel(), _BLOCK),)](x, codes, scale, x.numel(), LARGEST[format], _BLOCK, num_warps=8)
    return codes


@triton.jit
def _rows(x, codes, scales, columns, stride, largest: tl.constexpr, smallest: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < columns
    value = tl.load(x + row * stride + place, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(value), 0)
    nan = tl.max((value != value).to(tl.int32), 0)  # noqa: PLR0124  a maximum passes NaN by
    scale = tl.maximum(tl.div_rn(amax, largest), smallest)
    scale = tl.where(amax == 0, 1.0, scale)
    scale = tl.where(nan != 0, float("nan"), scale)
    tl.store(scales + row, scale)
    tl.store(
        codes + row * columns + place, _rounded(tl.div_rn(value, scale), largest, codes.dtype.element_ty), mask=inside
    )


@triton.jit
def _divide(x, codes, scale, count, largest: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    quotient = tl.div_rn(value, tl.load(scale))
    tl.store(codes + place, _rounded(quotient, largest, codes.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(value, largest: tl.constexpr, dtype: tl.constexpr):
    return tl.clamp(value, -largest, largest, propagate_nan=tl.PropagateNan.ALL).to(dtype)
