"""Drawing inside of a mask: what the latent and the prediction are outside of it, at every noise level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmdit.utils import number
from samplers import Guide, Guided, Step, shifted

MaskValues = Literal["binary", "soft"]


@dataclass(frozen=True, eq=False)
class Source:
    """The picture that a drawing starts from, as latents, and where it may change."""

    latents: Tensor  # [b, c, h, w] in model space, without noise
    mask: Tensor | None = None  # [b, 1, h, w] in [0, 1]: 1 is drawn anew, 0 stays; None is 1 everywhere
    differential: float = 0.0  # how far Differential Diffusion replaces the mask, see `Blend.mask_at`

    def to(self, x: Tensor) -> Source:
        """The same on the device and in the dtype of x."""
        return replace(self, latents=self.latents.to(x), mask=None if self.mask is None else self.mask.to(x))


def checked_source(source: Source, shape: Sequence[int]) -> Source:
    """The source with a picture and a mask for each latent of this shape, [b, c, h, w].

    Raises:
        ValueError: a picture or a mask of another shape, or a share outside of [0, 1].
    """
    count, _, *cells = shape
    latents = _for_each("image", source.latents, count, [shape[1], *cells])
    mask = None if source.mask is None else _for_each("mask", source.mask, count, [1, *cells])
    return replace(source, latents=latents, mask=mask, differential=number("differential", source.differential, 0, 1))


def _for_each(name: str, value: Tensor, count: int, wanted: list[int]) -> Tensor:
    if [*value.shape[1:]] != wanted or len(value) not in (1, count):
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {[count, *wanted]}, or 1 in place of {count}")
    return value.expand(count, *wanted)


def repeated(batch: Tensor, count: int) -> Tensor:
    """A batch of `count`, each entry as often as the others, the repetitions of one after each other."""
    return batch.repeat_interleave(count // len(batch), 0)


def noisy(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The latents at a noise level: sigma noise + (1 - sigma) latents, any shape."""
    return sigma * noise + (1 - sigma) * latents


def latent_mask(mask: Tensor, height: int, width: int, values: MaskValues = "soft") -> Float[Tensor, "b 1 h w"]:
    """A mask [b, H, W] at the size of the latents, in cells.

    Args:
        mask: in [0, 1], of any size.
        height, width: of the latents.
        values: "soft" is bilinear, without antialiasing or rounding (ComfyUI); "binary" is 1 from 0.5 on, then
            nearest (diffusers).
    """
    given = mask.unsqueeze(1)
    if values == "soft":
        return F.interpolate(given, size=(height, width), mode="bilinear")
    return F.interpolate((given >= 0.5).to(given.dtype), size=(height, width))


@dataclass(frozen=True, eq=False)
class Blend:
    """What a mask keeps of a picture while the rest of it is drawn.

    `around` is ComfyUI's `KSamplerX0Inpaint`, `after` is that of diffusers' `StableDiffusion3InpaintPipeline`.
    """

    latents: Float[Tensor, "b c h w"]  # of the picture, without noise
    noise: Float[Tensor, "b c h w"]  # of unit variance
    mask: Float[Tensor, "b 1 h w"]
    differential: float
    first: float  # the first noise level of the drawing
    last: float  # the level at which Differential Diffusion draws everywhere

    @classmethod
    def of(cls, source: Source, noise: Tensor, sigmas: Tensor, shift: float) -> Blend | None:
        """What the mask of a source keeps in a drawing along these levels; None where the source has no mask."""
        if source.mask is None:
            return None
        lowest = float(shifted(torch.tensor(1e-3, dtype=torch.float64), shift))
        first, last = float(sigmas[0]), max(lowest, float(sigmas[-1]))
        return cls(source.latents, noise, source.mask, source.differential, first, last)

    def mask_at(self, sigma: float) -> Tensor:
        """The mask at a noise level.

        Differential Diffusion (Levin and Fried 2023, arXiv 2306.00950) lets a cell change below a level that its mask
        value says: where the mask is at least (sigma - last) / (first - last). ComfyUI's DifferentialDiffusion.
        """
        if not self.differential:
            return self.mask
        threshold = (sigma - self.last) / (self.first - self.last) if self.first > self.last else 0.0
        inside = (self.mask >= threshold).to(self.mask.dtype)
        return self.differential * inside + (1 - self.differential) * self.mask

    def latent(self, x: Tensor, sigma: float) -> Tensor:
        """The latent x at a noise level, with the picture's outside of the mask."""
        mask = self.mask_at(sigma)
        return x * mask + noisy(self.latents, self.noise, sigma) * (1 - mask)

    def prediction(self, x0: Tensor, sigma: float) -> Tensor:
        """The predicted picture, with the given one outside of the mask."""
        mask = self.mask_at(sigma)
        return x0 * mask + self.latents * (1 - mask)

    def around(self, guide: Guide) -> Guide:
        """The guide, with the picture outside of the mask in what it is given and in what it predicts."""

        def blended(x: Tensor, sigma: float) -> Guided:
            found = guide(self.latent(x, sigma), sigma)
            return Guided(self.prediction(found.x0, sigma), found.uncond)

        return blended

    def after(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, with the picture at the step's level outside of the mask; the solver goes on from that."""
        for step in steps:
            step.x = self.latent(step.x, step.sigma)
            yield step
