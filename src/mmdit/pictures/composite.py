"""Composite, crop, invert, batch and blur pictures; the results equal those of the ComfyUI nodes that are named."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmdit.pictures.checks import check_mask, check_picture
from mmdit.pictures.masks import mask_to_size
from mmdit.pictures.resize import Size, cut_to_multiple, resize
from mmdit.utils import number, whole


def composite(
    destination: Tensor,
    source: Tensor,
    *,
    x: int = 0,
    y: int = 0,
    mask: Tensor | None = None,
    resize_source: bool = False,
) -> Float[Tensor, "b h w c"]:
    """Lay pictures on others: mask * source + (1 - mask) * destination (ImageCompositeMasked).

    Args:
        destination: [b, h, w, c].
        source: [b, h, w, c]; a shorter batch is repeated. A missing alpha channel is 1; an extra one is dropped.
        x, y: column and row of the source's top left pixel; parts outside of the destination are cropped.
        mask: [b, h, w], resized (bilinear) to the source; None is 1 everywhere.
        resize_source: whether the source is resized (bilinear) to the destination first.
    """
    check_picture("destination", destination)
    check_picture("source", source)
    destination, source = _same_channels(destination, source)
    return laid_on(
        destination.movedim(-1, 1), source.movedim(-1, 1), whole("x", x, 0), whole("y", y, 0), mask, resize_source
    ).movedim(1, -1)


def laid_on(
    destination: Float[Tensor, "b c h w"],
    source: Float[Tensor, "b2 c h2 w2"],
    left: int,
    top: int,
    mask: Tensor | None,
    resize_source: bool,
) -> Float[Tensor, "b c h w"]:
    """The common part of `composite` and `composite_latents`; `left` and `top` are in elements of the tensors."""
    if resize_source:
        source = F.interpolate(source, size=destination.shape[2:], mode="bilinear")
    source = repeated(source.to(destination), len(destination))
    found = destination.clone()
    area = (..., slice(top, top + source.shape[2]), slice(left, left + source.shape[3]))
    below = found[area]
    rows, columns = below.shape[2:]
    above = source[..., :rows, :columns]
    if mask is None:
        found[area] = above
        return found
    check_mask("mask", mask)
    weight = mask_to_size(mask.to(destination), Size(*source.shape[2:]))
    weight = repeated(weight, len(source))[..., :rows, :columns]
    found[area] = weight * above + (1 - weight) * below
    return found


def repeated(batch: Tensor, count: int) -> Tensor:
    """Repeat a batch from its start until it has `count` entries, or cut it (ComfyUI's repeat_to_batch_size)."""
    times = -(-count // len(batch))
    return batch.repeat(times, *[1] * (batch.ndim - 1))[:count]


def _same_channels(destination: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """ComfyUI's image_alpha_fix: the destination decides whether there is an alpha channel."""
    more = source.shape[3] - destination.shape[3]
    if more > 0:
        source = source[..., : destination.shape[3]]
    elif more < 0:
        source = F.pad(source, (0, -more), value=1.0)
    return destination, source


def crop(picture: Tensor, *, x: int, y: int, width: int, height: int) -> Float[Tensor, "b h w c"]:
    """Crop pictures from column x and row y on; the result is smaller at the picture's border (ImageCrop)."""
    check_picture("picture", picture)
    left, top = min(whole("x", x, 0), picture.shape[2] - 1), min(whole("y", y, 0), picture.shape[1] - 1)
    return picture[:, top : top + whole("height", height, 1), left : left + whole("width", width, 1)]


def invert(picture: Tensor) -> Float[Tensor, "b h w c"]:
    """1 - picture (ImageInvert)."""
    check_picture("picture", picture)
    return 1 - picture


def batch(first: Tensor, second: Tensor) -> Float[Tensor, "b h w c"]:
    """Concatenate two batches of pictures; the second is resized to the size of the first (ImageBatch)."""
    check_picture("first", first)
    check_picture("second", second)
    if first.shape[3] != second.shape[3]:
        raise ValueError(f"first has {first.shape[3]} channels and second {second.shape[3]}; give pictures of one kind")
    if first.shape[1:3] != second.shape[1:3]:
        second = resize(second, height=first.shape[1], width=first.shape[2], filter="bilinear", crop="center")
    return torch.cat([first, second.to(first)])


def solid(color: int, *, height: int, width: int, count: int = 1) -> Float[Tensor, "b h w 3"]:
    """Pictures of one color, 0xRRGGBB (EmptyImage)."""
    if not 0 <= whole("color", color, 0) <= 0xFFFFFF:
        raise ValueError(f"color must be at most 0xFFFFFF, got {color:#x}")
    channels = torch.tensor([((color >> shift) & 255) / 255 for shift in (16, 8, 0)], dtype=torch.float32)
    shape = (whole("count", count, 1), whole("height", height, 1), whole("width", width, 1), 3)
    return channels.expand(shape).clone()


def blur(picture: Tensor, radius: int = 1, sigma: float = 1.0) -> Float[Tensor, "b h w c"]:
    """Blur pictures by a Gaussian (ComfyUI's ImageBlur).

    Args:
        picture: [b, h, w, c].
        radius: the radius of the kernel of 2 radius + 1 pixels; 0 changes nothing. The kernel's coordinates are evenly
            spaced from -1 to 1.
        sigma: the standard deviation in kernel coordinates, so that the width of the blur grows with the radius.

    Raises:
        ValueError: the radius is not smaller than both sides, as reflection at the borders requires.
    """
    check_picture("picture", picture)
    radius = whole("radius", radius, 0)
    if not radius:
        return picture
    if radius >= min(picture.shape[1:3]):
        raise ValueError(f"radius {radius} must be smaller than both sides of the picture, {list(picture.shape[1:3])}")
    places = torch.linspace(-1, 1, 2 * radius + 1, device=picture.device).square()
    kernel = torch.exp(-(places[:, None] + places) / (2 * number("sigma", sigma, 1e-6) ** 2))
    kernel = (kernel / kernel.sum()).to(picture).expand(picture.shape[3], 1, -1, -1)
    padded = F.pad(picture.movedim(-1, 1), [radius] * 4, mode="reflect")
    return F.conv2d(padded, kernel, groups=picture.shape[3]).movedim(1, -1)


def gray_inside(picture: Tensor, mask: Tensor, grow: int = 6, cell: int = 8) -> tuple[Tensor, Tensor]:
    """Prepare a picture and a mask for inpainting, as ComfyUI's VAEEncodeForInpaint does before it encodes.

    Args:
        picture: [b, h, w, c].
        mask: [b, h, w], resized (bilinear) to the picture.
        grow: number of pixels by which the returned mask is grown; 0 only rounds it. An even number grows it one pixel
            more to the top and the left than to the bottom and the right.
        cell: pixels per side of a latent cell; the picture and the mask are center-cropped to multiples of it.

    Returns:
        Pictures [b, h, w, c] that are gray where the rounded mask is 1, and the mask [b, h, w], of zeros and ones.
    """
    check_picture("picture", picture)
    check_mask("mask", mask)
    (top, height), (left, width) = (cut_to_multiple(side, cell) for side in picture.shape[1:3])
    area = (slice(None), slice(top, top + height), slice(left, left + width))
    whole_mask = mask_to_size(mask.to(picture), Size(*picture.shape[1:3])).squeeze(1)
    picture, hard = picture[area], whole_mask[area].round()
    gray = (picture - 0.5) * (1 - hard).unsqueeze(-1) + 0.5
    return gray, _grown(hard, whole("grow", grow, 0))


def _grown(hard: Float[Tensor, "b h w"], size: int) -> Float[Tensor, "b h w"]:
    """Dilate a binary mask by a square window of `size` pixels per side."""
    if not size:
        return hard
    padding = size // 2  # ceil((size - 1) / 2)
    found = F.max_pool2d(F.pad(hard.unsqueeze(1), [padding] * 4), size, stride=1)
    return found[:, 0, : hard.shape[1], : hard.shape[2]]
