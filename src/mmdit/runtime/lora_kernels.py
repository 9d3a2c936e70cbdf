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

from mmdit.runtime.kernel_parts import KINDS, gelu_of, targets
from mmdit.runtime.rows import EPS, Activation, Added, AttentionInputs, Blank, Down, Rounding, Rows
from quant import low_rank_kernels
from quant.formats import LARGEST
from quant.kernels import code_of

_ROWS, _COLUMNS = 64, 64  # of a tile


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
        num_warps=4,
    )
    q, k, v = joint.unbind(0)
    return q, k, v


def gelu(x: Tensor, rows: Rows, rounding: Rounding, added: Added) -> Activation:
    """`plain_kernels.gelu` and rounding, which is not to a scale per row: that needs the whole row."""
    width, rows_here = x.shape[1], rows.as_one_sample()
    blank = Blank.of(rows, width, rounding, x, x.dtype)
    _gelu[(triton.cdiv(width, _COLUMNS), _tiles(rows_here, _ROWS))](
        x,
        *targets(blank, rounding, x),
        *_factors(added),
        rows_here.text,
        rows_here.image,
        width,
        KINDS[rounding.kind],
        LARGEST["e4m3"],
        added.up.shape[2],
        _ROWS,
        _COLUMNS,
        width % _COLUMNS == 0,
        num_warps=4,
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
def _product(low, low_stride, up, image_up, row, local, column, inside, is_text, rank: tl.constexpr):
    """What LoRAs add to a tile, in float32."""
    r = tl.arange(0, rank)
    a = tl.load(low + (row + local)[:, None] * low_stride + r[None, :])
    up += tl.where(is_text, 0, image_up)
    b = tl.load(up + column[None, :] * rank + r[:, None], mask=inside[None, :], other=0.0)
    return tl.dot(a, b, input_precision="ieee")


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
    local = tl.minimum(local, count - 1)  # beyond the last row it is read again, and not written
    width = heads * head_dim
    value = qkv + row.to(tl.int64) * (3 * width) + local[:, None] * (3 * width) + unit * head_dim + lane[None, :]
    value = tl.load(value, mask=both, other=0.0).to(tl.float32)
    value += _product(low, low_stride, up, image_up, row, local, unit * head_dim + lane, inside, is_text, rank)
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
@triton.jit(do_not_specialize=["text", "image"])
def _gelu(
    x,
    out,
    scales,
    text_static,
    image_static,
    low,
    low_stride,
    up,
    image_up,
    text,
    image,
    width,
    kind: tl.constexpr,
    largest: tl.constexpr,
    rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
    even: tl.constexpr,
):
    """`even` says that tiles have all their columns. The last tiles come first, as in `add_up`."""
    row, count, is_text, _, _ = _tile(tl.num_programs(1) - 1 - tl.program_id(1), 1, text, image, block)
    local, column = tl.arange(0, block), tl.program_id(0) * wide + tl.arange(0, wide)
    there, inside = local < count, column < width
    both = there[:, None] if even else there[:, None] & inside[None, :]
    local = tl.minimum(local, count - 1)  # beyond the last row it is read again, and not written
    place = row.to(tl.int64) * width + local[:, None] * width + column[None, :]
    value = tl.load(x + place) if even else tl.load(x + place, mask=inside[None, :], other=0.0)
    value = value.to(tl.float32)
    value += _product(low, low_stride, up, image_up, row, local, column, inside, is_text, rank)
    value = gelu_of(value)
    if kind == 2:
        static = tl.where(is_text, tl.load(text_static), tl.load(image_static)).to(tl.float32)
        value = code_of(value, static, largest, out.dtype.element_ty)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=both)
