"""Scenes of 1 to 4 simple shapes on a plain background: sampled on the CPU from a seed, drawn in batches on any device.

Pixel coordinates run from 0 to `SIDE`, x to the right and y downwards; pixel i has its middle at i + 0.5.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdit.demo.shapes import BACKGROUNDS, COLOURS, SHAPES, coverage, palette

__all__ = ["MAX_OBJECTS", "SIDE", "SIZES", "Scene", "SceneObject", "Scenes", "from_words", "render", "sample"]

SIDE = 128
MAX_OBJECTS = 4
# Extents in pixels before rotation. The wide gap between the two ranges makes sizes easy to tell apart.
SIZES: dict[str, tuple[float, float]] = {"small": (23.0, 27.0), "large": (38.0, 46.0)}
GAP = 6.0  # pixels between the boxes of two objects
MARGIN = 2.0  # pixels between a box and the border
TILT = 0.14  # radians (8 degrees): a square stays a square
TINT = 0.03  # how far a colour may lie from its palette entry, per channel
_COUNT_ODDS = (0.10, 0.35, 0.30, 0.25)
_TWIN_ODDS = 0.3  # scenes in which several objects share shape and colour, so that there is something to count
_TRIES = 32


@dataclass(frozen=True)
class SceneObject:
    """One object in words: middle of its box (x, y) and extent before rotation in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    across: float


@dataclass(frozen=True)
class Scene:
    """One scene in words."""

    background: str
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as tensors; object k of scene i exists where k < count[i]. Indices are into the name tables."""

    count: Int[Tensor, " b"]
    shape: Int[Tensor, "b 4"]
    colour: Int[Tensor, "b 4"]
    large: Bool[Tensor, "b 4"]
    across: Float[Tensor, "b 4"]
    angle: Float[Tensor, "b 4"]
    x: Float[Tensor, "b 4"]
    y: Float[Tensor, "b 4"]
    tint: Float[Tensor, "b 4 3"]
    background: Int[Tensor, " b"]
    background_tint: Float[Tensor, "b 3"]

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: "slice | Tensor") -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})

    def to(self, device: torch.device | str) -> "Scenes":
        """Return the same scenes on a device."""
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})

    def words(self) -> list[Scene]:
        """Return every scene in words."""
        shapes, colours, grounds = list(SHAPES), list(COLOURS), list(BACKGROUNDS)
        columns = [t.tolist() for t in (self.shape, self.colour, self.large, self.x, self.y, self.across)]
        scenes = []
        for i, (count, ground) in enumerate(zip(self.count.tolist(), self.background.tolist(), strict=True)):
            rows = zip(*(column[i][:count] for column in columns), strict=True)
            objects = [SceneObject(shapes[s], colours[c], _size(big), x, y, a) for s, c, big, x, y, a in rows]
            scenes.append(Scene(grounds[ground], tuple(objects)))
        return scenes


def sample(n: int, seed: int | torch.Generator) -> Scenes:
    """Draw `n` scenes on the CPU, the same for the same seed wherever they are drawn later.

    Args:
        n: number of scenes.
        seed: a seed, or a CPU generator to draw from.

    Raises:
        ValueError: `n` is negative.
    """
    if n < 0:
        raise ValueError(f"the number of scenes must not be negative, got {n}")
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    count = 1 + torch.multinomial(torch.tensor(_COUNT_ODDS), max(n, 1), replacement=True, generator=g)[:n]
    shape, colour = _kinds(n, count, g)
    large = torch.rand(n, MAX_OBJECTS, generator=g) < 0.5
    low, high = (torch.tensor([SIZES[s][i] for s in ("small", "large")])[large.long()] for i in (0, 1))
    across = low + (high - low) * torch.rand(n, MAX_OBJECTS, generator=g)
    angle = TILT * _signed(g, n, MAX_OBJECTS)
    half = across / 2 * (angle.cos() + angle.sin().abs())  # half the side of the box that holds every tilted shape
    x, y = _places(half, count, g)
    tint = TINT * _signed(g, n, MAX_OBJECTS, 3)
    background = torch.randint(len(BACKGROUNDS), (n,), generator=g)
    return Scenes(count, shape, colour, large, across, angle, x, y, tint, background, TINT * _signed(g, n, 3))


def from_words(scenes: Sequence[Scene]) -> Scenes:
    """Return scenes given in words as a batch, without tilt and tint; overlap of objects is not checked.

    Raises:
        ValueError: an unknown name, or more than `MAX_OBJECTS` objects.
    """
    n = len(scenes)
    if any(len(scene.objects) > MAX_OBJECTS for scene in scenes):
        raise ValueError(f"a scene has at most {MAX_OBJECTS} objects")
    whole, real = (torch.zeros(3, n, MAX_OBJECTS, dtype=d) for d in (torch.long, torch.float32))
    for i, scene in enumerate(scenes):
        for k, o in enumerate(scene.objects):
            names = ((o.shape, SHAPES), (o.colour, COLOURS), (o.size, SIZES))
            whole[:, i, k] = torch.tensor([_index(name, table) for name, table in names])
            real[:, i, k] = torch.tensor([o.across, o.x, o.y])
    count = torch.tensor([len(scene.objects) for scene in scenes], dtype=torch.long)
    ground = torch.tensor([_index(scene.background, BACKGROUNDS) for scene in scenes], dtype=torch.long)
    shape, colour, size = whole
    across, x, y = real
    tint = torch.zeros(n, MAX_OBJECTS, 3)
    return Scenes(count, shape, colour, size == 1, across, torch.zeros_like(x), x, y, tint, ground, tint[:, 0])


def render(scenes: Scenes) -> Float[Tensor, "b 3 128 128"]:
    """Draw scenes on the device that holds them: float32 RGB in [0, 1], antialiased by analytic coverage."""
    device = scenes.x.device
    cover = _covers(scenes)
    ground = palette(BACKGROUNDS).to(device)[scenes.background] + scenes.background_tint
    paint = palette(COLOURS).to(device)[scenes.colour] + scenes.tint - ground[:, None]
    # Objects never overlap, so their contributions add up.
    picture = ground[:, :, None, None] + torch.einsum("bkc,bkhw->bchw", paint, cover)
    return picture.clamp(0, 1)


def _index(name: str, table: Iterable[str]) -> int:
    names = list(table)
    if name not in names:
        raise ValueError(f"unknown name {name!r}; known: {', '.join(names)}")
    return names.index(name)


def _size(large: bool) -> str:
    return "large" if large else "small"


def _signed(generator: torch.Generator, *shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=generator) - 1


def _kinds(n: int, count: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw shape and colour; in some scenes the first few objects are twins of the first."""
    shape = torch.randint(len(SHAPES), (n, MAX_OBJECTS), generator=g)
    colour = torch.randint(len(COLOURS), (n, MAX_OBJECTS), generator=g)
    twins = 2 + (torch.rand(n, generator=g) * (count - 1)).long()  # 2 to count
    twin = torch.arange(MAX_OBJECTS) < twins[:, None]
    twin &= (torch.rand(n, generator=g) < _TWIN_ODDS)[:, None]
    return torch.where(twin, shape[:, :1], shape), torch.where(twin, colour[:, :1], colour)


