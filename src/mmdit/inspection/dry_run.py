"""A dry run of a model on the meta device, where tensors have shapes and no values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from encoders import VAE, CLIPText, T5Encoder
from mmdit.inspection.hooks import Handler, Target, hooked
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT


class Sizes(NamedTuple):
    """The sizes of the inputs of models."""

    batch: int = 1
    rows: int = 128  # height of the latent, in cells
    columns: int = 128  # width of the latent, in cells
    text_tokens: int = 333  # number of text tokens that the transformer reads
    clip_tokens: int = 77
    t5_tokens: int = 256


def rehearse(model: nn.Module, targets: Sequence[Target], sizes: Sizes, handle: Handler) -> None:
    """Run a copy of the model on the meta device, in which every target passes once with its shape and dtype.

    Args:
        model: one of our models, whose weights are not used.
        targets: points of this model.
        sizes: sizes of its inputs.
        handle: called for each target that passes, see `hooked`.
    """
    ghost = _ghost(type(model), model.config, _dtype(model))  # type: ignore[arg-type] # our models have a config
    doubles = [target._replace(model=ghost) for target in targets]
    with torch.no_grad(), hooked(ghost, doubles, handle):
        for entry in dict.fromkeys(target.entry for target in targets):
            _call(ghost, entry, sizes)


@lru_cache(maxsize=8)
def _ghost(kind: type[nn.Module], config: object, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return kind(config).to(dtype).eval().requires_grad_(False)


def _dtype(model: nn.Module) -> torch.dtype:
    return model.pos_embed.dtype if isinstance(model, MMDiT) else next(model.parameters()).dtype


def _call(ghost: nn.Module, entry: str, sizes: Sizes) -> None:
    batch, dtype = sizes.batch, _dtype(ghost)
    if isinstance(ghost, MMDiT):
        config = ghost.config
        latent = _empty(batch, config.in_channels, sizes.rows, sizes.columns, dtype=dtype)
        context = _empty(batch, sizes.text_tokens, config.context_dim, dtype=dtype)
        ghost(latent, _empty(batch), context, _empty(batch, config.pooled_dim, dtype=dtype))
    elif isinstance(ghost, ControlNet):
        _call_control(ghost, sizes)
    elif isinstance(ghost, VAE):
        cells = (sizes.rows, sizes.columns)
        pixels = tuple(side * ghost.config.downscale for side in cells)
        shape = (3, *pixels) if entry == "encoder" else (ghost.config.latent_channels, *cells)
        ghost.get_submodule(entry)(_empty(batch, *shape, dtype=dtype))
    else:
        assert isinstance(ghost, CLIPText | T5Encoder)
        length = sizes.clip_tokens if isinstance(ghost, CLIPText) else sizes.t5_tokens
        ghost(_empty(batch, length, dtype=torch.int64))


def _call_control(ghost: ControlNet, sizes: Sizes) -> None:
    config, batch, dtype = ghost.config, sizes.batch, _dtype(ghost)
    cells, patch = (sizes.rows, sizes.columns), config.patch_size
    ghost(
        _empty(batch, config.in_channels, *cells, dtype=dtype),
        _empty(batch),
        _empty(batch, sizes.text_tokens, config.context_dim or config.hidden_size, dtype=dtype),
        _empty(batch, config.pooled_dim, dtype=dtype),
        _empty(batch, config.hint_channels, *cells, dtype=dtype),
        _empty(batch, (sizes.rows // patch) * (sizes.columns // patch), config.hidden_size, dtype=dtype),
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
