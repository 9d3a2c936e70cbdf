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
from quant.scaling import SMALLEST_SCALE

_ROWS = 64  # of a tile of `pack`


class Cut(NamedTuple):
    """How `gelu` cuts the values.

    Args:
        rows, columns: of a step.
        steps: of a program, along its rows.
        stages: of the pipeline of steps; 1 is none.
        warps: of a program.
        behind: by how many tiles of rows the programs that write codes come after those that find the largest values.
    """

    rows: int
    columns: int
    steps: int
    stages: int
    warps: int
    behind: int


_CUT = Cut(64, 32, 8, 1, 4, 8)


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
    """`plain_kernels.gelu` and rounding, and the products of the result with the next down projections, in one launch.

    Args:
        x, rows, rounding, added, down: see `plain_kernels.gelu`.
        cut: how the values are cut; None takes the fastest on an H200.
    """
    width, alone, cut, token = x.shape[1], rows.as_one_sample(), cut or _CUT, rounding.kind == "token"
    tiles, strips = _tiles(alone, cut.rows), triton.cdiv(width, cut.columns * cut.steps)
    blank = Blank.of(rows, width, rounding, x, x.dtype)
    low, sums, weight, rank = None, x, x, 0
    if down is not None:
        weight = down.exact if down.halves is None else down.halves
        rank = weight.shape[1]
        low = torch.empty((rows.total, rank), dtype=x.dtype, device=x.device)
        sums = torch.empty((strips, rows.total, rank), dtype=torch.float32, device=x.device)
    found = torch.zeros(2 * tiles + rows.total, dtype=torch.int32, device=x.device) if rank or token else x
    _gelu[((tiles + cut.behind) * 2 * strips if token else tiles * strips,)](
        x,
        *targets(blank, rounding, x),
        found,
        *_factors(added),
        weight,
        x if down is None or down.factor is None else down.factor,
        x if low is None else low,
        sums,
        len(weight) - 1 if rank else 0,
        alone.text,
        alone.image,
        width,
        blank.gap,
        tiles,
        strips,
        KINDS[rounding.kind],
        LARGEST["e4m3"],
        SMALLEST_SCALE,
        added.up.shape[2],
        rank,
        *cut[:4],
        cut.behind if token else 0,
        width == strips * cut.columns * cut.steps,
        num_warps=cut.warps,
    )
    return blank.activation(rows, rounding)._replace(low=low)


