"""How float8 checkpoints spell their scales, and which other quantizations there are, which we do not read.

Three spellings are in use, all with value = stored * scale:
  ComfyUI, older: a marker `<prefix>scaled_fp8`, then `<layer>.scale_weight` and maybe `<layer>.scale_input`;
  ComfyUI, newer: `<layer>.weight_scale`, `<layer>.input_scale`, and per layer `<layer>.comfy_quant` (JSON bytes) or one
  `_quantization_metadata` in the file's metadata;
  NVIDIA ModelOpt: `<layer>.weight_scale`, `<layer>.input_scale`.
A file with none of them is plain: value = stored.
A layer with an input scale rounds its activations to float8 under that scale. A layer without one, or where the marker
has two elements or the layer says `full_precision_matrix_mult`, dequantizes its weight and leaves activations as they
are. (ComfyUI takes 1 for an input scale that is missing.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from quant.formats import DTYPES, FLOAT8, FORMAT_NAMED
from quant.scaling import positive, printable

HEADER = "_quantization_metadata"
MARKER, NOTE = "scaled_fp8", "comfy_quant"
_WEIGHT_SCALES = ("scale_weight", "weight_scale")
_INPUT_SCALES = ("scale_input", "input_scale")
Parse = Callable[[str | bytes, str], Any]  # see `parse_text`
_TEXT = 8 * 2**20  # bytes of JSON in a file's metadata; a thousand layers take 0.1 MB
_NAME = 200  # characters of a file's words that an error repeats
_INSTEAD = "use a float8 or 16-bit file of the model"
_EMBEDDINGS = ("shared", "embed_tokens", "token_embedding", "position_embedding", "relative_attention_bias")
# Keys by which other quantizations are known, and their names; the first that is found is named.
_UNREAD: Final = (
    (re.compile(r"\.quant_state\.bitsandbytes__nf4$"), "bitsandbytes NF4 (4 bits)"),
    (re.compile(r"\.quant_state\.bitsandbytes__fp4$"), "bitsandbytes FP4 (4 bits)"),
    (re.compile(r"\.quant_state(\.|$)|\.(nested_)?(absmax|quant_map)$"), "bitsandbytes (4 bits)"),
    (re.compile(r"\.SCB$|\.weight_format$"), "bitsandbytes LLM.int8 (8-bit integers)"),
    (re.compile(r"\.weight_scale_2$"), "NVFP4 (4 bits in blocks, with block scales)"),
    (re.compile(r"\.(wscales|wtscale|wcscales)$"), "SVDQuant (4 bits)"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ (packed integers)"),
    (re.compile(r"\.weight\._(data|scale|shift)$"), "optimum-quanto"),
)
_ANY_UNREAD: Final = re.compile("|".join(pattern.pattern for pattern, _ in _UNREAD))


def unread_quantization(
    dtypes: Mapping[str, torch.dtype],
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, object] | None = None,
) -> str:
    """What quantization a file has that is not read here: one sentence that names it, or "" where it has none.

    Readers call it before they compare keys and shapes, because such weights have other shapes and dtypes and would be
    reported as shape errors. It recognises bitsandbytes, NVFP4, MXFP8, 8-bit integers with scales, GPTQ, AWQ, SVDQuant,
    optimum-quanto, formats that ComfyUI's metadata names, and whatever a config.json calls `quantization_config`. (GGUF
    is a file format of its own.) It does not raise.

    Args:
        dtypes: The dtype of each tensor by its key, with or without prefix.
        metadata: The file's metadata.
        config: The model's config.json, parsed.
    """
    what = _unread_keys(dtypes) or _unread_layers(metadata or {}) or _unread_config(config or {})
    return f"{what}, which is not read; {_INSTEAD}" if what else ""


def _unread_keys(dtypes: Mapping[str, torch.dtype]) -> str:
    suspects = [key for key in dtypes if _ANY_UNREAD.search(key)]
    for pattern, name in _UNREAD if suspects else ():
        if found := [key for key in suspects if pattern.search(key)]:
            return f"{_some(found)}: quantized by {name}"
    scales = {key: weight_of(key.rpartition(".")[0]) for key in dtypes if last_part(key) in _WEIGHT_SCALES}
    if found := [key for key in scales if dtypes[key] in (torch.uint8, torch.float8_e8m0fnu)]:
        return f"{_some(found)}: quantized by MXFP8 (float8 in blocks, with block scales)"
    if found := [weight for weight in scales.values() if dtypes.get(weight) in (torch.int8, torch.uint8)]:
        return f"{_some(found)}: quantized to 8-bit integers with scales"
    return ""


def _unread_layers(metadata: Mapping[str, str]) -> str:
    try:
        notes = layers_in(metadata)
    except ValueError:  # `find_scales` and its callers say what is wrong with it
        return ""
    if found := [layer for layer, note in notes.items() if note.format not in FORMAT_NAMED]:
        return f"{_some(found)}: quantized in the format {notes[found[0]].format!r}"
    return ""


def _unread_config(config: Mapping[str, object]) -> str:
    said = config.get("quantization_config")
    if said is None:
        return ""
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    return f"config.json has a quantization_config of {str(method)[:80]!r}"


@dataclass(frozen=True)
class Scales:
    """Which keys of a file are scales, and of which weights."""

    spelling: str  # a name for people
    weights: dict[str, str] = field(default_factory=dict)  # key of the float8 weight -> key of its scale
    inputs: dict[str, str] = field(default_factory=dict)  # key of the float8 weight -> key of the input's scale
    notes: frozenset[str] = frozenset()  # keys of markers and per-layer JSON, which hold no value
    full_precision: frozenset[str] = frozenset()  # keys of weights whose activations are not rounded, the file says

    @property
    def keys(self) -> set[str]:
        """Every key that is not a weight."""
        return {*self.weights.values(), *self.inputs.values(), *self.notes}


class Note(NamedTuple):
    """The format that a file names for one layer, in its metadata or beside the weight."""

    format: str
    full_precision: bool = False


def find_scales(dtypes: Mapping[str, torch.dtype], *, scaled: bool = False) -> Scales:
    """Pair the scales of a model with their weights, by `{key: dtype}`.

    Args:
        dtypes: The dtype of every tensor of the model.
        scaled: Whether the file's metadata says that float8 weights have scales.

    Raises:
        ValueError: There is a scale without a float8 weight, a float8 weight without a scale among scaled ones, two
            scales for one weight, or another quantization (see `unread_quantization`).
    """
    if other := unread_quantization(dtypes):
        raise ValueError(other)
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


def parse_text(text: str | bytes, name: str) -> Any:
    """Parse a JSON text of a file.

    This parser knows limits of size and depth only. Functions that read JSON take another one of this form as `parse`;
    `mmdit` gives its own strict reader.

    Args:
        text: The text.
        name: The name of the text in an error.

    Raises:
        ValueError: The text is not JSON, is larger than 8 MiB, or nests too deep.
    """
    if len(text) > _TEXT:
        raise ValueError(f"{name} has {len(text)} bytes, more than {_TEXT}")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{name} nests arrays and objects too deep") from error


def layers_in(metadata: Mapping[str, str], parse: Parse = parse_text) -> dict[str, Note]:
    """The notes of a file's `_quantization_metadata`, by layer; empty where the file has none.

    Args:
        metadata: The file's metadata.
        parse: The JSON parser, see `parse_text`.

    Raises:
        ValueError: The entry is not the expected JSON.
    """
    if HEADER not in metadata:
        return {}
    try:
        layers = parse(metadata[HEADER], HEADER)["layers"]
        return {layer: _note(said) for layer, said in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "_quantization_metadata is not the expected JSON, "
            f'{{"layers": {{name: {{"format": ...}}}}}} ({type(error).__name__}: {str(error)[:_NAME]})'
        ) from error


def format_in(note: bytes, parse: Parse = parse_text) -> Note:
    """The note in the bytes of a layer's `comfy_quant` tensor.

    Args:
        note: The bytes.
        parse: The JSON parser, see `parse_text`.

    Raises:
        ValueError: The bytes are not the expected JSON.
    """
    try:
        return _note(parse(note, NOTE))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'comfy_quant holds {note[:80]!r}, expected JSON like {{"format": ...}}') from error


def check_formats(notes: Mapping[str, Note], dtypes: Mapping[str, torch.dtype]) -> None:
    """Compare the formats that a file names, `{layer: note}`, with the dtypes of its tensors, `{key: dtype}`.

    Raises:
        ValueError: A format is not float8, or is not the dtype of the layer's weight.
    """
    if other := sorted({note.format for note in notes.values() if note.format not in FORMAT_NAMED}):
        layers = [layer for layer, note in notes.items() if note.format not in FORMAT_NAMED]
        raise ValueError(
            f"quantization {', '.join(map(repr, other))} of {_some(layers)} is not read, only "
            f"{', '.join(FORMAT_NAMED)}; {_INSTEAD}"
        )
    for layer, note in notes.items():
        found = dtypes.get(weight_of(layer))
        if found is not DTYPES[FORMAT_NAMED[note.format]]:
            what = "there is no such weight" if found is None else f"that weight is {found}"
            raise ValueError(
                f"{weight_of(layer)!r:.200} is said to be {note.format}, but {what}; the file was written wrongly"
            )


def weight_of(layer: str) -> str:
    """The key of a layer's weight; where the model is itself one Linear, `layer` is ""."""
    return f"{layer}.weight" if layer else "weight"


