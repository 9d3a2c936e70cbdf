"""Seeds and generators for the starting noise of pictures and for the noise that samplers add."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from mmdit.pipeline.profiles import StepNoise
from mmdit.utils import is_boolean, shortened
from samplers import BrownianTree, Fresh, Noise, Solver, gaussian

Generators = torch.Generator | Sequence[torch.Generator] | None
MOST_PICTURES = 2**16
SeedLike = SupportsIndex | Sequence[SupportsIndex] | np.ndarray | Tensor  # what `seed=` takes


def checked_seeds(seed: SeedLike | None) -> int | list[int] | None:
    """The argument `seed` as a whole number or a list of whole numbers; sequences, arrays and tensors are accepted.

    Raises:
        ValueError: it is neither a whole number of at most 64 bits nor a list of them.
    """
    if seed is None:
        return None
    if isinstance(seed, np.ndarray | Tensor) and seed.ndim > 0:
        return [_checked_seed(one) for one in seed.reshape(-1)]
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        return [_checked_seed(one) for one in seed]
    return _checked_seed(seed)


def fresh_seeds(count: int) -> list[int]:
    """Random seeds from torch's global state, which `torch.manual_seed` makes reproducible."""
    _check_few(count)
    return torch.randint(2**32, (count,)).tolist()


def generators(seed: int | list[int] | None, generator: Generators, count: int, *, alone: bool = False) -> Generators:
    """The generators that draw the noise of `count` pictures; None is torch's global state.

    Args:
        seed, generator: one of them, or neither.
        count: number of pictures.
        alone: whether one seed for several pictures is the seed of each.

    Raises:
        ValueError: both are given, or their number differs from the number of pictures.
        TypeError: a generator is not a `torch.Generator`.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed and generator are both given; give one of them")
    if seed is None:
        return _checked_generators(generator, count)
    if isinstance(seed, int):
        if alone:
            _check_few(count)
            return [_seeded(seed) for _ in range(count)]
        return _seeded(seed)
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} pictures; give one whole number, or a list of one per picture")
    return [_seeded(one) for one in seed]


def check_draws_nothing(**sources: object) -> None:
    """Raise ValueError if a seed is given beside latents, where no noise is drawn."""
    if given := [name for name, value in sources.items() if value is not None]:
        raise ValueError(f"latents and {given[0]} are given; latents leave nothing to draw: give one of them")


def own_seeds(seed: int | list[int] | None, count: int, *, alone: bool) -> list[int | None]:
    """The seed with which each of `count` pictures can be drawn again alone; None where there is none.

    Args:
        seed: one for all pictures, or one for each.
        count: number of pictures.
        alone: whether one seed for several pictures is the seed of each.
    """
    if isinstance(seed, list):
        return list(seed)
    return [seed if seed is not None and (alone or count == 1) else None] * count


def _checked_generators(generator: Generators, count: int) -> Generators:
    for one in generator if isinstance(generator, Sequence) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise TypeError(f"generator is {type(one).__name__}, expected a torch.Generator or a list of them")
    if isinstance(generator, Sequence) and len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} pictures; give one, or a list of one per picture")
    return generator


def _check_few(count: int) -> None:
    """Raise ValueError for more pictures than `MOST_PICTURES`, because each would need a generator."""
    if count > MOST_PICTURES:
        raise ValueError(f"{count} pictures at once are asked for, at most {MOST_PICTURES} have seeds of their own")


def _checked_seed(seed: object) -> int:
    try:
        found = None if is_boolean(seed) else index(seed)  # type: ignore[arg-type] # what it is for
    except TypeError:
        found = None
    if found is None or not -(2**63) <= found < 2**64:
        raise ValueError(f"a seed is a whole number of at most 64 bits, got {shortened(seed)}")
    return found


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(_checked_seed(seed))


def solver_options(
    solver: Solver, x: Tensor, sigmas: Tensor, shift: float, generators: Generators, rule: StepNoise
) -> dict[str, Any]:
    """The keyword arguments of a solver that a pipeline sets: the schedule's shift and the noise, if it takes them.

    Args:
        solver: the solver.
        x: the starting latents, [b, c, h, w].
        sigmas: the falling noise levels, float64 [steps + 1].
        shift: the shift of the schedule.
        generators: the generators of the starting noise; None is torch's global state.
        rule: the profile's rule for the added noise.

    Raises:
        ImportError: the rule asks for a Brownian tree, and torchsde is not installed.
    """
    options: dict[str, Any] = {"shift": shift} if solver.shift else {}
    if solver.is_stochastic:
        options["noise"] = _continued(x, generators) if rule == "continued" else _again(solver, x, sigmas, generators)
    return options


def _continued(x: Tensor, generators: Generators) -> Noise:
    return Fresh(x, generators)


def _again(solver: Solver, x: Tensor, sigmas: Tensor, generators: Generators) -> Noise:
    """Noise from new generators with the same seeds, as in ComfyUI: independent draws, or along a Brownian path."""
    seeds = _seeds(generators)
    if solver.noise == "path":
        if seeds is None:
            seeds = int(torch.randint(2**63 - 1, ()))
        return BrownianTree(x, float(sigmas[sigmas > 0].min()), float(sigmas.max()), seeds)
    if seeds is None:
        return Fresh(x)
    if isinstance(seeds, int):
        return Fresh(x, torch.Generator(x.device).manual_seed(seeds))
    return Fresh(x, [torch.Generator(x.device).manual_seed(seed) for seed in seeds])


def next_noise(x: Tensor, generators: Generators) -> Tensor:
    """Noise with the shape of x, drawn on the CPU from each generator's seed + 1; without generators, from torch's.

    For the sampler "ddim", ComfyUI adds it to the picture outside of a mask.
    """
    seeds = _seeds(generators)
    drawn_by: Generators = None
    if isinstance(seeds, list):
        drawn_by = [_seeded((seed + 1) % 2**64) for seed in seeds]
    elif seeds is not None:
        drawn_by = _seeded((seeds + 1) % 2**64)
    return gaussian(x.shape, drawn_by, torch.float32).to(x)


def _seeds(generators: Generators) -> int | list[int] | None:
    """The initial seeds of generators."""
    if generators is None or isinstance(generators, torch.Generator):
        return None if generators is None else generators.initial_seed()
    return [generator.initial_seed() for generator in generators]
