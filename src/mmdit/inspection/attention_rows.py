"""Attention patterns, some rows at a time: all of a 1024 x 1024 picture of 3.5-Large is 1.5 GB per block in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS_BYTES = 2**26  # of scores at a time


def pattern_rows(q: Tensor, k: Tensor, *, most: int = ROWS_BYTES) -> Iterator[tuple[int, Tensor]]:
    """softmax(q k^T / sqrt(d)) in blocks of rows: the first row's number and [b, heads, rows, keys].

    In float32, or float64 where the queries are that.

    Args:
        q: [b, heads, queries, d].
        k: [b, heads, keys, d].
        most: bytes of a block, which has at least one row.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    row = q.shape[0] * q.shape[1] * k.shape[2] * dtype.itemsize
    keys, count = k.to(dtype).transpose(-1, -2), max(1, most // max(row, 1))
    for first in range(0, q.shape[2], count):
        scores = q[:, :, first : first + count].to(dtype) @ keys
        yield first, (scores * q.shape[-1] ** -0.5).softmax(dim=-1)


def pattern(q: Tensor, k: Tensor) -> Tensor:
    """All rows, [b, heads, queries, keys]."""
    return torch.cat([rows for _, rows in pattern_rows(q, k)], dim=2)
