"""How float8 checkpoints spell their scales.

Three spellings are in use, all with value = stored * scale:
  ComfyUI, older: a marker `<prefix>scaled_fp8`, then `<layer>.scale_weight` and maybe `<layer>.scale_input`;
  ComfyUI, newer: `<layer>.weight_scale`, `<layer>.input_scale`, and per layer `<layer>.comfy_quant` (JSON bytes) or one
  `_quantization_metadata` in the file's metadata;
  NVIDIA ModelOpt: `<layer>.weight_scale`, `<layer>.input_scale`.
A file with none of them is plain: value = stored.
Activations are multiplied in float8 under a layer's input scale; where there is none, or where the marker has two
elements or a layer says `full_precision_matrix_mult`, the weight is widened and they stay as they are. (ComfyUI takes 1
for a scale that is not there.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.recipe import Format

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FORMAT_OF: dict[torch.dtype, Format] = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
HEADER = "_quantization_metadata"
MARKER, NOTE = "scaled_fp8", "comfy_quant"
_WEIGHT_SCALES = ("scale_weight", "weight_scale")
_INPUT_SCALES = ("scale_input", "input_scale")
_INSTEAD = "use a float8 or 16-bit file of the model"
_EMBEDDINGS = ("shared", "embed_tokens", "token_embedding", "position_embedding", "relative_attention_bias")


@dataclass(frozen=True)
class Scales:
    """Which keys of a file are scales, and of what."""

    spelling: str  # for people
    weights: dict[str, str] = field(default_factory=dict)  # key of the float8 weight -> key of its scale
    inputs: dict[str, str] = field(default_factory=dict)  # key of the float8 weight -> key of the input's scale
    notes: frozenset[str] = frozenset()  # keys that hold no value: markers and per-layer JSON
    full_precision: frozenset[str] = frozenset()  # keys of weights whose activations are said to stay as they are

    @property
    def keys(self) -> set[str]:
        """Every key that is not a weight."""
        return {*self.weights.values(), *self.inputs.values(), *self.notes}


class Note(NamedTuple):
    """What a file says of one layer, in its metadata or beside the weight."""

    format: str
    full_precision: bool = False


def find_scales(dtypes: Mapping[str, torch.dtype], *, scaled: bool = False) -> Scales:
    """Pair the scales of a model with their weights, by `{key: dtype}`.

    Args:
        dtypes: of all tensors of the model.
        scaled: whether the file says in its metadata that float8 weights have scales.

    Raises:
        ValueError: a scale without a float8 weight, a float8 weight without a scale among scaled ones, two scales for
            one weight, or a quantization other than float8.
    """
    if other := [key for key in dtypes if last_part(key) == "weight_scale_2"]:
        raise ValueError(f"{_some(other)}: block scales of NVFP4, which is not read; {_INSTEAD}")
    notes = frozenset(key for key in dtypes if last_part(key) in (MARKER, NOTE))
    weights, inputs = _paired(dtypes, _WEIGHT_SCALES), _paired(dtypes, _INPUT_SCALES)
    noted = bool(scaled or notes)
    scaled = bool(noted or weights or inputs)
    if without := [key for key in dtypes if scaled and key not in weights and _needs_scale(key, dtypes[key])]:
        raise ValueError(
            f"{_some(without)}: float8 without a scale, though the file says that it is scaled; it is incomplete"
        )
    if not scaled:
        plain = any(dtype in FLOAT8 for dtype in dtypes.values())
        return Scales("plain float8 (no scales)" if plain else "no float8")
    newer = "ComfyUI's newer (weight_scale)" if noted else "ModelOpt's (weight_scale)"
    names = {"scale_weight": "ComfyUI's older (scale_weight)", "weight_scale": newer}
    spellings = {names[last_part(key)] for key in weights.values()}
    return Scales(" + ".join(sorted(spellings)) or "ComfyUI marker without scales", weights, inputs, notes)


def layers_in(metadata: Mapping[str, str]) -> dict[str, Note]:
    """`{layer: what is said of it}` of a file's `_quantization_metadata`; empty where it has none.

    Raises:
        ValueError: it is not the expected JSON.
    """
    if HEADER not in metadata:
        return {}
    try:
        layers = json.loads(metadata[HEADER])["layers"]
        return {layer: _note(said) for layer, said in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "_quantization_metadata is not the expected JSON, "
            f'{{"layers": {{name: {{"format": ...}}}}}} ({type(error).__name__}: {error})'
        ) from error


def format_in(note: bytes) -> Note:
    """What a layer's `comfy_quant` bytes say.

    Raises:
        ValueError: it is not the expected JSON.
    """
    try:
        return _note(json.loads(note))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'comfy_quant holds {note[:80]!r}, expected JSON like {{"format": ...}}') from error


def check_formats(notes: Mapping[str, Note], dtypes: Mapping[str, torch.dtype]) -> None:
    """Hold what a file says of its layers, `{layer: note}`, against its `{key: dtype}`.

    Raises:
        ValueError: a format other than float8, or one that is not the weight's dtype.
    """
    if other := sorted({note.format for note in notes.values() if note.format not in FORMATS}):
        layers = [layer for layer, note in notes.items() if note.format not in FORMATS]
        raise ValueError(
            f"quantization {', '.join(map(repr, other))} of {_some(layers)} is not read, only {', '.join(FORMATS)}; "
            f"{_INSTEAD}"
        )
    for layer, note in notes.items():
        found = dtypes.get(weight_of(layer))
        if found is not FORMATS[note.format]:
            what = "there is no such weight" if found is None else f"that weight is {found}"
            raise ValueError(
                f"{weight_of(layer)!r} is said to be {note.format}, but {what}; the file was written wrongly"
            )


def weight_of(layer: str) -> str:
    """The key of a layer's weight; a model that is one Linear has no name before it."""
    return f"{layer}.weight" if layer else "weight"


