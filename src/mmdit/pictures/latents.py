"""Operations on latents [b, c, h, w], equal to the ComfyUI nodes that are named; sizes and positions are in cells.

ComfyUI holds latents at the scale of the VAE, u = z / 1.5305 + 0.0609 of model-space latents z; see `to_vae_scale`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmdit.pictures.checks import check_latent
from mmdit.pictures.composite import laid_on, repeated
from mmdit.pictures.resize import Filter, resize_latent
from mmdit.utils import number, whole
from samplers import pick

SCALE, SHIFT = 1.5305, 0.0609  # the constants of the official VAE
Rotation = Literal["none", "90 degrees", "180 degrees", "270 degrees"]
ROTATIONS: tuple[Rotation, ...] = get_args(Rotation)
Axis = Literal["x-axis: vertically", "y-axis: horizontally"]
AXES: tuple[Axis, ...] = get_args(Axis)
_LEAST = 8  # minimum side of a LatentCrop result, in cells


def to_vae_scale(latent: Tensor, scale: float = SCALE, shift: float = SHIFT) -> Float[Tensor, "b c h w"]:
    """Latents from model space to the scale of the VAE, as they travel in ComfyUI; `vae.from_model` is the same."""
    check_latent("latent", latent)
    return latent / scale + shift


def from_vae_scale(latent: Tensor, scale: float = SCALE, shift: float = SHIFT) -> Float[Tensor, "b c h w"]:
    """Latents from the scale of the VAE to model space; `vae.to_model` is the same."""
    check_latent("latent", latent)
    return (latent - shift) * scale


def composite_latents(
    destination: Tensor,
    source: Tensor,
    *,
    x: int = 0,
    y: int = 0,
    mask: Tensor | None = None,
    resize_source: bool = False,
) -> Float[Tensor, "b c h w"]:
    """Lay latents on others: mask * source + (1 - mask) * destination (LatentCompositeMasked).

    Args:
        destination, source: [b, c, h, w]; a shorter batch of sources is repeated.
        x, y: the cell of the source's first cell; what is outside of the destination is left out.
        mask: [b, h, w], resized (bilinear) to the source; None is 1 everywhere.
        resize_source: whether the source is resized (bilinear) to the destination first.
    """
    check_latent("destination", destination)
    check_latent("source", source)
    return laid_on(destination, source, whole("x", x, 0), whole("y", y, 0), mask, resize_source)


def paste_latent(
    destination: Tensor, source: Tensor, *, x: int = 0, y: int = 0, feather: int = 0
) -> Float[Tensor, "b c h w"]:
    """Paste latents onto others, with edges that fade in linearly (LatentComposite).

    Args:
        destination, source: [b, c, h, w].
        x, y: the cell of the source's first cell; what is outside of the destination is left out.
        feather: width in cells of the ramp at each edge that does not touch the destination's border.
    """
    check_latent("destination", destination)
    check_latent("source", source)
    left, top, feather = whole("x", x, 0), whole("y", y, 0), whole("feather", feather, 0)
    found = destination.clone()
    area = (..., slice(top, top + source.shape[2]), slice(left, left + source.shape[3]))
    below = found[area]
    rows, columns = below.shape[2:]
    above = source[..., :rows, :columns].to(found)
    down = _ramp(rows, feather, top != 0, top + rows < found.shape[2]).to(found)
    across = _ramp(columns, feather, left != 0, left + columns < found.shape[3]).to(found)
    weight = down[:, None] * across
    found[area] = above * weight + below * (1 - weight)
    return found


def _ramp(side: int, feather: int, first: bool, last: bool) -> Float[Tensor, " side"]:
    """Weights along a side; they rise from the first edge, the last edge, or both."""
    weights = torch.ones(side)
    for i in range(min(feather, side)):
        if first:
            weights[i] *= (i + 1) / feather
        if last:
            weights[side - 1 - i] *= (i + 1) / feather
    return weights


def blend_latents(first: Tensor, second: Tensor, factor: float = 0.5) -> Float[Tensor, "b c h w"]:
    """first * factor + second * (1 - factor) (LatentBlend); another size becomes the first's (bicubic, center)."""
    check_latent("first", first)
    check_latent("second", second)
    factor = number("factor", factor, 0, 1)
    if first.shape != second.shape:
        second = _to_size(second, first, "bicubic")
    return first * factor + second.to(first) * (1 - factor)


