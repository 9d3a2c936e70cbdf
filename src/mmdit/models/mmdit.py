"""The MMDiT of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.models.blocks import JointBlock
from mmdit.models.config import MMDiTConfig
from mmdit.models.layers import (
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    VectorEmbedder,
    centre_of_table,
    sincos_pos_embed,
)


class MMDiT(nn.Module):
    """Predicts the velocity of a latent, given a text (Esser et al. 2024, arXiv 2403.03206).

    Parameter names are those of the official files without their prefix. See `MMDiTConfig` for the variants and
    `mmdit.load_mmdit` to read a checkpoint.
    """

    pos_embed: Tensor
    folded = False  # whether scales or means were moved between Linears, which LoRAs for the weights do not know

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = VectorEmbedder(config.pooled_dim, config.hidden_size)
        self.context_embedder = nn.Linear(config.context_dim, config.hidden_size)
        self.register_buffer("pos_embed", sincos_pos_embed(config.hidden_size, config.pos_embed_size))
        self.joint_blocks = nn.ModuleList(JointBlock(config, index=i) for i in range(config.depth))
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size, config.out_channels)

    def forward(
        self,
        latent: Float[Tensor, "b c h w"],
        timestep: Float[Tensor, " b"],
        context: Float[Tensor, "b n k"],
        pooled: Float[Tensor, "b p"],
        *,
        control: Sequence[Tensor | None] | None = None,
        skip_layers: Collection[int] = (),
    ) -> Float[Tensor, "b o h w"]:
        """The velocity (noise minus picture) at each cell of the latent.

        Args:
            latent: latents in model space; height and width are multiples of the patch size and fit the position
                table.
            timestep: 1000 x sigma, one per sample.
            context: text tokens, of width `config.context_dim`.
            pooled: the pooled text vector, of width `config.pooled_dim`.
            control: one residual [b, l, hidden_size] or None per block, added to the image tokens after it.
            skip_layers: numbers of blocks that are left out (skip-layer guidance); their control is still added.

        Raises:
            ValueError: a size, width or block number does not fit the config.
        """
        self.check(latent, context, pooled, control, skip_layers)
        c = self.t_embedder(timestep) + self.y_embedder(pooled)
        x = self.x_embedder(latent) + self.cropped_pos_embed(*latent.shape[2:])
        context = self.context_embedder(context)
        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                context, x = block(context, x, c)
            if control is not None and (residual := control[i]) is not None:
                x = x + residual
        return self.unpatchify(self.final_layer(x, c), *latent.shape[2:])

    def cropped_pos_embed(self, height: int, width: int) -> Float[Tensor, "1 l d"]:
        """The centre of the position table, for a latent of `height` x `width` cells."""
        side, patch = self.config.pos_embed_size, self.config.patch_size
        return centre_of_table(self.pos_embed, side, height // patch, width // patch)

    def unpatchify(self, tokens: Float[Tensor, "b l p"], height: int, width: int) -> Float[Tensor, "b o h w"]:
        """The cells of a latent, from tokens that each hold (row, column, channel) of one patch."""
        patch = self.config.patch_size
        cells = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height // patch, width // patch))
        return torch.einsum("bhwpqc->bchpwq", cells).flatten(4, 5).flatten(2, 3)

    def check(
        self,
        latent: Tensor,
        context: Tensor,
        pooled: Tensor,
        control: Sequence[Tensor | None] | None,
        skip_layers: Collection[int],
    ) -> None:
        """Raise ValueError, with the numbers, for inputs that this model cannot take."""
        config = self.config
        patch, limit = config.patch_size, config.patch_size * config.pos_embed_size
        if any(size % patch or not patch <= size <= limit for size in latent.shape[2:]):
            raise ValueError(
                f"latent is {latent.shape[2]} x {latent.shape[3]} cells; each side must be a multiple of {patch} "
                f"between {patch} and {limit}"
            )
        for name, found, expected in (
            ("latent channels", latent.shape[1], config.in_channels),
            ("context width", context.shape[-1], config.context_dim),
            ("pooled width", pooled.shape[-1], config.pooled_dim),
        ):
            if found != expected:
                raise ValueError(f"{name}: got {found}, this model takes {expected}")
        if control is not None and len(control) != config.depth:
            raise ValueError(f"control has {len(control)} entries; give one Tensor or None per block: {config.depth}")
        if outside := [i for i in skip_layers if not 0 <= i < config.depth]:
            raise ValueError(f"skip_layers {outside} do not exist; this model has blocks 0 to {config.depth - 1}")
