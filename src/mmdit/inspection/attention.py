"""Rows and columns of attention patterns, computed without holding a whole pattern in memory.

The pattern of one block of SD3.5 Large for a 1024 x 1024 picture takes 1.5 GB in 16 bits. Rows are computed in blocks
(`pattern_rows`). Columns need no [l, l] matrix where attention also gives the log-sum-exp of the scores of every query,
because softmax(s)_j = exp(s_j - lse) (`LogSumExp`, `word_maps`, `quadrant_masses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.models.attention import Attended

Source = Literal["fused", "beside", "rows", "pattern"]
Direction = Literal["i2t", "t2i"]
QUADRANTS = ("I2I", "I2T", "T2I", "T2T")  # reader and read tokens: image patches or text tokens
BYTES = 2**26  # largest number of bytes of scores held at once
TOLERANCE = 1e-3  # for a kernel's log-sum-exp: other bases or scales are off by far more, rounding by far less
_PROBED = 16  # queries whose log-sum-exp is checked
_Fused = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)


# By what `torch._fused_sdp_choice` answers (torch.nn.attention.SDPBackend). 0, plain maths, gives no log-sum-exp.
_KERNELS: dict[int, _Fused] = {1: _flash, 2: _efficient, 3: _cudnn}


class Call(NamedTuple):
    """All properties of a call that decide how PyTorch computes the attention."""

    kernel: int
    device: str
    dtype: torch.dtype
    queries: torch.Size
    keys: torch.Size


class LogSumExp:
    """Attention bit-equal to `F.scaled_dot_product_attention`, with the log-sum-exp of the scores beside it.

    The way to compute the log-sum-exp is found by a trial, once for each kind of call, and kept in `found`:

        fused   the kernel that PyTorch picks for this call returns it, and attention runs once
        beside  that kernel then gives other bits, so it runs a second time for the log-sum-exp alone
        rows    there is no such kernel, or its log-sum-exp is wrong; it is computed in blocks of rows
    """

    def __init__(self) -> None:
        self.found: dict[Call, Source] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The result of the whole batch [b, n, l, d], and without gradients the log-sum-exp of some of its rows.

        Args:
            q, k, v: [b, n, l, d].
            rows: rows of the batch whose log-sum-exp is wanted, [rows, n, l], float32 or wider.
        """
        if self._source(q, k, v) == "fused":
            z, lse = _fused(q, k, v)
            return z, lse[rows].detach()
        return F.scaled_dot_product_attention(q, k, v), self.of(q[rows], k[rows], v[rows])

    @torch.no_grad()
    def of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The log-sum-exp without the output, [b, n, l]."""
        return by_rows(q, k) if self._source(q, k, v) == "rows" else _fused(q, k, v)[1]

    @torch.no_grad()
    def _source(self, q: Tensor, k: Tensor, v: Tensor) -> Source:
        call = Call(_kernel(q, k, v), q.device.type, q.dtype, q.shape, k.shape)
        if call not in self.found:
            self.found[call] = _tried(q, k, v) if call.kernel in _KERNELS else "rows"
        return self.found[call]


def by_rows(q: Tensor, k: Tensor, *, limit: int = BYTES) -> Tensor:
    """The log-sum-exp [b, n, l] of q k / sqrt(d), in float32 or wider, one block of queries after another.

    Args:
        q: [b, n, l, d].
        k: [b, n, m, d].
        limit: largest number of bytes of scores held at once, unless a single row of all heads needs more.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5
    rows = max(1, limit // (keys[..., 0, :].numel() * keys.element_size()))
    return torch.cat([torch.logsumexp(part.to(wide) @ keys, dim=-1) for part in q.split(rows, dim=2)], dim=2)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The kernel that PyTorch picks for this call; 0 on devices whose kernels are not known here."""
    return torch._fused_sdp_choice(q, k, v) if q.device.type in {"cpu", "cuda"} else 0


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    z, lse, *_ = _KERNELS[_kernel(q, k, v)](q, k, v)
    return z, lse.reshape(*q.shape[:2], -1)[..., : q.shape[2]]  # kernels fill up the queries, or append a dimension


def _tried(q: Tensor, k: Tensor, v: Tensor) -> Source:
    z, lse = _fused(q, k, v)
    some = torch.linspace(0, q.shape[2] - 1, min(_PROBED, q.shape[2]), device=q.device).long()
    error = (by_rows(q[:, :, some], k) - lse[..., some]).abs().max()
    if not bool(error < TOLERANCE):
        return "rows"
    plain = F.scaled_dot_product_attention(q, k, v)  # of another dtype under autocast
    return "fused" if z.dtype == plain.dtype and torch.equal(z, plain) else "beside"


def word_maps(
    q: Tensor, k: Tensor, lse: Tensor, text: int, tokens: Tensor, mix: Tensor, direction: Direction, *, each: bool
) -> Tensor:
    """The attention between image patches and words, for one sample: [n or 1, words, patches].

    Args:
        q, k: queries and keys [n, l, d] of text tokens followed by image patches.
        lse: log-sum-exp of the scores of each query, [n, l].
        text: number of text tokens.
        tokens: positions of the text tokens of the words, [m].
        mix: the weight of each of these tokens in each word, [words, m].
        direction: "i2t" for the share of a patch's attention that goes to the word; "t2i" for the share of the word's
            attention that goes to the patch.
        each: whether to keep every head; otherwise the mean over heads is returned as one head.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    of_words, of_image = (k, q) if direction == "i2t" else (q, k)
    less = lse[:, None, text:] if direction == "i2t" else lse[:, tokens, None]
    heads = max(1, BYTES // (max(1, len(tokens)) * (q.shape[1] - text) * wide.itemsize))
    chunks = zip(*(part.split(heads) for part in (of_words[:, tokens], of_image[:, text:], less)), strict=True)
    parts = []
    for words, patches, minus in chunks:
        scores = words.to(wide) @ patches.to(wide).mT * q.shape[-1] ** -0.5  # n tokens patches
        found = mix @ (scores - minus).exp()
        parts.append(found if each else found.sum(0, keepdim=True))
    return torch.cat(parts) if each else torch.cat(parts).sum(0, keepdim=True) / len(q)


def quadrant_masses(lse: Tensor, lse_of_text: Tensor, text: int) -> Tensor:
    """The attention of all queries summed over each quadrant, [b, n, 4] in the order of `QUADRANTS`.

    A row of attention sums to 1, so the two quadrants of image queries sum to the number of patches, and those of text
    queries to the number of text tokens.

    Args:
        lse: log-sum-exp of the scores of each query with all keys, [b, n, l], text tokens first.
        lse_of_text: the same with the text's keys alone; exp(lse_of_text - lse) is the mass on text.
        text: number of text tokens.
    """
    of_text, of_image = (lse_of_text - lse).exp().split([text, lse.shape[-1] - text], dim=-1)
    i2t, t2t = of_image.sum(-1), of_text.sum(-1)
    return torch.stack([of_image.shape[-1] - i2t, i2t, text - t2t, t2t], dim=-1)


def pattern_rows(
    attended: Attended, queries: Tensor | None = None, *, limit: int = BYTES
) -> Iterator[tuple[int, Tensor]]:
    """Yield the attention pattern in blocks of rows: the index of the first row, and [b, heads, rows, keys].

    The blocks are in float32, or in float64 where the queries are float64.

    Args:
        attended: one call of attention.
        queries: numbers of the tokens whose rows are computed, [n] or [b, n]; None for all.
        limit: largest number of bytes of a block, which has at least one row.
    """
    dtype = torch.promote_types(attended.q.dtype, torch.float32)
    row = attended.q.shape[0] * attended.q.shape[1] * attended.k.shape[2] * dtype.itemsize
    count = max(1, limit // max(row, 1))
    every = torch.arange(attended.q.shape[2]) if queries is None else queries
    for first in range(0, every.shape[-1], count):
        yield first, attended.pattern(every[..., first : first + count])


def word_maps_of_pattern(
    attended: Attended, text: int, tokens: Tensor, mix: Tensor, direction: Direction, *, each: bool
) -> Tensor:
    """The result of `word_maps`, computed from rows of the pattern, for attention that is not plain softmax.

    Args:
        attended: the attention of one sample.
        text, tokens, mix, direction, each: see `word_maps`.
    """
    if direction == "t2i":
        found = mix @ attended.pattern(tokens)[0, :, :, text:].to(mix)
    else:
        image = torch.arange(text, attended.q.shape[2])
        columns = torch.cat([block[0, :, :, tokens] for _, block in pattern_rows(attended, image)], dim=1)
        found = mix @ columns.to(mix).mT
    return found if each else found.mean(0, keepdim=True)


def quadrants_of_pattern(attended: Attended, text: int) -> Tensor:
    """The result of `quadrant_masses`, computed from rows of the pattern, [b, n, 4]."""
    on_text, on_image = [], []
    for _, block in pattern_rows(attended):
        on_text.append(block[..., :text].sum(-1))
        on_image.append(block[..., text:].sum(-1))
    (t2t, i2t), (t2i, i2i) = (
        (part[..., :text].sum(-1), part[..., text:].sum(-1))
        for part in (torch.cat(on_text, -1), torch.cat(on_image, -1))
    )
    return torch.stack([i2i, i2t, t2i, t2t], dim=-1)
