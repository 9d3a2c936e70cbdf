"""Arguments of a pipeline, checked: each error says what was found, what is expected and what to give."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

from encoders import checked_prompts
from mmdit.config import MMDiTConfig
from mmdit.pictures import OUTPUT_TYPES
from mmdit.profiles import PROFILES, Profile
from samplers import SOLVERS, pick

Generators = torch.Generator | Sequence[torch.Generator] | None


def profile_of(profile: str | Profile) -> Profile:
    """A profile, or the one of that name."""
    return profile if isinstance(profile, Profile) else pick(PROFILES, profile, "profile")


def check_names(output_type: str, sampler: str) -> None:
    """Raise ValueError, with the nearest names, for one that is unknown."""
    pick(dict.fromkeys(OUTPUT_TYPES), output_type, "output_type")
    pick(SOLVERS, sampler, "sampler")


def whole(name: str, value: int, least: int) -> int:
    """The value of an argument that counts something."""
    if not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def matching(negative: str | Sequence[str], count: int) -> list[str]:
    """As many negative prompts as prompts."""
    negatives = [negative] * count if isinstance(negative, str) else checked_prompts(negative, "negative prompt")
    if len(negatives) != count:
        raise ValueError(f"{len(negatives)} negative prompts for {count} prompts; give one, or one for each")
    return negatives


def generators(seed: int | Sequence[int] | None, generator: Generators, count: int) -> Generators:
    """What draws the noise of `count` pictures."""
    if seed is not None and generator is not None:
        raise ValueError("seed and generator are both given; give one of them")
    if seed is None:
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(
                f"{len(generator)} generators for {count} pictures; give one, or a list of one per picture"
            )
        return generator
    if isinstance(seed, SupportsIndex):
        return _seeded(seed)
    if not isinstance(seed, Sequence) or len(seed) != count:
        found = f"{len(seed)} seeds" if isinstance(seed, Sequence) else f"seed {seed!r}"
        raise ValueError(f"{found} for {count} pictures; give one whole number, or a list of one per picture")
    return [_seeded(one) for one in seed]


def _seeded(seed: SupportsIndex) -> torch.Generator:
    if not isinstance(seed, SupportsIndex) or not -(2**63) <= index(seed) < 2**64:
        raise ValueError(f"a seed is a whole number of at most 64 bits, got {seed!r}")
    return torch.Generator().manual_seed(index(seed))


def cells(pixels: int, name: str, config: MMDiTConfig, cell: int) -> int:
    """The latent cells, of `cell` pixels each, along a side of so many pixels."""
    if not isinstance(pixels, int):
        raise TypeError(f"{name} is {type(pixels).__name__}, expected int: {pixels!r}")
    unit = cell * config.patch_size
    most = unit * config.pos_embed_size
    if pixels % unit or not unit <= pixels <= most:
        near = min(max(round(pixels / unit) * unit, unit), most)
        raise ValueError(f"{name} must be a multiple of {unit} from {unit} to {most}, got {pixels}; use {near}")
    return pixels // cell


def check_latents(
    latents: Tensor, count: int, config: MMDiTConfig, cell: int, height: int | None, width: int | None
) -> None:
    """Raise ValueError unless they are `count` latents of a size that the model draws, and that was asked for."""
    patch, most = config.patch_size, config.patch_size * config.pos_embed_size
    drawn = all(patch <= side <= most and side % patch == 0 for side in latents.shape[2:])
    if latents.ndim != 4 or latents.shape[:2] != (count, config.in_channels) or not drawn:
        raise ValueError(
            f"latents have shape {list(latents.shape)}, expected [{count}, {config.in_channels}, height/{cell}, "
            f"width/{cell}], sides in multiples of {patch} up to {most}"
        )
    for name, pixels, side in (("height", height, latents.shape[2]), ("width", width, latents.shape[3])):
        if pixels is not None and pixels != side * cell:
            raise ValueError(f"{name} is {pixels}, but that of the latents is {side * cell}; leave {name} out")
