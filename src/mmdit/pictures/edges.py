"""Canny edge detection as in ComfyUI's node (kornia) or in OpenCV."""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmdit.pictures.read import PictureLike, load_image
from mmdit.utils import number
from samplers import pick

RULES = ("kornia-0.9", "kornia-0.7", "opencv")
_USUAL = {"kornia-0.9": (0.4, 0.8), "kornia-0.7": (0.4, 0.8), "opencv": (100.0, 200.0)}
# (rows down, columns right) of the neighbour in direction 0 to 7: from the right towards the bottom, by 45 degrees.
_NEIGHBOURS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
_FLAT = 1e-6  # added under the square root, as in kornia, which keeps its gradient finite


def canny(
    image: PictureLike, low: float | None = None, high: float | None = None, *, rule: str = "kornia-0.9"
) -> Float[Tensor, "b h w 3"]:
    """The edges of a picture: 1 on an edge and 0 elsewhere, in three equal channels; a hint for a ControlNet.

    Args:
        image: a file, a Pillow picture, or an array or tensor [h, w, 3] or [b, h, w, 3] in [0, 1].
        low: the low threshold of the gradient magnitude: pixels above it are edges if they are connected to a pixel
            above `high`. None is 0.4, or 100 for OpenCV. Gradients are those of the unnormalised Sobel filter. kornia
            takes them of gray values in [0, 1], after a Gaussian of 5 x 5 pixels and sigma 1; OpenCV takes |x| + |y| of
            8-bit values, without a Gaussian.
        high: the high threshold, see `low`. None is 0.8, or 200 for OpenCV.
        rule: "kornia-0.9" is kornia 0.9.0, which ComfyUI's node `Canny` uses: of two equal neighbours across an edge,
            it keeps the left or the upper one. "kornia-0.7" is kornia 0.7.4, which keeps neither; whether two
            neighbours are equal depends on the last bit there, so that single pixels can differ. "opencv" is
            `cv2.Canny` of the RGB picture and needs cv2.

    Raises:
        ValueError: the rule is unknown, a threshold is not finite or not above 0, or low is above high.
        ImportError: the rule is "opencv", and cv2 is not installed.
    """
    pick(dict.fromkeys(RULES), rule, "rule")
    usual = _USUAL[rule]
    least, most = (
        number(name, usual[i] if x is None else x) for i, (name, x) in enumerate((("low", low), ("high", high)))
    )
    if not 0 < least <= most:
        raise ValueError(f"canny takes 0 < low <= high, got low {least:g} and high {most:g}")
    picture = load_image(image).picture
    edges = _opencv(picture, least, most) if rule == "opencv" else _kornia(picture, least, most, rule == "kornia-0.9")
    return edges[..., None].repeat(1, 1, 1, 3)


def _kornia(picture: Tensor, low: float, high: float, ties: bool) -> Float[Tensor, "b h w"]:
    """Detect edges as kornia does; `ties` is whether one of two equal neighbours is kept.

    Source: kornia `filters/canny.py`, `filters/gaussian.py`, `filters/sobel.py` of 0.9.0 and 0.7.4. Sums have kornia's
    order, because equal neighbours must be bit-equal.
    """
    x, y = _gradients(_blurred(_gray(picture, fused=ties)))
    magnitude = (x.square() + y.square() + _FLAT).sqrt()
    direction = (torch.atan2(y, x) * (4 / math.pi)).round().long() % 8
    larger = _larger_or_first(magnitude) if ties else _larger(magnitude)
    both = torch.stack([direction, (direction + 4) % 8])
    kept = larger.gather(0, both).all(0) & (magnitude > math.sqrt(_FLAT))
    return _connected(kept & (magnitude > low), kept & (magnitude > high)).to(picture.dtype)


def _larger_or_first(magnitude: Float[Tensor, "b h w"]) -> Bool[Tensor, "8 b h w"]:
    """Whether a pixel is larger than its neighbour in each direction, or equal to that on its right or below it.

    Beyond the border there is no gradient.
    """
    padded = F.pad(magnitude, (1, 1, 1, 1), value=math.sqrt(_FLAT))
    rows, columns = magnitude.shape[-2:]
    around = [padded[:, 1 + y : 1 + y + rows, 1 + x : 1 + x + columns] for y, x in _NEIGHBOURS]
    pairs = [magnitude >= one if i in (0, 2) else magnitude > one for i, one in enumerate(around)]
    return torch.stack(pairs)


def _larger(magnitude: Float[Tensor, "b h w"]) -> Bool[Tensor, "8 b h w"]:
    """Whether a pixel is larger than its neighbour in each direction; beyond the border there is 0.

    The difference is a convolution, as in kornia 0.7.4: its rounding decides between equal neighbours.
    """
    kernels = magnitude.new_zeros(len(_NEIGHBOURS), 1, 3, 3)
    kernels[:, 0, 1, 1] = 1
    for i, (y, x) in enumerate(_NEIGHBOURS):
        kernels[i, 0, 1 + y, 1 + x] = -1
    return F.conv2d(magnitude[:, None], kernels, padding=1).transpose(0, 1) > 0


def _gray(picture: Float[Tensor, "b h w 3"], *, fused: bool) -> Float[Tensor, "b h w"]:
    """The luminance; kornia 0.9 rounds a product and a sum once (fused), kornia 0.7 rounds each."""
    red, green, blue = picture.unbind(-1)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=picture.dtype, device=picture.device)
    if fused:
        return torch.addcmul(torch.addcmul(red * weights[0], green, weights[1]), blue, weights[2])
    return weights[0] * red + weights[1] * green + weights[2] * blue


def _blurred(gray: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Blur by a Gaussian of five pixels and sigma 1, along rows and then columns, with reflection at the borders."""
    wave = torch.exp(-(torch.arange(5, dtype=gray.dtype, device=gray.device) - 2).square() / 2)
    kernel = wave / wave.sum()
    rows = F.conv2d(F.pad(gray[:, None], (2, 2, 0, 0), mode="reflect"), kernel.view(1, 1, 1, 5))
    return F.conv2d(F.pad(rows, (0, 0, 2, 2), mode="reflect"), kernel.view(1, 1, 5, 1))[:, 0]


def _gradients(gray: Float[Tensor, "b h w"]) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w"]]:
    """Sobel's gradients along x and y, unnormalised; the borders are repeated."""
    along_x = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=gray.dtype, device=gray.device)
    padded = F.pad(gray[:, None], (1, 1, 1, 1), mode="replicate")
    x, y = F.conv2d(padded, torch.stack([along_x, along_x.T])[:, None]).unbind(1)
    return x, y


def _connected(weak: Tensor, strong: Tensor) -> Tensor:
    """The weak pixels that a path of weak pixels, by their eight neighbours, connects to a strong one."""
    while True:
        near = F.max_pool2d(strong.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
        grown = strong | (weak & near)
        if torch.equal(grown, strong):
            return strong
        strong = grown


def _opencv(picture: Tensor, low: float, high: float) -> Float[Tensor, "b h w"]:
    if find_spec("cv2") is None:
        raise ImportError("rule='opencv' needs OpenCV: pip install opencv-python-headless, or take rule='kornia-0.9'")
    library: Any = import_module("cv2")
    pictures = (picture * 255).round().to(torch.uint8).cpu().numpy()
    found = [torch.from_numpy(library.Canny(one, low, high)) for one in pictures]
    return (torch.stack(found) > 0).to(picture.device, picture.dtype)
