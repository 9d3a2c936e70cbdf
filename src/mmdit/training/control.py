"""A ControlNet in training beside the frozen transformer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmdit.models.controlnet import ControlKind, ControlNet, ControlNetConfig
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import residuals_of, spread
from mmdit.pipeline.profiles import Profile

_MLP_WIDTH = {"mlp.fc1.weight": 0, "mlp.fc1.bias": 0, "mlp.fc2.weight": 1}  # of a block: where the hidden layer is


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


def new_net(transformer: MMDiT, depth: int, kind: ControlKind | None, mlp_dim: int | None = None) -> ControlNet:
    """A net of single-stream blocks whose residuals start at 0; the last Linears are zero, all others are random."""
    net = ControlNet(new_config(transformer, depth, kind, mlp_dim))
    start_net(net)
    return net


def new_config(
    transformer: MMDiT, depth: int, kind: ControlKind | None, mlp_dim: int | None = None
) -> ControlNetConfig:
    """The config of a net of single-stream blocks for a transformer; see `ControlNetConfig` for `mlp_dim`."""
    width, pooled_dim = transformer.config.hidden_size, transformer.config.pooled_dim
    return ControlNetConfig(depth, width, pooled_dim, kind=kind, mlp_dim=mlp_dim)


@torch.no_grad()
def grow(given: ControlNet, into: ControlNet) -> None:
    """Give a new net the weights of one with fewer blocks, or with other widths of the hidden layers of its MLPs.

    The blocks of `given` come first. All further ones pass on their input, because their gates are zero, and have the
    residual of its last block. Of wider hidden layers, the units with the largest weights are kept; of narrower ones,
    further units keep their random inputs, and have no effect until they are trained.

    Args:
        given: single-stream blocks.
        into: see `new_net`; of at least as many blocks, and otherwise the same sizes.

    Raises:
        ValueError: a net has joint blocks; `into` has fewer blocks; a net lacks a tensor of the other one; a tensor
            other than those of the MLPs has another shape; or `head_dim` or `zero_pooled` differ. `into` is then
            unchanged.
    """
    for name, net in (("given", given), ("new", into)):
        if net.config.is_joint:
            raise ValueError(
                f"the {name} net has joint blocks (context_dim={net.config.context_dim}); only nets of single-stream "
                "blocks grow"
            )
    old, new = given.config.depth, into.config.depth
    if new < old:
        raise ValueError(f"a net of {old} blocks cannot become one of {new}; give at least as many")
    found: dict[str, Tensor] = dict(given.named_parameters())
    wanted: dict[str, Tensor] = dict(into.named_parameters())
    further = tuple(f"{blocks}.{i}." for blocks in ("transformer_blocks", "controlnet_blocks") for i in range(old, new))
    _check_same(found, {key: tensor for key, tensor in wanted.items() if not key.startswith(further)})
    for name in ("head_dim", "zero_pooled"):
        if (one := getattr(given.config, name)) != (other := getattr(into.config, name)):
            raise ValueError(f"{name} of the given net is {one}, that of the new net {other}: make it with the same")
    for i in range(old):
        _fit_mlp(found, wanted, f"transformer_blocks.{i}.mlp")
    for i in range(old, new):
        for part in ("weight", "bias"):
            rows = wanted[f"transformer_blocks.{i}.adaLN_modulation.1.{part}"]
            rows.unflatten(0, (6, -1))[[2, 5]] = 0
            found[f"controlnet_blocks.{i}.{part}"] = found[f"controlnet_blocks.{old - 1}.{part}"]
    for key, tensor in found.items():
        wanted[key].copy_(tensor)


def _check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a tensor that a net lacks, or has in another shape, up to the width of its MLPs."""
    for key in sorted(found.keys() ^ wanted.keys()):
        one, other = ("given", "new") if key in found else ("new", "given")
        raise ValueError(f"the {one} net has {key}, which the {other} net has not: make them with the same settings")
    for key, tensor in found.items():
        shape, taken = list(tensor.shape), list(wanted[key].shape)
        if (place := _MLP_WIDTH.get(".".join(key.split(".")[2:]))) is not None:
            shape[place] = taken[place]
        if shape != taken:
            raise ValueError(f"{key} of the given net has shape {list(tensor.shape)}, the new net takes {taken}")


def _fit_mlp(found: dict[str, Tensor], wanted: dict[str, Tensor], mlp: str) -> None:
    """Replace the weights of an MLP in `found` by weights whose hidden layer is as wide as that in `wanted`."""
    reads, bias, gives = (f"{mlp}.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight"))
    old, new = len(found[bias]), len(wanted[bias])
    if new < old:
        kept = (found[reads].norm(dim=1) * found[gives].norm(dim=0)).topk(new).indices
        found |= {reads: found[reads][kept], bias: found[bias][kept], gives: found[gives][:, kept]}
    elif new > old:
        none = torch.zeros_like(wanted[gives][:, old:])
        found[reads] = torch.cat([found[reads], wanted[reads][old:]])
        found[bias] = torch.cat([found[bias], wanted[bias][old:]])
        found[gives] = torch.cat([found[gives], none], dim=1)


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
