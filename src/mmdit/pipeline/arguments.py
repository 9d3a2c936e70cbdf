"""Arguments of a pipeline, checked: each error says what was found, what is expected and what to give."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Literal

from torch import Tensor

from mmdit.models.config import MMDiTConfig
from mmdit.pipeline.images import OUTPUT_TYPES
from mmdit.pipeline.profiles import PRESETS, PROFILES, Profile
from quant.recipe import Recipe, as_recipe
from samplers import pick, resolution_shift

Offload = Literal["stages"]
Shift = float | Literal["resolution"] | None


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
    recipe = as_recipe(quant, "quant")
    if recipe.activation == "static":
        raise ValueError(
            f"quant={quant!r} needs scales of the activations: load without quant, then mmdit.quantize_static"
        )
    return recipe


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
