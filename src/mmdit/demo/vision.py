"""Reads a picture back: background and objects, from pixels alone.

Pixels are named by their nearest colour, connected regions of one colour that survive an erosion are objects (so specks
and the mixed colours of a thin edge are not), and each object's soft mask is compared with drawn templates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmdit.demo.scenes import SIZES, Scene
from mmdit.demo.shapes import BACKGROUNDS, COLOURS, SHAPES, coverage, palette, unit_area

__all__ = ["UNKNOWN", "Found", "Parsed", "masks", "parse", "parse_batch", "symbolic"]

UNKNOWN = "unknown"  # the shape name of a region that matches no template
MIN_CORE = 24  # pixels of a region that an erosion by one pixel must leave: a true 23 px star leaves 60 and more
MIN_FIT = 0.88  # similarity to the best template: true shapes reach 0.95 after noise and blur, other regions less
_LIMIT = sum(SIZES["small"][1:] + SIZES["large"][:1]) / 2  # pixels between small and large
_GRID = 28  # side of the canonical mask
_SPAN = 1.45  # half width of the canonical mask in units of the square root of the area
_ANGLES = tuple(math.radians(a) for a in (-12, -8, -4, 0, 4, 8, 12))
_CHUNK = 64  # pictures at a time: bounds the memory of a large batch


@dataclass(frozen=True)
class Found:
    """One object: names, middle of its box and extent in pixels, its box (left, top, right, bottom), template fit."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    across: float
    box: tuple[float, float, float, float]
    fit: float


@dataclass(frozen=True)
class Parsed:
    """The background and the objects of a picture, the largest object first."""

    background: str
    objects: tuple[Found, ...]


def parse(picture: Float[Tensor, "3 h w"]) -> Parsed:
    """Return what one RGB picture in [0, 1] shows. The reading depends on pixels alone."""
    return parse_batch(picture[None])[0]


def parse_batch(pictures: Float[Tensor, "b 3 h w"]) -> list[Parsed]:
    """Return what each RGB picture in [0, 1] shows, on the device that holds them."""
    return [parsed for chunk in pictures.float().split(_CHUNK) for parsed in _parse_chunk(chunk)]


def masks(picture: Float[Tensor, "3 h w"]) -> Bool[Tensor, "n h w"]:
    """Return the pixels of each object of one picture, in the order of `parse(picture).objects`."""
    pictures = picture[None].float()
    _, ground = _background(pictures)
    regions = _regions(_name_pixels(pictures, ground))
    return regions.labels[0] == regions.label[:, None, None]


def symbolic(scene: Scene) -> Parsed:
    """Return the scene as a perfect reader would find it; boxes ignore the tilt."""
    objects = []
    for o in scene.objects:
        r = o.across / 2
        box = (o.x - r, o.y - r, o.x + r, o.y + r)
        objects.append(Found(o.shape, o.colour, o.size, o.x, o.y, o.across, box, 1.0))
    return Parsed(scene.background, tuple(objects))


def _parse_chunk(pictures: Tensor) -> list[Parsed]:
    index, ground = _background(pictures)
    names = _name_pixels(pictures, ground)
    regions = _regions(names)
    objects = _describe(pictures, ground, regions)
    rows: list[list[Found]] = [[] for _ in pictures]
    for row, found in zip(regions.picture.tolist(), objects, strict=True):
        rows[row].append(found)
    grounds = list(BACKGROUNDS)
    return [Parsed(grounds[i], tuple(found)) for i, found in zip(index.tolist(), rows, strict=True)]


