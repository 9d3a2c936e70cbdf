"""Noise: the starting noise of a picture, and the fresh noise that stochastic solvers add."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
# (level before the step, level after it) -> noise of unit variance, of the latent's shape
Noise = Callable[[float, float], Tensor]

_THREADS = 4  # that draw one large sample
_LARGE = 2**16  # numbers from which threads pay
_BLOCK = 2**12  # a thread begins at a multiple of so many; torch makes normal numbers from blocks of 16 uniform ones


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


def gaussian_by_threads(shape: Sequence[int], generators: Generators, dtype: torch.dtype) -> Tensor:
    """`gaussian`, to the last bit, where a large draw from a generator on a CPU is shared by several threads.

    torch makes each block of normal numbers from as many uniform ones of the same places. So a thread can begin in the
    middle, once it has drawn the uniform numbers before. One thread draws where those take about as long, as in most
    dtypes under torch 2.13, and where threads would not draw the same numbers: each dtype and size is tried before.

    Args:
        shape, generators, dtype: see `gaussian`.
    """
    if isinstance(generators, Sequence) and len(generators) == shape[0]:
        return torch.cat([gaussian_by_threads((1, *shape[1:]), one, dtype) for one in generators])
    count = prod(shape)
    if not isinstance(generators, torch.Generator) or generators.device.type != "cpu" or count < _LARGE:
        return gaussian(shape, generators, dtype)
    if not _pays(dtype) or not _shareable(dtype, count):
        return gaussian(shape, generators, dtype)
    return _shared(count, generators, dtype).view(tuple(shape))


def _shared(count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The next `count` normal numbers of a generator, which is left as one thread would leave it."""
    state, each = generator.get_state(), count // _THREADS // _BLOCK * _BLOCK
    own = [torch.Generator("cpu") for _ in range(_THREADS)]

    def draw(place: int) -> Tensor:
        start, stop = place * each, count if place == _THREADS - 1 else (place + 1) * each
        own[place].set_state(state)
        wide = torch.promote_types(dtype, torch.float32)
        torch.empty(start, dtype=wide, device="cpu").uniform_(generator=own[place])
        return torch.randn(stop - start, generator=own[place], dtype=dtype, device="cpu")

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(draw, range(_THREADS)))
    generator.set_state(own[-1].get_state())
    return torch.cat(parts)


@cache
def _pays(dtype: torch.dtype) -> bool:
    """Whether normal numbers take several times as long as uniform ones, as those of 16 bits do under torch 2.11."""
    return _seconds(partial(torch.randn, dtype=dtype)) > _THREADS * _seconds(partial(torch.rand, dtype=torch.float32))


def _seconds(draw: Callable[..., Tensor]) -> float:
    """Of a draw, the quickest of a few."""
    times, generator = [], torch.Generator("cpu")
    for _ in range(5):
        begin = time.perf_counter()
        draw(2**13, generator=generator, device="cpu")
        times.append(time.perf_counter() - begin)
    return min(times)


@cache
def _shareable(dtype: torch.dtype, count: int) -> bool:
    """Whether threads draw so many numbers as one thread does, and leave the generator in the same state.

    torch may draw large samples in another way than small ones, so that a smaller sample would prove nothing.
    """
    one, many = (torch.Generator("cpu").manual_seed(1) for _ in range(2))
    for generator in (one, many):  # a state in the middle, with a number that is kept for the next odd draw
        torch.randn(3, generator=generator, device="cpu")
    same = torch.equal(torch.randn(count, generator=one, dtype=dtype, device="cpu"), _shared(count, many, dtype))
    return same and torch.equal(one.get_state(), many.get_state())


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
