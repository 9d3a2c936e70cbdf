"""Resize Pillow pictures, crop the region around a mask, and paste a drawing back, as diffusers does.

Source: `VaeImageProcessor` of diffusers 0.42.1, with `resample="lanczos"`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps

from mmdit.utils import whole
from samplers import pick

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)


class Box(NamedTuple):
    """A region of a picture: its first column and row, and the column and row after its last."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top


def fit(image: Image.Image, *, height: int, width: int, how: Fit = "crop") -> Image.Image:
    """Resize a picture to exactly this size with Pillow's LANCZOS.

    Args:
        image: a picture of any mode.
        height, width: in pixels.
        how: "stretch" changes the aspect ratio (diffusers' resize_mode "default"); "crop" covers the size and crops the
            excess ("crop"); "pad" fits inside and fills the rest with the border lines of the picture ("fill").

    Raises:
        ValueError: a size is invalid, or `how` is unknown.
    """
    height, width = whole("height", height, 1), whole("width", width, 1)
    match pick(dict(zip(FITS, FITS, strict=True)), how, "fit"):
        case "stretch":
            return image.resize((width, height), Image.Resampling.LANCZOS)
        case "crop":
            return _covering(image, width, height)
        case "pad":
            return _inside(image, width, height)


def crop_region(mask: Image.Image, *, height: int, width: int, pad: int = 0) -> Box:
    """The region around a mask, with the aspect ratio of the drawing (diffusers' `get_crop_region`).

    Args:
        mask: the mask; all pixels that are not black belong to the region.
        height, width: the size of the drawing, in pixels.
        pad: number of pixels by which the region is enlarged on each side, within the picture.

    Raises:
        ValueError: the mask is black.
    """
    rows, columns = (np.flatnonzero((np.asarray(mask.convert("L")) > 0).any(axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError("mask_image is black everywhere: there is nothing to draw anew; white is what is drawn")
    pad = whole("padding_mask_crop", pad, 0)
    left, right = max(int(columns[0]) - pad, 0), min(int(columns[-1]) + 1 + pad, mask.width)
    top, bottom = max(int(rows[0]) - pad, 0), min(int(rows[-1]) + 1 + pad, mask.height)
    aspect = whole("width", width, 1) / whole("height", height, 1)
    if (right - left) / (bottom - top) > aspect:
        top, bottom = _widened(top, bottom, (right - left) / aspect, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * aspect, mask.width)
    return Box(left, top, right, bottom)


def _widened(start: int, stop: int, wanted: float, side: int) -> tuple[int, int]:
    """A span of the wanted length around another, moved inside of the side and cut to it."""
    more = int(wanted - (stop - start))
    start, stop = start - more // 2, stop + more - more // 2
    if stop >= side:
        start, stop = start - (stop - side), side
    if start < 0:
        start, stop = 0, stop - start
    return start, min(stop, side)


def paste_back(original: Image.Image, mask: Image.Image, drawn: Image.Image, box: Box | None = None) -> Image.Image:
    """Paste the original over the drawing where the mask is dark (diffusers' `apply_overlay`).

    Args:
        original: the whole original picture.
        mask: the mask, of the original's size; gray values blend the two.
        drawn: the drawing of the box, of any size; or of the whole picture, at the picture's size.
        box: the region that was drawn; None is the whole picture.
    """
    if mask.size != original.size:
        raise ValueError(f"mask_image has {mask.size} pixels and the picture {original.size}; give a mask of its size")
    kept = Image.new("RGBa", original.size)
    kept.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    if box is not None:
        base = Image.new("RGBA", original.size)
        base.paste(_covering(drawn, box.width, box.height), (box.left, box.top))
        drawn = base.convert("RGB")
    drawn = drawn.convert("RGBA")
    drawn.alpha_composite(kept.convert("RGBA"))
    return drawn.convert("RGB")


def _covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture until it covers a size, and cut it around its center."""
    narrower = image.width * height < width * image.height
    wide = width if narrower else image.width * height // image.height
    high = image.height * width // image.width if narrower else height
    return _centered(image.resize((wide, high), Image.Resampling.LANCZOS), width, height)


def _inside(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture until it fits into a size, and fill the rest with its border lines."""
    wider = image.width * height > width * image.height
    wide = width if wider else image.width * height // image.height
    high = image.height * width // image.width if wider else height
    small = image.resize((max(1, wide), max(1, high)), Image.Resampling.LANCZOS)
    canvas = _centered(small, width, height)
    above, beside = height // 2 - small.height // 2, width // 2 - small.width // 2
    if above > 0:
        canvas.paste(_line(small, (0, 0, width, 0), (width, above)), (0, 0))
        canvas.paste(_line(small, (0, small.height, width, small.height), (width, above)), (0, above + small.height))
    if beside > 0:
        canvas.paste(_line(small, (0, 0, 0, height), (beside, height)), (0, 0))
        canvas.paste(_line(small, (small.width, 0, small.width, height), (beside, height)), (beside + small.width, 0))
    return canvas


def _centered(image: Image.Image, width: int, height: int) -> Image.Image:
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image, (width // 2 - image.width // 2, height // 2 - image.height // 2))
    return canvas


def _line(image: Image.Image, line: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """A border line of a picture, stretched to an area (Pillow resizes a box without a width or height to it)."""
    return image.resize(size, box=line)
