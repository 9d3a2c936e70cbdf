"""A ControlNet in training beside the frozen transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit.models.controlnet import ControlKind, ControlNet, ControlNetConfig
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import residuals_of, spread
from mmdit.pipeline.profiles import Profile


class Controlled(nn.Module):
    """The velocity with a net's residuals; the net is float32, and computes in the transformer's dtype by autocast.

    Args:
        transformer: frozen.
        net: trained.
        profile: that of the drawings. Its rules for positions, text, timestep and the blocks after which residuals are
            added are those of `residuals_of`, which drawings use.
    """

    def __init__(self, transformer: MMDiT, net: ControlNet, profile: Profile) -> None:
        super().__init__()
        self.transformer, self.net = transformer.requires_grad_(False), net
        self.profile, self.places = profile, spread(profile, net, transformer.config.depth)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, hint: Tensor) -> Tensor:
        """The velocity [b, c, h, w]; `hint` holds the latents of hints [b, c, h, w], for the rest see `MMDiT`."""
        model, wide = self.transformer, self.net.pos_embed_input.proj.weight.dtype
        with torch.autocast(latent.device.type, model.pos_embed.dtype, enabled=model.pos_embed.dtype != wide):
            residuals = residuals_of(self.net, model, self.profile, latent, timestep, context, pooled, hint)
        added = [None if j is None else residuals[j].to(latent.dtype) for j in self.places]
        return model(latent, timestep, context, pooled, control=added)


def new_net(transformer: MMDiT, depth: int, kind: ControlKind | None) -> ControlNet:
    """A net of single-stream blocks whose residuals start at 0; the last Linears are zero, all others are random."""
    net = ControlNet(new_config(transformer, depth, kind))
    start_net(net)
    return net


def new_config(transformer: MMDiT, depth: int, kind: ControlKind | None) -> ControlNetConfig:
    """The config of a net of single-stream blocks for a transformer."""
    return ControlNetConfig(depth, transformer.config.hidden_size, transformer.config.pooled_dim, kind=kind)


def start_net(net: ControlNet) -> None:
    """Xavier's Linears, gates of 1, and residuals of 0, so that training starts at the transformer's own output."""
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
        if "adaLN" in name:
            nn.init.normal_(module.weight, std=0.002)
            module.bias.data.view(6, -1)[[2, 5]] = 1.0  # gates: the block acts from the first step
    for project in net.controlnet_blocks:
        nn.init.zeros_(project.get_parameter("weight"))
