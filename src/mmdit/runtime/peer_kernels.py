"""Triton kernels that store straight into the memory of other GPUs, and a barrier between these GPUs.

An address on another GPU is one here plus the distance between the two memories, counted in heads. Triton is required.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from mmdit.runtime.kernels import normed_heads
from mmdit.runtime.rows import EPS, Rows

_UNITS = 32  # heads of tokens that a program moves


def send_heads(
    qkv: Tensor, norms: Tensor | None, rows: Rows, joint: Tensor, heads: Tensor, starts: tuple[int, int]
) -> None:
    """`kernels.pack` over several ranks: each head of this rank's tokens goes to the rank that attends with it.

    Args:
        qkv: [rows, 3 d], of this rank's tokens.
        norms: weights of the RMS norms, [2 (text, image), 2 (queries, keys), head_dim]; None leaves the norms out.
        rows: the stream and sample of each row.
        joint: this rank's memory, [3, samples, tokens of all ranks, own heads, head_dim].
        heads: int64 [heads, 3]: by head, the distance to its rank's memory in heads, and there the number of heads and
            the place among them.
        starts: where this rank's text and image tokens begin among those of all ranks.
    """
    head_dim, total = joint.shape[-1], len(heads)
    units = rows.total * 3 * total
    _send_heads[(triton.cdiv(units, _UNITS),)](
        qkv,
        qkv if norms is None else norms,
        joint,
        heads,
        units,
        total,
        head_dim,
        *rows.divisors,
        rows.samples,
        joint.shape[2],
        *starts,
        EPS,
        norms is not None,
        _UNITS,
        triton.next_power_of_2(head_dim),
        num_warps=4,
    )


def send_tokens(z: Tensor, own: Tensor, tokens: Tensor, first: int) -> None:
    """The way back: each token's result goes to the rank whose token it is.

    Args:
        z: [samples, tokens of all ranks, own heads, head_dim], contiguous.
        own: this rank's memory, [samples, own tokens, heads, head_dim].
        tokens: int64 [tokens of all ranks, 3]: by token, the distance to its rank's memory in heads, and there the
            number of tokens and the place among them.
        first: the first of this rank's heads.
    """
    samples, count, heads, head_dim = z.shape
    units = samples * count * heads
    _send_tokens[(triton.cdiv(units, _UNITS),)](
        z,
        own,
        tokens,
        units,
        count,
        heads,
        own.shape[2],
        first,
        head_dim,
        _UNITS,
        triton.next_power_of_2(head_dim),
        num_warps=4,
    )


def meet(flags: Tensor, distances: Tensor, counter: Tensor, rank: int) -> None:
    """Wait on the GPU until all ranks are here; what they stored into this rank's memory before has arrived then.

    Args:
        flags: int32 [ranks], which the other ranks write: how often each of them has been here.
        distances: int64 [ranks]: from this rank's flags to those of each, in units of an int32.
        counter: int32 [1], in this rank's own memory: how often it has been here.
        rank: this rank.
    """
    _meet[(1,)](flags, distances, counter, rank, len(distances), num_warps=1)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(
    do_not_specialize=["units", "split", "text", "image", "samples", "tokens", "text_start", "image_start"],
)
def _send_heads(
    qkv,
    norms,
    joint,
    places,
    units,
    heads,
    head_dim,
    split,
    text,
    image,
    samples,
    tokens,
    text_start,
    image_start,
    eps,
    normed: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """A unit is one head of one token's queries, keys or values; they lie in a row in `qkv`."""
    unit = tl.program_id(0) * block + tl.arange(0, block)
    there = unit < units
    row = unit // (3 * heads)
    part = unit // heads % 3
    is_text = row < split
    sample = tl.where(is_text, row // text, (row - split) // image)
    token = tl.where(is_text, text_start + row % text, image_start + (row - split) % image)
    distance, count, index = _home(places + unit % heads * 3, there)
    place = (distance + ((part * samples + sample) * tokens + token) * count + index) * head_dim
    lane = tl.arange(0, wide)[None, :]
    inside = there[:, None] & (lane < head_dim)
    value = tl.load(qkv + unit.to(tl.int64)[:, None] * head_dim + lane, mask=inside, other=0.0)
    if normed:
        value = normed_heads(value, norms, is_text, part, lane, inside, head_dim, eps)
    tl.store(joint + place[:, None] + lane, value, mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["units", "tokens", "first"])
def _send_tokens(
    z, own, places, units, tokens, own_heads, heads, first, head_dim, block: tl.constexpr, wide: tl.constexpr
):
    """A unit is one head of one token."""
    unit = tl.program_id(0) * block + tl.arange(0, block)
    there = unit < units
    sample = unit // (own_heads * tokens)
    distance, count, index = _home(places + unit // own_heads % tokens * 3, there)
    place = (distance + (sample * count + index) * heads + first + unit % own_heads) * head_dim
    lane = tl.arange(0, wide)[None, :]
    inside = there[:, None] & (lane < head_dim)
    value = tl.load(z + unit.to(tl.int64)[:, None] * head_dim + lane, mask=inside, other=0.0)
    tl.store(own + place[:, None] + lane, value, mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _home(entry, there):
    """Where a head or a token goes: the distance to its rank's memory, and there the number of them and its place."""
    distance = tl.load(entry, mask=there, other=0)
    count = tl.load(entry + 1, mask=there, other=0)
    index = tl.load(entry + 2, mask=there, other=0)
    return distance, count, index


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _meet(flags, distances, counter, rank: tl.constexpr, ranks: tl.constexpr):
    """Flags only grow, so that a rank which is one meeting ahead passes nobody by."""
    now = tl.load(counter) + 1
    tl.store(counter, now)
    for other in tl.static_range(ranks):
        if other != rank:
            tl.atomic_xchg(flags + tl.load(distances + other) + rank, now, sem="release", scope="sys")
    for other in tl.static_range(ranks):
        if other != rank:
            while tl.atomic_add(flags + other, 0, sem="acquire", scope="sys") < now:
                pass
