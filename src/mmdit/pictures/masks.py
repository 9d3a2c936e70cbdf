"""Operations on masks [b, h, w] in [0, 1], where 1 is what is drawn anew; equal to ComfyUI's nodes of those names."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmdit.pictures.checks import check_mask, check_picture
from mmdit.pictures.resize import Size
from mmdit.utils import number, whole
from samplers import pick

Operation = Literal["multiply", "add", "subtract", "and", "or", "xor"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
Channel = Literal["red", "green", "blue", "alpha"]
CHANNELS: tuple[Channel, ...] = get_args(Channel)


def solid_mask(value: float, *, height: int, width: int) -> Float[Tensor, "1 h w"]:
    """A mask that has one value everywhere (SolidMask)."""
    return torch.full((1, whole("height", height, 1), whole("width", width, 1)), number("value", value, 0, 1))


def invert_mask(mask: Tensor) -> Float[Tensor, "b h w"]:
    """1 - mask (InvertMask)."""
    check_mask("mask", mask)
    return 1 - mask


def crop_mask(mask: Tensor, *, x: int, y: int, width: int, height: int) -> Float[Tensor, "b h w"]:
    """The part of a mask from column x and row y on, as far as there is one (CropMask).

    Raises:
        ValueError: nothing is left.
    """
    check_mask("mask", mask)
    top, left = whole("y", y, 0), whole("x", x, 0)
    found = mask[:, top : top + whole("height", height, 1), left : left + whole("width", width, 1)]
    if 0 in found.shape:
        raise ValueError(f"x {x}, y {y} lie outside of the mask of {mask.shape[2]} x {mask.shape[1]} pixels")
    return found


def threshold_mask(mask: Tensor, value: float = 0.5) -> Float[Tensor, "b h w"]:
    """1 where the mask is above a value, else 0 (ThresholdMask)."""
    check_mask("mask", mask)
    return (mask > number("value", value)).to(mask.dtype)


def binary_mask(mask: Tensor) -> Float[Tensor, "b h w"]:
    """1 where the mask is at least 0.5, else 0 (diffusers' VaeImageProcessor with do_binarize)."""
    check_mask("mask", mask)
    return (mask >= 0.5).to(mask.dtype)


def mask_to_picture(mask: Tensor) -> Float[Tensor, "b h w 3"]:
    """The mask as three equal channels (MaskToImage)."""
    check_mask("mask", mask)
    return mask.unsqueeze(-1).expand(-1, -1, -1, 3)


def picture_to_mask(picture: Tensor, channel: Channel = "red") -> Float[Tensor, "b h w"]:
    """One channel of a picture as it is (ImageToMask).

    Raises:
        ValueError: the picture has no such channel.
    """
    check_picture("picture", picture)
    place = pick({name: i for i, name in enumerate(CHANNELS)}, channel, "channel")
    if place >= picture.shape[3]:
        raise ValueError(f"the picture has {picture.shape[3]} channels, and so no channel {channel!r}")
    return picture[..., place]


def color_to_mask(picture: Tensor, color: int) -> Float[Tensor, "b h w"]:
    """1 where a picture has this color, else 0 (ImageColorToMask).

    Args:
        picture: [b, h, w, c] with at least three channels, which are rounded to 8 bits.
        color: 0xRRGGBB.
    """
    check_picture("picture", picture)
    if picture.shape[3] < 3:
        raise ValueError(f"the picture has {picture.shape[3]} channel, expected red, green and blue")
    wanted = torch.tensor([(whole("color", color, 0) >> shift) & 255 for shift in (16, 8, 0)], device=picture.device)
    if color > 0xFFFFFF:
        raise ValueError(f"color must be at most 0xFFFFFF, got {color:#x}")
    levels = (picture[..., :3].clamp(0, 1) * 255).round().long()
    return (levels == wanted).all(-1).to(picture.dtype)


def grow_mask(mask: Tensor, expand: int, *, tapered_corners: bool = True) -> Float[Tensor, "b h w"]:
    """Grow a mask by a number of pixels, or shrink it if the number is negative (GrowMask).

    Args:
        mask: [b, h, w]; grays are kept: each step takes the largest (or smallest) value of the neighbourhood.
        expand: steps of one pixel.
        tapered_corners: whether the neighbourhood is a plus of 5 pixels; else it is a square of 9.
    """
    check_mask("mask", mask)
    steps, sign = abs(_integer("expand", expand)), 1 if expand >= 0 else -1
    grown = mask.unsqueeze(1) * sign
    for _ in range(steps):
        grown = _dilated(grown, tapered_corners)
    return grown.squeeze(1) * sign


def _dilated(x: Float[Tensor, "b 1 h w"], plus: bool) -> Float[Tensor, "b 1 h w"]:
    if not plus:
        return F.max_pool2d(x, 3, stride=1, padding=1)
    rows = F.max_pool2d(x, (3, 1), stride=1, padding=(1, 0))
    return torch.maximum(rows, F.max_pool2d(x, (1, 3), stride=1, padding=(0, 1)))


def feather_mask(
    mask: Tensor, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> Float[Tensor, "b h w"]:
    """Let a mask fall off linearly towards its edges (FeatherMask).

    ComfyUI counts from the far end by -0, -1, -2, ...: at the right, column 0 gets the factor 1 / right, the last
    column 2 / right, the one before it 3 / right, and so on; the same is true of the bottom.

    Args:
        mask: [b, h, w].
        left, top, right, bottom: widths of the fall-off in pixels; at most the side counts.
    """
    check_mask("mask", mask)
    height, width = mask.shape[1:]
    columns = _fall_off(width, left, right, "left", "right").to(mask)
    rows = _fall_off(height, top, bottom, "top", "bottom").to(mask)
    return mask * columns * rows.unsqueeze(1)


def _fall_off(side: int, first: int, last: int, *names: str) -> Float[Tensor, " side"]:
    """The fall-off factors of the rows or of the columns."""
    first, last = (min(whole(name, value, 0), side) for name, value in zip(names, (first, last), strict=True))
    factors = torch.ones(side)
    for i in range(first):
        factors[i] *= (i + 1) / first
    for i in range(last):
        factors[-i] *= (i + 1) / last
    return factors


def combine_masks(
    destination: Tensor, source: Tensor, *, x: int = 0, y: int = 0, operation: Operation = "multiply"
) -> Float[Tensor, "b h w"]:
    """Combine two masks, the second laid on the first at column x and row y (MaskComposite).

    Args:
        destination, source: [b, h, w]; parts of the source outside of the destination are cropped.
        x, y: column and row of the source's top left pixel in the destination.
        operation: "multiply", "add", "subtract", clamped to [0, 1]; "and", "or", "xor" of the rounded masks.
    """
    check_mask("destination", destination)
    check_mask("source", source)
    pick(dict.fromkeys(OPERATIONS), operation, "operation")
    left, top = whole("x", x, 0), whole("y", y, 0)
    area = (slice(None), slice(top, top + source.shape[1]), slice(left, left + source.shape[2]))
    combined = destination.clone()
    below = combined[area]
    combined[area] = _combined(below, source[:, : below.shape[1], : below.shape[2]].to(below), operation)
    return combined.clamp(0, 1)


def _combined(a: Tensor, b: Tensor, operation: Operation) -> Tensor:
    match operation:
        case "multiply":
            return a * b
        case "add":
            return a + b
        case "subtract":
            return a - b
    a, b = a.round().bool(), b.round().bool()
    return (a & b if operation == "and" else a | b if operation == "or" else a ^ b).float()


def mask_to_size(
    mask: Tensor, size: Size | tuple[int, int], filter: Literal["bilinear", "nearest"] = "bilinear"
) -> Float[Tensor, "b 1 h w"]:
    """A mask at the size of latents, or of a picture, with one channel.

    ComfyUI takes "bilinear", without antialiasing and without rounding, diffusers "nearest" of a binary mask.

    Args:
        mask: [b, h, w].
        size: height and width.
        filter: "bilinear" or "nearest".
    """
    check_mask("mask", mask)
    pick(dict.fromkeys(("bilinear", "nearest")), filter, "filter")
    height, width = size
    return F.interpolate(mask.unsqueeze(1), size=(whole("height", height, 1), whole("width", width, 1)), mode=filter)


def _integer(name: str, value: int) -> int:
    """A whole number that may be negative."""
    return whole(name, value, 0) if not isinstance(value, int) or value >= 0 else -whole(name, -value, 1)
