"""Triton kernels that round activations to float8 in one pass over them: to codes, or to values of codes in float16.

They give the codes and scales of `quant.scaling` bit for bit (division rounded to nearest, NaN kept), and read and
write every value once, where eager torch takes nine passes. Codes need compute capability 8.9, values do not. Loaded
only on GPUs.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.current import on_its_device
from quant.formats import DTYPES, LARGEST, Format
from quant.launch import Launcher, pieces
from quant.scaling import SMALLEST_SCALE

_BLOCK = 4096  # values that a program of `_divide` rounds
_PER_THREAD = 16  # values of a row that a thread holds
_LONG, _CHUNK = 4096, 2048  # longer rows are read twice in chunks, from the cache the second time


@on_its_device
def quantize_rows(x: Tensor, format: Format, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Codes [m, k] and scales float32 [m, 1] of a matrix whose rows are contiguous; in float16 the values of codes."""
    rows, columns = x.shape
    return rows_of(x, rows, columns, x.stride(0), format, dtype)


def rows_of(
    x: Tensor, rows: int, columns: int, stride: int, format: Format, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of a tensor of any shape on the current GPU, read as a matrix of this size and row stride."""
    codes = x.new_empty(rows, columns, dtype=dtype or DTYPES[format])  # of torch's ways, this takes the host least
    scales = x.new_empty(rows, 1, dtype=torch.float32)
    grid, tensors = (rows, 1, 1), (x, codes, scales)
    if columns > _LONG:
        _launch_long_rows(grid, tensors, (columns, stride, LARGEST[format], SMALLEST_SCALE, _CHUNK), warps=8)
        return codes, scales
    block = 1 << (columns - 1).bit_length()  # the next power of two
    warps = min(max(block // (32 * _PER_THREAD), 1), 16)
    _launch_rows(grid, tensors, (columns, stride, LARGEST[format], SMALLEST_SCALE, block), warps=warps)
    return codes, scales


@on_its_device
def quantize_with(x: Tensor, scale: Tensor, format: Format, dtype: torch.dtype | None = None) -> Tensor:
    """Codes of a contiguous tensor under one scale, float32 (); in float16 the values of codes."""
    codes, count = torch.empty_like(x, dtype=dtype or DTYPES[format]), x.numel()
    _launch_divide((pieces(count, _BLOCK), 1, 1), (x, codes, scale), (count, LARGEST[format], _BLOCK), warps=8)
    return codes


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _rows(x, codes, scales, columns, stride, largest: tl.constexpr, smallest: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < columns
    value = tl.load(x + row * stride + place, mask=inside, other=0.0).to(tl.float32)
    scale = row_scale(largest_of(tl.abs(value)), largest, smallest)
    tl.store(scales + row, scale)
    code = code_of(value, scale, largest, codes.dtype.element_ty, True)
    tl.store(codes + row * columns + place, code, mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _long_rows(x, codes, scales, columns, stride, largest: tl.constexpr, smallest: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    amax = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        value = tl.load(x + row * stride + start + place, mask=start + place < columns, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    scale = row_scale(largest_of(amax), largest, smallest)
    tl.store(scales + row, scale)
    for start in range(0, columns, block):
        inside = start + place < columns
        value = tl.load(x + row * stride + start + place, mask=inside, other=0.0).to(tl.float32)
        code = code_of(value, scale, largest, codes.dtype.element_ty, True)
        tl.store(codes + row * columns + start + place, code, mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def larger(a, b):
    """The larger one; NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def largest_of(size):
    """The largest of a vector of absolute values; NaN if any of them is NaN."""
    return tl.reduce(size, 0, larger)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def row_scale(amax, largest: tl.constexpr, smallest: tl.constexpr):
    """`quant.scaling.scale_of`."""
    scale = tl.maximum(tl.div_rn(amax, largest), smallest, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(amax == 0, 1.0, scale)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _divide(x, codes, scale, count, largest: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    code = code_of(value, tl.load(scale), largest, codes.dtype.element_ty)
    tl.store(codes + place, code, mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def code_of(value, scale, largest: tl.constexpr, dtype: tl.constexpr, bounded: tl.constexpr = False):
    """The codes of value / scale, the quotient rounded to nearest; for the dtype float16 the values of these codes.

    `bounded` says that the scale is that of `row_scale` for the largest value, so that nothing is beyond the largest
    code, which takes fewer instructions (3 of 32 a value in GELU, counted for sm_90).

    A product with the rounded reciprocal and one correction give that quotient (Markstein 1990, theorem 8.3) at a third
    of a division's instructions; what is far beyond the largest code needs none, and could overflow in it.
    """
    reciprocal = tl.div_rn(1.0, scale)
    quotient = value * reciprocal
    corrected = tl.fma(tl.fma(quotient, -scale, value), reciprocal, quotient)
    inside = quotient != 0  # a zero keeps its sign
    if not bounded:
        inside = inside & (tl.abs(quotient) < 2 * largest)
    quotient = tl.where(inside, corrected, quotient)
    if not bounded:
        quotient = tl.clamp(quotient, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    if dtype == tl.float16:
        quotient = _nearest(quotient, largest)
    return quotient.to(dtype)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _nearest(value, largest: tl.constexpr):
    """The nearest value of a code, ties to even, by arithmetic of float32: see `quant.scaling.to_values`.

    The largest number tells the formats apart: E4M3 has 3 bits of mantissa and E5M2 has 2.
    """
    smallest: tl.constexpr = 2.0**-6 if largest == 448.0 else 2.0**-14
    grid: tl.constexpr = 1.5 * 2.0**20 if largest == 448.0 else 1.5 * 2.0**21
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(power, smallest) * grid
    return (value + large) - large


_launch_rows, _launch_long_rows, _launch_divide = Launcher(_rows), Launcher(_long_rows), Launcher(_divide)
