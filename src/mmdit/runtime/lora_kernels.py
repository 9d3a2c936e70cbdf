"""Triton kernels of the fast path that add what LoRAs add to a product while they read the product.

A program handles a tile of rows of one sample and stream, because the up projection would be read once per row
otherwise. What is added is computed on matrix units and stays in float32; `mmdit.runtime.plain_kernels` says what the
kernels compute.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.runtime.kernel_parts import KINDS, gelu_of, targets
from mmdit.runtime.rows import EPS, Activation, Added, AttentionInputs, Blank, Down, Rounding, Rows
from quant import low_rank_kernels
from quant.formats import LARGEST
from quant.kernels import code_of, larger, row_scale
from quant.launch import Launcher, pieces
from quant.scaling import SMALLEST_SCALE

_ROWS = 64  # of a tile of `pack`


class Cut(NamedTuple):
    """How the programs of `gelu` cut the values.

    Args:
        rows, columns: of a step.
        steps: of a program, along its rows.
        stages: of the pipeline of steps; 1 is none.
        warps: of a program.
    """

    rows: int
    columns: int
    steps: int
    stages: int
    warps: int


# The fastest on an H200, in 16 bits.
_VALUES, _VALUES_AND_LOW = Cut(64, 64, 1, 1, 4), Cut(64, 64, 8, 3, 4)
_CODES, _LARGEST = Cut(64, 32, 19, 3, 4), Cut(64, 64, 8, 3, 4)


def low(x: Activation, down: Down, dtype: torch.dtype) -> Tensor:
    """`plain_kernels.low`, in one launch."""
    weight = down.exact if down.halves is None else down.halves
    return low_rank_kernels.low(x.text, x.image, weight, down.factor, dtype)


def add_up(out: Tensor, added: Added, rows: Rows) -> None:
    """`plain_kernels.add_up`, in one launch."""
    low_rank_kernels.add_up(out, added.low, added.up, rows.split)


def pack(qkv: Tensor, norms: Tensor | None, rows: Rows, head_dim: int, added: Added) -> AttentionInputs:
    """`plain_kernels.pack`, in one pass."""
    heads = qkv.shape[1] // (3 * head_dim)
    shape = (3, rows.samples, rows.text + rows.image, heads, head_dim)
    joint = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    _pack[(3 * heads, _tiles(rows, _ROWS))](
        qkv,
        qkv if norms is None else norms,
        joint,
        *_factors(added),
        *rows,
        heads,
        head_dim,
        EPS,
        norms is not None,
        added.up.shape[2],
        _ROWS,
        max(triton.next_power_of_2(head_dim), 16),
        head_dim == max(triton.next_power_of_2(head_dim), 16),
        num_warps=4,
    )
    q, k, v = joint.unbind(0)
    return q, k, v


def gelu(
    x: Tensor, rows: Rows, rounding: Rounding, added: Added, down: Down | None = None, cut: Cut | None = None
) -> Activation:
    """`plain_kernels.gelu` and rounding, in one pass; a scale per row is found in a pass before.

    Args:
        x, rows, rounding, added, down: see `plain_kernels.gelu`.
        cut: how the values are cut; None takes the fastest on an H200.
    """
    width, alone = x.shape[1], rows.as_one_sample()
    cut = cut or _cut(x, rounding, down)
    grid = _grid(alone, width, cut)
    blank = Blank.of(rows, width, rounding, x, x.dtype)
    sizes = largest_gelu(x, rows, added) if rounding.kind == "token" else x
    weight, rank, sums = x, 0, x  # which are not read
    if down is not None:
        weight = down.exact if down.halves is None else down.halves
        rank = weight.shape[1]
        sums = torch.empty((grid[0], rows.total, rank), dtype=torch.float32, device=x.device)
    low, low_stride, up, image_up = _factors(added)
    factor = x if down is None or down.factor is None else down.factor
    values = (
        low_stride,
        image_up,
        len(weight) - 1 if rank else 0,
        alone.text,
        alone.image,
        width,
        blank.gap,
        KINDS[rounding.kind],
        LARGEST["e4m3"],
        SMALLEST_SCALE,
        added.up.shape[2],
        rank,
        *cut[:4],
        width % (cut.columns * cut.steps) == 0,
    )
    tensors = (x, *targets(blank, rounding, x), sizes, low, up, weight, factor, sums)
    _launch_gelu((*grid, 1), tensors, values, warps=cut.warps)
    next_low = sums.sum(0).to(x.dtype) if rank else None  # of all strips of columns, in one order
    return blank.activation(rows, rounding)._replace(low=next_low)


def _cut(x: Tensor, rounding: Rounding, down: Down | None) -> Cut:
    """How `gelu` cuts the values.

    In 32 bits, steps of 64 columns with factors of rank 64 would need 136 KiB of shared memory, and RTX cards have 99.
    """
    if rounding.kind != "none":
        return _CODES
    if down is None:
        return _VALUES
    return _VALUES_AND_LOW if x.itemsize == 2 else _CODES


def largest_gelu(x: Tensor, rows: Rows, added: Added, cut: Cut | None = None) -> Tensor:
    """The largest absolute value of `plain_kernels.gelu` in each row, as the bits of float32 in int32 [rows]."""
    width, alone, cut = x.shape[1], rows.as_one_sample(), cut or _LARGEST
    sizes = torch.zeros(rows.total, dtype=torch.int32, device=x.device)
    _largest_gelu[_grid(alone, width, cut)](
        x,
        sizes,
        *_factors(added),
        alone.text,
        alone.image,
        width,
        added.up.shape[2],
        *cut[:4],
        width % (cut.columns * cut.steps) == 0,
        num_warps=cut.warps,
    )
    return sizes


def _grid(rows: Rows, width: int, cut: Cut) -> tuple[int, int]:
    """Strips of columns, and tiles of rows."""
    return pieces(width, cut.columns * cut.steps), _tiles(rows, cut.rows)


def _tiles(rows: Rows, block: int) -> int:
    """Tiles of so many rows, none of which has rows of two samples or streams."""
    return rows.samples * (pieces(rows.text, block) + pieces(rows.image, block))


def _factors(added: Added) -> tuple[Tensor, int, Tensor, int]:
    """`low` and the distance of its rows, `up` and the distance from the first stream's to the last one's."""
    return added.low, added.low.stride(0), added.up, (len(added.up) - 1) * added.up.stride(0)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _tile(tile, samples, text, image, block: tl.constexpr):
    """First row of a tile, how many rows it has at most, whether they are text, their sample, and the first's token."""
    text_tiles = tl.cdiv(text, block)
    is_text = tile < samples * text_tiles
    each = tl.where(is_text, text_tiles, tl.cdiv(image, block))
    index = tl.where(is_text, tile, tile - samples * text_tiles)
    sample = index // each
    token = (index % each) * block
    tokens = tl.where(is_text, text, image)
    row = tl.where(is_text, 0, samples * text) + sample * tokens + token
    return row, tokens - token, is_text, sample, token


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _operands(
    low, low_stride, up, image_up, row, local, column, inside, is_text, even: tl.constexpr, rank: tl.constexpr
):
    """The factors of what LoRAs add to a tile.

    They are loaded before the tile, so that all loads are under way at once: a tile is moved to the layout of its
    product as soon as it is there, and what is loaded after that waits for it.
    """
    r = tl.arange(0, rank)
    a = tl.load(low + (row + local)[:, None] * low_stride + r[None, :])
    up += tl.where(is_text, 0, image_up) + column[None, :] * rank + r[:, None]
    return a, tl.load(up) if even else tl.load(up, mask=inside[None, :], other=0.0)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["samples", "text", "image"])
