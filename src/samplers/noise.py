"""Noise: where a picture starts, and what stochastic solvers add on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
# What a stochastic solver asks: (level before, level after) -> noise of unit variance, of the latent's shape.
Noise = Callable[[float, float], Tensor]


def gaussian(
    shape: Sequence[int], generators: torch.Generator | Sequence[torch.Generator] | None, dtype: torch.dtype
) -> Tensor:
    """Normal noise of `shape` [b, c, h, w], drawn in `dtype` on the generator's device.

    Args:
        shape: of the batch.
        generators: one for the whole batch, or one per sample; None draws from torch's global state on the CPU.
        dtype: what the draw itself is made in: float64 draws are other numbers than float32 ones.

    Raises:
        ValueError: there are as many generators neither as one nor as samples.
    """
    if generators is None or isinstance(generators, torch.Generator):
        device = "cpu" if generators is None else generators.device
        return torch.randn(tuple(shape), generator=generators, device=device, dtype=dtype)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} samples; give one, or one per sample")
    return torch.cat([gaussian((1, *shape[1:]), generator, dtype) for generator in generators])


class Fresh:
    """Independent normal noise for every request, whatever the levels.

    Args:
        x: the latent: its shape, dtype and device.
        generators: see `gaussian`; each goes on from where it is.
    """

    def __init__(self, x: Tensor, generators: Generators = None) -> None:
        self.like, self.generators = x, generators

    def __call__(self, sigma: float, following: float) -> Tensor:
        return gaussian(self.like.shape, self.generators, self.like.dtype).to(self.like.device)


class BrownianTree:
    """The noise of ComfyUI's and k-diffusion's SDE solvers: increments of one Brownian path over the levels.

    Between two levels it is (W(sigma') - W(sigma)) / sqrt(|sigma' - sigma|), so that what is added over a stretch does
    not depend on how many steps it is cut into. torchsde draws the path, in float32 on the CPU (Li et al. 2020,
    arXiv 2001.01328, section 4); it comes with the extra `comfy`.

    Args:
        x: the latent: its shape, dtype and device.
        sigma_min, sigma_max: the lowest level above 0, and the highest.
        seeds: one for the whole batch, or one per sample, whose noise is then that of its seed alone.

    Raises:
        ImportError: torchsde is not installed.
        ValueError: there are as many seeds neither as one nor as samples.
    """

    def __init__(self, x: Tensor, sigma_min: float, sigma_max: float, seeds: int | Sequence[int]) -> None:
        tree = _torchsde().BrownianTree
        if isinstance(seeds, Sequence) and len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} seeds for {len(x)} samples; give one, or one per sample")
        self.like, self.batched = x, isinstance(seeds, Sequence)
        zero = torch.zeros(x.shape[1:] if self.batched else x.shape, dtype=x.dtype)
        low, high = (torch.tensor(level, dtype=torch.float32) for level in (sigma_min, sigma_max))
        each = seeds if isinstance(seeds, Sequence) else [seeds]
        self.trees = [tree(low, zero, high, entropy=seed) for seed in each]

    def __call__(self, sigma: float, following: float) -> Tensor:
        ends = [torch.tensor(level, dtype=torch.float32) for level in (sigma, following)]
        with warnings.catch_warnings():  # it rounds its own ends, and then finds ours a millionth beyond them
            warnings.filterwarnings("ignore", "Should have t")
            paths = torch.stack([tree(min(ends), max(ends)) for tree in self.trees])
        noise = (paths if self.batched else paths[0]) * (1.0 if following > sigma else -1.0)
        return (noise / (ends[1] - ends[0]).abs().sqrt()).to(self.like)


def _torchsde() -> Any:
    try:
        import torchsde
    except ImportError as error:
        raise ImportError(
            "ComfyUI's noise of the *_sde samplers is drawn by torchsde, which is not installed: "
            'pip install "mmdit-lab[comfy]", or use another profile, whose noise is torch\'s own'
        ) from error
    return torchsde
