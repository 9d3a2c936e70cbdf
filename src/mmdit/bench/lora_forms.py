"""Kernels of LoRAs that the library does not use yet, measured by `mmdit.bench.lora_kernels`.

`gelu_and_low` needs the largest value of each row under a scale per row, which the pass that adds the LoRA before could
find. `up_and_bias` writes what `quant.low_rank_kernels.add_up` adds.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.runtime.kernel_parts import KINDS, gelu_of, targets
from mmdit.runtime.lora_kernels import _factors, _tile, _tiles
from mmdit.runtime.rows import Activation, Added, Blank, Down, Rounding, Rows
from quant.current import on_its_device
from quant.formats import LARGEST
from quant.kernels import code_of, row_scale
from quant.scaling import SMALLEST_SCALE

_ROWS, _COLUMNS = 64, 128  # of a program of `up_and_bias`


class Cut(NamedTuple):
    """How the values are cut: rows and columns of a step, strips of columns, pipeline stages, warps of a program."""

    rows: int
    columns: int
    strips: int
    stages: int
    warps: int


@on_its_device
def gelu_and_low(
    x: Tensor, rows: Rows, rounding: Rounding, added: Added | None, down: Down, sizes: Tensor | None, cut: Cut
) -> tuple[Activation, Tensor]:
    """GELU of x and what a LoRA adds, rounded, and the products with the down projections of what reads it.

    Args:
        x, rows, rounding: see `mmdit.runtime.kernels.gelu`.
        added: what the LoRA adds; None takes x for the values of GELU.
        down: the projections.
        sizes: the largest value of each row, as the bits of float32 in int32 [rows]; for a scale per row.
        cut: how the values are cut.

    Returns:
        The values or codes, and the products in float32, [rows, r].
    """
    width = x.shape[1]
    blank = Blank.of(rows, width, rounding, x, x.dtype)
    weight = down.exact if down.halves is None else down.halves
    steps = triton.cdiv(width, cut.strips * cut.columns)
    sums = torch.empty((cut.strips, rows.total, weight.shape[1]), dtype=torch.float32, device=x.device)
    low, low_stride, up, image_up = (x, 0, x, 0) if added is None else _factors(added)
    _gelu_and_low[(cut.strips, _tiles(rows.as_one_sample(), cut.rows))](
        x,
        *targets(blank, rounding, x),
        x if sizes is None else sizes,
        low,
        low_stride,
        up,
        image_up,
        weight,
        (len(weight) - 1) * weight.stride(0),
        weight if down.factor is None else down.factor,
        (len(weight) - 1) * weight.shape[1],
        sums,
        rows.split,
        rows.total - rows.split,
        width,
        blank.gap,
        added is not None,
        KINDS[rounding.kind],
        LARGEST["e4m3"],
        SMALLEST_SCALE,
        down.factor is not None,
        weight.shape[1] if added is None else added.up.shape[2],
        weight.shape[1],
        cut.rows,
        cut.columns,
        steps,
        cut.stages,
        width == cut.strips * cut.columns * steps,
        num_warps=cut.warps,
    )
    return blank.activation(rows, rounding), sums.sum(0)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["text", "image", "gap"])
def _gelu_and_low(
    x,
    out,
    scales,
    text_static,
    image_static,
    sizes,
    low,
    low_stride,
    up,
    image_up,
    down,
    image_down,
    factor,
    image_factor,
    sums,
    text,
    image,
    width,
    gap,
    adds: tl.constexpr,
    kind: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    has_factor: tl.constexpr,
    rank: tl.constexpr,
    below: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
    stages: tl.constexpr,
    even: tl.constexpr,
):
    strip = tl.program_id(0)
    row, count, is_text, _, _ = _tile(tl.num_programs(1) - 1 - tl.program_id(1), 1, text, image, block)
    local, lane, r, n = tl.arange(0, block), tl.arange(0, wide), tl.arange(0, rank), tl.arange(0, below)
    there = local < count
    local = tl.minimum(local, count - 1)
    if adds:
        a = tl.load(low + (row + local)[:, None] * low_stride + r[None, :])
        up += tl.where(is_text, 0, image_up)
    down += tl.where(is_text, 0, image_down)
    scale = 1.0
    if kind == 1:
        scale = row_scale(tl.load(sizes + row + local).to(tl.float32, bitcast=True), largest, smallest)
        if strip == 0:
            tl.store(scales + row + local + tl.where(is_text, 0, gap), scale, mask=there)
        scale = scale[:, None]
    if kind == 2:
        scale = tl.where(is_text, tl.load(text_static), tl.load(image_static)).to(tl.float32)
    place = row.to(tl.int64) * width + local[:, None] * width
    total = tl.zeros([block, below], tl.float32)
    first = strip * (steps * wide)
    for start in tl.range(first, first + steps * wide, wide, num_stages=stages):
        column = start + lane
        inside = column < width
        below_at = down + n[None, :] * width + column[:, None]
        c = tl.load(below_at) if even else tl.load(below_at, mask=inside[:, None], other=0.0)
        if adds:
            up_at = up + column[None, :] * rank + r[:, None]
            b = tl.load(up_at) if even else tl.load(up_at, mask=inside[None, :], other=0.0)
        at = place + column[None, :]
        value = tl.load(x + at) if even else tl.load(x + at, mask=inside[None, :], other=0.0)
        value = value.to(tl.float32)
        if adds:
            value = gelu_of(value + tl.dot(a, b, input_precision="ieee"))
        if kind != 0:
            value = code_of(value, scale, largest, out.dtype.element_ty, kind == 1)
        else:
            value = value.to(out.dtype.element_ty)
        tl.store(out + at, value, mask=there[:, None] if even else there[:, None] & inside[None, :])
        total = tl.dot(value.to(c.dtype), c, total, input_precision="ieee")
    if kind != 0:
        total *= scale
    if has_factor:
        total *= tl.load(factor + tl.where(is_text, 0, image_factor) + n)[None, :]
    sums += strip * (text + image) * below
    tl.store(sums + (row + local)[:, None] * below + n[None, :], total, mask=there[:, None])


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
