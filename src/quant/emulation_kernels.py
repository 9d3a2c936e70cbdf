"""Triton kernels that multiply by float8 weights on matrix units of 16 bits, for GPUs without FP8 units.

Codes are decoded by integer arithmetic from bytes, because Triton converts E4M3 on compute capability 8.9 and above
only; these kernels run on 8.0 and 8.6 too. Every code is exact in float16, every product of two codes is exact in
float32, and sums are in float32, so a result differs from the formula by the rounding of these sums and its own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.current import on_its_device
from quant.formats import Format
from quant.product import Product, Tile

_WIDE_BLOCK = 1024  # values that a program of `_widen` and of `_finish` handles


@on_its_device
def widen(codes: Tensor, scale: Tensor | None, format: Format, dtype: torch.dtype) -> Tensor:
    """Values of codes [out, in] in one pass, and of codes times scale where one is given: `scaling.values_of`.

    Args:
        codes: uint8 or float8, contiguous.
        scale: float32, () or [out, 1]; None leaves it out.
        format: of the codes.
        dtype: of the result: float32, bfloat16 or float16.
    """
    outs, width = codes.shape
    found = torch.empty((outs, width), dtype=dtype, device=codes.device)
    single = scale is not None and not scale.ndim
    _widen[(outs, triton.cdiv(width, _WIDE_BLOCK))](
        codes.view(torch.uint8),
        codes if scale is None else scale,
        found,
        width,
        0 if single else 1,
        scale is not None,
        format == "e4m3",
        _WIDE_BLOCK,
        num_warps=4,
    )
    return found


@on_its_device
def multiply(product: Product, out: Tensor, tile: Tile, *, weight: Tensor | None = None) -> None:
    """Write the product into `out`, [m, out], whose rows are contiguous.

    Args:
        product: what is multiplied.
        out: gets the result; float32, bfloat16 or float16.
        tile: how the product is cut.
        weight: the weight of `widen` in x's dtype; None decodes in registers.
    """
    x, x_scale, codes, scale, bias, format = product
    (rows, width), outs = x.shape, len(codes)
    right = codes.view(torch.uint8) if weight is None else weight
    _multiply[(triton.cdiv(rows, tile.rows) * triton.cdiv(outs, tile.outs),)](
        x,
        right,
        out,
        scale if x_scale is None else x_scale,
        scale,
        scale if bias is None else bias,
        rows,
        outs,
        width,
        x.stride(0),
        out.stride(0),
        1 if x_scale is not None and x_scale.ndim else 0,
        1 if scale.ndim else 0,
        product.dequantizes,
        bias is not None,
        weight is None,
        format == "e4m3",
        width % tile.summands == 0,
        tile.rows,
        tile.outs,
        tile.summands,
        num_stages=tile.stages,
        num_warps=tile.warps,
    )


@on_its_device
def finish(sums: Tensor, product: Product, out: Tensor) -> None:
    """Write sums * scale * x_scale + bias into `out`; sums are float32 [m, out]."""
    rows, outs = sums.shape
    assert product.x_scale is not None, "weights that are dequantized have no scale left"
    _finish[(rows, triton.cdiv(outs, _WIDE_BLOCK))](
        sums,
        out,
        product.x_scale,
        product.scale,
        product.scale if product.bias is None else product.bias,
        outs,
        out.stride(0),
        1 if product.x_scale.ndim else 0,
        1 if product.scale.ndim else 0,
        product.bias is not None,
        _WIDE_BLOCK,
        num_warps=4,
    )


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def half_of(code, e4m3: tl.constexpr):
    """The value of a code, uint8, as float16, which holds it exactly.

    E5M2 is the upper byte of a float16. The bits of E4M3, moved to those of a float16, are 2^-8 times its value, also
    where it is subnormal, but for NaN, which looks like 480. Times 146 this overflows, which 448 does not, and infinity
    times 0 is NaN: arithmetic that GPUs do on two values at once, as they do not with comparisons.
    """
    if e4m3:
        wide = code.to(tl.int8, bitcast=True).to(tl.int16)  # the sign is copied to bit 8, and moves to bit 15
        moved = ((wide << 7) & -16385).to(tl.float16, bitcast=True)  # all bits but 14, where the sign was
        value = (moved * (146.0 * 256.0)) * 0.0 + moved * 256.0
    else:
        value = (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    return value


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _weight_of(code, scale, dtype: tl.constexpr, dequantizes: tl.constexpr, e4m3: tl.constexpr):
    value = half_of(code, e4m3)
    if dequantizes:
        value = value.to(tl.float32) * scale
    return value.to(dtype)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _widen(
    codes,
    scale,
    out,
    width,
    step,
    scaled: tl.constexpr,
    e4m3: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < width
    start = row.to(tl.int64) * width
    code = tl.load(codes + start + place, mask=inside, other=0)
    factor = tl.load(scale + row * step) if scaled else 1.0
    tl.store(out + start + place, _weight_of(code, factor, out.dtype.element_ty, scaled, e4m3), mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _finish(
    sums,
    out,
    x_scale,
    scale,
    bias,
    outs,
    stride,
    x_step,
    step,
    has_bias: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < outs
    value = tl.load(sums + row.to(tl.int64) * outs + place, mask=inside, other=0.0)
    value = value * tl.load(scale + place * step, mask=inside, other=0.0) * tl.load(x_scale + row * x_step)
    if has_bias:
        value += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * stride + place, value.to(out.dtype.element_ty), mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x,
    weight,
    out,
    x_scale,
    scale,
    bias,
    rows,
    outs,
    width,
    x_stride,
    stride,
    x_step,
    step,
    dequantizes: tl.constexpr,
    has_bias: tl.constexpr,
    decodes: tl.constexpr,
    e4m3: tl.constexpr,
    even: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """Programs go through the tiles in groups of 8 rows of tiles, so that tiles are read again from the cache.

    A weight that is decoded is the left factor, because the matrix units take only that one from registers.
    """
    tiles_m = tl.cdiv(rows, block_m)
    tiles_n = tl.cdiv(outs, block_n)
    program = tl.program_id(0)
    group = program // (8 * tiles_n)
    first = group * 8
    height = tl.minimum(tiles_m - first, 8)
    tile_m = first + (program % (8 * tiles_n)) % height
    tile_n = (program % (8 * tiles_n)) // height

    m = tile_m * block_m + tl.arange(0, block_m)
    n = tile_n * block_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    of_x = x + (m % rows).to(tl.int64) * x_stride  # rows beyond the end read others, and are not written
    of_weight = weight + (n % outs).to(tl.int64) * width
    if decodes:
        acc = tl.zeros((block_n, block_m), tl.float32)
        own = tl.load(scale + (n % outs) * step)[:, None] if dequantizes else 1.0
        left = of_weight[:, None] + k[None, :]
        right = of_x[None, :] + k[:, None]
        for start in range(0, width, block_k):
            if even:
                code = tl.load(left)
                value = tl.load(right)
            else:
                code = tl.load(left, mask=k[None, :] < width - start, other=0)
                value = tl.load(right, mask=k[:, None] < width - start, other=0.0)
            acc = tl.dot(_weight_of(code, own, x.dtype.element_ty, dequantizes, e4m3), value, acc)
            left += block_k
            right += block_k
        acc = tl.trans(acc)
    else:
        acc = tl.zeros((block_m, block_n), tl.float32)
        left = of_x[:, None] + k[None, :]
        right = of_weight[None, :] + k[:, None]
        for start in range(0, width, block_k):
            if even:
                value = tl.load(left)
                wide = tl.load(right)
            else:
                value = tl.load(left, mask=k[None, :] < width - start, other=0.0)
                wide = tl.load(right, mask=k[:, None] < width - start, other=0.0)
            acc = tl.dot(value, wide, acc)
            left += block_k
            right += block_k

    if not dequantizes:  # the weight's scale first, as `matmul._emulated` has it
        acc = acc * tl.load(scale + (n % outs) * step)[None, :]
        acc = acc * tl.load(x_scale + (m % rows) * x_step)[:, None]
    if has_bias:
        acc += tl.load(bias + n % outs).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * stride + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outs)[None, :])
