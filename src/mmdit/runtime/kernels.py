"""Triton kernels of the fast path: each reads and writes every value once, where eager torch takes several passes.

They compute what `mmdit.runtime.plain_kernels` says, in float32, rounded once at the end; codes and scales obey
`quant.scaling` bit for bit. A program handles a row, in two pieces whose sizes are powers of two, because a single one
would waste up to half of the threads: the model's widths are 19 x 128 and 12 x 128. Triton is required.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmdit.runtime import lora_kernels
from mmdit.runtime.kernel_parts import KINDS, gelu_of, targets
from mmdit.runtime.rows import (
    EPS,
    Activation,
    Added,
    AttentionInputs,
    Blank,
    Columns,
    Down,
    Output,
    Rounding,
    Rows,
    Update,
)
from quant.formats import LARGEST
from quant.kernels import code_of, largest_of, row_scale
from quant.scaling import SMALLEST_SCALE

low, add_up = lora_kernels.low, lora_kernels.add_up
_PER_THREAD = 32  # values of a row that a thread holds where they are rounded; half as many where they are not
_UNITS = 32  # heads of tokens that a program of `_pack` moves


def norm_modulate(
    x: Tensor, table: Tensor, rows: Rows, outputs: Sequence[Output], updates: Sequence[Update] = ()
) -> list[Activation]:
    """`plain_kernels.norm_modulate`: gated updates, LayerNorm, one or two modulations and roundings, in one pass."""
    width = x.shape[1]
    blanks = [Blank.of(rows, width, one.rounding, x, x.dtype) for one in outputs]
    columns = [column for one in outputs for column in (one.shift, one.scale)] + [one.gate for one in updates]
    columns += [Columns(0, 0)] * (2 - len(updates))  # which are not read
    shifts = columns[: 2 * len(outputs)] if len(outputs) == 2 else columns[:2] * 2
    gates = columns[2 * len(outputs) :]
    first, last, kind = blanks[0], blanks[-1], outputs[0].rounding.kind
    keeps = [one.wide is not None for one in outputs]
    if any(keeps) and not all(keeps):
        raise ValueError("of two outputs, both have `wide` or neither")
    if any(one.rounding.kind != kind for one in outputs):
        raise ValueError(f"outputs are rounded to {[one.rounding.kind for one in outputs]}; one kind is expected")
    _norm[(rows.total,)](
        x,
        updates[0].value if updates else x,
        updates[-1].value if updates else x,
        table,
        *targets(first, outputs[0].rounding, x),
        *targets(last, outputs[-1].rounding, x),
        *(x if one.wide is None else one.wide for one in (outputs[0], outputs[-1])),
        *(number for pair in shifts for number in pair),
        *(number for pair in gates for number in pair),
        *rows.divisors,
        table.stride(0),
        width,
        first.gap,
        EPS,
        len(updates),
        len(outputs),
        any(keeps),
        KINDS[kind],
        LARGEST["e4m3"],
        SMALLEST_SCALE,
        **_pieces(width, kind),
    )
    return [blank.activation(rows, one.rounding) for blank, one in zip(blanks, outputs, strict=True)]


def gelu(x: Tensor, rows: Rows, rounding: Rounding, added: Added | None = None, down: Down | None = None) -> Activation:
    """`plain_kernels.gelu` and rounding, in one pass; with a LoRA under a scale per row in two.

    The products with `down` have been measured under a scale per row, where they are quicker so than apart.
    """
    if added is None:
        return _row_by_row(x, rows, rounding, joint=False, gelu=True)
    return lora_kernels.gelu(x, rows, rounding, added, down if rounding.kind == "token" else None)


def rounded(x: Tensor, rows: Rows, rounding: Rounding) -> Activation:
    """`plain_kernels.rounded`, in one pass; nothing is copied where nothing is rounded."""
    if rounding.kind == "none":
        return Blank(x, None, 0).activation(rows, rounding)
    return _row_by_row(x, rows, rounding, joint=False, gelu=False)


def unpack(z: Tensor, rows: Rows, rounding: Rounding, *, text: bool = True) -> Activation:
    """`plain_kernels.unpack` and rounding, in one pass; nothing is copied where the rows are in place already."""
    wanted = rows if text else rows.only_image()
    z = z.flatten(2)
    if rounding.kind == "none" and rows.samples == 1:
        return Blank(z[0] if text else z[0, rows.text :], None, 0).activation(wanted, rounding)
    return _row_by_row(z, rows, rounding, joint=True, gelu=False, skip=0 if text else rows.split)


def pack(qkv: Tensor, norms: Tensor | None, rows: Rows, head_dim: int, added: Added | None = None) -> AttentionInputs:
    """`plain_kernels.pack`: RMS norms of queries and keys and the joint layout, in one pass."""
    if added is not None:
        return lora_kernels.pack(qkv, norms, rows, head_dim, added)
    heads = qkv.shape[1] // (3 * head_dim)
    shape = (3, rows.samples, rows.text + rows.image, heads, head_dim)
    joint = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    units = rows.total * 3 * heads
    _pack[(triton.cdiv(units, _UNITS),)](
        qkv,
        qkv if norms is None else norms,
        joint,
        units,
        heads,
        head_dim,
        *rows.divisors,
        rows.text,
        rows.image,
        EPS,
        norms is not None,
        _UNITS,
        triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    q, k, v = joint.unbind(0)
    return q, k, v


def _row_by_row(x: Tensor, rows: Rows, rounding: Rounding, *, joint: bool, gelu: bool, skip: int = 0) -> Activation:
    """Each row by itself; `joint` rows come in the layout of attention, of which the first `skip` are left out."""
    width = x.shape[-1]
    wanted = rows.only_image() if skip else rows
    blank = Blank.of(wanted, width, rounding, x, x.dtype)
    _row[(wanted.total,)](
        x,
        *targets(blank, rounding, x),
        skip,
        *rows.divisors,
        rows.text,
        rows.text + rows.image,
        width,
        blank.gap,
        joint,
        gelu,
        KINDS[rounding.kind],
        LARGEST["e4m3"],
        SMALLEST_SCALE,
        **_pieces(width, rounding.kind),
    )
    return blank.activation(wanted, rounding)


def _pieces(width: int, kind: str) -> dict[str, Any]:
    """Two powers of two that hold a row, and the warps of a program."""
    values = _PER_THREAD // 2 if kind == "none" else _PER_THREAD
    head = triton.next_power_of_2(width) // 2
    tail = triton.next_power_of_2(max(width - head, 1))
    warps = min(max(triton.next_power_of_2(width) // (32 * values) // 2, 1), 16)
    return {"head": head, "tail": tail, "num_warps": warps}


@no_type_check  # annotations have Triton's meaning here
@triton.jit(
    do_not_specialize=[
        "text_shift",
        "image_shift",
        "text_scale",
        "image_scale",
        "text_shift2",
        "image_shift2",
        "text_scale2",
        "image_scale2",
        "text_gate",
        "image_gate",
        "text_gate2",
        "image_gate2",
        "split",
        "text",
        "image",
        "gap",
    ]
)
def _norm(
    x,
    update,
    update2,
    table,
    out,
    scales,
    text_static,
    image_static,
    out2,
    scales2,
    text_static2,
    image_static2,
    wide,
    wide2,
    text_shift,
    image_shift,
    text_scale,
    image_scale,
    text_shift2,
    image_shift2,
    text_scale2,
    image_scale2,
    text_gate,
    image_gate,
    text_gate2,
    image_gate2,
    split,
    text,
    image,
    stride,
    width,
    gap,
    eps,
    updates: tl.constexpr,
    outputs: tl.constexpr,
    keep: tl.constexpr,
    kind: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    head: tl.constexpr,
    tail: tl.constexpr,
):
    row = tl.program_id(0)
    is_text = row < split
    vectors = table + tl.where(is_text, row // text, (row - split) // image).to(tl.int64) * stride
    place = row.to(tl.int64) * width
    a = tl.arange(0, head)
    b = head + tl.arange(0, tail)
    inside = b < width
    value = tl.load(x + place + a).to(tl.float32)
    value2 = tl.load(x + place + b, mask=inside, other=0.0).to(tl.float32)
    if updates > 0:
        gate = vectors + tl.where(is_text, text_gate, image_gate) * width
        value = _add(value, update + place + a, gate + a, True)
        value2 = _add(value2, update + place + b, gate + b, inside)
    if updates > 1:
        gate2 = vectors + tl.where(is_text, text_gate2, image_gate2) * width
        value = _add(value, update2 + place + a, gate2 + a, True)
        value2 = _add(value2, update2 + place + b, gate2 + b, inside)
    if updates > 0:
        tl.store(x + place + a, value.to(x.dtype.element_ty))
        tl.store(x + place + b, value2.to(x.dtype.element_ty), mask=inside)

    mean = (tl.sum(value, 0) + tl.sum(value2, 0)) / width
    value = value - mean
    value2 = tl.where(inside, value2 - mean, 0.0)
    variance = (tl.sum(value * value, 0) + tl.sum(value2 * value2, 0)) / width
    factor = 1 / tl.sqrt_rn(variance + eps)

    scale_place = row + tl.where(is_text, 0, gap)
    shift = vectors + tl.where(is_text, text_shift, image_shift) * width
    scale = vectors + tl.where(is_text, text_scale, image_scale) * width
    normed = _modulated(value, factor, shift + a, scale + a, True)
    normed2 = _modulated(value2, factor, shift + b, scale + b, inside)
    if keep:
        tl.store(wide + place + a, normed)
        tl.store(wide + place + b, normed2, mask=inside)
    static = tl.where(is_text, tl.load(text_static), tl.load(image_static)).to(tl.float32) if kind == 2 else 1.0
    _put(out + place, scales + scale_place, normed, normed2, a, b, inside, static, kind, largest, smallest)
    if outputs > 1:
        shift2 = vectors + tl.where(is_text, text_shift2, image_shift2) * width
        scale2 = vectors + tl.where(is_text, text_scale2, image_scale2) * width
        normed = _modulated(value, factor, shift2 + a, scale2 + a, True)
        normed2 = _modulated(value2, factor, shift2 + b, scale2 + b, inside)
        if keep:
            tl.store(wide2 + place + a, normed)
            tl.store(wide2 + place + b, normed2, mask=inside)
        static2 = tl.where(is_text, tl.load(text_static2), tl.load(image_static2)).to(tl.float32) if kind == 2 else 1.0
        _put(out2 + place, scales2 + scale_place, normed, normed2, a, b, inside, static2, kind, largest, smallest)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _add(value, update, gate, inside):
    gated = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    return value + gated * tl.load(update, mask=inside, other=0.0).to(tl.float32)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _modulated(value, factor, shift, scale, inside):
    scaled = 1.0 + tl.load(scale, mask=inside, other=0.0).to(tl.float32)
    return value * factor * scaled + tl.load(shift, mask=inside, other=0.0).to(tl.float32)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def _put(
    out,
    scales,
    value,
    value2,
    a,
    b,
    inside,
    static,
    kind: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
):
    """Store a row in 16 bits (kind 0), as codes under its own scale (1) or as codes under a given scale (2)."""
    if kind == 0:
        tl.store(out + a, value.to(out.dtype.element_ty))
        tl.store(out + b, value2.to(out.dtype.element_ty), mask=inside)
    else:
        scale = static
        if kind == 1:
            size = tl.maximum(
                largest_of(tl.abs(value)),
                largest_of(tl.where(inside, tl.abs(value2), 0.0)),
                propagate_nan=tl.PropagateNan.ALL,
            )
            scale = row_scale(size, largest, smallest)
            tl.store(scales, scale)
        tl.store(out + a, code_of(value, scale, largest, out.dtype.element_ty, kind == 1))
        tl.store(out + b, code_of(value2, scale, largest, out.dtype.element_ty, kind == 1), mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["skip", "split", "text", "image", "text_tokens", "tokens", "gap"])
def _row(
    x,
    out,
    scales,
    text_static,
    image_static,
    skip,
    split,
    text,
    image,
    text_tokens,
    tokens,
    width,
    gap,
    joint: tl.constexpr,
    gelu: tl.constexpr,
    kind: tl.constexpr,
    largest: tl.constexpr,
    smallest: tl.constexpr,
    head: tl.constexpr,
    tail: tl.constexpr,
):
    index = tl.program_id(0)
    row = index + skip
    is_text = row < split
    source = row
    if joint:
        of_image = (row - split) // image * tokens + text_tokens + (row - split) % image
        source = tl.where(is_text, row // text * tokens + row % text, of_image)
    a = tl.arange(0, head)
    b = head + tl.arange(0, tail)
    inside = b < width
    value = tl.load(x + source.to(tl.int64) * width + a).to(tl.float32)
    value2 = tl.load(x + source.to(tl.int64) * width + b, mask=inside, other=0.0).to(tl.float32)
    if gelu:
        value = gelu_of(value)
        value2 = gelu_of(value2)
    static = tl.where(is_text, tl.load(text_static), tl.load(image_static)).to(tl.float32) if kind == 2 else 1.0
    scale_place = index + tl.where(is_text, 0, gap)
    place = index.to(tl.int64) * width
    _put(out + place, scales + scale_place, value, value2, a, b, inside, static, kind, largest, smallest)


@no_type_check  # annotations have Triton's meaning here
@triton.jit(do_not_specialize=["units", "split", "text", "image", "text_tokens", "image_tokens"])
def _pack(
    qkv,
    norms,
    joint,
    units,
    heads,
    head_dim,
    split,
    text,
    image,
    text_tokens,
    image_tokens,
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
    tokens = text_tokens + image_tokens
    sample = tl.where(is_text, row // text, (row - split) // image)
    token = tl.where(is_text, row % text, text_tokens + (row - split) % image)
    samples = units // (3 * heads) // tokens
    place = (((part * samples + sample) * tokens + token) * heads + unit % heads).to(tl.int64) * head_dim
    lane = tl.arange(0, wide)[None, :]
    inside = there[:, None] & (lane < head_dim)
    value = tl.load(qkv + unit.to(tl.int64)[:, None] * head_dim + lane, mask=inside, other=0.0)
    if normed:
        value = normed_heads(value, norms, is_text, part, lane, inside, head_dim, eps)
    tl.store(joint + place[:, None] + lane, value, mask=inside)


@no_type_check  # annotations have Triton's meaning here
@triton.jit
def normed_heads(value, norms, is_text, part, lane, inside, head_dim, eps):
    """Heads of queries (part 0) and keys (1) by the RMS norm of their stream; values (2) as they are."""
    wider = value.to(tl.float32)
    factor = 1 / tl.sqrt_rn(tl.sum(wider * wider, 1) / head_dim + eps)
    which = tl.where(is_text, 0, 2) + tl.minimum(part, 1)
    weight = tl.load(norms + which[:, None] * head_dim + lane, mask=inside, other=0.0).to(tl.float32)
    scaled = (wider * factor[:, None] * weight).to(value.dtype)
    return tl.where(part[:, None] < 2, scaled, value)
