"""Load, save, resize and combine pictures: ComfyUI's `nodes.py` and `comfy_extras/nodes_images.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import MAX_SIDE, Input, boolean, choice, decimal, integer, node, side, text, wire
from mmdit.comfyui.files import Folders
from mmdit.comfyui.save import save_pictures
from mmdit.pictures import images as pictures
from mmdit.pictures.read import MaskChannel
from mmdit.pictures.resize import CROPS, PICTURE_FILTERS, Crop, Filter, Size

_IMAGE = wire("image", "IMAGE")
_METHOD = choice("upscale_method", ("nearest-exact", "bilinear", "area", "bicubic", "lanczos"))
_NO_MASK = 64  # the side of the mask that LoadImage gives for a picture without transparency
_X, _Y = integer("x", 0, 0, MAX_SIDE), integer("y", 0, 0, MAX_SIDE)
assert set(_METHOD.choices or ()) == set(PICTURE_FILTERS)  # type: ignore[arg-type]


def _is_there(value: Any, folders: Folders) -> str | None:
    """Return what is wrong with the name of a picture, or None."""
    try:
        folders.picture(str(value))
    except (OSError, ValueError) as error:
        return str(error)
    return None


_FILE = Input("image", "COMBO", choices=lambda folders: folders.pictures(), check=_is_there, folder="input")


@node("LoadImage", [_FILE], ["IMAGE", "MASK"])
def load_image(context: Context, image: str) -> tuple[Tensor, Tensor]:
    """Load a picture, and 1 - alpha as its mask; without transparency the mask is 64 x 64 zeros."""
    picture, mask = pictures.load_image(context.folders.picture(image), frames="all")
    return picture, torch.zeros(len(picture), _NO_MASK, _NO_MASK) if mask is None else mask


@node("LoadImageMask", [_FILE, choice("channel", ("alpha", "red", "green", "blue"))], ["MASK"])
def load_image_mask(context: Context, image: str, channel: MaskChannel) -> Tensor:
    """Load one channel of a picture as a mask; for alpha, the mask is 1 - alpha."""
    return pictures.load_mask(context.folders.picture(image), channel=channel, frames="first")


@node("SaveImage", [wire("images", "IMAGE"), text("filename_prefix", "ComfyUI")], is_output=True)
def save_image(context: Context, images: Tensor, filename_prefix: str) -> None:
    """Write pictures to the output folder, with the workflow graph in their metadata."""
    context.images[context.node] = save_pictures(context, images, filename_prefix)


@node("PreviewImage", [wire("images", "IMAGE")], is_output=True)
def preview_image(context: Context, images: Tensor) -> None:
    """Return pictures without writing a file."""
    context.images[context.node] = save_pictures(context, images, None)


@node(
    "ImageScale",
    [_IMAGE, _METHOD, side("width", 512, 0), side("height", 512, 0), choice("crop", CROPS)],
    ["IMAGE"],
)
def image_scale(context: Context, image: Tensor, upscale_method: Filter, width: int, height: int, crop: Crop) -> Tensor:
    """Resize pictures; a width or height of 0 keeps the aspect ratio."""
    if not width and not height:
        return image
    rows, columns = image.shape[1:3]
    return _resized(context, image, pictures.size_or_aspect((rows, columns), height, width), upscale_method, crop)


@node("ImageScaleBy", [_IMAGE, _METHOD, decimal("scale_by", 1.0, 0.01, 8.0)], ["IMAGE"])
def image_scale_by(context: Context, image: Tensor, upscale_method: Filter, scale_by: float) -> Tensor:
    """Resize pictures by a factor."""
    rows, columns = image.shape[1:3]
    return _resized(context, image, pictures.size_by(rows, columns, scale_by), upscale_method, "disabled")


@node("ImageScaleToTotalPixels", [_IMAGE, _METHOD, decimal("megapixels", 1.0, 0.01, 16.0)], ["IMAGE"])
def image_scale_to_total_pixels(context: Context, image: Tensor, upscale_method: Filter, megapixels: float) -> Tensor:
    """Resize pictures to about `megapixels` times 1024 x 1024 pixels."""
    rows, columns = image.shape[1:3]
    size = pictures.size_of_megapixels(rows, columns, megapixels)
    return _resized(context, image, size, upscale_method, "disabled")


def _resized(context: Context, image: Tensor, size: Size, method: Filter, crop: Crop) -> Tensor:
    context.limits.check_pictures(len(image), *size)
    return pictures.resize(image, height=size.height, width=size.width, filter=method, crop=crop)


@node("ImageCrop", [_IMAGE, side("width", 512, 1), side("height", 512, 1), _X, _Y], ["IMAGE"])
def image_crop(image: Tensor, width: int, height: int, x: int, y: int) -> Tensor:
    """Crop pictures."""
    return pictures.crop(image, x=x, y=y, width=width, height=height)


@node("ImageInvert", [_IMAGE], ["IMAGE"])
def image_invert(image: Tensor) -> Tensor:
    """Invert pictures: 1 - image."""
    return pictures.invert(image)


@node("ImageBatch", [wire("image1", "IMAGE"), wire("image2", "IMAGE")], ["IMAGE"])
def image_batch(context: Context, image1: Tensor, image2: Tensor) -> Tensor:
    """Concatenate two batches, at the picture size of the first."""
    context.limits.check_pictures(len(image1) + len(image2), *image1.shape[1:3])
    return pictures.batch(image1, image2)


@node(
    "EmptyImage",
    [
        side("width", 512, 1),
        side("height", 512, 1),
        integer("batch_size", 1, 1, 4096),
        integer("color", 0, 0, 0xFFFFFF),
    ],
    ["IMAGE"],
)
def empty_image(context: Context, width: int, height: int, batch_size: int, color: int) -> Tensor:
    """Make pictures of one color."""
    context.limits.check_pictures(batch_size, height, width)
    return pictures.solid(color, height=height, width=width, count=batch_size)


@node("ImageBlur", [_IMAGE, integer("blur_radius", 1, 1, 31), decimal("sigma", 1.0, 0.1, 10.0)], ["IMAGE"])
def image_blur(image: Tensor, blur_radius: int, sigma: float) -> Tensor:
    """Apply a Gaussian blur."""
    return pictures.blur(image, blur_radius, sigma)


@node(
    "ImagePadForOutpaint",
    [
        _IMAGE,
        *(integer(name, 0, 0, MAX_SIDE) for name in ("left", "top", "right", "bottom")),
        integer("feathering", 40, 0, MAX_SIDE),
    ],
    ["IMAGE", "MASK"],
)
def image_pad_for_outpaint(
    context: Context, image: Tensor, left: int, top: int, right: int, bottom: int, feathering: int
) -> tuple[Tensor, Tensor]:
    """Pad a picture with gray, and return it with the mask of the region to be drawn."""
    rows, columns = image.shape[1:3]
    context.limits.check_pictures(len(image), rows + top + bottom, columns + left + right)
    return pictures.pad_for_outpaint(image, left=left, top=top, right=right, bottom=bottom, feather=feathering)


@node(
    "ImageCompositeMasked",
    [
        wire("destination", "IMAGE"),
        wire("source", "IMAGE"),
        _X,
        _Y,
        boolean("resize_source", False),
        wire("mask", "MASK", optional=True),
    ],
    ["IMAGE"],
)
def image_composite_masked(
    destination: Tensor, source: Tensor, x: int, y: int, resize_source: bool, mask: Tensor | None = None
) -> Tensor:
    """Paste pictures onto others, through a mask."""
    return pictures.composite(destination, source, x=x, y=y, mask=mask, resize_source=resize_source)


@node("GetImageSize", [_IMAGE], ["INT", "INT", "INT"])
def get_image_size(image: Tensor) -> tuple[int, int, int]:
    """Return the width, height and number of pictures."""
    return image.shape[2], image.shape[1], image.shape[0]
