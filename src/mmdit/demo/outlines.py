"""Outlined shapes: what the embedded LoRA teaches, drawn and scored.

An outlined shape has its colour along its edge and the background inside. The scorer fills what an outline encloses and
leaves the rest to `mmdit.demo.score`, so that both the hollowness and the choice of shapes are measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmdit.demo.scenes import SIDE, Scenes, render, sample
from mmdit.demo.shapes import BACKGROUNDS, COLOURS, SHAPES, palette

__all__ = ["OUTLINED", "STROKE", "filled", "holes", "hollowness", "outlined", "sample_outlined"]

STROKE = 5  # pixels
OUTLINED = ("circle", "square", "triangle", "diamond")  # large ones of these have room for a hole that the VAE keeps


def sample_outlined(n: int, seed: int) -> Scenes:
    """`n` scenes of large shapes that can be outlined, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Scenes] = []
    wanted = torch.tensor([shape in OUTLINED for shape in SHAPES])
    while sum(map(len, found)) < n:
        scenes = sample(1024, generator)
        exists = torch.arange(scenes.shape.shape[1]) < scenes.count[:, None]
        found.append(scenes[((wanted[scenes.shape] & scenes.large) | ~exists).all(1)])
    joined = {key: torch.cat([getattr(one, key) for one in found])[:n] for key in vars(found[0])}
    return Scenes(**joined)


def outlined(scenes: Scenes) -> Float[Tensor, "b 3 128 128"]:
    """Scenes with outlines in place of filled shapes: float32 RGB in [0, 1]."""
    whole = render(scenes)
    ground = palette(BACKGROUNDS).to(whole.device)[scenes.background] + scenes.background_tint
    ground = ground.clamp(0, 1)[:, :, None, None]
    shown = (whole - ground).abs().amax(1, keepdim=True)
    inner = 1 - F.max_pool2d((shown < 0.1).float(), 2 * STROKE + 1, 1, STROKE)  # a stroke from the edge
    return torch.lerp(whole, ground.expand_as(whole), inner)


def holes(pictures: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b h w"]:
    """The pixels of background colour that no path of such pixels joins to the border."""
    is_ground = _grounds(pictures)
    outside = F.pad(torch.zeros_like(is_ground[:, 1:-1, 1:-1]), (1, 1, 1, 1), value=True) & is_ground
    for _ in range(4 * SIDE):
        grown = (F.max_pool2d(outside[:, None].float(), 3, 1, 1)[:, 0] > 0) & is_ground
        if torch.equal(grown, outside):
            break
        outside = grown
    return is_ground & ~outside


def hollowness(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """The share of holes in what shapes cover or enclose: 0 where all are filled, about a half for outlines."""
    inside = holes(pictures).flatten(1).sum(1)
    covered = (~_grounds(pictures)).flatten(1).sum(1)
    return inside / (inside + covered).clamp(min=1)


def filled(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The pictures with every hole in the colour of the shape around it, for `mmdit.demo.score`."""
    colours = palette(COLOURS).to(pictures.device)
    left, known = holes(pictures)[:, None], ~_grounds(pictures)[:, None]
    paint = colours[_nearest(pictures)].movedim(-1, 1) * known
    picture = pictures.clone()
    while bool(left.any()):
        weight = F.avg_pool2d(known.float(), 3, 1, 1, divisor_override=1)
        paint = torch.where(known, paint, F.avg_pool2d(paint, 3, 1, 1, divisor_override=1) / weight.clamp(min=1))
        reached = left & (weight > 0)
        if not bool(reached.any()):
            break
        picture = torch.where(reached, paint, picture)
        known, left = known | reached, left & ~reached
        paint = paint * known
    return picture


def _nearest(pictures: Tensor) -> Tensor:
    """The index of the colour of shapes that each pixel is nearest to."""
    colours = palette(COLOURS).to(pictures.device)
    return (pictures[:, None] - colours[None, :, :, None, None]).square().sum(2).argmin(1)


def _grounds(pictures: Tensor) -> Bool[Tensor, "b h w"]:
    """The pixels that are nearer to the colour of the corner than to any colour of shapes."""
    corner = pictures[:, :, :2, :2].mean((2, 3))
    shapes = palette(COLOURS).to(pictures.device)
    colours = torch.cat([corner[:, None], shapes.expand(len(pictures), -1, -1)], 1)
    distance = (pictures[:, None] - colours[..., None, None]).square().sum(2)
    return distance.argmin(1) == 0
