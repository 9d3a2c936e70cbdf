"""Triton kernels of the fast VAE: GroupNorm and SiLU of pictures whose channels lie side by side.

Statistics take one pass over the picture, and the norm with SiLU another one, where eager torch takes several and
changes the memory layout twice. Everything is computed in float32. Triton is required.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from encoders.tiling import Moments
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
    samples, width, height, columns = x.shape
    cells, wide = height * columns, triton.next_power_of_2(width)
    rows = max(min(_TILE // wide, triton.next_power_of_2(cells)), 1)
    each = max(triton.cdiv(triton.cdiv(cells, _PARTS), rows), 1) * rows  # cells of a part
    parts = triton.cdiv(cells, each)
    per_group = width // norm.num_groups
    means, squares = torch.empty((2, samples, parts, width), dtype=torch.float32, device=x.device).unbind(0)
    centre, factor = torch.empty((2, samples, width), dtype=torch.float32, device=x.device).unbind(0)
    out = x if in_place else torch.empty_like(x)
    _moments[(parts, samples)](x, means, squares, cells, width, each, rows, wide, num_warps=8)
    _affine[(norm.num_groups, samples)](
        means,
        squares,
        norm.weight,
        centre,
        factor,
        cells,
        width,
        each,
        parts,
        per_group,
        norm.eps,
        triton.next_power_of_2(parts),
        triton.next_power_of_2(per_group),
        num_warps=8 if parts > 64 else 1,
    )
    _apply[(triton.cdiv(cells, rows), samples)](
        x, out, centre, factor, norm.bias, cells, width, silu, rows, wide, num_warps=8
    )
    return out


@on_its_device
def group_moments(x: Tensor, groups: int) -> Moments:
    """`Moments.of` for activations with channels last, in one pass over them.

    Args:
        x: [b, c, h, w], channels last.
        groups: of a GroupNorm.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    samples, width, height, columns = x.shape
    cells, wide = height * columns, triton.next_power_of_2(width)
    rows = max(min(_TILE // wide, triton.next_power_of_2(cells)), 1)
    each = max(triton.cdiv(triton.cdiv(cells, _PARTS), rows), 1) * rows  # cells of a part
    parts = triton.cdiv(cells, each)
    means, squares = torch.empty((2, samples, parts, width), dtype=torch.float32, device=x.device).unbind(0)
    _moments[(parts, samples)](x, means, squares, cells, width, each, rows, wide, num_warps=8)
    count = torch.full((parts, 1, 1), each, dtype=torch.float32, device=x.device)
    count[-1] = cells - (parts - 1) * each
    means, squares = (one.unflatten(2, (groups, -1)) for one in (means, squares))  # b parts groups channels
    mean = (means * count).sum((1, 3)) / (cells * width // groups)
    apart = means - mean[:, None, :, None]
    return Moments(cells * width // groups, mean, (squares + count * apart.square()).sum((1, 3)))


@on_its_device
def norm_by(norm: nn.GroupNorm, x: Tensor, moments: Moments) -> Tensor:
    """GroupNorm under given moments, then SiLU, written into `x`.

    Args:
        norm: the groups, weights and eps.
        x: [b, c, h, w], channels last.
        moments: those of the whole activations, of which `x` may be a part.
    """
    samples, width, height, columns = x.shape
    cells, wide = height * columns, triton.next_power_of_2(width)
    rows = max(min(_TILE // wide, triton.next_power_of_2(cells)), 1)
    spread = (samples, norm.num_groups, width // norm.num_groups)
    scale = (moments.squares / moments.total + norm.eps).rsqrt().unsqueeze(2).expand(spread).flatten(1)
    centre, factor = moments.mean.unsqueeze(2).expand(spread).flatten(1), scale * norm.weight
    _apply[(triton.cdiv(cells, rows), samples)](
        x, x, centre, factor, norm.bias, cells, width, True, rows, wide, num_warps=8
    )
    return x


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
    """Mean and factor of each channel: parts are merged without cancellation (Chan, Golub and LeVeque 1979)."""
    group, sample = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, part_block)
    lane = tl.arange(0, channel_block)
    channel = group * per_group + lane
    known = lane < per_group
    inside = (part < parts)[:, None] & known[None, :]
    place = (sample * parts + part)[:, None] * width + channel[None, :]
    mean_of = tl.load(means + place, mask=inside, other=0.0)
    square_of = tl.load(squares + place, mask=inside, other=0.0)
    count = tl.where(inside, tl.minimum(cells - part * each, each).to(tl.float32)[:, None], 0.0)
    total = cells.to(tl.float32) * per_group
    first = tl.load(means + sample * parts * width + group * per_group)  # near all others
    mean = first + tl.sum(tl.sum((mean_of - first) * count, 1), 0) / total
    apart = mean_of - mean
    variance = tl.sum(tl.sum(square_of + count * apart * apart, 1), 0) / total
    scale = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32) / tl.sqrt_rn(variance + eps)
    tl.store(centre + sample * width + channel, tl.where(known, mean, 0.0), mask=known)
    tl.store(factor + sample * width + channel, scale, mask=known)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["cells"])
def _apply(x, out, centre, factor, bias, cells, width, silu: tl.constexpr, rows: tl.constexpr, wide: tl.constexpr):
    """(x - mean) factor + bias, which is exact where all values of a group are equal."""
    sample = tl.program_id(1)
    cell = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, wide)
    known = channel < width
    inside = (cell < cells)[:, None] & known[None, :]
    mean = tl.load(centre + sample * width + channel, mask=known, other=0.0)
    scale = tl.load(factor + sample * width + channel, mask=known, other=0.0)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    place = (sample.to(tl.int64) * cells + cell)[:, None] * width + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
    if silu:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
