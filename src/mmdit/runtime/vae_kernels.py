"""Triton kernels of the fast VAE: GroupNorm and SiLU of pictures whose channels lie side by side.

Statistics take one pass over the picture, and the norm with SiLU another one, where eager torch takes several and
changes the memory layout twice. Everything is computed in float32. Triton is required.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from quant.current import on_its_device

_TILE = 8192  # values of a program's tile
_PARTS = 512  # programs that share the statistics of a picture, at most


@on_its_device
def norm(x: Tensor, norm: nn.GroupNorm, *, silu: bool, in_place: bool = False) -> Tensor:
    """`mmdit.runtime.fast_vae.plain_norm`, in two passes over the picture.

    Args:
        x: [b, c, h, w], channels last.
        norm: the groups, weights and eps.
        silu: whether SiLU follows.
        in_place: write the result into `x`.
    """
    (samples, width), parts = x.shape[:2], _Parts.of(x)
    centre, factor = torch.empty((2, samples, width), dtype=torch.float32, device=x.device).unbind(0)
    out = x if in_place else torch.empty_like(x)
    _affine[(norm.num_groups, samples)](
        *parts.moments,
        norm.weight,
        centre,
        factor,
        *parts.sizes(norm.num_groups),
        norm.eps,
        **parts.blocks(norm.num_groups),
    )
    _applied(x, out, centre, factor, norm, silu=silu)
    return out


@on_its_device
def band_message(x: Tensor, groups: int) -> Tensor:
    """What other ranks must know of the rows of one: uint8 [bytes], which `norm_band` reads.

    The mean and the sum of squared deviations of each group, float32 [b, groups, 2], then the first and the last row,
    [2, b, w, c] in the dtype of `x`.

    Args:
        x: [b, c, h, w], channels last: the rows.
        groups: of a GroupNorm.
    """
    samples, width, height, columns = x.shape
    parts = _Parts.of(x)
    message = x.new_empty(8 * samples * groups + 2 * samples * columns * width * x.itemsize, dtype=torch.uint8)
    moments, edges = _message(message, x, groups)
    _grouped[(groups, samples)](*parts.moments, moments, *parts.sizes(groups), **parts.blocks(groups))
    for edge, row in zip(edges, (0, height - 1), strict=True):
        edge.copy_(x[:, :, row].transpose(1, 2))
    return message


@on_its_device
def norm_band(norm: nn.GroupNorm, x: Tensor, messages: Tensor, rank: int, rows: Sequence[int]) -> Tensor:
    """GroupNorm under the moments of all ranks, then SiLU, of a rank's rows and the rows next to them.

    Args:
        norm: the groups, weights and eps.
        x: [b, c, h, w], channels last: the rank's rows.
        messages: uint8 [ranks, bytes]: the `band_message` of each rank.
        rank: the rank.
        rows: the number of rows of each rank, of which the first ones can have one more.

    Returns:
        [b, c, above + h + below, w], channels last; above and below are 1, but 0 at the border of the picture.
    """
    samples, width, height, columns = x.shape
    centre, factor = torch.empty((2, samples, width), dtype=torch.float32, device=x.device).unbind(0)
    _spread[(norm.num_groups, samples)](
        messages.view(torch.float32),
        norm.weight,
        centre,
        factor,
        messages.shape[1] // 4,
        rows[0] * columns,
        rows[-1] * columns,
        sum(one == rows[0] for one in rows),
        width,
        width // norm.num_groups,
        norm.eps,
        len(rows),
        triton.next_power_of_2(width // norm.num_groups),
        num_warps=1,
    )
    above, below = int(rank > 0), int(rank + 1 < len(rows))
    out = torch.empty(
        (samples, width, above + height + below, columns),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    _applied(x, out[:, :, above : above + height], centre, factor, norm, silu=True)
    for there, edge, place in ((rank - 1, 1, 0), (rank + 1, 0, above + height)):
        if 0 <= there < len(rows):
            row = _message(messages[there], x, norm.num_groups)[1][edge].unsqueeze(1).permute(0, 3, 1, 2)
            _applied(row, out[:, :, place : place + 1], centre, factor, norm, silu=True)
    return out


class _Parts(NamedTuple):
    """The moments of each channel in each part of a picture, and the sizes that kernels read them by."""

    moments: tuple[Tensor, Tensor]  # means and sums of squared deviations, float32 [samples, parts, width]
    cells: int
    each: int  # cells of a part

    @classmethod
    def of(cls, x: Tensor) -> _Parts:
        """Of activations [b, c, h, w], channels last."""
        samples, width, height, columns = x.shape
        cells, (rows, wide) = height * columns, _tile(x)
        each = max(triton.cdiv(triton.cdiv(cells, _PARTS), rows), 1) * rows
        parts = triton.cdiv(cells, each)
        means, squares = torch.empty((2, samples, parts, width), dtype=torch.float32, device=x.device).unbind(0)
        _moments[(parts, samples)](x, means, squares, cells, width, each, rows, wide, num_warps=8)
        return cls((means, squares), cells, each)

    def sizes(self, groups: int) -> tuple[int, ...]:
        """Arguments of `_affine` and `_grouped`."""
        parts, width = self.moments[0].shape[1:]
        return self.cells, width, self.each, parts, width // groups

    def blocks(self, groups: int) -> dict[str, int]:
        """Arguments of their launches."""
        parts, width = self.moments[0].shape[1:]
        found = {"part_block": parts, "channel_block": width // groups}
        return {key: triton.next_power_of_2(one) for key, one in found.items()} | {"num_warps": 8 if parts > 64 else 1}


def _tile(x: Tensor) -> tuple[int, int]:
    """Cells and channels of a program's tile, powers of two."""
    wide = triton.next_power_of_2(x.shape[1])
    return max(min(_TILE // wide, triton.next_power_of_2(x.shape[2] * x.shape[3])), 1), wide


def _message(message: Tensor, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The moments and the rows in a message of activations like `x`, see `band_message`."""
    samples, width, _, columns = x.shape
    place = 8 * samples * groups
    moments = message[:place].view(torch.float32).view(samples, groups, 2)
    return moments, message[place:].view(x.dtype).view(2, samples, columns, width)


def _applied(x: Tensor, out: Tensor, centre: Tensor, factor: Tensor, norm: nn.GroupNorm, *, silu: bool) -> None:
    """Write the normed rows of `x` into `out`; in both, the rows of a sample are side by side, channels last."""
    samples, width, height, columns = x.shape
    cells, (rows, wide) = height * columns, _tile(x)
    _apply[(triton.cdiv(cells, rows), samples)](
        x,
        out,
        centre,
        factor,
        norm.bias,
        cells,
        width,
        x.stride(0),
        out.stride(0),
        silu,
        rows,
        wide,
        num_warps=8,
    )


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["cells", "each"])
def _moments(x, means, squares, cells, width, each, rows: tl.constexpr, wide: tl.constexpr):
    """Mean and sum of squared deviations of each channel over the cells of a part.

    Values are taken relative to the part's first cell, so that no digits cancel where the mean is large.
    """
    part, sample = tl.program_id(0), tl.program_id(1)
    first = part * each
    end = tl.minimum(first + each, cells)
    channel = tl.arange(0, wide)
    known = channel < width
    picture = x + sample.to(tl.int64) * cells * width
    shift = tl.load(picture + first.to(tl.int64) * width + channel, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros((rows, wide), tl.float32)
    square = tl.zeros((rows, wide), tl.float32)
    for start in range(first, end, rows):
        cell = start + tl.arange(0, rows)
        inside = (cell < end)[:, None] & known[None, :]
        place = cell.to(tl.int64)[:, None] * width + channel[None, :]
        value = tl.load(picture + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - shift[None, :], 0.0)
        total += value
        square += value * value
    count = (end - first).to(tl.float32)
    sums = tl.sum(total, 0)
    place = (sample * tl.num_programs(0) + part) * width + channel
    tl.store(means + place, shift + sums / count, mask=known)
    tl.store(squares + place, tl.sum(square, 0) - sums * (sums / count), mask=known)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["cells", "each", "parts"])
def _affine(
    means,
    squares,
    weight,
    centre,
    factor,
    cells,
    width,
    each,
    parts,
    per_group,
    eps,
    part_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Mean and factor of each channel."""
    group, sample = tl.program_id(0), tl.program_id(1)
    mean, square = _of_group(
        means, squares, group, sample, cells, width, each, parts, per_group, part_block, channel_block
    )
    variance = square / (cells.to(tl.float32) * per_group)
    _put_affine(weight, centre, factor, group, sample, width, per_group, mean, variance, eps, channel_block)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["cells", "each", "parts"])
def _grouped(
    means,
    squares,
    moments,
    cells,
    width,
    each,
    parts,
    per_group,
    part_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Mean and sum of squared deviations of each group."""
    group, sample = tl.program_id(0), tl.program_id(1)
    mean, square = _of_group(
        means, squares, group, sample, cells, width, each, parts, per_group, part_block, channel_block
    )
    place = moments + (sample * tl.num_programs(0) + group) * 2
    tl.store(place, mean)
    tl.store(place + 1, square)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _of_group(
    means,
    squares,
    group,
    sample,
    cells,
    width,
    each,
    parts,
    per_group,
    part_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Parts are merged without cancellation (Chan, Golub and LeVeque 1979)."""
    part = tl.arange(0, part_block)
    lane = tl.arange(0, channel_block)
    inside = (part < parts)[:, None] & (lane < per_group)[None, :]
    place = (sample * parts + part)[:, None] * width + (group * per_group + lane)[None, :]
    mean_of = tl.load(means + place, mask=inside, other=0.0)
    square_of = tl.load(squares + place, mask=inside, other=0.0)
    count = tl.where(inside, tl.minimum(cells - part * each, each).to(tl.float32)[:, None], 0.0)
    total = cells.to(tl.float32) * per_group
    first = tl.load(means + sample * parts * width + group * per_group)  # near all others
    mean = first + tl.sum(tl.sum((mean_of - first) * count, 1), 0) / total
    apart = mean_of - mean
    return mean, tl.sum(tl.sum(square_of + count * apart * apart, 1), 0)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _put_affine(weight, centre, factor, group, sample, width, per_group, mean, variance, eps, block: tl.constexpr):
    """Store the mean and the factor of a group's channels."""
    lane = tl.arange(0, block)
    channel = group * per_group + lane
    known = lane < per_group
    scale = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32) / tl.sqrt_rn(variance + eps)
    tl.store(centre + sample * width + channel, tl.where(known, mean, 0.0), mask=known)
    tl.store(factor + sample * width + channel, scale, mask=known)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["stride", "more", "less", "larger"])
def _spread(
    messages,
    weight,
    centre,
    factor,
    stride,
    more,
    less,
    larger,
    width,
    per_group,
    eps,
    ranks: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Mean and factor of each channel from the moments of all ranks, of which the first `larger` have `more` cells."""
    group, sample = tl.program_id(0), tl.program_id(1)
    place = messages + (sample * tl.num_programs(0) + group) * 2
    total, mean, square = more * per_group * 1.0, tl.load(place), tl.load(place + 1)
    for rank in tl.static_range(1, ranks):
        count = tl.where(rank < larger, more, less) * per_group * 1.0
        apart = tl.load(place + rank * stride) - mean
        square += tl.load(place + rank * stride + 1) + apart * apart * total * (count / (total + count))
        total += count
        mean += apart * (count / total)
    _put_affine(weight, centre, factor, group, sample, width, per_group, mean, square / total, eps, channel_block)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["cells"])
def _apply(
    x,
    out,
    centre,
    factor,
    bias,
    cells,
    width,
    x_stride,
    out_stride,
    silu: tl.constexpr,
    rows: tl.constexpr,
    wide: tl.constexpr,
):
    """(x - mean) factor + bias, which is exact where all values of a group are equal."""
    sample = tl.program_id(1)
    cell = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, wide)
    known = channel < width
    inside = (cell < cells)[:, None] & known[None, :]
    mean = tl.load(centre + sample * width + channel, mask=known, other=0.0)
    scale = tl.load(factor + sample * width + channel, mask=known, other=0.0)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    place = cell.to(tl.int64)[:, None] * width + channel[None, :]
    here, there = sample.to(tl.int64) * x_stride, sample.to(tl.int64) * out_stride
    value = tl.load(x + here + place, mask=inside, other=0.0).to(tl.float32)
    value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
    if silu:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + there + place, value.to(out.dtype.element_ty), mask=inside)