def check_scale_shape(weight: Sequence[int], scale: Sequence[int], name: str) -> None:
    """Raise ValueError unless a scale of that shape is one number, or one per row as [out] or [..., out, 1]."""
    rows = list(weight[:1])
    known = [rows, [*rows, *[1] * (len(weight) - 1)], [*rows, 1], [*weight[:-1], 1]] if weight else []
    if prod(scale) != 1 and list(scale) not in known:
        raise ValueError(
            f"{name}: scale of shape {list(scale)} for a weight of shape {list(weight)}; expected one number"
            + (f", or one per row: {rows} or {known[-1]}" if known else "")
        )


def dequantize(stored: Tensor, scale: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """stored * scale, multiplied in float32 (float64 for float64) and then rounded to `dtype`.

    That is what torch's own cast of the exact product gives, which goes through float32 too.

    Args:
        stored: float8 codes, [out, in] or any shape.
        scale: one number, or one per row as [out] or [..., out, 1].
        name: what to call the weight in an error.
        dtype: of the result.

    Raises:
        ValueError: the scale has another shape, or is zero, negative or not finite.
    """
    check_scale_shape(stored.shape, scale.shape, name)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = positive(scale, name, "a scale", wide)
    if factor.numel() == 1:
        factor = factor.reshape(())
    elif factor.shape != (*stored.shape[:-1], 1):
        factor = along_rows(factor, stored.ndim)
    return (stored.to(wide) * factor).to(dtype)


def _paired(dtypes: Mapping[str, torch.dtype], endings: Iterable[str]) -> dict[str, str]:
    """`{weight key: scale key}` for scale keys with one of these last parts."""
    found: dict[str, str] = {}
    for key in dtypes:
        layer, _, ending = key.rpartition(".")
        if ending not in endings:
            continue
        weight = weight_of(layer)
        if dtypes.get(weight) not in FLOAT8:
            what = "there is no such weight" if weight not in dtypes else f"that weight is {dtypes[weight]}, not float8"
            raise ValueError(f"stray scale {key!r}: it belongs to {weight!r}, and {what}; the file was written wrongly")
        if weight in found:
            raise ValueError(f"{weight!r} has two scales, {found[weight]!r} and {key!r}; one is expected")
        found[weight] = key
    return found


def along_rows(scale: Tensor, dims: int) -> Tensor:
    """One number per row in the shape that multiplies a tensor of so many dimensions."""
    return scale.reshape(-1, *[1] * (dims - 1))


def _note(said: Any) -> Note:
    name, full = str(said["format"]), said.get("full_precision_matrix_mult", False)
    if not isinstance(full, bool):
        raise TypeError(f"full_precision_matrix_mult is {full!r}")
    return Note(name, full)


def positive(scale: Tensor, name: str, what: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A scale in `dtype`; ValueError, which calls it `what` of `name`, unless it is finite and above zero."""
    if not scale.dtype.is_floating_point:
        raise ValueError(f"{name}: {what} must be floating point, got {scale.dtype}")
    factor = scale.to(dtype)
    if bad := factor[~(factor.isfinite() & (factor > 0))].tolist():
        raise ValueError(f"{name}: {what} must be finite and above zero; {len(bad)} are not, first {bad[:3]}")
    return factor


def _needs_scale(key: str, dtype: torch.dtype) -> bool:
    """Weights of linears; norms and embeddings are stored plain in the files that are known."""
    layer, _, ending = key.rpartition(".")
    return (
        dtype in FLOAT8
        and ending == "weight"
        and last_part(layer) not in _EMBEDDINGS
        and "norm" not in last_part(layer)
    )


def last_part(key: str) -> str:
    """What comes after the last dot."""
    return key.rpartition(".")[2]


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(repr(key) for key in keys[:3]) + more