def add_latents(first: Tensor, second: Tensor) -> Float[Tensor, "b c h w"]:
    """first + second (LatentAdd); another size is brought to the first's (bilinear, center)."""
    return first + _like(first, second)


def subtract_latents(first: Tensor, second: Tensor) -> Float[Tensor, "b c h w"]:
    """first - second (LatentSubtract); another size is brought to the first's (bilinear, center)."""
    return first - _like(first, second)


def multiply_latent(latent: Tensor, factor: float) -> Float[Tensor, "b c h w"]:
    """latent * factor (LatentMultiply)."""
    check_latent("latent", latent)
    return latent * number("factor", factor)


def interpolate_latents(first: Tensor, second: Tensor, ratio: float = 1.0) -> Float[Tensor, "b c h w"]:
    """Interpolate the directions of cells and their norms, both linearly (LatentInterpolate).

    Args:
        first, second: [b, c, h, w]; another size is brought to the first's (bilinear, center).
        ratio: the weight of `first`, 0 to 1.
    """
    second, ratio = _like(first, second), number("ratio", ratio)
    norm_1, norm_2 = (one.norm(dim=1, keepdim=True) for one in (first, second))
    mixed = _unit(first, norm_1) * ratio + _unit(second, norm_2) * (1 - ratio)
    return _unit(mixed, mixed.norm(dim=1, keepdim=True)) * (norm_1 * ratio + norm_2 * (1 - ratio))


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm == 0, 0, x / norm)


def batch_latents(first: Tensor, second: Tensor) -> Float[Tensor, "b c h w"]:
    """Two batches of latents as one (LatentBatch); another size is brought to the first's (bilinear, center)."""
    check_latent("first", first)
    check_latent("second", second)
    return torch.cat([first, (_to_size(second, first) if first.shape[1:] != second.shape[1:] else second).to(first)])


def rotate_latent(latent: Tensor, rotation: Rotation) -> Float[Tensor, "b c h w"]:
    """Rotate clockwise (LatentRotate).

    Args:
        latent: [b, c, h, w].
        rotation: "none", "90 degrees", "180 degrees" or "270 degrees".
    """
    check_latent("latent", latent)
    turns = pick({name: i for i, name in enumerate(ROTATIONS)}, rotation, "rotation")
    return torch.rot90(latent, k=turns, dims=(3, 2))


def flip_latent(latent: Tensor, axis: Axis) -> Float[Tensor, "b c h w"]:
    """Mirror latents (LatentFlip): "x-axis: vertically" reverses the rows, "y-axis: horizontally" the columns."""
    check_latent("latent", latent)
    return torch.flip(latent, [pick(dict(zip(AXES, (2, 3), strict=True)), axis, "axis")])


def crop_latent(latent: Tensor, *, x: int, y: int, width: int, height: int) -> Float[Tensor, "b c h w"]:
    """The part of latents from cell x, y on, as far as there is one (LatentCrop).

    Args:
        latent: [b, c, h, w], with sides of at least 8 cells.
        x, y: the first cell, at most 8 cells from the end.
        width, height: in cells.
    """
    check_latent("latent", latent)
    if min(latent.shape[2:]) < _LEAST:
        raise ValueError(f"latent has {list(latent.shape[2:])} cells; cropping needs at least {_LEAST} along each side")
    left = min(whole("x", x, 0), latent.shape[3] - _LEAST)
    top = min(whole("y", y, 0), latent.shape[2] - _LEAST)
    return latent[..., top : top + whole("height", height, 1), left : left + whole("width", width, 1)]


def _like(first: Tensor, second: Tensor) -> Tensor:
    """Resize and repeat the second latents to the shape of the first (ComfyUI's reshape_latent_to)."""
    check_latent("first", first)
    check_latent("second", second)
    second = second if first.shape[1:] == second.shape[1:] else _to_size(second, first)
    return repeated(second.to(first), len(first))


def _to_size(latent: Tensor, like: Tensor, filter: Filter = "bilinear") -> Tensor:
    if latent.shape[1] != like.shape[1]:
        raise ValueError(f"latents have {like.shape[1]} and {latent.shape[1]} channels; give latents of one model")
    return resize_latent(latent, height=like.shape[2], width=like.shape[3], filter=filter, crop="center")
