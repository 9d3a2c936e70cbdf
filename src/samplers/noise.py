"""Noise: the starting noise of a picture, and the fresh noise that stochastic solvers add."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
# (level before the step, level after it) -> noise of unit variance, of the latent's shape
Noise = Callable[[float, float], Tensor]


def gaussian(
    shape: Sequence[int], generators: torch.Generator | Sequence[torch.Generator] | None, dtype: torch.dtype
) -> Tensor:
    """Draw normal noise of shape [b, c, h, w] in `dtype`, on the generator's device.

    Args:
        shape: [b, c, h, w]; any number of dimensions, of which the first counts the samples.
        generators: one for the whole batch, or one per sample; None draws from torch's global state on the CPU.
        dtype: the dtype of the draw; a float64 draw gives other numbers than a float32 draw, and so does one of 16 bits
            on a CPU under torch 2.11 (under 2.13 these are rounded float32 numbers).

    Raises:
        ValueError: the number of generators is not the number of samples.
    """
    if generators is None or isinstance(generators, torch.Generator):
        device = "cpu" if generators is None else generators.device
        return torch.randn(tuple(shape), generator=generators, device=device, dtype=dtype)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} samples; give one, or one per sample")
    return torch.cat([gaussian((1, *shape[1:]), generator, dtype) for generator in generators])


class Fresh:
    """Independent normal noise for every call, whatever the levels.

    Args:
        x: a latent of the shape, dtype and device that the noise shall have.
        generators: see `gaussian`; each continues from its present state.
    """

    def __init__(self, x: Tensor, generators: Generators = None) -> None:
        self.like, self.generators = x, generators

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return sent(gaussian(self.like.shape, self.generators, self.like.dtype), self.like)


class BrownianTree:
    """The noise of ComfyUI's and k-diffusion's SDE solvers: increments of one Brownian path over the levels.

    Between two levels it is (W(sigma') - W(sigma)) / sqrt(|sigma' - sigma|), so that the noise added between two levels
    does not depend on the number of steps between them. torchsde draws the path, in float32 on the CPU (Li et al. 2020,
    arXiv 2001.01328, section 4); it comes with the extra `comfy`.

    Args:
        x: a latent of the shape, dtype and device that the noise shall have.
        sigma_min, sigma_max: the lowest level above 0, and the highest.
        seeds: one for the whole batch, or one per sample; then the noise of a sample depends on its own seed alone.

    Raises:
        ImportError: torchsde is not installed.
        ValueError: the number of seeds is not the number of samples.
    """

    def __init__(self, x: Tensor, sigma_min: float, sigma_max: float, seeds: int | Sequence[int]) -> None:
        tree = _torchsde().BrownianTree
        if isinstance(seeds, Sequence) and len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} seeds for {len(x)} samples; give one, or one per sample")
        self.like, self.batched = x, isinstance(seeds, Sequence)
        zero = torch.zeros(x.shape[1:] if self.batched else x.shape, dtype=x.dtype, device="cpu")
        low, high = (torch.tensor(level, dtype=torch.float32, device="cpu") for level in (sigma_min, sigma_max))
        each = seeds if isinstance(seeds, Sequence) else [seeds]
        self.trees = [tree(low, zero, high, entropy=seed) for seed in each]

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        ends = [torch.tensor(level, dtype=torch.float32, device="cpu") for level in (sigma, sigma_next)]
        with (
            warnings.catch_warnings()
        ):  # torchsde rounds the ends of its path and warns of ours, which may lie 1e-6 beyond
            warnings.filterwarnings("ignore", "Should have t")
            paths = torch.stack([tree(min(ends), max(ends)) for tree in self.trees])
        noise = (paths if self.batched else paths[0]) * (1.0 if sigma_next > sigma else -1.0)
        return sent(noise / (ends[1] - ends[0]).abs().sqrt(), self.like)


def sent(noise: Tensor, like: Tensor) -> Tensor:
    """Noise on the device and in the dtype of `like`; the host does not wait for a GPU that fetches it."""
    return moved(noise.to(like.dtype), like.device)


def moved(noise: Tensor, device: torch.device) -> Tensor:
    """Noise on a device; the host does not wait for a GPU that fetches it."""
    fetches = device.type == "cuda" and noise.device.type == "cpu"
    return (noise.pin_memory() if fetches else noise).to(device, non_blocking=fetches)


def _torchsde() -> Any:
    try:
        import torchsde
    except ImportError as error:
        raise ImportError(
            "ComfyUI's noise of the *_sde samplers is drawn by torchsde, which is not installed: "
            'pip install "mmdit-lab[comfy]", or use another profile, whose noise is torch\'s own'
        ) from error
    return torchsde