def _pack(
    qkv,
    norms,
    joint,
    low,
    low_stride,
    up,
    image_up,
    samples,
    text,
    image,
    heads,
    head_dim,
    eps,
    normed: tl.constexpr,
    rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    even: tl.constexpr,
):
    """A program handles one head of the queries, keys or values; they lie in a row in `qkv`."""
    unit = tl.program_id(0)
    part, head = unit // heads, unit % heads
    row, count, is_text, sample, token = _tile(tl.program_id(1), samples, text, image, block)
    local, lane = tl.arange(0, block), tl.arange(0, wide)
    there, inside = local < count, lane < head_dim
    both = there[:, None] & inside[None, :]
    local = tl.minimum(local, count - 1)  # beyond the last row it is read again, and not written
    width = heads * head_dim
    value = qkv + row.to(tl.int64) * (3 * width) + local[:, None] * (3 * width) + unit * head_dim + lane[None, :]
    a, b = _operands(low, low_stride, up, image_up, row, local, unit * head_dim + lane, inside, is_text, even, rank)
    which = tl.where(is_text, 0, 2) + tl.minimum(part, 1)
    weight = tl.load(norms + which * head_dim + lane, mask=inside, other=0.0).to(tl.float32) if normed else 1.0
    value = tl.load(value) if even else tl.load(value, mask=inside[None, :], other=0.0)
    value = value.to(tl.float32) + tl.dot(a, b, input_precision="ieee")
    if normed:  # noqa: SIM102  (this one is known when the kernel is compiled)
        if part < 2:
            factor = 1 / tl.sqrt_rn(tl.sum(value * value, 1) / head_dim + eps)
            value = value * factor[:, None] * weight[None, :]
    first = (part * samples + sample) * (text + image) + tl.where(is_text, 0, text) + token
    place = joint + first.to(tl.int64) * width + local[:, None] * width + head * head_dim + lane[None, :]
    tl.store(place, value.to(joint.dtype.element_ty), mask=both)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["text", "image"])