def check_scale_shape(weight: Sequence[int], scale: Sequence[int], name: str) -> None:
    """Raise ValueError unless a scale of that shape is one number, or one per row as [out] or [..., out, 1]."""
    rows = list(weight[:1])
    known = [rows, [*rows, *[1] * (len(weight) - 1)], [*rows, 1], [*weight[:-1], 1]] if weight else []
    if prod(scale) != 1 and list(scale) not in known:
        raise ValueError(
            f"{printable(name)}: scale of shape {list(scale)} for a weight of shape {list(weight)}; expected one number"
            + (f", or one per row: {rows} or {known[-1]}" if known else "")
        )


def dequantize(stored: Tensor, scale: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The values of a stored weight: stored * scale, multiplied in float32 (float64 for float64) and rounded once.

    That is what torch's own cast of the exact product gives, which goes through float32 too.

    Args:
        stored: float8 tensor, [out, in] or any shape.
        scale: One number, or one per row as [out] or [..., out, 1].
        name: The name of the weight in an error.
        dtype: The dtype of the result.

    Raises:
        ValueError: The scale has another shape, or is zero, negative or not finite.
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
    """`{key of the weight: key of its scale}` for keys that end in one of these words."""
    found: dict[str, str] = {}
    for key in dtypes:
        layer, _, ending = key.rpartition(".")
        if ending not in endings:
            continue
        weight = weight_of(layer)
        if dtypes.get(weight) not in FLOAT8:
            what = "there is no such weight" if weight not in dtypes else f"that weight is {dtypes[weight]}, not float8"
            raise ValueError(
                f"stray scale {key!r:.200}: it belongs to {weight!r:.200}, and {what}; the file was written wrongly"
            )
        if weight in found:
            raise ValueError(
                f"{weight!r:.200} has two scales, {found[weight]!r:.200} and {key!r:.200}; one is expected"
            )
        found[weight] = key
    return found


def along_rows(scale: Tensor, dims: int) -> Tensor:
    """One number per row, reshaped to multiply a tensor of `dims` dimensions."""
    return scale.reshape(-1, *[1] * (dims - 1))


def _note(said: Any) -> Note:
    name, full = str(said["format"])[:_NAME], said.get("full_precision_matrix_mult", False)
    if not isinstance(full, bool):
        raise TypeError(f"full_precision_matrix_mult is a {type(full).__name__}")
    return Note(name, full)


def _needs_scale(key: str, dtype: torch.dtype) -> bool:
    """Whether the key is a Linear's weight; norms and embeddings are stored plain in the known files."""
    layer, _, ending = key.rpartition(".")
    return (
        dtype in FLOAT8
        and ending == "weight"
        and last_part(layer) not in _EMBEDDINGS
        and "norm" not in last_part(layer)
    )


def last_part(key: str) -> str:
    """The part of a key after its last dot."""
    return key.rpartition(".")[2]


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(repr(key[:_NAME]) for key in keys[:3]) + more
