"""Inversion of a picture to noise: integrate the flow's ODE from low to high noise levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmdit.utils import number
from samplers import Denoise, Step

Inverter = Literal["euler", "heun"]
LOWEST = 1e-4  # the first sigma of an inversion, because the velocity is undefined at 0 (ComfyUI's FlipSigmas)


@dataclass(frozen=True, eq=False)
class Inversion:
    """The result of `mmdit.Pipeline.invert`. To reconstruct the picture, or to draw another one from its noise:

    cond = pipe.encode(prompt)
    how = {"sigmas": inversion.falling, "guidance_scale": 1.0, "add_noise": False}
    for step in pipe.sample(cond, None, inversion.latents, **how): ...
    """

    latents: Float[Tensor, "b c h w"]  # at the last sigma: noise, if that is 1
    image: Float[Tensor, "b c h w"]  # the picture's latents, in model space
    trajectory: tuple[Tensor, ...]  # latents [b, c, h, w] at each sigma; the last entry is `latents`
    sigmas: Float[Tensor, " levels"]  # float64, rising from 0.0001

    @property
    def falling(self) -> Float[Tensor, " levels"]:
        """The sigmas for drawing from the inverted latents, falling to 0."""
        return torch.cat([self.sigmas[1:].flip(0), self.sigmas.new_zeros(1)])


def rising(levels: Tensor, strength: float) -> Tensor:
    """The sigmas of an inversion: those of the last round(steps * strength) steps of a drawing, in rising order.

    Source: ComfyUI's SplitSigmasDenoise and FlipSigmas.

    Args:
        levels: the sigmas of the drawing, [steps + 1], falling to 0.
        strength: the share of the steps to invert, above 0 and at most 1.

    Raises:
        ValueError: no step is left.
    """
    steps = len(levels) - 1
    kept = round(steps * number("strength", strength, 0, 1))
    if not kept:
        raise ValueError(f"strength {strength:g} leaves none of {steps} steps; give more strength or more steps")
    found = levels[-(kept + 1) :].flip(0)
    return torch.cat([found.new_full((1,), LOWEST), found[1:]]) if found[0] == 0 else found


def euler_up(denoise: Denoise, x: Tensor, levels: Tensor) -> Iterator[Step]:
    """Euler's method along rising sigmas: x + v(x, sigma) (sigma' - sigma). First order.

    Args:
        denoise: (latent, sigma) -> predicted x0, of the latent's shape.
        x: the latent at the first sigma, of any shape.
        levels: the sigmas, [steps + 1], rising; the first is above 0.
    """
    for i, (sigma, following) in enumerate(pairwise(levels.tolist())):
        x0 = denoise(x, sigma)
        step = Step(i, following, x + (x - x0) / sigma * (following - sigma), x0)
        yield step
        x = step.x


def heun_up(denoise: Denoise, x: Tensor, levels: Tensor) -> Iterator[Step]:
    """Heun's method along rising sigmas: the mean of the velocities at both ends. Second order, two NFE per step.

    Args:
        denoise, x, levels: see `euler_up`.
    """
    for i, (sigma, following) in enumerate(pairwise(levels.tolist())):
        x0 = denoise(x, sigma)
        velocity, width = (x - x0) / sigma, following - sigma
        ahead = x + velocity * width
        there = (ahead - denoise(ahead, following)) / following
        step = Step(i, following, x + (velocity + there) / 2 * width, x0)
        yield step
        x = step.x


INVERTERS: dict[str, Callable[[Denoise, Tensor, Tensor], Iterator[Step]]] = {"euler": euler_up, "heun": heun_up}
