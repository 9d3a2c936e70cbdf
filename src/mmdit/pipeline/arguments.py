"""Arguments of a pipeline, checked: each error says what was found, what is expected and what to give."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from operator import index
from typing import Literal, SupportsIndex

import torch
from torch import Tensor, nn

from mmdit.models.config import MMDiTConfig
from mmdit.pipeline.images import OUTPUT_TYPES
from mmdit.pipeline.profiles import PRESETS, PROFILES, Profile
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor
from samplers import pick, resolution_shift

Offload = Literal["stages"]
Shift = float | Literal["resolution"] | None
Generators = torch.Generator | Sequence[torch.Generator] | None


def profile_of(profile: str | Profile, preset: str | None = None) -> Profile:
    """A profile, or the one of that name, with the settings of a preset as its defaults."""
    found = profile if isinstance(profile, Profile) else pick(PROFILES, profile, "profile")
    return found if preset is None else pick(PRESETS, preset, "preset").applied(found)


def checked_offload(offload: str | None) -> str | None:
    """Raise ValueError unless it is None or "stages"."""
    return offload if offload is None else pick({"stages": offload}, offload, "offload")


def checked_quant(quant: str | Recipe | None) -> Recipe | None:
    """The recipe, or the one of that name.

    Raises:
        ValueError: an unknown name, or a recipe with static activations, whose scales take a calibration.
    """
    if quant is None:
        return None
    recipe = quant if isinstance(quant, Recipe) else pick(RECIPES, quant, "quant")
    if recipe.activation == "static":
        raise ValueError(
            f"quant={quant!r} needs scales of the activations: load without quant, then mmdit.quantize_static"
        )
    return recipe


def check_float8(transformer: nn.Module, recipe: Recipe, name: str) -> None:
    """Raise ValueError for a transformer that is float8 already under another recipe than this."""
    found = {weight.recipe for weight in transformer.parameters() if isinstance(weight, Float8Tensor)}
    if found and found != {recipe}:
        raise ValueError(
            f"{name or 'the pipeline'}: the transformer is float8 already ({', '.join(map(quant_name, found))}) and "
            f"quant= asks for {quant_name(recipe)}; leave quant out, or give a 16-bit file"
        )


def quant_name(recipe: Recipe) -> str:
    """What settings call it: its name among `quant.RECIPES`, or "custom"."""
    return next((name for name, known in RECIPES.items() if known == recipe), "custom")


def check_output_type(output_type: str) -> None:
    """Raise ValueError, with the nearest names, for one that is unknown."""
    pick(dict.fromkeys(OUTPUT_TYPES), output_type, "output_type")


def shift_for(shift: Shift, default: float, sides: Sequence[int], patch: int) -> float:
    """The shift as a number: None is the default, "resolution" that of a latent with these sides.

    Raises:
        ValueError: it is something else, or not a finite number above 0.
    """
    if shift is None:
        return default
    if isinstance(shift, str):
        pick({"resolution": shift}, shift, "shift")
        return resolution_shift((sides[0] // patch) * (sides[1] // patch))
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < inf:
        raise ValueError(f'shift must be a finite number above 0, or "resolution", got {shift!r}')
    return float(shift)


def generators(
    seed: int | Sequence[int] | None, generator: Generators, count: int, *, alone: bool = False
) -> Generators:
    """What draws the noise of `count` pictures.

    Args:
        seed, generator: one of them, or neither.
        count: pictures.
        alone: one seed for several pictures is that of each.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed and generator are both given; give one of them")
    if seed is None:
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(
                f"{len(generator)} generators for {count} pictures; give one, or a list of one per picture"
            )
        return generator
    if isinstance(seed, SupportsIndex):
        return [_seeded(seed) for _ in range(count)] if alone else _seeded(seed)
    if not isinstance(seed, Sequence) or len(seed) != count:
        found = f"{len(seed)} seeds" if isinstance(seed, Sequence) else f"seed {seed!r}"
        raise ValueError(f"{found} for {count} pictures; give one whole number, or a list of one per picture")
    return [_seeded(one) for one in seed]


def check_draws_nothing(**sources: object) -> None:
    """Raise ValueError if something to draw noise with is given beside latents."""
    if given := [name for name, value in sources.items() if value is not None]:
        raise ValueError(f"latents and {given[0]} are given; latents leave nothing to draw: give one of them")


def own_seeds(seed: int | Sequence[int] | None, count: int, *, alone: bool) -> list[int | None]:
    """The seed with which each of `count` pictures can be drawn again by itself; None where there is none.

    Args:
        seed: as it was given.
        count: pictures.
        alone: one seed for several pictures draws each as if alone.
    """
    if isinstance(seed, Sequence):
        return [index(one) for one in seed]
    return [index(seed) if seed is not None and (alone or count == 1) else None] * count


def _seeded(seed: SupportsIndex) -> torch.Generator:
    if not isinstance(seed, SupportsIndex) or not -(2**63) <= index(seed) < 2**64:
        raise ValueError(f"a seed is a whole number of at most 64 bits, got {seed!r}")
    return torch.Generator().manual_seed(index(seed))


def cells(pixels: int, name: str, config: MMDiTConfig, cell: int, unit: int) -> int:
    """The latent cells, of `cell` pixels each and in multiples of `unit`, along a side of so many pixels."""
    if not isinstance(pixels, int):
        raise TypeError(f"{name} is {type(pixels).__name__}, expected int: {pixels!r}")
    unit *= cell
    most = cell * config.patch_size * config.pos_embed_size
    if pixels % unit or not unit <= pixels <= most:
        near = min(max(round(pixels / unit) * unit, unit), most)
        raise ValueError(f"{name} must be a multiple of {unit} from {unit} to {most}, got {pixels}; use {near}")
    return pixels // cell


def check_latents(
    latents: Tensor, count: int, config: MMDiTConfig, cell: int, unit: int, height: int | None, width: int | None
) -> None:
    """Raise ValueError unless they are `count` latents of a size that the model draws, and that was asked for."""
    most = config.patch_size * config.pos_embed_size
    drawn = all(unit <= side <= most and side % unit == 0 for side in latents.shape[2:])
    if latents.ndim != 4 or latents.shape[:2] != (count, config.in_channels) or not drawn:
        raise ValueError(
            f"latents have shape {list(latents.shape)}, expected [{count}, {config.in_channels}, height/{cell}, "
            f"width/{cell}], sides in multiples of {unit} up to {most}"
        )
    for name, pixels, side in (("height", height, latents.shape[2]), ("width", width, latents.shape[3])):
        if pixels is not None and pixels != side * cell:
            raise ValueError(f"{name} is {pixels}, but that of the latents is {side * cell}; leave {name} out")
