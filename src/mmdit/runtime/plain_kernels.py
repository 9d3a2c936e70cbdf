"""What `mmdit.runtime.kernels` computes, in plain torch: its oracle, and the fast path where there is no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.runtime.rows import (
    EPS,
    Activation,
    Added,
    AttentionInputs,
    Columns,
    Down,
    Output,
    Part,
    Rounding,
    Rows,
    Update,
)
from quant.scaling import scale_of, to_codes, to_values


def low(x: Activation, down: Down, dtype: torch.dtype) -> Tensor:
    """The products of the rows of both streams and the down projections of their LoRAs, [rows, r].

    Args:
        x: values, or codes and their scale.
        down: the projections.
        dtype: of the result, and of the sums.
    """
    found = []
    for part, weight in ((x.text, down.exact[0]), (x.image, down.exact[-1])):
        if part is not None:
            values = part.data.to(dtype)
            found.append(F.linear(values if part.scale is None else values * part.scale.to(dtype), weight))
    return torch.cat(found)


def add_up(out: Tensor, added: Added, rows: Rows) -> None:
    """Add what LoRAs add to products [rows, out], in place."""
    split = rows.split
    out[:split].addmm_(added.low[:split], added.up[0].t())
    out[split:].addmm_(added.low[split:], added.up[-1].t())


def norm_modulate(
    x: Tensor, table: Tensor, rows: Rows, outputs: Sequence[Output], updates: Sequence[Update] = ()
) -> list[Activation]:
    """Add the gated updates to the residual stream, in place; norm it, and modulate it once per output.

    Args:
        x: the residual stream, [rows, d].
        table: modulation vectors of each sample, [samples, vectors, d].
        rows: the stream and sample of each row.
        outputs: LayerNorm(x) (1 + scale) + shift, and what that is rounded to; in one launch all to one kind.
        updates: at most two.
    """
    for update in updates:
        x.add_(spread(table, update.gate, rows) * update.value)
    normed = F.layer_norm(x, x.shape[1:], eps=EPS)
    found = []
    for one in outputs:
        value = normed * (1 + spread(table, one.scale, rows)) + spread(table, one.shift, rows)
        if one.wide is not None:
            one.wide.copy_(value)
        found.append(_rounded(value, rows, one.rounding))
    return found


def gelu(x: Tensor, rows: Rows, rounding: Rounding, added: Added | None = None, down: Down | None = None) -> Activation:
    """GELU in its tanh approximation, [rows, k], of x and what LoRAs add to it.

    Args:
        x: the values, [rows, k], to which may be added in place.
        rows: the stream and sample of each row.
        rounding: what the result is rounded to.
        added: what LoRAs add.
        down: the down projections that the result is multiplied by next; a kernel may do so (`Activation.low`).
    """
    if added is not None:
        add_up(x, added, rows)
    return _rounded(F.gelu(x, approximate="tanh"), rows, rounding)


def rounded(x: Tensor, rows: Rows, rounding: Rounding) -> Activation:
    """The rows themselves, [rows, k], rounded."""
    return _rounded(x, rows, rounding)


def pack(qkv: Tensor, norms: Tensor | None, rows: Rows, head_dim: int, added: Added | None = None) -> AttentionInputs:
    """Queries, keys and values of both streams in the layout of joint attention, text first.

    Args:
        qkv: [rows, 3 d].
        norms: weights of the RMS norms, [2 (text, image), 2 (queries, keys), head_dim]; None leaves the norms out.
        rows: the stream and sample of each row.
        head_dim: channels per head.
        added: what LoRAs add to qkv; that may be added in place.
    """
    if added is not None:
        add_up(qkv, added, rows)
    parts: list[list[Tensor]] = [[], [], []]
    for stream, (start, end) in enumerate(((0, rows.split), (rows.split, rows.total))):
        if start == end:
            continue
        heads = qkv[start:end].unflatten(-1, (3, -1, head_dim)).unflatten(0, (rows.samples, -1))  # b l 3 h c
        for index, part in enumerate(heads.unbind(2)):
            weight = None if norms is None or index == 2 else norms[stream, index]
            parts[index].append(part if weight is None else F.rms_norm(part, (head_dim,), weight, EPS))
    q, k, v = (torch.cat(part, dim=1) for part in parts)
    return q, k, v


def unpack(z: Tensor, rows: Rows, rounding: Rounding, *, text: bool = True) -> Activation:
    """The result of joint attention, [samples, tokens, heads, head_dim], as rows of each stream.

    Args:
        z: text tokens first.
        rows: the stream and sample of each row.
        rounding: what the rows are rounded to.
        text: whether the text's rows are wanted.
    """
    parts = z.flatten(2).split([rows.text, rows.image], dim=1)
    if not text:
        return _rounded(parts[1].flatten(0, 1), rows.only_image(), rounding)
    return _rounded(torch.cat([part.flatten(0, 1) for part in parts]), rows, rounding)


def spread(table: Tensor, columns: Columns, rows: Rows) -> Tensor:
    """The vector of each row's stream and sample, [rows, d]."""
    spread = [
        table[:, column].repeat_interleave(tokens, dim=0)
        for column, tokens in ((columns.text, rows.text), (columns.image, rows.image))
        if tokens
    ]
    return torch.cat(spread) if len(spread) > 1 else spread[0]


def _rounded(x: Tensor, rows: Rows, rounding: Rounding) -> Activation:
    text, image = x[: rows.split], x[rows.split :]
    return Activation(
        _part(text, rounding, rounding.text) if rows.text else None,
        _part(image, rounding, rounding.image) if rows.image else None,
    )


def _part(x: Tensor, rounding: Rounding, static: Tensor | None) -> Part:
    if rounding.kind == "none":
        return Part(x)
    scale = scale_of(x.abs().amax(dim=1, keepdim=True), "e4m3") if rounding.kind == "token" else static
    assert scale is not None, "static rounding has the scale of its stream"
    rounded = to_values(x, scale, "e4m3") if rounding.codes == torch.float16 else to_codes(x, scale, "e4m3")
    return Part(rounded, scale)
