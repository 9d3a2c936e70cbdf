"""Outpainting: enlarge the canvas of a picture, and make the mask of the added borders."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit.pictures.read import PictureLike, load_image
from mmdit.utils import whole


def pad_for_outpaint(
    image: PictureLike, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, feather: int = 40
) -> tuple[Tensor, Tensor]:
    """Enlarge pictures by gray borders, and make the mask for drawing there (ComfyUI's ImagePadForOutpaint).

    Args:
        image: a picture, as `mmdit.images.load_image` accepts it.
        left, top, right, bottom: number of pixels to add at each side.
        feather: number of pixels over which the mask extends into the picture and falls off. It has no effect unless
            2 feather is less than both sides of the picture.

    Returns:
        Pictures [b, H, W, 3] and a mask [1, H, W]: 1 on the borders, ((feather - d) / feather) ** 2 at distance d from
        the nearest border.

    Raises:
        ValueError: a number is negative, or the picture cannot be read.
    """
    picture = load_image(image).picture
    borders = {"left": left, "top": top, "right": right, "bottom": bottom}
    left, top, right, bottom = (whole(name, value, 0) for name, value in borders.items())
    height, width = picture.shape[1:3]
    size = (height + top + bottom, width + left + right)
    canvas = picture.new_full((len(picture), *size, picture.shape[3]), 0.5)
    canvas[:, top : top + height, left : left + width] = picture
    mask = picture.new_ones(1, *size)
    falling = _falling(height, width, (left, top, right, bottom), whole("feather", feather, 0))
    mask[:, top : top + height, left : left + width] = falling.to(mask)
    return canvas, mask


def _falling(height: int, width: int, borders: tuple[int, int, int, int], feather: int) -> Tensor:
    """The mask inside of the picture, float64 [h, w]."""
    if not 0 < 2 * feather < min(height, width):
        return torch.zeros(height, width, dtype=torch.float64)
    left, top, right, bottom = borders
    down, across = _distance(height, top, bottom), _distance(width, left, right)
    distance = torch.minimum(down[:, None], across)
    return ((feather - distance).clamp(min=0) / feather).square()


def _distance(side: int, before: int, after: int) -> Tensor:
    """The distance of each row or column to the added borders, counted as in ComfyUI: from 0 forwards, from 1 back."""
    places = torch.arange(side, dtype=torch.float64)
    far = torch.full_like(places, side)
    return torch.minimum(places if before else far, side - places if after else far)
