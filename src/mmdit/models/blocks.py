"""The joint block: two streams, text and image, that meet in one attention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.models.config import MMDiTConfig
from mmdit.models.layers import QKV, Attend, Mlp, Modulation, SelfAttention, layer_norm, modulate


class StreamBlock(nn.Module):
    """One stream's half of a joint block (`context_block` or `x_block`).

    adaLN gives 6 chunks: shift, scale, gate for attention, then for the MLP; 9 where a second attention follows
    (`attn2`, image stream of MMDiT-X); 2 where the stream ends here (`pre_only`: context stream of the last block).
    """

    def __init__(self, config: MMDiTConfig, *, pre_only: bool = False, dual_attention: bool = False) -> None:
        super().__init__()
        width, qk_norm = config.hidden_size, config.qk_norm == "rms"
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, config.head_dim, qk_norm=qk_norm, pre_only=pre_only)
        if dual_attention:
            self.attn2 = SelfAttention(width, config.head_dim, qk_norm=qk_norm)
        if not pre_only:
            self.norm2 = layer_norm(width)
            self.mlp = Mlp(width, config.mlp_dim or 4 * width)
        self.chunks = 2 if pre_only else 9 if dual_attention else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def modulations(self, c: Float[Tensor, "b d"]) -> tuple[Modulation, ...]:
        """For attention; for the MLP; for the second attention: as many as the stream has."""
        parts = self.adaLN_modulation(c).chunk(self.chunks, dim=-1)
        return tuple(Modulation(*parts[i : i + 3]) for i in range(0, self.chunks, 3))

    def add_attention(self, x: Tensor, z: Tensor, m: Modulation) -> Tensor:
        """The residual stream after attention."""
        return x + _gated(m, self.attn.project_out(z))

    def add_mlp(self, x: Tensor, m: Modulation) -> Tensor:
        """The residual stream after the MLP."""
        return x + _gated(m, self.mlp(modulate(self.norm2(x), m)))


class JointBlock(nn.Module):
    """Text and image tokens attend to each other; all else is done by each stream alone.

    Source: Esser et al. 2024 (arXiv 2403.03206), figure 2b; Stability-AI/sd3.5 `mmditx.py`. Text tokens come first.
    """

    def __init__(self, config: MMDiTConfig, *, index: int) -> None:
        super().__init__()
        self.ends_context = index == config.depth - 1
        self.dual_attention = index in config.dual_attention_blocks
        self.context_block = StreamBlock(config, pre_only=self.ends_context)
        self.x_block = StreamBlock(config, dual_attention=self.dual_attention)
        self.attend = Attend()
        if self.dual_attention:
            self.attend2 = Attend()

    def forward(
        self, context: Float[Tensor, "b n d"], x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, "b n d"] | None, Float[Tensor, "b l d"]]:
        """Both streams after the block; the context is None after the last one."""
        context_m, x_m = self.context_block.modulations(c), self.x_block.modulations(c)
        x_normed = self.x_block.norm1(x)
        context_qkv = self.context_block.attn.project_in(modulate(self.context_block.norm1(context), context_m[0]))
        x_qkv = self.x_block.attn.project_in(modulate(x_normed, x_m[0]))
        context_z, x_z = self.attend(*_joined(context_qkv, x_qkv)).split([context.shape[1], x.shape[1]], dim=2)

        x = self.x_block.add_attention(x, x_z, x_m[0])
        if self.dual_attention:
            attn2 = self.x_block.attn2
            z = self.attend2(*attn2.project_in(modulate(x_normed, x_m[2])))
            x = x + _gated(x_m[2], attn2.project_out(z))
        x = self.x_block.add_mlp(x, x_m[1])
        if self.ends_context:
            return None, x
        context = self.context_block.add_attention(context, context_z, context_m[0])
        return self.context_block.add_mlp(context, context_m[1]), x


def _joined(context: QKV, x: QKV) -> QKV:
    return QKV(*(torch.cat(pair, dim=2) for pair in zip(context, x, strict=True)))


def _gated(m: Modulation, update: Tensor) -> Tensor:
    assert m.gate is not None, "a stream that ends here adds nothing"
    return m.gate.unsqueeze(1) * update
