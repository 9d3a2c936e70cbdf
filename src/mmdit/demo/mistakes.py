"""Scenes with one mistake each, as the model makes them, for training that teaches it to mend them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmdit.demo.scenes import Scenes
from mmdit.demo.shapes import COLOURS, SHAPES

__all__ = ["mistaken"]

# Mistakes that every caption contradicts, because it names shape and colour of all objects.
_ODDS = {"colour": 0.5, "shape": 0.2, "swapped": 0.15, "missing": 0.15}
_OF_OBJECTS = ("shape", "colour", "large", "across", "angle", "x", "y", "tint")


def mistaken(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """Return the scenes with one mistake each: an object of another colour or shape, two colours swapped, one missing.

    A scene of a single object gets another colour in place of the last two.

    Args:
        scenes: on the generator's device.
        generator: where the mistakes come from.
    """
    device, n = scenes.count.device, len(scenes)
    rows = torch.arange(n, device=device)
    kind = torch.multinomial(torch.tensor([*_ODDS.values()], device=device), max(n, 1), True, generator=generator)[:n]
    kind = torch.where((scenes.count == 1) & (kind >= 2), 0, kind)
    one = _below(scenes.count, generator)
    other = (one + 1 + _below((scenes.count - 1).clamp(min=1), generator)) % scenes.count
    shape, colour = scenes.shape.clone(), scenes.colour.clone()
    colour[rows, one] = torch.where(kind == 0, _another(colour[rows, one], len(COLOURS), generator), colour[rows, one])
    shape[rows, one] = torch.where(kind == 1, _another(shape[rows, one], len(SHAPES), generator), shape[rows, one])
    first, second = colour[rows, one], colour[rows, other]
    colour[rows, one] = torch.where(kind == 2, second, first)
    colour[rows, other] = torch.where(kind == 2, first, second)
    return _without(replace(scenes, shape=shape, colour=colour), one, kind == 3)


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
