"""The joint block: two streams, text and image, that meet in one attention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.models.attention import Attend
from mmdit.models.config import MMDiTConfig
from mmdit.models.layers import QKV, Meet, Mlp, Modulation, SelfAttention, layer_norm, modulate


class StreamBlock(nn.Module):
    """One stream's half of a joint block (`context_block` or `x_block`).

    adaLN gives 6 chunks: shift, scale, gate for attention, then for the MLP; 9 where a second attention follows
    (`attn2`, image stream of MMDiT-X); 2 where the stream ends here (`pre_only`: context stream of the last block).

    `resid_mid` has no parameters: it names the residual stream between attention and MLP, so that a hook can change it.
    """

    def __init__(self, config: MMDiTConfig, *, pre_only: bool = False, dual_attention: bool = False) -> None:
        super().__init__()
        width, qk_norm = config.hidden_size, config.qk_norm == "rms"
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, config.head_dim, qk_norm=qk_norm, pre_only=pre_only)
        if dual_attention:
            self.attn2 = SelfAttention(width, config.head_dim, qk_norm=qk_norm)
        if not pre_only:
            self.resid_mid = nn.Identity()
            self.norm2 = layer_norm(width)
            self.mlp = Mlp(width, config.mlp_dim or 4 * width)
        self.dual_attention = dual_attention
        self.chunks = 2 if pre_only else 9 if dual_attention else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def forward(
        self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"], meet: Meet, meet2: Meet | None = None
    ) -> Float[Tensor, "b l d"] | None:
        """The stream after the block; None where it ends.

        Args:
            x: tokens of the stream.
            c: the conditioning vector: embedded timestep + pooled text.
            meet: the joint attention, in which the other stream takes part.
            meet2: the second attention, of this stream alone.
        """
        m = self.modulations(c)
        attended = self._attended(x, m, meet, meet2)
        if attended is None:
            return None
        x = self.resid_mid(attended)
        del attended
        return x + _gated(m[1], self.mlp(modulate(self.norm2(x), m[1])))

    def _attended(
        self, x: Float[Tensor, "b l d"], m: tuple[Modulation, ...], meet: Meet, meet2: Meet | None
    ) -> Float[Tensor, "b l d"] | None:
        """The stream after its attentions; what it reads and adds is freed before the MLP runs."""
        normed = self.norm1(x)
        reads = [modulate(normed, m[0])]
        if self.dual_attention:
            reads.append(modulate(normed, m[2]))
        del normed  # read in no comprehension, after which Python 3.11 deletes it in a way that torch.compile lacks
        update = self.attn(reads.pop(0), meet)
        if update is None:
            return None
        x = x + _gated(m[0], update)
        del update
        return x + _gated(m[2], self.attn2(reads.pop(), meet2)) if self.dual_attention else x

    def modulations(self, c: Float[Tensor, "b d"]) -> tuple[Modulation, ...]:
        """The modulation of attention, of the MLP and of the second attention, as far as the stream has them."""
        parts = self.adaLN_modulation(c).chunk(self.chunks, dim=-1)
        return tuple(Modulation(*parts[i : i + 3]) for i in range(0, self.chunks, 3))


class JointBlock(nn.Module):
    """Text and image tokens attend to each other; each stream does everything else alone.

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
        """Both streams after the block; the context is None after the last one.

        Each stream is one call of its module. The call of the image stream happens inside that of the text stream,
        where the two meet: both are then at their attention.
        """
        sizes = [context.shape[1], x.shape[1]]
        context_z = context  # the attention's output of the text, once the streams have met

        def meet(context_qkv: QKV) -> Tensor:
            nonlocal x

            def join(x_qkv: QKV) -> Tensor:
                nonlocal context_z
                both = QKV(*(torch.cat(pair, dim=2) for pair in zip(context_qkv, x_qkv, strict=True)))
                context_z, x_z = self.attend(*both).split(sizes, dim=2)
                return x_z

            x = self.x_block(x, c, join, self._attend_alone if self.dual_attention else None)
            return context_z

        context = self.context_block(context, c, meet)
        return context, x

    def _attend_alone(self, image_qkv: QKV) -> Tensor:
        return self.attend2(*image_qkv)


def _gated(m: Modulation, update: Tensor) -> Tensor:
    assert m.gate is not None, "a stream that ends here adds nothing"
    return m.gate.unsqueeze(1) * update
