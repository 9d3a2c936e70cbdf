"""A form of GELU with a LoRA that the library does not use yet, measured by `mmdit.bench.lora_kernels`.

Under a scale per row it needs the largest value of each row, which the pass that adds the LoRA before could find.
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
