"""Attention that also gives the log-sum-exp of every query's scores: with it, any one score is an exact probability.

softmax(s)_j = exp(s_j - lse), so that columns of the attention pattern need no [l, l] matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Source = Literal["fused", "beside", "rows"]
BYTES = 2**26  # of scores that are held at once
TOLERANCE = 1e-3  # of a kernel's log-sum-exp; other bases or scales are off by far more, rounding by far less
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
    """What decides how an attention is computed."""

    kernel: int
    device: str
    dtype: torch.dtype
    queries: torch.Size
    keys: torch.Size


class LogSumExp:
    """Attends just as `F.scaled_dot_product_attention` does, bit by bit, and gives the log-sum-exp beside it.

    How, is found out by trying, once for each kind of call, and kept in `found`:

        fused   the kernel that PyTorch picks for this call is asked for its own; it attends once
        beside  that kernel gives other bits when asked, so it runs a second time for the log-sum-exp alone
        rows    there is no such kernel, or its log-sum-exp is not that of the scores: computed in blocks of rows
    """

    def __init__(self) -> None:
        self.found: dict[Call, Source] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The result of the whole batch [b, n, l, d], and without gradients the log-sum-exp of some of its rows.

        Args:
            q, k, v: [b, n, l, d].
            rows: of the batch; the log-sum-exp is [rows, n, l], float32 or wider.
        """
        if self._source(q, k, v) == "fused":
            z, lse = _fused(q, k, v)
            return z, lse[rows].detach()
        return F.scaled_dot_product_attention(q, k, v), self.of(q[rows], k[rows], v[rows])

    @torch.no_grad()
    def of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The log-sum-exp alone, [b, n, l]."""
        return by_rows(q, k) if self._source(q, k, v) == "rows" else _fused(q, k, v)[1]

    @torch.no_grad()
    def _source(self, q: Tensor, k: Tensor, v: Tensor) -> Source:
        call = Call(_kernel(q, k, v), q.device.type, q.dtype, q.shape, k.shape)
        if call not in self.found:
            self.found[call] = _tried(q, k, v) if call.kernel in _KERNELS else "rows"
        return self.found[call]


def by_rows(q: Tensor, k: Tensor, *, limit: int = BYTES) -> Tensor:
    """The log-sum-exp [b, n, l] of q k / sqrt(d), at least in float32, a block of queries after another.

    Args:
        q: [b, n, l, d].
        k: [b, n, m, d].
        limit: bytes of scores that are held at once, unless a single row of all heads needs more.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5
    rows = max(1, limit // (keys[..., 0, :].numel() * keys.element_size()))
    return torch.cat([torch.logsumexp(part.to(wide) @ keys, dim=-1) for part in q.split(rows, dim=2)], dim=2)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> int:
    """What PyTorch picks for this call; 0 on devices whose kernels are not known here."""
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
