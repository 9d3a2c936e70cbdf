"""Inpainting: the latent and the prediction outside of the mask, at every noise level."""

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
    differential: float = 0.0  # share of Differential Diffusion, 0 to 1, see `Blend.mask_at`

    def to(self, x: Tensor) -> Source:
        """Move the source to the device and the dtype of x."""
        return replace(self, latents=self.latents.to(x), mask=None if self.mask is None else self.mask.to(x))


def checked_source(source: Source, shape: Sequence[int]) -> Source:
    """Check a source, and repeat its picture and mask for each latent of shape [b, c, h, w].

    Raises:
        ValueError: the picture or the mask has another shape, or `differential` is outside of [0, 1].
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
    """Repeat each entry of a batch equally often, to a batch of `count`; copies of one entry are adjacent.

    Raises:
        ValueError: `count` is no multiple of the batch.
    """
    if not len(batch) or count % len(batch):
        raise ValueError(f"a batch of {len(batch)} cannot be repeated to {count}; give one, or one for each")
    return batch.repeat_interleave(count // len(batch), 0)


def noisy(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Add noise to latents of any shape: sigma * noise + (1 - sigma) * latents."""
    return sigma * noise + (1 - sigma) * latents


def latent_mask(mask: Tensor, height: int, width: int, values: MaskValues = "soft") -> Float[Tensor, "b 1 h w"]:
    """Resize a mask to the size of the latents, [b, 1, h, w].

    Args:
        mask: [b, H, W] in [0, 1], of any size.
        height, width: the size of the latents, in cells.
        values: "soft" resizes bilinearly, without antialiasing or rounding (ComfyUI); "binary" thresholds at 0.5 and
            then resizes by nearest neighbour (diffusers).
    """
    given = mask.unsqueeze(1)
    if values == "soft":
        return F.interpolate(given, size=(height, width), mode="bilinear")
    return F.interpolate((given >= 0.5).to(given.dtype), size=(height, width))


@dataclass(frozen=True, eq=False)
class Blend:
    """Blends the given picture into a drawing outside of the mask.

    `around` does so as ComfyUI's `KSamplerX0Inpaint`, and `after` as diffusers' `StableDiffusion3InpaintPipeline`.
    """

    latents: Float[Tensor, "b c h w"]  # latents of the picture, without noise
    noise: Float[Tensor, "b c h w"]  # noise of unit variance
    mask: Float[Tensor, "b 1 h w"]
    differential: float
    first: float  # the first noise level of the drawing
    last: float  # the noise level from which on Differential Diffusion draws everywhere

    @classmethod
    def of(cls, source: Source, noise: Tensor, sigmas: Tensor, shift: float) -> Blend | None:
        """Make the blend of a source for a drawing with these sigmas; None if the source has no mask."""
        if source.mask is None:
            return None
        lowest = float(shifted(torch.tensor(1e-3, dtype=torch.float64, device="cpu"), shift))
        first, last = float(sigmas[0]), max(lowest, float(sigmas[-1]))
        return cls(source.latents, noise, source.mask, source.differential, first, last)

    def mask_at(self, sigma: float) -> Tensor:
        """The mask at a noise level.

        In Differential Diffusion (Levin and Fried 2023, arXiv 2306.00950), the mask value of a cell sets the noise
        level below which it may change: a cell changes where its mask is at least (sigma - last) / (first - last).
        Source: ComfyUI's DifferentialDiffusion.
        """
        if not self.differential:
            return self.mask
        threshold = (sigma - self.last) / (self.first - self.last) if self.first > self.last else 0.0
        inside = (self.mask >= threshold).to(self.mask.dtype)
        return self.differential * inside + (1 - self.differential) * self.mask

    def latent(self, x: Tensor, sigma: float) -> Tensor:
        """Replace the latent x outside of the mask with the picture's latent at this noise level."""
        mask = self.mask_at(sigma)
        return x * mask + noisy(self.latents, self.noise, sigma) * (1 - mask)

    def prediction(self, x0: Tensor, sigma: float) -> Tensor:
        """Replace the predicted x0 outside of the mask with the given picture's latents."""
        mask = self.mask_at(sigma)
        return x0 * mask + self.latents * (1 - mask)

    def around(self, guide: Guide) -> Guide:
        """Wrap a guide: outside of the mask, its input and its prediction are those of the given picture."""

        def blended(x: Tensor, sigma: float) -> Guided:
            found = guide(self.latent(x, sigma), sigma)
            return Guided(self.prediction(found.x0, sigma), found.uncond)

        return blended

    def after(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Wrap the steps: outside of the mask, `step.x` becomes the given picture at the step's noise level."""
        for step in steps:
            step.x = self.latent(step.x, step.sigma)
            yield step
