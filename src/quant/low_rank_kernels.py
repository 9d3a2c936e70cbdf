"""Triton kernels for low-rank factors beside a weight.

`low` multiplies activations, also as float8 codes, by the down projection; `add_up` adds the product of that result and
the up projection to the output of the weight, and `up_and_bias` to the bias. The sums are in float32. Loaded only where
Triton is.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.current import on_its_device
from quant.launch import Launcher, pieces


class Blocks(NamedTuple):
    """How a program of `low` works: its rows, 16 of which a warp has; values of a row in a step; pipeline stages."""

    rows: int
    depth: int
    stages: int


# The fastest on an H200. Codes are converted to 16 bits between memory and product; up to 32 rows, Triton goes on with
# the next codes meanwhile.
_OF_CODES, _OF_VALUES = Blocks(32, 256, 4), Blocks(64, 128, 4)
_SHORT = 4096  # codes in a row, up to which three stages are quicker
_LEAST = 3  # stages; with two, nothing is loaded during a product
_ADDED_ROWS, _ADDED_COLUMNS = 32, 128
_BIAS_ROWS, _BIAS_COLUMNS = 64, 128


@on_its_device
def low(
    first: tuple[Tensor, Tensor | None] | None,
    second: tuple[Tensor, Tensor | None] | None,
    down: Tensor,
    factor: Tensor | None,
    dtype: torch.dtype,
    blocks: Blocks | None = None,
) -> Tensor:
    """The products of the rows of two streams and the down projection of each, [rows of both, r], in one launch.

    Args:
        first, second: activations [rows, in] with contiguous rows, in 16 or 32 bits or as codes, and their scale,
            float32 [rows, 1] or (); None where a stream has no rows. Both have the same dtype.
        down: [streams, r, in], of which the first is for `first` and the last for `second`; r is 16, 32 or 64. float16
            for codes, else of the activations' dtype.
        factor: float32 [streams, r], by which each product is multiplied; None is one.
        dtype: of the result.
        blocks: see `Blocks`; None chooses the fastest on an H200, or less where the device has less shared memory.
    """
    some = first if first is not None else second
    assert some is not None, "a stream has rows"
    (text, text_scale), (image, image_scale) = first or some, second or some
    split, rest = 0 if first is None else len(text), 0 if second is None else len(image)
    rank, width = down.shape[1:]
    out = torch.empty((split + rest, rank), dtype=dtype, device=down.device)
    chosen = blocks or (_OF_VALUES if factor is None else _OF_CODES)
    if blocks is None and factor is not None and width <= _SHORT:
        chosen = chosen._replace(stages=_LEAST)
    chosen = chosen._replace(depth=min(chosen.depth, max(triton.next_power_of_2(width), 16)))
    if blocks is None:
        chosen = fitting(chosen, rank, text.itemsize, down.itemsize, _shared_memory(down.device))
    rows, depth, stages = chosen
    tensors = (
        text,
        image,
        text if text_scale is None else text_scale,
        image if image_scale is None else image_scale,
        down,
        down if factor is None else factor,
        out,
    )
    values = (
        split,
        rest,
        width,
        text.stride(0),
        image.stride(0),
        (len(down) - 1) * rank * width,
        (len(down) - 1) * rank,
        0 if text_scale is None else 1 + int(text_scale.numel() > 1 or text_scale.ndim > 1),
        factor is not None,
        rank,
        rows,
        depth,
        stages,
        width % depth == 0,
    )
    grid = (pieces(split, rows) + pieces(rest, rows), 1, 1)
    _launch_low(grid, tensors, values, warps=max(rows // 16, 1))
    return out


def fitting(blocks: Blocks, rank: int, itemsize: int, down_itemsize: int, limit: int) -> Blocks:
    """The blocks, with fewer stages or less depth until a program fits the shared memory of its multiprocessor.

    All stages but one have a buffer for the activations and the down projection. (On Hopper, products in 16 bits have
    one buffer more: 128 KiB at most, of 227.)

    Args:
        blocks: the fastest where memory suffices.
        rank: r of `low`.
        itemsize, down_itemsize: bytes of a value of the activations and of the down projection.
        limit: bytes of shared memory that a program may have.
    """
    rows, depth, most = blocks
    while depth > 16:
        for stages in range(most, _LEAST - 1, -1):
            if (stages - 1) * depth * (rows * itemsize + rank * down_itemsize) <= limit:
                return Blocks(rows, depth, stages)
        depth //= 2
    return Blocks(rows, depth, min(most, _LEAST))


@cache
def _shared_memory(device: torch.device) -> int:
    """The most shared memory of a program that Triton launches, in bytes; its interpreter has no limit."""
    if device.type != "cuda":
        return sys.maxsize
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@on_its_device
def add_up(out: Tensor, low: Tensor, up: Tensor, split: int = 0) -> None:
    """Add low times the transposed up projection of each stream to a matrix with contiguous rows, in place.

    The last rows come first: after the product that has written the matrix, they are still in the cache.

    Args:
        out: [rows, out].
        low: [rows, r]; r is 16, 32 or 64.
        up: contiguous [streams, out, r], of which the first is for the first `split` rows and the last for the others.
        split: number of rows of the first stream.
    """
    rows, columns = out.shape
    block, wide = _ADDED_ROWS, _ADDED_COLUMNS
    grid = pieces(columns, wide), pieces(split, block) + pieces(rows - split, block), 1
    rank = up.shape[2]
    other = (len(up) - 1) * columns * rank
    values = (split, rows, columns, out.stride(0), low.stride(0), other, rank, block, wide)
    _launch_add_up(grid, (out, low, up), values, warps=4)


@on_its_device
def up_and_bias(low: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """low [rows, r] times the transposed up projection [out, r], plus the bias [out]: [rows, out], in one pass.

    r is 16, 32 or 64, and the rows of `low` and `up` are contiguous.
    """
    (rows, rank), columns = low.shape, len(up)
    out = torch.empty((rows, columns), dtype=up.dtype, device=up.device)
    grid = pieces(columns, _BIAS_COLUMNS), pieces(rows, _BIAS_ROWS), 1
    values = (rows, columns, low.stride(0), rank, _BIAS_ROWS, _BIAS_COLUMNS)
    _launch_up_and_bias(grid, (out, bias, low, up), values, warps=4)
    return out


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["split", "rest"])
def _low(
    text,
    image,
    text_scale,
    image_scale,
    down,
    factor,
    out,
    split,
    rest,
    width,
    text_stride,
    image_stride,
    image_down,
    image_factor,
    scaled: tl.constexpr,
    has_factor: tl.constexpr,
    rank: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
    stages: tl.constexpr,
    even: tl.constexpr,
):
    """`scaled` is 0 without scales, 1 with a single one and 2 with one per row; `even` if nothing of a step is outside.

    The last rows come first: after the kernel that has written them, they are still in the cache.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles = tl.cdiv(split, block)
    if tile < tiles:
        x, scale, stride, rows, start = text, text_scale, text_stride, split, tile * block
    else:
        x, scale, stride, rows, start = image, image_scale, image_stride, rest, (tile - tiles) * block
        down += image_down
        factor += image_factor
        out += split * rank
    local, r, place = tl.arange(0, block), tl.arange(0, rank), tl.arange(0, depth)
    row = tl.minimum(start + local, rows - 1)  # beyond the last row it is read again, and not written
    x += row.to(tl.int64)[:, None] * stride + place[None, :]
    down += r[None, :] * width + place[:, None]
    sums = tl.zeros([block, rank], tl.float32)
    for k in tl.range(0, width, depth, num_stages=stages):
        if even:
            value, by = tl.load(x + k), tl.load(down + k)
        else:
            inside = k + place < width
            value = tl.load(x + k, mask=inside[None, :], other=0.0)
            by = tl.load(down + k, mask=inside[:, None], other=0.0)
        sums = tl.dot(value.to(by.dtype), by, sums, input_precision="ieee")
    if scaled == 1:
        sums *= tl.load(scale)
    if scaled == 2:
        sums *= tl.load(scale + row)[:, None]
    if has_factor:
        sums *= tl.load(factor + r)[None, :]
    there = start + local < rows
    tl.store(out + row[:, None] * rank + r[None, :], sums.to(out.dtype.element_ty), mask=there[:, None])


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["split", "rows"])
def _add_up(
    out,
    low,
    up,
    split,
    rows,
    columns,
    stride,
    low_stride,
    other_up,
    rank: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    tile, tiles = tl.num_programs(1) - 1 - tl.program_id(1), tl.cdiv(split, block)
    start, end = tile * block, split
    if tile >= tiles:
        start, end = split + (tile - tiles) * block, rows
        up += other_up
    local, column, r = tl.arange(0, block), tl.program_id(0) * wide + tl.arange(0, wide), tl.arange(0, rank)
    there, inside = start + local < end, column < columns
    a = tl.load(low + (start + local)[:, None] * low_stride + r[None, :], mask=there[:, None], other=0.0)
    b = tl.load(up + column[None, :] * rank + r[:, None], mask=inside[None, :], other=0.0)
    place = out + start.to(tl.int64) * stride + local[:, None] * stride + column[None, :]
    value = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    value += tl.dot(a, b, input_precision="ieee")
    tl.store(place, value.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


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


_launch_low, _launch_add_up, _launch_up_and_bias = Launcher(_low), Launcher(_add_up), Launcher(_up_and_bias)
