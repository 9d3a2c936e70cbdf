"""The float8 weights of a file beside their qdata: checked scales, and the recipe with which they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from quant.formats import FORMAT_OF
from quant.recipe import Granularity, Recipe
from quant.scaling import checked_input_scale, positive, printable
from quant.spellings import (
    HEADER,
    MARKER,
    NOTE,
    Note,
    Parse,
    Scales,
    along_rows,
    check_formats,
    check_scale_shape,
    find_scales,
    format_in,
    last_part,
    parse_text,
    weight_of,
)

NOTE_BYTES = 4096  # the largest `comfy_quant` tensor; those that ComfyUI writes have under 200 bytes


class Stored(NamedTuple):
    """Scales and recipe of one float8 weight of a file."""

    scale: Tensor  # float32, () or [out, 1]
    input_scale: Tensor | None  # float32, ()
    recipe: Recipe


def stored_weights(
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    notes: Mapping[str, Note],
    recipes: Mapping[str, Recipe],
    parse: Parse = parse_text,
) -> tuple[Scales, dict[str, Stored]]:
    """How the scales of a model are spelled, and scales and recipe of every scaled weight by its key.

    Args:
        shapes, dtypes: Shape and dtype of every tensor of the model, by key.
        read: Gives the tensor of a key; called for scales and notes, after their sizes are checked.
        notes: The notes of the file's metadata, by layer.
        recipes: The recipes of our own metadata entry, by the weight's key; other weights have what the spelling says.
        parse: The JSON parser, see `quant.spellings.parse_text`.

    Raises:
        ValueError: See `find_scales`; a scale is not one positive number, or one per row; or two places in the file
            contradict each other.
    """
    _check_note_sizes(shapes, dtypes)
    said = _said(dtypes, read, notes, parse)
    check_formats(said, dtypes)
    scales = find_scales(dtypes, scaled=bool(notes))
    marked = any(last_part(key) == MARKER and prod(shapes[key]) == 2 for key in scales.notes)
    named = {weight_of(layer) for layer, note in said.items() if note.full_precision}
    full = frozenset(weight for weight in scales.weights if marked or weight in named)
    found = {}
    for weight, key in scales.weights.items():
        own, given = recipes.get(weight), scales.inputs.get(weight)
        check_scale_shape(shapes[weight], shapes[key], weight)
        if given is not None and prod(shapes[given]) != 1:
            raise ValueError(f"{printable(weight)}: input scale of shape {list(shapes[given])}; expected one number")
        scale = checked_scale(read(key), shapes[weight], weight, None if own is None else own.granularity)
        input_scale = None if given is None else checked_input_scale(read(given), weight)
        static = input_scale is not None and weight not in full
        found[weight] = Stored(scale, input_scale, recipe_of(dtypes[weight], scale, weight, own, static=static))
    return replace(scales, full_precision=full), found


def recipe_of(codes: torch.dtype, scale: Tensor, name: str, own: Recipe | None = None, *, static: bool) -> Recipe:
    """The recipe of a stored weight: that of our own metadata entry, else the one that the spelling implies.

    Args:
        codes: The dtype of its qdata.
        scale: Its scale, as `checked_scale` gives it.
        name: The name of the weight in an error.
        own: The recipe of our own entry.
        static: Whether the file has a scale for its activations and does not ask for full precision.

    Raises:
        ValueError: Our own entry contradicts qdata or scale.
    """
    granularity: Granularity = "row" if scale.ndim else "tensor"
    spelled = Recipe(FORMAT_OF[codes], granularity, activation="static" if static else "none")
    for what in ("format", "granularity") if own else ():
        if getattr(own, what) != getattr(spelled, what):
            raise ValueError(
                f"{name!r:.200} is said to have {what} {getattr(own, what)!r}, but has {getattr(spelled, what)!r}; "
                "the file was written wrongly"
            )
    if own and own.activation == "static" and not static:
        raise ValueError(
            f"{name!r:.200} is said to have static activations, but has no input scale; the file is incomplete"
        )
    return own or spelled


def checked_scale(scale: Tensor, weight: Sequence[int], name: str, granularity: Granularity | None = None) -> Tensor:
    """A weight's scale as float32, () or [..., out, 1].

    Args:
        scale: The scale as it is stored.
        weight: The shape of the qdata.
        name: The name of the weight in an error.
        granularity: The granularity in our own entry; it decides what one number for a weight of one row is.

    Raises:
        ValueError: The scale has another shape or dtype, or is zero, negative or not finite.
    """
    check_scale_shape(weight, scale.shape, name)
    scale, rows = positive(scale, name, "a scale"), (*weight[:-1], 1)
    if scale.numel() == prod(rows) and (scale.numel() != 1 or granularity == "row"):
        return scale.reshape(rows)
    return scale.reshape(()) if scale.numel() == 1 else along_rows(scale, len(weight))


def _check_note_sizes(shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse notes too large for a layer's JSON before they are read."""
    for key, shape in shapes.items():
        if last_part(key) == NOTE and (size := prod(shape) * dtypes[key].itemsize) > NOTE_BYTES:
            raise ValueError(f"{key!r:.200} has {size} bytes; a layer's quantization note has at most {NOTE_BYTES}")


def _said(
    dtypes: Mapping[str, torch.dtype], read: Callable[[str], Tensor], notes: Mapping[str, Note], parse: Parse
) -> dict[str, Note]:
    """The notes of the metadata together with those in `comfy_quant` tensors."""
    found = dict(notes)
    for key in dtypes:
        layer, _, ending = key.rpartition(".")
        if ending == NOTE:
            note = format_in(bytes(read(key).flatten().view(torch.uint8).tolist()), parse)
            if found.setdefault(layer, note) != note:
                raise ValueError(f"{layer!r:.200}: {HEADER} says {found[layer]}, but {key} says {note}")
    return found
