"""What a file says of its float8 weights beside their codes: checked scales, and the recipe to read them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from quant.recipe import Granularity, Recipe
from quant.spellings import (
    FORMAT_OF,
    HEADER,
    MARKER,
    NOTE,
    Note,
    Scales,
    along_rows,
    check_formats,
    check_scale_shape,
    find_scales,
    format_in,
    last_part,
    positive,
    weight_of,
)


class Stored(NamedTuple):
    """What a file says of one float8 weight beside its codes."""

    scale: Tensor  # float32, () or [out, 1]
    input_scale: Tensor | None  # float32, ()
    recipe: Recipe


def stored_weights(
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    notes: Mapping[str, Note],
    recipes: Mapping[str, Recipe],
) -> tuple[Scales, dict[str, Stored]]:
    """How the scales of a model are spelled, and `{key of a scaled weight: what stands beside its codes}`.

    Args:
        shapes, dtypes: of all its tensors.
        read: gives the tensor of a key; called for scales and notes.
        notes: of the file's metadata, by layer.
        recipes: of our own entry there, by the weight's key; a weight without one has what the spelling says.

    Raises:
        ValueError: see `find_scales`; a scale that is not one positive number, or one per row; or two places that say
            different things of a weight.
    """
    said = _said(dtypes, read, notes)
    check_formats(said, dtypes)
    scales = find_scales(dtypes, scaled=bool(notes))
    marked = any(last_part(key) == MARKER and prod(shapes[key]) == 2 for key in scales.notes)
    named = {weight_of(layer) for layer, note in said.items() if note.full_precision}
    full = frozenset(weight for weight in scales.weights if marked or weight in named)
    found = {}
    for weight, key in scales.weights.items():
        own, given = recipes.get(weight), scales.inputs.get(weight)
        scale = checked_scale(read(key), shapes[weight], weight, None if own is None else own.granularity)
        input_scale = None if given is None else checked_input_scale(read(given), weight)
        static = input_scale is not None and weight not in full
        found[weight] = Stored(scale, input_scale, recipe_of(dtypes[weight], scale, weight, own, static=static))
    return replace(scales, full_precision=full), found


def recipe_of(codes: torch.dtype, scale: Tensor, name: str, own: Recipe | None = None, *, static: bool) -> Recipe:
    """The recipe of a stored weight: of our own entry, else one that says no more than the spelling.

    Args:
        codes: the dtype of its codes.
        scale: as `checked_scale` gives it.
        name: what to call the weight in an error.
        own: what our own entry says.
        static: whether its activations have a scale, that is used.

    Raises:
        ValueError: our own entry does not go with codes and scale.
    """
    granularity: Granularity = "row" if scale.ndim else "tensor"
    spelled = Recipe(FORMAT_OF[codes], granularity, activation="static" if static else "none")
    for what in ("format", "granularity") if own else ():
        if getattr(own, what) != getattr(spelled, what):
            raise ValueError(
                f"{name!r} is said to have {what} {getattr(own, what)!r}, but has {getattr(spelled, what)!r}; "
                "the file was written wrongly"
            )
    if own and own.activation == "static" and not static:
        raise ValueError(f"{name!r} is said to have static activations, but has no input scale; the file is incomplete")
    return own or spelled


def checked_scale(scale: Tensor, weight: Sequence[int], name: str, granularity: Granularity | None = None) -> Tensor:
    """A weight's scale as float32, () or [..., out, 1].

    Args:
        scale: as it is stored.
        weight: the shape of the codes.
        name: what to call the weight in an error.
        granularity: of our own entry, which tells what one number for one row is.

    Raises:
        ValueError: the scale has another shape or dtype, or is zero, negative or not finite.
    """
    check_scale_shape(weight, scale.shape, name)
    scale, rows = positive(scale, name, "a scale"), (*weight[:-1], 1)
    if scale.numel() == prod(rows) and (scale.numel() != 1 or granularity == "row"):
        return scale.reshape(rows)
    return scale.reshape(()) if scale.numel() == 1 else along_rows(scale, len(weight))


def checked_input_scale(scale: Tensor, name: str) -> Tensor:
    """The scale of a weight's input as float32 ().

    Raises:
        ValueError: it is not one number, or zero, negative or not finite.
    """
    if scale.numel() != 1:
        raise ValueError(f"{name}: input scale of shape {list(scale.shape)}; expected one number")
    return positive(scale, name, "an input scale").reshape(())


def _said(
    dtypes: Mapping[str, torch.dtype], read: Callable[[str], Tensor], notes: Mapping[str, Note]
) -> dict[str, Note]:
    """What metadata and tensors of bytes say of layers together."""
    found = dict(notes)
    for key in dtypes:
        layer, _, ending = key.rpartition(".")
        if ending == NOTE:
            note = format_in(bytes(read(key).flatten().view(torch.uint8).tolist()))
            if found.setdefault(layer, note) != note:
                raise ValueError(f"{layer!r}: {HEADER} says {found[layer]}, but {key} says {note}")
    return found
