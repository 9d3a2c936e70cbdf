"""The layers of an MMDiT; attribute names are the official checkpoint keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cuts a latent into patches and projects each to one token, row by row (`x_embedder`)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        # Laid out by tokens, as the text is: torch compiles wrong gradients of blocks for other layouts, also for CPUs.
        return self.proj(latent).flatten(2).transpose(1, 2).contiguous()  # b l d


class TimestepEmbedder(nn.Module):
    """Sinusoid of the timestep, then an MLP (`t_embedder`)."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, timestep: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.mlp(timestep_sinusoid(timestep, self.frequency_size).to(next(self.mlp.parameters()).dtype))


class VectorEmbedder(nn.Module):
    """MLP over the pooled text vector (`y_embedder`)."""

    def __init__(self, pooled_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(pooled_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, pooled: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        return self.mlp(pooled)


class QKV(NamedTuple):
    """Queries, keys and values, each [b, heads, l, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


Meet = Callable[[QKV], Tensor]  # attention itself: queries, keys and values of a stream -> [b, heads, l, head_dim]


class RMSNorm(nn.RMSNorm):
    """The norm of queries and keys, with its weight in their dtype.

    Under autocast the weight of a Linear is cast to 16 bits, and so is this one. Torch's own norm would keep it in
    float32, warn, and compute by several operations what the model in 16 bits computes by one.
    """

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """The projections around attention of one stream; attention itself is the block's `attend` or `attend2`.

    `proj` is absent where the stream ends with this attention (context stream of the last block).
    """

    def __init__(self, hidden_size: int, head_dim: int, *, qk_norm: bool, pre_only: bool = False) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.ln_q = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.pre_only = pre_only
        if not pre_only:
            self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "b l d"], meet: Meet) -> Float[Tensor, "b l d"] | None:
        """What attention adds to the stream before its gate; None where the stream ends.

        Args:
            x: the normalised, modulated tokens of the stream.
            meet: computes attention; in joint attention the other stream takes part inside it.
        """
        z = meet(self.project_in(x))
        return None if self.pre_only else self.project_out(z)

    def project_in(self, x: Float[Tensor, "b l d"]) -> QKV:
        """Queries, keys and values of the tokens, split into heads and normalised."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)  # b l heads head_dim
        return QKV(self.ln_q(q).transpose(1, 2), self.ln_k(k).transpose(1, 2), v.transpose(1, 2))

    def project_out(self, z: Float[Tensor, "b n l d"]) -> Float[Tensor, "b l h"]:
        """The heads' outputs, concatenated and projected back to the stream's width."""
        return self.proj(z.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linears around a tanh-approximated GELU."""

    def __init__(self, hidden_size: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_dim, hidden_size)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self.fc2(self.act(self.fc1(x)))


class Modulation(NamedTuple):
    """Shift, scale and gate of one sublayer, which adaLN computes from the conditioning vector; each [b, d]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulate(x: Float[Tensor, "b l d"], m: Modulation) -> Float[Tensor, "b l d"]:
    """x (1 + scale) + shift, the same for all tokens (DiT, arXiv 2212.09748, section 3.2)."""
    return x * (1 + m.scale.unsqueeze(1)) + m.shift.unsqueeze(1)


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    """The only LayerNorm of the model: no affine, eps 1e-6."""
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class FinalLayer(nn.Module):
    """Modulated norm and the projection from tokens to patches (`final_layer`)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b l p"]:
        return self.linear(modulate(self.norm_final(x), Modulation(*self.adaLN_modulation(c).chunk(2, dim=-1))))


def timestep_sinusoid(timestep: Float[Tensor, " b"], size: int = 256) -> Float[Tensor, "b {size}"]:
    """[cos | sin] of timestep * exp(-ln(10000) i / (size/2)), in float32 at every model dtype.

    Source: Stability-AI/sd3.5 `mmditx.TimestepEmbedder`. The references compute it in float32, and at t near 1000
    another precision would give other numbers.
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def centre_of_table(table: Float[Tensor, "1 p d"], side: int, rows: int, columns: int) -> Float[Tensor, "1 l d"]:
    """The middle `rows` x `columns` positions of a table of `side` x `side`."""
    top, left = (side - rows) // 2, (side - columns) // 2
    return table.unflatten(1, (side, side))[:, top : top + rows, left : left + columns].flatten(1, 2)


def sincos_pos_embed(hidden_size: int, side: int) -> Float[Tensor, "1 l d"]:
    """The position table that training starts from, [1, side**2, hidden_size]; checkpoints bring their own.

    The first half of the channels encodes the column, the second half the row, each as [sin | cos] with
    frequencies 10000**(-i / (hidden_size/4)). Source: Stability-AI/sd3.5 `mmditx.get_2d_sincos_pos_embed`.
    """
    if torch.get_default_device().type == "meta":  # a shape alone; torch's arange would load its compiler for it
        return torch.empty(1, side**2, hidden_size)
    index = torch.arange(side, dtype=torch.float64)
    omega = 10000 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    wave = torch.cat([(index[:, None] * omega).sin(), (index[:, None] * omega).cos()], dim=-1)  # side d/2
    column, row = wave[None, :, :].expand(side, -1, -1), wave[:, None, :].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side**2, hidden_size).float()
