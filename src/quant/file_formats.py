"""How float8 checkpoints spell their scales.

Three spellings are in use, all with value = stored * scale:
  ComfyUI, older: a marker `<prefix>scaled_fp8`, then `<layer>.scale_weight` and maybe `<layer>.scale_input`;
  ComfyUI, newer: `<layer>.weight_scale`, `<layer>.input_scale`, and per layer `<layer>.comfy_quant` (JSON bytes) or one
  `_quantization_metadata` in the file's metadata;
  NVIDIA ModelOpt: `<layer>.weight_scale`, `<layer>.input_scale`.
A file with none of them is plain: value = stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_WEIGHT_SCALES = {"scale_weight": "ComfyUI (scale_weight)", "weight_scale": "ComfyUI or ModelOpt (weight_scale)"}
_INPUT_SCALES = ("scale_input", "input_scale")
_EMBEDDINGS = ("shared", "embed_tokens", "token_embedding", "position_embedding", "relative_attention_bias")


@dataclass(frozen=True)
class Scales:
    """Which keys of a file are scales, and of what."""

    spelling: str  # for people
    weights: dict[str, str] = field(default_factory=dict)  # key of the float8 weight -> key of its scale
    inputs: dict[str, str] = field(default_factory=dict)  # key of the float8 weight -> key of the input's scale
    notes: frozenset[str] = frozenset()  # keys that hold no value: markers and per-layer JSON

    @property
    def keys(self) -> set[str]:
        """Every key that is not a weight."""
        return {*self.weights.values(), *self.inputs.values(), *self.notes}


def find_scales(dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str] | None = None) -> Scales:
    """Pair the scales of a file with their weights, by `{key: dtype}`.

    Raises:
        ValueError: a scale without a float8 weight, a float8 weight without a scale among scaled ones, two scales for
            one weight, or a quantization other than float8.
    """
    notes = frozenset(key for key in dtypes if _last(key) in ("scaled_fp8", "comfy_quant"))
    weights, spellings = _paired(dtypes, _WEIGHT_SCALES)
    inputs, _ = _paired(dtypes, _INPUT_SCALES)
    _refuse_other_formats(dtypes, metadata or {})
    scaled = bool(weights or notes)
    if without := [key for key in dtypes if scaled and key not in weights and _needs_scale(key, dtypes[key])]:
        raise ValueError(f"{_some(without)}: float8 without a scale, though the file says that it is scaled")
    if not scaled:
        plain = any(dtype in FLOAT8 for dtype in dtypes.values())
        return Scales("plain float8 (no scales)" if plain else "no float8", inputs=inputs)
    return Scales(" + ".join(sorted(spellings)) or "ComfyUI marker without scales", weights, inputs, notes)


def dequantize(stored: Tensor, scale: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """stored * scale, computed in float32 (float64 for float64) and rounded once.

    Args:
        stored: float8 codes, [out, in] or any shape.
        scale: one number, or one per row as [out] or [out, 1].
        name: what to call the weight in an error.
        dtype: of the result.

    Raises:
        ValueError: the scale has another shape, or is zero, negative or not finite.
    """
    if scale.numel() not in (1, stored.shape[0]):
        raise ValueError(f"{name}: scale of shape {list(scale.shape)} for a weight of shape {list(stored.shape)}")
    if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
        raise ValueError(f"{name}: its scale must be finite and above zero, found {scale.flatten()[:4].tolist()}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = scale.to(wide).reshape(-1, *[1] * (stored.ndim - 1)) if scale.numel() > 1 else scale.to(wide).reshape(())
    return (stored.to(wide) * rows).to(dtype)


def layer_format(note: bytes) -> str:
    """The format that a layer's `comfy_quant` bytes name.

    Raises:
        ValueError: it is not the expected JSON, or not a float8 format.
    """
    try:
        name = json.loads(note)["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"comfy_quant holds {note[:80]!r}, expected JSON with a format") from error
    if name not in FORMATS:
        raise ValueError(f"quantization format {name!r} is not read; known are {', '.join(FORMATS)}")
    return str(name)


def _paired(dtypes: Mapping[str, torch.dtype], endings: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """`{weight key: scale key}` and the spellings met, for scale keys with one of these last parts."""
    found: dict[str, str] = {}
    for key in dtypes:
        layer, _, ending = key.rpartition(".")
        if ending not in endings:
            continue
        weight = f"{layer}.weight"
        if dtypes.get(weight) not in FLOAT8:
            what = "there is no such weight" if weight not in dtypes else f"that weight is {dtypes[weight]}, not float8"
            raise ValueError(f"stray scale {key!r}: it belongs to {weight!r}, and {what}")
        if weight in found:
            raise ValueError(f"{weight!r} has two scales: {found[weight]!r} and {key!r}")
        found[weight] = key
    return found, {_WEIGHT_SCALES.get(_last(key), "") for key in found.values()}


def _refuse_other_formats(dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]) -> None:
    if other := [key for key in dtypes if _last(key) == "weight_scale_2"]:
        raise ValueError(f"{_some(other)}: block scales of NVFP4, which is not read; use a float8 or 16-bit file")
    if "_quantization_metadata" in metadata:
        try:
            layers = json.loads(metadata["_quantization_metadata"])["layers"]
            formats = {layer["format"] for layer in layers.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"_quantization_metadata is not the expected JSON ({error!r})") from error
        if unknown := sorted(formats - set(FORMATS)):
            raise ValueError(f"quantization formats {unknown} are not read; known are {', '.join(FORMATS)}")


def _needs_scale(key: str, dtype: torch.dtype) -> bool:
    """Weights of linears; norms and embeddings are stored plain in the files that are known."""
    layer, _, ending = key.rpartition(".")
    return dtype in FLOAT8 and ending == "weight" and _last(layer) not in _EMBEDDINGS and "norm" not in _last(layer)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(repr(key) for key in keys[:3]) + more