def _places(half: Tensor, count: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Place the boxes [n, 4] apart from each other: scenes that do not fit are placed anew until they do."""
    places = torch.full((2, *half.shape), -1.0)
    open_rows = torch.arange(len(half))
    while len(open_rows):
        trial, fits = _place_once(half[open_rows], count[open_rows], g)
        places[:, open_rows[fits]] = trial[:, fits]
        open_rows = open_rows[~fits]
    return places[0], places[1]


def _place_once(half: Tensor, count: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Try once: each object in turn takes the first free place among `_TRIES` random places."""
    n = len(half)
    places = torch.zeros(2, n, MAX_OBJECTS)
    fits = torch.ones(n, dtype=torch.bool)
    for k in range(MAX_OBJECTS):
        free_span = SIDE - 2 * (half[:, k] + MARGIN)
        tries = torch.rand(2, n, _TRIES, generator=g) * free_span[:, None] + (half[:, k] + MARGIN)[:, None]
        away = (tries[..., None] - places[:, :, None, :k]).abs().amax(0)  # n tries k
        free = (away >= (half[:, k, None] + half[:, :k] + GAP)[:, None]).all(-1)
        first = free.to(torch.uint8).argmax(-1)
        places[:, :, k] = tries[:, torch.arange(n), first]
        fits &= free.any(-1) | (k >= count)
    return places, fits


def _covers(scenes: Scenes) -> Float[Tensor, "b 4 128 128"]:
    device = scenes.x.device
    cover = torch.zeros(len(scenes), MAX_OBJECTS, SIDE, SIDE, device=device)
    middle = torch.arange(SIDE, device=device) + 0.5
    exists = torch.arange(MAX_OBJECTS, device=device) < scenes.count[:, None]
    for index, shape in enumerate(SHAPES):
        which = exists & (scenes.shape == index)
        half, angle, x, y = (t[which][:, None, None] for t in (scenes.across / 2, scenes.angle, scenes.x, scenes.y))
        right, down = (middle[None, None, :] - x) / half, (middle[None, :, None] - y) / half
        cos, sin = angle.cos(), angle.sin()
        cover[which] = coverage(shape, cos * right + sin * down, cos * down - sin * right, half)
    return cover
