"""Triton kernels of the fast path that add what LoRAs add to a product while they read the product.

A program handles a tile of rows of one sample and stream, because the up projection would be read once per row
otherwise. What is added is computed on matrix units and stays in float32; `mmdit.runtime.plain_kernels` says what the
kernels compute.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from mmdit.runtime.kernel_parts import KINDS, gelu_of, targets
from mmdit.runtime.rows import EPS, Activation, Added, AttentionInputs, Blank, Down, Rounding, Rows, Update
from quant import low_rank_kernels
from quant.formats import LARGEST
from quant.kernels import code_of, row_scale
from quant.scaling import SMALLEST_SCALE

_ROWS, _COLUMNS = 64, 128  # of a tile
_GELU_ROWS, _GELU_COLUMNS = 32, 256


def low(x: Activation, down: Down, dtype: torch.dtype) -> Tensor:
    """`plain_kernels.low`, in one launch."""
    weight = down.exact if down.halves is None else down.halves
    return low_rank_kernels.low(x.text, x.image, weight, down.factor, dtype)


def update(x: Tensor, table: Tensor, rows: Rows, one: Update) -> None:
    """Add a gated update, and what LoRAs add to it, to the residual stream in place."""
    assert one.added is not None, "an update without LoRAs is added by the norm"
    width = x.shape[1]
    _update[(triton.cdiv(width, _COLUMNS), _tiles(rows, _ROWS))](
        x,
        one.value,
        table,
        *_factors(one.added),
        one.gate.text,
        one.gate.image,
        *rows,
        table.stride(0),
        width,
        one.added.up.shape[2],
        _ROWS,
        _COLUMNS,
        num_warps=4,
    )


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
        num_warps=4,
    )
    q, k, v = joint.unbind(0)
    return q, k, v


def gelu(
    x: Tensor,
    rows: Rows,
    rounding: Rounding,
    added: Added,
    waits: bool | None = None,
    tile: tuple[int, int] = (_GELU_ROWS, _GELU_COLUMNS),
) -> Activation:
    """`plain_kernels.gelu` and rounding.

    Args:
        x, rows, rounding, added: see there.
        waits: whether the programs of a row wait for its largest value in one launch; else one launch finds it, and
            the next one writes. None is `WAITS`.
        tile: rows and columns of a program.
    """
    width = x.shape[1]
    blank = Blank.of(rows, width, rounding, x, x.dtype)
    columns, tiles = triton.cdiv(width, tile[1]), _tiles(rows, tile[0])
    token = rounding.kind == "token"
    state = torch.zeros(1 + tiles + rows.total if token else 0, dtype=torch.int32, device=x.device)
    passes = [(True, True)] if not token or (WAITS if waits is None else waits) else [(True, False), (False, True)]
    for finds, writes in passes:
        _gelu_tile[(columns * tiles,)](
            x,
            *targets(blank, rounding, x),
            state if token else x,
            *_factors(added),
            *rows,
            width,
            blank.gap,
            columns,
            tiles,
            finds,
            writes,
            KINDS[rounding.kind],
            LARGEST["e4m3"],
            SMALLEST_SCALE,
            added.up.shape[2],
            *tile,
            num_warps=8,
        )
    return blank.activation(rows, rounding)


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
def _product(low, low_stride, up, image_up, row, local, there, column, inside, is_text, rank: tl.constexpr):
    """What LoRAs add to a tile, in float32."""
    r = tl.arange(0, rank)
    a = tl.load(low + (row + local)[:, None] * low_stride + r[None, :], mask=there[:, None], other=0.0)
    up += tl.where(is_text, 0, image_up)
    b = tl.load(up + column[None, :] * rank + r[:, None], mask=inside[None, :], other=0.0)
    return tl.dot(a, b, input_precision="ieee")


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["text_gate", "image_gate", "samples", "text", "image"])
def _update(
    x,
    value,
    table,
    low,
    low_stride,
    up,
    image_up,
    text_gate,
    image_gate,
    samples,
    text,
    image,
    stride,
    width,
    rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    row, count, is_text, sample, _ = _tile(tl.program_id(1), samples, text, image, block)
    local, column = tl.arange(0, block), tl.program_id(0) * wide + tl.arange(0, wide)
    there, inside = local < count, column < width
    both = there[:, None] & inside[None, :]
    place = row.to(tl.int64) * width + local[:, None] * width + column[None, :]
    gate = table + sample.to(tl.int64) * stride + tl.where(is_text, text_gate, image_gate) * width + column
    gate = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(x + place, mask=both, other=0.0).to(tl.float32)
    by = tl.load(value + place, mask=both, other=0.0).to(tl.float32)
    by += _product(low, low_stride, up, image_up, row, local, there, column, inside, is_text, rank)
    tl.store(x + place, (before + gate[None, :] * by).to(x.dtype.element_ty), mask=both)


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
):
    """A program handles one head of the queries, keys or values; they lie in a row in `qkv`."""
    unit = tl.program_id(0)
    part, head = unit // heads, unit % heads
    row, count, is_text, sample, token = _tile(tl.program_id(1), samples, text, image, block)
    local, lane = tl.arange(0, block), tl.arange(0, wide)
    there, inside = local < count, lane < head_dim
    both = there[:, None] & inside[None, :]
    width = heads * head_dim
    value = qkv + row.to(tl.int64) * (3 * width) + local[:, None] * (3 * width) + unit * head_dim + lane[None, :]
    value = tl.load(value, mask=both, other=0.0).to(tl.float32)
    value += _product(low, low_stride, up, image_up, row, local, there, unit * head_dim + lane, inside, is_text, rank)
    if normed:  # noqa: SIM102  (this one is known when the kernel is compiled)
        if part < 2:
            which = tl.where(is_text, 0, 2) + part
            factor = 1 / tl.sqrt_rn(tl.sum(value * value, 1) / head_dim + eps)
            weight = tl.load(norms + which * head_dim + lane, mask=inside, other=0.0).to(tl.float32)
            value = value * factor[:, None] * weight[None, :]
    first = (part * samples + sample) * (text + image) + tl.where(is_text, 0, text) + token
    place = joint + first.to(tl.int64) * width + local[:, None] * width + head * head_dim + lane[None, :]
    tl.store(place, value.to(joint.dtype.element_ty), mask=both)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["samples", "text", "image", "gap", "tiles"])
def _gelu_tile(
    x,
    out,
    scales,
    text_static,
    image_static,
    state,
    low,
    low_stride,
    up,
    image_up,
    samples,
    text,
    image,
    width,
    gap,
    columns,
    tiles,
    finds: tl.constexpr,
    writes: tl.constexpr,
    kind: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """`state` has a counter of programs, one of each tile's programs, and the largest value of each row as its bits.

    A program that finds the largest values and writes waits for the others of its rows. It takes the next number of
    those that are left, so that whom it waits for has started or will start whatever the order of launching is.
    """
    index = tl.program_id(0)
    if kind == 1 and finds and writes:
        index = tl.atomic_add(state, 1)
    tile = index // columns
    row, count, is_text, _, _ = _tile(tile, samples, text, image, block)
    local, column = tl.arange(0, block), (index % columns) * wide + tl.arange(0, wide)
    there, inside = local < count, column < width
    both = there[:, None] & inside[None, :]
    place = row.to(tl.int64) * width + local[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=both, other=0.0).to(tl.float32)
    value += _product(low, low_stride, up, image_up, row, local, there, column, inside, is_text, rank)
    value = gelu_of(value)
    if kind == 0:
        tl.store(out + place, value.to(out.dtype.element_ty), mask=both)
    if kind == 1:
        sizes = state + 1 + tiles + row + local
        if finds:
            # Bits of numbers that are not negative are ordered as they are, and those of NaN come last.
            bits = tl.abs(tl.where(both, value, 0.0)).to(tl.int32, bitcast=True)
            tl.atomic_max(sizes, tl.max(bits, 1), mask=there)
            if writes:
                tl.debug_barrier()
                tl.atomic_add(state + 1 + tile, 1)
                while tl.atomic_add(state + 1 + tile, 0) < columns:
                    pass
        if writes:
            size = tl.load(sizes, mask=there, other=0, volatile=True).to(tl.float32, bitcast=True)
            scale = row_scale(size, largest, smallest)
            code = code_of(value, scale[:, None], largest, out.dtype.element_ty)
            tl.store(out + place, code, mask=both)
            if index % columns == 0:
                tl.store(scales + row + local + tl.where(is_text, 0, gap), scale, mask=there)
    if kind == 2:
        static = tl.where(is_text, tl.load(text_static), tl.load(image_static)).to(tl.float32)
        tl.store(out + place, code_of(value, static, largest, out.dtype.element_ty), mask=both)


WAITS = isinstance(_gelu_tile, JITFunction)  # the default of `gelu`: not where Triton interprets one by one
