"""From a picture back to noise: the flow's ODE from low noise levels to high ones."""

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
LOWEST = 1e-4  # where an inversion starts in place of 0, at which no velocity is defined (ComfyUI's FlipSigmas)


@dataclass(frozen=True, eq=False)
class Inversion:
    """What `mmdit.Pipeline.invert` found. To draw the picture again, or another one from its noise:

    cond = pipe.encode(prompt)
    how = {"sigmas": inversion.falling, "guidance_scale": 1.0, "add_noise": False}
    for step in pipe.sample(cond, None, inversion.latents, **how): ...
    """

    latents: Float[Tensor, "b c h w"]  # at the last level: noise, where that is 1
    image: Float[Tensor, "b c h w"]  # the picture's latents, in model space
    trajectory: tuple[Tensor, ...]  # latents [b, c, h, w] at each of the levels, the last of them `latents`
    sigmas: Float[Tensor, " levels"]  # float64, rising from 0.0001

    @property
    def falling(self) -> Float[Tensor, " levels"]:
        """The levels of the way back to the picture: falling to 0."""
        return torch.cat([self.sigmas[1:].flip(0), self.sigmas.new_zeros(1)])


def rising(levels: Tensor, strength: float) -> Tensor:
    """The levels of an inversion: those of the last round(steps strength) steps of a drawing, upwards.

    Args:
        levels: of the drawing, falling to 0, [steps + 1].
        strength: how far towards noise, above 0 up to 1 (ComfyUI's SplitSigmasDenoise and FlipSigmas).

    Raises:
        ValueError: the strength leaves no step.
    """
    steps = len(levels) - 1
    kept = round(steps * number("strength", strength, 0, 1))
    if not kept:
        raise ValueError(f"strength {strength:g} leaves none of {steps} steps; give more strength or more steps")
    found = levels[-(kept + 1) :].flip(0)
    return torch.cat([found.new_full((1,), LOWEST), found[1:]]) if found[0] == 0 else found


def euler_up(denoise: Denoise, x: Tensor, levels: Tensor) -> Iterator[Step]:
    """Euler's method to rising levels: x + v(x, sigma) (sigma' - sigma). First order.

    Args:
        denoise: (latent, noise level) -> predicted x0, of the latent's shape.
        x: the latent at the first level, any shape.
        levels: [steps + 1], rising from above 0.
    """
    for i, (sigma, following) in enumerate(pairwise(levels.tolist())):
        x0 = denoise(x, sigma)
        step = Step(i, following, x + (x - x0) / sigma * (following - sigma), x0)
        yield step
        x = step.x


def heun_up(denoise: Denoise, x: Tensor, levels: Tensor) -> Iterator[Step]:
    """Heun's method to rising levels: the mean of the velocities at both ends. Second order, two model calls a step.

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
