"""Resizing of pictures, masks and latents, equal to ComfyUI's `comfy.utils.common_upscale` and its nodes.

Sizes are in pixels for pictures [b, h, w, c] and in cells for latents [b, c, h, w]. Nothing is antialiased except by
"area" and "lanczos".
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmdit.pictures.checks import check_latent, check_picture
from mmdit.utils import number, whole
from samplers import pick

Filter = Literal["nearest-exact", "bilinear", "area", "bicubic", "bislerp", "lanczos"]
Crop = Literal["disabled", "center"]
FILTERS: tuple[Filter, ...] = get_args(Filter)
CROPS: tuple[Crop, ...] = get_args(Crop)
PICTURE_FILTERS = tuple(one for one in FILTERS if one != "bislerp")
LATENT_FILTERS = tuple(one for one in FILTERS if one != "lanczos")
_PARALLEL = 1e-5  # how near to 1 or -1 the cosine of two directions counts as the same or the opposite direction


class Size(NamedTuple):
    """Height and width."""

    height: int
    width: int


def resize(
    picture: Tensor, *, height: int, width: int, filter: Filter = "lanczos", crop: Crop = "disabled"
) -> Float[Tensor, "b h w c"]:
    """Resize pictures (ComfyUI's ImageScale).

    Args:
        picture: [b, h, w, c], in [0, 1].
        height, width: in pixels.
        filter: "nearest-exact", "bilinear", "bicubic" and "area" are those of `torch.nn.functional.interpolate`;
            "lanczos" is Pillow's, of pictures truncated to 8 bits.
        crop: "center" first cuts the picture to the new aspect ratio; "disabled" stretches it.

    Raises:
        ValueError: the picture or a size is invalid, or the filter or the crop is unknown.
    """
    check_picture("picture", picture)
    pick(dict.fromkeys(PICTURE_FILTERS), filter, "filter")
    return _resized(picture.movedim(-1, 1), _size(height, width), filter, crop).movedim(1, -1)


def resize_nearest(picture: Tensor, *, height: int, width: int) -> Float[Tensor, "b h w c"]:
    """Resize pictures by nearest neighbour, rounding positions down (diffusers, for arrays and tensors)."""
    check_picture("picture", picture)
    return F.interpolate(picture.movedim(-1, 1), size=tuple(_size(height, width))).movedim(1, -1)


def resize_latent(
    latent: Tensor, *, height: int, width: int, filter: Filter = "nearest-exact", crop: Crop = "disabled"
) -> Float[Tensor, "b c h w"]:
    """Resize latents (ComfyUI's LatentUpscale, with sizes in cells).

    Args:
        latent: [b, c, h, w]; ComfyUI resizes latents at the scale of the VAE, see `to_vae_scale`, which changes the
            result of "bislerp".
        height, width: in cells.
        filter: "nearest-exact", "bilinear", "area", "bicubic" or "bislerp".
        crop: see `resize`.

    Raises:
        ValueError: the latents or a size are invalid, or the filter or the crop is unknown.
    """
    check_latent("latent", latent)
    pick(dict.fromkeys(LATENT_FILTERS), filter, "filter")
    return _resized(latent, _size(height, width), filter, crop)


def size_by(height: int, width: int, scale: float) -> Size:
    """The sides times `scale`, rounded half to even (ComfyUI's LatentUpscaleBy and ImageScaleBy), at least 1."""
    scale = number("scale", scale, 0)
    return Size(*(max(1, round(whole(name, side, 1) * scale)) for name, side in (("height", height), ("width", width))))


def size_or_aspect(size: tuple[int, int], height: int, width: int, least: int = 1) -> Size:
    """The requested size; one side of 0 keeps the aspect ratio, and two sides of 0 keep the present size.

    Args:
        size: the present height and width, in the unit of `height` and `width`.
        height, width: the requested sides; 0 leaves a side open.
        least: the smallest side; ComfyUI's LatentUpscale has 64 pixels, its ImageScale 1.

    Raises:
        ValueError: a side is negative.
    """
    height, width = whole("height", height, 0), whole("width", width, 0)
    if not height and not width:
        return Size(*size)
    if not width:
        height = max(least, height)
        return Size(height, max(least, round(size[1] * height / size[0])))
    if not height:
        width = max(least, width)
        return Size(max(least, round(size[0] * width / size[1])), width)
    return Size(max(least, height), max(least, width))


def size_of_megapixels(height: int, width: int, megapixels: float) -> Size:
    """The size with about `megapixels` x 1024 x 1024 pixels (ComfyUI's ImageScaleToTotalPixels)."""
    total = int(number("megapixels", megapixels, 0) * 1024 * 1024)
    scale = math.sqrt(total / (width * height))
    return Size(max(1, round(height * scale)), max(1, round(width * scale)))


def center_crop(picture: Tensor, multiple: int = 8) -> Float[Tensor, "b h w c"]:
    """Cut pictures [b, h, w, c] around their center so that both sides are multiples (ComfyUI's VAEEncode).

    Raises:
        ValueError: a side is smaller than `multiple`.
    """
    check_picture("picture", picture)
    (top, height), (left, width) = (cut_to_multiple(side, multiple) for side in picture.shape[1:3])
    return picture[:, top : top + height, left : left + width]


def cut_to_multiple(side: int, multiple: int = 8) -> tuple[int, int]:
    """The offset and length of the centered part of a side that is a multiple.

    Raises:
        ValueError: nothing is left.
    """
    length = side // whole("multiple", multiple, 1) * multiple
    if not length:
        raise ValueError(f"a side of {side} pixels is smaller than {multiple}; give a larger picture")
    return (side % multiple) // 2, length


def _size(height: int, width: int) -> Size:
    return Size(whole("height", height, 1), whole("width", width, 1))


def _resized(x: Float[Tensor, "b c h w"], size: Size, filter: Filter, crop: Crop) -> Float[Tensor, "b c h2 w2"]:
    pick(dict.fromkeys(CROPS), crop, "crop")
    if crop == "center":
        x = cut_to_aspect(x, size)
    match filter:
        case "lanczos":
            return _lanczos(x, size)
        case "bislerp":
            return bislerp(x, size)
        case _:
            return F.interpolate(x, size=tuple(size), mode=filter)


def cut_to_aspect(x: Float[Tensor, "b c h w"], size: Size) -> Float[Tensor, "b c h2 w2"]:
    """Crop both sides equally to about the aspect ratio of a size."""
    height, width = x.shape[2:]
    old, new = width / height, size.width / size.height
    left = round((width - width * (new / old)) / 2) if old > new else 0
    top = round((height - height * (old / new)) / 2) if old < new else 0
    if 2 * left >= width or 2 * top >= height:
        raise ValueError(
            f"nothing is left of {height} x {width} when it is cut to the aspect ratio of {size.height} x {size.width}"
        )
    return x[..., top : height - top, left : width - left]


def _lanczos(x: Float[Tensor, "b c h w"], size: Size) -> Float[Tensor, "b c h2 w2"]:
    """Pillow's LANCZOS of each picture, by way of 8 bits, truncated."""
    if bad := int((~torch.isfinite(x)).sum()):
        raise ValueError(f"{bad} of {x.numel()} values of the picture are not finite; lanczos needs finite ones")
    levels = np.clip(255 * x.movedim(1, -1).float().cpu().numpy(), 0, 255).astype(np.uint8)
    levels = levels[..., 0] if x.shape[1] == 1 else levels
    pictures = [Image.fromarray(one).resize((size.width, size.height), Image.Resampling.LANCZOS) for one in levels]
    small = [np.array(one, dtype=np.float32) / 255 for one in pictures]
    found = torch.from_numpy(np.stack(small)).view(len(x), *size, x.shape[1])
    return found.movedim(-1, 1).to(x.device, x.dtype)


def bislerp(x: Float[Tensor, "b c h w"], size: Size) -> Float[Tensor, "b c h2 w2"]:
    """Interpolate latents along rows, then columns: directions of cells on great circles, their norms linearly.

    ComfyUI's `comfy.utils.bislerp`, in float32: where two directions are the same, the first cell is taken, and where
    they are opposite, the cells are interpolated linearly.
    """
    wide = _slerped(x.float(), size.width)
    return _slerped(wide.transpose(2, 3), size.height).transpose(2, 3).to(x.dtype)


def _slerped(x: Float[Tensor, "b c h w"], width: int) -> Float[Tensor, "b c h w2"]:
    """Interpolate along the last axis."""
    places = torch.arange(x.shape[3], dtype=torch.float32, device=x.device)
    following = (places + 1).clamp(max=x.shape[3] - 1)
    rows = [one.view(1, 1, 1, -1) for one in (places, following)]
    here, there = (F.interpolate(one, size=(1, width), mode="bilinear") for one in rows)
    share = here - here.floor()
    return _slerp(x[..., here.long().flatten()], x[..., there.long().flatten()], share)


def _slerp(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"], share: Tensor) -> Float[Tensor, "b c h w"]:
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    unit_a, unit_b = (torch.where(norm == 0, 0, one / norm) for one, norm in ((a, norm_a), (b, norm_b)))
    cosine = (unit_a * unit_b).sum(1, keepdim=True)
    angle = torch.acos(cosine)
    arc = (torch.sin((1 - share) * angle) * unit_a + torch.sin(share * angle) * unit_b) / torch.sin(angle)
    arc = arc * (norm_a * (1 - share) + norm_b * share)
    linear = a * (1 - share) + b * share
    return torch.where(cosine > 1 - _PARALLEL, a, torch.where(cosine < _PARALLEL - 1, linear, arc))
