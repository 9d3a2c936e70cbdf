"""Masks, [b, h, w] in [0, 1]: ComfyUI's `comfy_extras/nodes_mask.py`."""

from __future__ import annotations

from torch import Tensor

from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import MAX_SIDE, boolean, choice, decimal, integer, node, side, wire
from mmdit.pictures import images as pictures
from mmdit.pictures.masks import OPERATIONS, Channel, Operation

_MASK = wire("mask", "MASK")
_PLACE = (integer("x", 0, 0, MAX_SIDE), integer("y", 0, 0, MAX_SIDE))
_SIZE = (side("width", 512, 1), side("height", 512, 1))


@node("SolidMask", [decimal("value", 1.0, 0.0, 1.0), *_SIZE], ["MASK"])
def solid_mask(context: Context, value: float, width: int, height: int) -> Tensor:
    """Make a mask of one value."""
    context.limits.check_pictures(1, height, width)
    return pictures.solid_mask(value, height=height, width=width)


@node("InvertMask", [_MASK], ["MASK"])
def invert_mask(mask: Tensor) -> Tensor:
    """Invert a mask: 1 - mask."""
    return pictures.invert_mask(mask)


@node("CropMask", [_MASK, *_PLACE, *_SIZE], ["MASK"])
def crop_mask(mask: Tensor, x: int, y: int, width: int, height: int) -> Tensor:
    """Crop a mask."""
    return pictures.crop_mask(mask, x=x, y=y, width=width, height=height)


@node("MaskToImage", [_MASK], ["IMAGE"])
def mask_to_image(mask: Tensor) -> Tensor:
    """Convert a mask to a gray picture."""
    return pictures.mask_to_picture(mask)


@node("ImageToMask", [wire("image", "IMAGE"), choice("channel", ("red", "green", "blue", "alpha"))], ["MASK"])
def image_to_mask(image: Tensor, channel: Channel) -> Tensor:
    """Take a channel of a picture as a mask, unchanged."""
    return pictures.picture_to_mask(image, channel)


@node("ImageColorToMask", [wire("image", "IMAGE"), integer("color", 0, 0, 0xFFFFFF)], ["MASK"])
def image_color_to_mask(image: Tensor, color: int) -> Tensor:
    """Make a mask that is 1 where a picture has this color."""
    return pictures.color_to_mask(image, color)


@node("GrowMask", [_MASK, integer("expand", 0, -MAX_SIDE, MAX_SIDE), boolean("tapered_corners", True)], ["MASK"])
def grow_mask(context: Context, mask: Tensor, expand: int, tapered_corners: bool) -> Tensor:
    """Grow a mask by `expand` pixels; a negative number shrinks it."""
    context.limits.check("steps", abs(expand))
    return pictures.grow_mask(mask, expand, tapered_corners=tapered_corners)


@node("FeatherMask", [_MASK, *(integer(name, 0, 0, MAX_SIDE) for name in ("left", "top", "right", "bottom"))], ["MASK"])
def feather_mask(mask: Tensor, left: int, top: int, right: int, bottom: int) -> Tensor:
    """Fade a mask out towards its edges."""
    return pictures.feather_mask(mask, left=left, top=top, right=right, bottom=bottom)


@node(
    "MaskComposite",
    [wire("destination", "MASK"), wire("source", "MASK"), *_PLACE, choice("operation", OPERATIONS)],
    ["MASK"],
)
def mask_composite(destination: Tensor, source: Tensor, x: int, y: int, operation: Operation) -> Tensor:
    """Combine a mask with another at a position."""
    return pictures.combine_masks(destination, source, x=x, y=y, operation=operation)


@node("ThresholdMask", [_MASK, decimal("value", 0.5, 0.0, 1.0)], ["MASK"])
def threshold_mask(mask: Tensor, value: float) -> Tensor:
    """Make a mask that is 1 where the given mask is above a value."""
    return pictures.threshold_mask(mask, value)