def _background(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the background colour that most pixels are nearest to, and their mean colour [b, 3]."""
    pictures = pictures[:, :, ::2, ::2]  # a quarter of the pixels suffices
    grounds = palette(BACKGROUNDS).to(pictures.device)
    known = torch.cat([grounds, palette(COLOURS).to(pictures.device)])
    nearest = _nearest(pictures, known.expand(len(pictures), -1, -1))
    counts = torch.stack([(nearest == i).sum((1, 2)) for i in range(len(grounds))], 1)
    index = counts.argmax(1)
    mask = (nearest == index[:, None, None])[:, None]
    mean = (pictures * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)
    return index, torch.where(counts.amax(1, keepdim=True) > 0, mean, grounds[index])


def _nearest(pictures: Tensor, colours: Tensor) -> Tensor:
    """Return the index of the nearest of `colours` [b, n, 3] for every pixel: [b, h, w]."""
    closeness = torch.einsum("bnc,bchw->bnhw", colours, pictures) - (colours**2).sum(-1)[..., None, None] / 2
    return closeness.max(1).indices  # argmax is several times slower on the CPU


def _name_pixels(pictures: Tensor, ground: Tensor) -> Tensor:
    """Return 0 for background and 1 + colour index for every other pixel: [b, h, w]."""
    colours = palette(COLOURS).to(pictures.device).expand(len(pictures), -1, -1)
    return _nearest(pictures, torch.cat([ground[:, None], colours], 1))


@dataclass(frozen=True)
class _Regions:
    """Regions by picture and then by area, largest first."""

    picture: Tensor  # n: which picture
    colour: Tensor  # n: colour index
    box: Tensor  # n 4: left, top, right, bottom, in pixel edges
    label: Tensor  # n: what `labels` holds in this region
    labels: Tensor  # b h w


def _regions(names: Tensor) -> _Regions:
    """Return the connected regions of one colour that survive the erosion."""
    labels = _connected(names)
    picture, row, column = (labels >= 0).nonzero().unbind(1)
    label = labels[picture, row, column]
    n = int(labels.max()) + 1
    area = torch.bincount(label, minlength=n)
    core = torch.bincount(label[_eroded(names)[picture, row, column]], minlength=n)
    # All pixels of a region agree on these two, so whichever is written last is right.
    owner = torch.zeros_like(area).scatter_(0, label, picture)
    colour = torch.zeros_like(area).scatter_(0, label, names[picture, row, column] - 1)
    keep = (core >= MIN_CORE).nonzero()[:, 0]
    keep = keep[torch.argsort(owner[keep] * (names[0].numel() + 1) - area[keep], stable=True)]
    box = torch.stack([*_ends(label, column, n), *_ends(label, row, n)], 1).float()[keep][:, [0, 2, 1, 3]]
    return _Regions(owner[keep], colour[keep], box, keep, labels)


def _ends(label: Tensor, at: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the first and last pixel edges of each of `n` labels along one axis."""
    low = torch.full((n,), 1 << 30, device=at.device).scatter_reduce(0, label, at, "amin")
    return low, torch.zeros(n, dtype=at.dtype, device=at.device).scatter_reduce(0, label, at, "amax") + 1


def _eroded(names: Tensor) -> Tensor:
    """Return the pixels whose 3 x 3 neighbours all have the same name (beyond the border: other)."""
    padded = F.pad(names.float()[:, None], (1, 1, 1, 1), value=-1.0)
    return (F.max_pool2d(padded, 3, 1) == -F.max_pool2d(-padded, 3, 1))[:, 0] & (names > 0)


def _connected(names: Tensor) -> Tensor:
    """Label 4-connected regions of equal name by numbers of their own, background by -1: [b, h, w]."""
    solid = names > 0
    starts = solid.clone()
    starts[:, :, 1:] &= names[:, :, 1:] != names[:, :, :-1]
    run = starts.flatten().cumsum(0).reshape(names.shape) - 1  # horizontal runs are the nodes of the graph
    joined = solid[:, 1:] & (names[:, 1:] == names[:, :-1])
    pairs = torch.unique_consecutive(torch.stack([run[:, :-1][joined], run[:, 1:][joined]], 1), dim=0)
    labels = _lowest_connected(int(starts.sum()), pairs[:, 0], pairs[:, 1])
    return torch.where(solid, labels[run.clamp(min=0)] if len(labels) else run, -1)


def _lowest_connected(n: int, first: Tensor, second: Tensor) -> Tensor:
    """Return for each of `n` nodes the lowest node that the edges (first[i], second[i]) connect it with."""
    labels = torch.arange(n, device=first.device)
    while True:
        low = torch.minimum(labels[first], labels[second])
        lower = labels.scatter_reduce(0, labels[first], low, "amin")  # hang whole trees, not single nodes
        lower = lower.scatter_reduce(0, labels[second], low, "amin")
        lower = lower[lower]
        if torch.equal(lower, labels):
            return labels
        labels = lower


def _describe(pictures: Tensor, ground: Tensor, regions: _Regions) -> list[Found]:
    """Classify every region: size and shape from its soft mask, colour from its pixels."""
    if not len(regions.label):
        return []
    masks = _soft_masks(pictures, ground, regions)
    canonical, area = _canonical(masks)
    fits = _similarity(canonical, _templates().to(masks.device)).amax(2)  # n shapes
    fit, shape = fits.max(1)
    units = torch.tensor([unit_area(s) for s in SHAPES], device=masks.device)
    across = 2 * (area / units[shape]).sqrt()
    columns = (shape, fit, regions.colour, across, regions.box)
    return [_found(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _found(shape: int, fit: float, colour: int, across: float, box: Sequence[float]) -> Found:
    left, top, right, bottom = box
    name = SHAPES[shape] if fit >= MIN_FIT else UNKNOWN
    size = "large" if across > _LIMIT else "small"
    middle = ((left + right) / 2, (top + bottom) / 2)
    return Found(name, list(COLOURS)[colour], size, *middle, across, (left, top, right, bottom), fit)


def _soft_masks(pictures: Tensor, ground: Tensor, regions: _Regions) -> Tensor:
    """Return how much of the way from background to object each pixel in and around a region is: [n, h, w]."""
    inside = (regions.labels[regions.picture] == regions.label[:, None, None]).float()
    core = -F.max_pool2d(-inside[:, None], 3, 1, 1)
    here = pictures[regions.picture]
    paint = (here * core).sum((2, 3)) / core.sum((2, 3)).clamp(min=1)
    base = ground[regions.picture]
    path = paint - base
    along = torch.einsum("nchw,nc->nhw", here, path) - (base * path).sum(1)[:, None, None]
    share = (along / (path**2).sum(1)[:, None, None]).clamp(0, 1)
    near = F.max_pool2d(inside[:, None], 5, 1, 2)[:, 0]
    return share * near


def _canonical(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Resample masks so that centroid and area agree: [n, grid * grid], and the areas in pixels [n]."""
    n, h, w = masks.shape
    area = masks.sum((1, 2))
    column, row = (torch.arange(s, device=masks.device) + 0.5 for s in (w, h))
    x = (masks.sum(1) * column).sum(1) / area
    y = (masks.sum(2) * row).sum(1) / area
    axis = ((torch.arange(_GRID, device=masks.device) + 0.5) / _GRID * 2 - 1) * _SPAN
    reach = area.sqrt()[:, None] * axis
    across, down = (x[:, None] + reach) * 2 / w - 1, (y[:, None] + reach) * 2 / h - 1
    grid = torch.stack([across[:, None].expand(n, _GRID, _GRID), down[:, :, None].expand(n, _GRID, _GRID)], -1)
    return F.grid_sample(masks[:, None], grid, align_corners=False).flatten(1), area


def _similarity(masks: Tensor, templates: Tensor) -> Tensor:
    """Return the soft Dice score 2 <a, b> / (<a, a> + <b, b>) of masks [n, p] with templates [s, r, p]: [n, s, r]."""
    common = torch.einsum("np,srp->nsr", masks, templates)
    return 2 * common / ((masks**2).sum(1)[:, None, None] + (templates**2).sum(2))


@cache
def _templates() -> Tensor:
    """Draw every shape at every angle, as `_canonical` sees it: [shapes, angles, grid * grid]."""
    axis = torch.arange(64) + 0.5 - 32
    drawn = []
    for shape in SHAPES:
        for angle in _ANGLES:
            x, y = axis[None, :] / 17, axis[:, None] / 17
            cos, sin = math.cos(angle), math.sin(angle)
            drawn.append(coverage(shape, cos * x + sin * y, cos * y - sin * x, 17.0))
    return _canonical(torch.stack(drawn))[0].reshape(len(SHAPES), len(_ANGLES), -1)
