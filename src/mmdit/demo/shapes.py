"""Shapes as signed distances, and the palette: what scenes are drawn from and what the scorer compares with."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["BACKGROUNDS", "COLOURS", "SHAPES", "coverage", "palette", "signed_distance", "unit_area"]

# RGB in [0, 1]. No object colour is a background colour, so every object stands out on every background.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.08, 0.10),
    "orange": (0.98, 0.46, 0.03),
    "yellow": (0.99, 0.90, 0.10),
    "green": (0.10, 0.62, 0.18),
    "cyan": (0.10, 0.82, 0.90),
    "blue": (0.10, 0.24, 0.92),
    "purple": (0.50, 0.10, 0.66),
    "pink": (0.99, 0.46, 0.75),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.04, 0.04, 0.04),
    "brown": (0.42, 0.26, 0.13),
    "navy": (0.05, 0.08, 0.38),
    "beige": (0.86, 0.78, 0.58),
}

_CROSS_ARM = 0.34  # half the width of an arm
_RING_HOLE = 0.52  # radius of the hole
_STAR_OUTER = 1 / math.sin(math.radians(72))  # the box of the star is then 2 wide
_STAR_INNER = 0.45 * _STAR_OUTER  # fatter than a pentagram (0.38), so that its arms stay visible at 22 px
_STAR_DROP = _STAR_OUTER * (1 - math.cos(math.radians(36))) / 2  # puts the middle of the star's box at the origin


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 1


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = (2 * x.abs() - y - 1) / math.sqrt(5)
    return torch.maximum(side, y - 1)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() + y.abs() - 1) / math.sqrt(2)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    upright = torch.maximum(x - _CROSS_ARM, y - 1)
    return torch.minimum(upright, torch.maximum(x - 1, y - _CROSS_ARM))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - (1 + _RING_HOLE) / 2).abs() - (1 - _RING_HOLE) / 2


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Fold the plane into half an arm; its edge runs from the tip to the notch."""
    y = y - _STAR_DROP
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - fifth * torch.round(angle / fifth)).abs()
    radius = torch.hypot(x, y)
    along = _STAR_INNER * math.cos(fifth / 2) - _STAR_OUTER
    across = _STAR_INNER * math.sin(fifth / 2)
    off_tip = radius * torch.cos(angle) - _STAR_OUTER
    return (off_tip * across - radius * torch.sin(angle) * along) / math.hypot(along, across)


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
SHAPES: tuple[str, ...] = tuple(_DISTANCES)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Return the signed distance of points to a shape that fills the box [-1, 1]^2, y downwards; negative inside.

    Exact near the edges and a lower bound elsewhere, which antialiasing does not see. x and y of one shape, any.

    Raises:
        KeyError: no such shape.
    """
    return _DISTANCES[shape](x, y)


def coverage(shape: str, x: Tensor, y: Tensor, half: Tensor | float) -> Tensor:
    """Return how much of each pixel the shape covers, 0 to 1: `half` is its half extent in pixels, x and y as above."""
    return (0.5 - signed_distance(shape, x, y) * half).clamp(0, 1)


@cache
def unit_area(shape: str) -> float:
    """Return the area of the shape that fills [-1, 1]^2, by sums over a fine grid (error under 0.1 %)."""
    axis = (torch.arange(512, dtype=torch.float64) + 0.5) / 256 - 1
    return float(coverage(shape, axis[None, :], axis[:, None], 256.0).mean() * 4)


def palette(colours: dict[str, tuple[float, float, float]]) -> Tensor:
    """Return the RGB rows of `COLOURS` or `BACKGROUNDS` in order: float32 [n, 3]."""
    return torch.tensor(list(colours.values()), dtype=torch.float32)
