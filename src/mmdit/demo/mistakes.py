"""Scenes with one mistake each, as the model makes them, for training that teaches it to mend them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmdit.demo.scenes import GAP, MARGIN, MAX_OBJECTS, SIDE, Scenes
from mmdit.demo.shapes import COLOURS, SHAPES

__all__ = ["mistaken"]

# Mistakes that every caption contradicts, because it names shape and colour of all objects.
_ODDS = {"colour": 0.35, "shape": 0.15, "swapped": 0.15, "missing": 0.15, "extra": 0.2}
_KINDS = list(_ODDS)
_OF_OBJECTS = ("shape", "colour", "large", "across", "angle", "x", "y", "tint")
_TRIES = 16  # random places for an extra object


def mistaken(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Return the scenes with one mistake each.

    An object has another colour or another shape, two objects have their colours swapped, one is missing, or one has a
    twin. Where a mistake is not possible (a scene of one object, equal colours, no room), an object has another colour.

    Args:
        scenes: on the generator's device.
        generator: where the mistakes come from.
    """
    device, n = scenes.count.device, len(scenes)
    rows = torch.arange(n, device=device)
    kind = torch.multinomial(torch.tensor([*_ODDS.values()], device=device), max(n, 1), True, generator=generator)[:n]
    swapped, missing, extra = (kind == _KINDS.index(name) for name in ("swapped", "missing", "extra"))
    one = _below(scenes.count, generator)
    other = (one + 1 + _below((scenes.count - 1).clamp(min=1), generator)) % scenes.count
    place, free = _free_place(scenes, one, generator)
    swapped &= scenes.colour[rows, one] != scenes.colour[rows, other]
    missing, extra = missing & (scenes.count > 1), extra & free
    reshaped = kind == _KINDS.index("shape")
    recoloured = ~(swapped | missing | extra | reshaped)
    shape, colour = scenes.shape.clone(), scenes.colour.clone()
    first, second = colour[rows, one], colour[rows, other]
    colour[rows, one] = torch.where(recoloured, _another(first, len(COLOURS), generator), first)
    shape[rows, one] = torch.where(reshaped, _another(shape[rows, one], len(SHAPES), generator), shape[rows, one])
    colour[rows[swapped], one[swapped]], colour[rows[swapped], other[swapped]] = second[swapped], first[swapped]
    return _with_twin(_without(replace(scenes, shape=shape, colour=colour), one, missing), one, place, extra)


def _free_place(scenes: Scenes, one: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A place [2, n] for another object as large as that of this index, and where there is one [n]."""
    n, device = len(scenes), one.device
    half = scenes.across / 2 * (scenes.angle.cos() + scenes.angle.sin().abs())
    mine = half[torch.arange(n, device=device), one]
    edge = (mine + MARGIN)[:, None]
    tries = edge + (SIDE - 2 * edge) * torch.rand(2, n, _TRIES, generator=generator, device=device)
    away = (tries[..., None] - torch.stack([scenes.x, scenes.y])[:, :, None]).abs().amax(0)  # n tries objects
    absent = torch.arange(MAX_OBJECTS, device=device) >= scenes.count[:, None]
    free = ((away >= (mine[:, None] + half + GAP)[:, None]) | absent[:, None]).all(-1)
    chosen = free.to(torch.uint8).argmax(-1)
    return tries[:, torch.arange(n, device=device), chosen], free.any(-1) & (scenes.count < MAX_OBJECTS)


def _with_twin(scenes: Scenes, one: Tensor, place: Tensor, where: Tensor) -> Scenes:
    """The scenes with another object like that of this index in some of them, at these places."""
    rows = torch.arange(len(scenes), device=one.device)[where]
    fields = {name: getattr(scenes, name).clone() for name in _OF_OBJECTS}
    last = scenes.count[where]
    for value in fields.values():
        value[rows, last] = value[rows, one[where]]
    fields["x"][rows, last], fields["y"][rows, last] = place[:, where]
    return replace(scenes, count=scenes.count + where.to(scenes.count.dtype), **fields)


def _without(scenes: Scenes, one: Tensor, where: Tensor) -> Scenes:
    """The scenes without the object of this index in some of them: the last object takes its place in the list."""
    rows = torch.arange(len(scenes), device=one.device)[where]
    fields = {name: getattr(scenes, name).clone() for name in _OF_OBJECTS}
    for value in fields.values():
        value[rows, one[where]] = value[rows, scenes.count[where] - 1]
    return replace(scenes, count=scenes.count - where.to(scenes.count.dtype), **fields)


def _below(limit: Tensor, generator: torch.Generator) -> Tensor:
    """A whole number from 0 to each limit, which is left out."""
    return (torch.rand(len(limit), generator=generator, device=limit.device) * limit).long().clamp(max=limit - 1)


def _another(index: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Another index below `size` than each given one."""
    step = torch.randint(1, size, (len(index),), generator=generator, device=index.device)
    return (index + step) % size