def _largest_gelu(
    x,
    sizes,
    low,
    low_stride,
    up,
    image_up,
    text,
    image,
    width,
    rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
    stages: tl.constexpr,
    even: tl.constexpr,
):
    """The last tiles come first, as in `add_up`.

    GELU rises from -0.75 on, is above -0.171 below zero, and above 0.26 from 0.4 on. So where the largest sum is above
    0.4, its GELU is the largest. (The GELU of minus infinity is not a number, and stays alone in its row.)
    """
    row, there, is_text = _rows_of(tl.num_programs(1) - 1 - tl.program_id(1), text, image, block)
    a = tl.load(low + row[:, None] * low_stride + tl.arange(0, rank)[None, :])
    x += row.to(tl.int64)[:, None] * width
    up += tl.where(is_text, 0, image_up)
    start = tl.program_id(0) * (steps * wide)
    most = tl.full([block], float("-inf"), tl.float32)
    for k in tl.range(0, steps, num_stages=stages):
        value = _sum(x, a, up, start + k * wide + tl.arange(0, wide), width, rank, even)
        most = larger(most, tl.reduce(value, 1, larger))
    size = tl.abs(gelu_of(most))
    if not (tl.min(most, 0) > 0.4):
        for k in tl.range(0, steps, num_stages=1):
            value = _sum(x, a, up, start + k * wide + tl.arange(0, wide), width, rank, even)
            size = larger(size, tl.reduce(tl.abs(gelu_of(value)), 1, larger))
    tl.atomic_max(sizes + row, size.to(tl.int32, bitcast=True), mask=there, sem="relaxed")


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["text", "image", "gap"])
def _gelu(
    x,
    out,
    scales,
    text_static,
    image_static,
    sizes,
    low,
    up,
    down,
    factor,
    sums,
    low_stride,
    image_up,
    last,
    text,
    image,
    width,
    gap,
    kind: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    rank: tl.constexpr,
    down_rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
    stages: tl.constexpr,
    even: tl.constexpr,
):
    """GELU, rounding, and the sums of the products of a strip's values or codes with the next down projections.

    Under a scale per row (kind 1) the first tiles come first, which `_largest_gelu` has read last; else the last ones,
    as in `add_up`. `even` says that programs have all their columns.
    """
    tile = tl.program_id(1) if kind == 1 else tl.num_programs(1) - 1 - tl.program_id(1)
    row, there, is_text = _rows_of(tile, text, image, block)
    a = tl.load(low + row[:, None] * low_stride + tl.arange(0, rank)[None, :])
    place = row.to(tl.int64)[:, None] * width
    up += tl.where(is_text, 0, image_up)
    scale = tl.full([block], 1.0, tl.float32)
    if kind == 1:
        scale = row_scale(tl.load(sizes + row).to(tl.float32, bitcast=True), largest, smallest)
        if tl.program_id(0) == 0:
            tl.store(scales + row + tl.where(is_text, 0, gap), scale, mask=there)
    if kind == 2:
        scale *= tl.where(is_text, tl.load(text_static), tl.load(image_static)).to(tl.float32)
    start = tl.program_id(0) * (steps * wide)
    n = tl.arange(0, down_rank if down_rank > 0 else 1)
    total = tl.zeros([block, down_rank if down_rank > 0 else 1], tl.float32)
    part = tl.where(is_text, 0, last * down_rank)
    down += part * width
    for k in tl.range(0, steps, num_stages=stages):
        column = start + k * wide + tl.arange(0, wide)
        value = gelu_of(_sum(x + place, a, up, column, width, rank, even))
        if kind != 0:
            value = code_of(value, scale[:, None], largest, out.dtype.element_ty, kind == 1)
        value = value.to(out.dtype.element_ty)
        both = there[:, None] if even else there[:, None] & (column < width)[None, :]
        tl.store(out + place + column[None, :], value, mask=both)
        if down_rank > 0:
            by = down + n[None, :] * width + column[:, None]
            by = tl.load(by) if even else tl.load(by, mask=(column < width)[:, None], other=0.0)
            total = tl.dot(value.to(by.dtype), by, total, input_precision="ieee")
    if down_rank > 0:
        if kind != 0:
            total *= scale[:, None] * tl.load(factor + part + n)[None, :]
        sums += tl.program_id(0) * (text + image) * down_rank
        tl.store(sums + row[:, None] * down_rank + n[None, :], total, mask=there[:, None])


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _rows_of(tile, text, image, block: tl.constexpr):
    """The rows of a tile, [block], and which of them exist (the last one is repeated); whether they are text."""
    row, count, is_text, _, _ = _tile(tile, 1, text, image, block)
    local = tl.arange(0, block)
    return row + tl.minimum(local, count - 1), local < count, is_text


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _sum(x, a, up, column, width, rank: tl.constexpr, even: tl.constexpr):
    """Some columns of x and what LoRAs add to them, in float32."""
    up += column[None, :] * rank + tl.arange(0, rank)[:, None]
    inside = (column < width)[None, :]
    b = tl.load(up) if even else tl.load(up, mask=inside, other=0.0)
    value = tl.load(x + column[None, :]) if even else tl.load(x + column[None, :], mask=inside, other=0.0)
    return value.to(tl.float32) + tl.dot(a, b, input_precision="ieee")


_launch_gelu = Launcher(_gelu)
