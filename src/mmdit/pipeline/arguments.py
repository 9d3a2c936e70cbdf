"""Checks of a pipeline's arguments; each error tells what was found, what is expected and what to give."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Literal

import torch
from torch import Tensor

from mmdit.models.config import MMDiTConfig
from mmdit.pipeline.images import OUTPUT_TYPES
from mmdit.pipeline.profiles import PRESETS, PROFILES, Profile
from mmdit.runtime.plan import parse_bytes
from mmdit.utils import is_boolean, number, shortened
from quant.recipe import Recipe, as_recipe
from samplers import pick, resolution_shift

LEAST_TILE = 16  # pixels a side; with smaller tiles the calls of layers would cost more than their work
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Offload = Literal["stages"]
Shift = float | Literal["resolution"] | None


def profile_of(profile: str | Profile, preset: str | None = None) -> Profile:
    """The profile, given itself or by name, with the settings of a preset as its defaults.

    Raises:
        ValueError: a name is unknown; the nearest names are listed.
    """
    found = profile if isinstance(profile, Profile) else pick(PROFILES, profile, "profile")
    return found if preset is None else pick(PRESETS, preset, "preset").applied(found)


def checked_offload(offload: str | None) -> str | None:
    """Return the argument `offload`, or raise ValueError unless it is None or "stages"."""
    return offload if offload is None else pick({"stages": offload}, offload, "offload")


def checked_memory(memory: str | int | None, offload: str | None) -> int | None:
    """Return the argument `memory` in bytes.

    Raises:
        ValueError: it is no size; or `offload` is given too.
    """
    if memory is None:
        return None
    if offload is not None:
        raise ValueError(f"memory={memory!r} and offload={offload!r} are both given; a budget decides what takes turns")
    return parse_bytes(memory)


def checked_quant(quant: str | Recipe | None) -> Recipe | None:
    """The recipe, given itself or by name.

    Raises:
        ValueError: the name is unknown, or the recipe has static activations, whose scales need a calibration.
    """
    if quant is None:
        return None
    recipe = as_recipe(quant, "quant")
    if recipe.activation == "static":
        raise ValueError(
            f"quant={quant!r} needs scales of the activations: load without quant, then call "
            "mmdit.quantize_static; or write a quantized model by `mmdit quantize --recipe fp8-static`"
        )
    return recipe


def check_output_type(output_type: str) -> None:
    """Raise ValueError for an unknown output type; the nearest names are listed."""
    pick(dict.fromkeys(OUTPUT_TYPES), output_type, "output_type")


def shift_for(shift: Shift, default: float, sides: Sequence[int], patch: int) -> float:
    """The argument `shift` as a number.

    Args:
        shift: a number above 0; None for the default; "resolution" to compute it from the size of the latents.
        default: the model's shift.
        sides: height and width of the latents, in cells.
        patch: the transformer's patch size, in cells.

    Raises:
        ValueError: `shift` is neither a finite number above 0 nor "resolution".
    """
    if shift is None:
        return default
    if isinstance(shift, str):
        pick({"resolution": shift}, shift, "shift")
        return resolution_shift((sides[0] // patch) * (sides[1] // patch))
    found = number('shift, which may be "resolution",', shift, 0)
    if not found:
        raise ValueError(f'shift must be a finite number above 0, or "resolution", got {shift!r}')
    return found


def check_tensor(name: str, value: object, *, finite: bool = False) -> None:
    """Raise TypeError or ValueError unless a value is a dense floating-point tensor (with `finite`, a finite one)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a tensor of floating-point numbers")
    if value.layout != torch.strided or value.dtype not in _FLOATS or value.device.type == "meta":
        raise ValueError(
            f"{name} is a tensor of {value.dtype}, {value.layout}, on {value.device}; expected a dense one of "
            "float16, bfloat16, float32 or float64, with values"
        )
    if finite and (bad := int((~torch.isfinite(value)).sum())):
        raise ValueError(f"{bad} of {value.numel()} values of {name} are not finite; give finite ones")


def cells(pixels: int, name: str, config: MMDiTConfig, cell: int, unit: int) -> int:
    """The number of latent cells along a side of a picture.

    Args:
        pixels: length of the side.
        name: the argument's name, for errors.
        config: the transformer's config.
        cell: pixels per latent cell.
        unit: the side must be a multiple of this number of cells.

    Raises:
        TypeError: `pixels` is not a whole number.
        ValueError: it is not such a multiple, or exceeds the transformer's position table.
    """
    try:
        pixels = index("" if is_boolean(pixels) else pixels)  # type: ignore[arg-type] # no index of a string
    except TypeError as error:
        raise TypeError(f"{name} is {type(pixels).__name__}, expected int: {shortened(pixels)}") from error
    unit *= cell
    most = cell * config.patch_size * config.pos_embed_size
    if pixels % unit or not unit <= pixels <= most:
        near = min(max(round(min(pixels, most) / unit) * unit, unit), most) if pixels > 0 else unit
        raise ValueError(
            f"{name} must be a multiple of {unit} from {unit} to {most}, got {shortened(pixels)}; use {near}"
        )
    return pixels // cell


def check_latents(
    latents: Tensor, count: int, config: MMDiTConfig, cell: int, unit: int, height: int | None, width: int | None
) -> None:
    """Raise ValueError unless there are `count` finite latents of a size that the model supports and that was given."""
    check_tensor("latents", latents, finite=True)
    most = config.patch_size * config.pos_embed_size
    drawn = all(unit <= side <= most and side % unit == 0 for side in latents.shape[2:])
    if latents.ndim != 4 or latents.shape[:2] != (count, config.in_channels) or not drawn:
        raise ValueError(
            f"latents have shape {list(latents.shape)}, expected [{count}, {config.in_channels}, height/{cell}, "
            f"width/{cell}], sides in multiples of {unit} up to {most}"
        )
    for name, pixels, side in (("height", height, latents.shape[2]), ("width", width, latents.shape[3])):
        if pixels is not None and pixels != side * cell:
            raise ValueError(f"{name} is {pixels}, but the {name} of the latents is {side * cell}; leave {name} out")