def _tiles(rows: Rows, block: int) -> int:
    """Tiles of so many rows, none of which has rows of two samples or streams."""
    found: int = rows.samples * (triton.cdiv(rows.text, block) + triton.cdiv(rows.image, block))
    return found


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
@triton.jit(do_not_specialize=["text", "image", "gap", "tiles"])
def _gelu(
    x,
    out,
    scales,
    text_static,
    image_static,
    found,
    low,
    low_stride,
    up,
    image_up,
    down,
    factor,
    down_low,
    down_sums,
    last,
    text,
    image,
    width,
    gap,
    tiles,
    strips,
    kind: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    rank: tl.constexpr,
    down_rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
    stages: tl.constexpr,
    behind: tl.constexpr,
    even: tl.constexpr,
):
    """A program handles a strip of a tile of rows. The last rows come first: after the product that has written them,
    they are still in the cache.

    Under a scale per row (kind 1) there are programs of two kinds by turns: the first ones find the largest value of
    each row, the others write codes. Those that write the codes of a tile come `behind` tiles after those that find its
    largest values, which are known by then, or soon, and the values are still in the cache. Programs start in the order
    of their numbers; they wait for smaller numbers of the first kind only, and these never wait.

    `found` has, for each tile, the number of strips whose largest values are found, then that of strips that are
    written, and then, for each row, the largest value, as the bits of float32.
    """
    number = tl.program_id(0)
    each: tl.constexpr = 2 if kind == 1 else 1
    turn, strip = number // (each * strips), number % (each * strips)
    finds = strip < strips
    if kind == 1:
        turn -= tl.where(finds, 0, behind)
        strip -= tl.where(finds, 0, strips)
    if (turn >= 0) & (turn < tiles):
        tile = tiles - 1 - turn
        row, count, is_text, _, _ = _tile(tile, 1, text, image, block)
        local = tl.arange(0, block)
        there = local < count
        row += tl.minimum(local, count - 1)  # beyond the last row it is read again, and not written
        a = tl.load(low + row[:, None] * low_stride + tl.arange(0, rank)[None, :])
        up += tl.where(is_text, 0, image_up)
        place = row.to(tl.int64)[:, None] * width
        done, size, start = found + tile, found + 2 * tiles + row, strip * (steps * wide)
        if kind == 1 and finds:
            value = _largest(x + place, a, up, start, width, rank, block, wide, steps, stages, even)
            tl.atomic_max(size, value.to(tl.int32, bitcast=True), mask=there, sem="relaxed")
            tl.debug_barrier()
            tl.atomic_add(done, 1, sem="release")
        else:
            scale = tl.full([block], 1.0, tl.float32)
            if kind == 1:
                while tl.atomic_add(done, 0, sem="acquire") < strips:
                    pass
                scale = row_scale(tl.load(size, volatile=True).to(tl.float32, bitcast=True), largest, smallest)
                if strip == 0:
                    tl.store(scales + row + tl.where(is_text, 0, gap), scale, mask=there)
            if kind == 2:
                scale *= tl.where(is_text, tl.load(text_static), tl.load(image_static)).to(tl.float32)
            part = tl.where(is_text, 0, last * down_rank)
            down += part * width
            total = _values(
                x + place,
                out + place,
                a,
                up,
                down,
                scale,
                there,
                start,
                width,
                kind,
                largest,
                rank,
                down_rank,
                block,
                wide,
                steps,
                stages,
                even,
            )
            if down_rank > 0:
                n = tl.arange(0, down_rank)[None, :]
                at, every = row[:, None] * down_rank + n, (text + image) * down_rank
                tl.store(down_sums + strip * every + at, total, mask=there[:, None])
                tl.debug_barrier()
                if tl.atomic_add(done + tiles, 1, sem="acq_rel") == strips - 1:  # the last one adds up in their order
                    total = tl.zeros([block, down_rank], tl.float32)
                    for other in range(strips):
                        total += tl.load(down_sums + other * every + at, volatile=True)
                    if kind != 0:
                        total *= scale[:, None] * tl.load(factor + part + n)
                    tl.store(down_low + at, total.to(down_low.dtype.element_ty), mask=there[:, None])


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _largest(
    x,
    a,
    up,
    start,
    width,
    rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
    stages: tl.constexpr,
    even: tl.constexpr,
):
    """The largest absolute value of GELU in each row of a strip, [block].

    GELU rises from -0.75 on, is above -0.171 below zero, and above 0.26 from 0.4 on. So where the largest sum is above
    0.4, its GELU is the largest. (The GELU of minus infinity is not a number, and stays alone in its row.)
    """
    most = tl.full([block], float("-inf"), tl.float32)
    for k in tl.range(0, steps, num_stages=stages):
        value = _sum(x, a, up, start + k * wide + tl.arange(0, wide), width, rank, even)
        most = larger(most, tl.reduce(value, 1, larger))
    size = tl.abs(gelu_of(most))
    if not (tl.min(most, 0) > 0.4):
        for k in tl.range(0, steps, num_stages=1):
            value = _sum(x, a, up, start + k * wide + tl.arange(0, wide), width, rank, even)
            size = larger(size, tl.reduce(tl.abs(gelu_of(value)), 1, larger))
    return size


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _values(
    x,
    out,
    a,
    up,
    down,
    scale,
    there,
    start,
    width,
    kind: tl.constexpr,
    largest: tl.constexpr,
    rank: tl.constexpr,
    down_rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    steps: tl.constexpr,
    stages: tl.constexpr,
    even: tl.constexpr,
):
    """Write the values or codes of a strip; the sums of their products with `down`, [block, down_rank]."""
    n = tl.arange(0, down_rank if down_rank > 0 else 1)
    total = tl.zeros([block, down_rank if down_rank > 0 else 1], tl.float32)
    for k in tl.range(0, steps, num_stages=stages):
        column = start + k * wide + tl.arange(0, wide)
        value = gelu_of(_sum(x, a, up, column, width, rank, even))
        if kind == 0:
            value = value.to(out.dtype.element_ty)
        else:
            value = code_of(value, scale[:, None], largest, out.dtype.element_ty, kind == 1)
        inside = there[:, None] if even else there[:, None] & (column < width)[None, :]
        tl.store(out + column[None, :], value, mask=inside)
        if down_rank > 0:
            by = down + n[None, :] * width + column[:, None]
            by = tl.load(by) if even else tl.load(by, mask=(column < width)[:, None], other=0.0)
            total = tl.dot(value.to(by.dtype), by, total, input_precision="ieee")
    return total


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _sum(x, a, up, column, width, rank: tl.constexpr, even: tl.constexpr):
    """Some columns of x and what LoRAs add to them, in float32."""
    up += column[None, :] * rank + tl.arange(0, rank)[:, None]
    inside = (column < width)[None, :]
    b = tl.load(up) if even else tl.load(up, mask=inside, other=0.0)
    value = tl.load(x + column[None, :]) if even else tl.load(x + column[None, :], mask=inside, other=0.0)
    return value.to(tl.float32) + tl.dot(a, b, input_precision="ieee")
