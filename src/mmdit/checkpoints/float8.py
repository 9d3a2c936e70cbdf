"""Float8 in checkpoint files: reading joins scales with their weights, and writing separates them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from encoders.json_files import parse_json
from mmdit.checkpoints.lazy import AsStored, Codes, LazyTensor, agree
from mmdit.checkpoints.recognise import UNUSED
from mmdit.checkpoints.safetensors_io import CheckpointError
from quant.formats import FLOAT8
from quant.packing import Kind, kinds_in, layer_of, metadata_of, note_key, note_of, scale_keys
from quant.spellings import (
    HEADER,
    MARKER,
    Scales,
    check_formats,
    dequantize,
    layers_in,
    weight_of,
)
from quant.stored import Stored, recipe_of, stored_weights

Float8 = Literal["keep", "dequantize"]
Spelling = Literal["comfyui", "comfyui-old"]
Tensors = dict[str, LazyTensor]
MAX_SCALES = 2**20  # bytes of one scale or note; a scale per row of T5's vocabulary takes 128,512


def absorb_scales(
    source: Path, keys: Mapping[str, str], stored: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> tuple[Tensors, Scales]:
    """The tensors of one model in a file, joined with their scales, and the spelling of these scales.

    Only scales and notes are read, no weights.

    Args:
        source: the path of the file, for errors.
        keys: the tensors of the model, `{name without prefix: name in the file}`.
        stored: all tensors of the file.
        metadata: the file's metadata.

    Raises:
        CheckpointError: a scale is not positive or does not fit its weight, or there are too many or too few scales.
    """
    tensors = {name: stored[key] for name, key in keys.items()}
    names = {key: name for name, key in keys.items()}
    try:
        header = layers_in(metadata, parse_json)
        check_formats(header, {key: lazy.dtype for key, lazy in stored.items()})
        notes = {layer_of(names[key]): header[layer_of(key)] for key in map(weight_of, header) if key in names}
        kinds = {names[key]: kind for key, kind in kinds_in(metadata, parse_json).items() if key in names}
        scales, found = stored_weights(
            {key: lazy.shape for key, lazy in tensors.items()},
            {key: lazy.dtype for key, lazy in tensors.items()},
            partial(_read_small, tensors),
            notes,
            {key: kind.recipe for key, kind in kinds.items()},
            parse_json,
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    absorbed = {key: lazy for key, lazy in tensors.items() if key not in scales.keys and not UNUSED.fullmatch(key)}
    for key, said in found.items():
        absorbed[key] = _scaled(key, tensors[key], said, kinds.get(key))
    if not found:
        absorbed = {key: _plain(key, lazy) for key, lazy in absorbed.items()}
    return absorbed, scales


def _read_small(tensors: Mapping[str, LazyTensor], key: str) -> Tensor:
    """Read a scale or a note, which is refused where it is too large to be one."""
    if tensors[key].nbytes > MAX_SCALES:
        raise ValueError(f"{key!r} takes {tensors[key].nbytes} bytes, {MAX_SCALES} are the most of a scale or a note")
    return tensors[key].read()


def disagreeing(tensors: Mapping[str, LazyTensor], merges: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The merged weights whose parts disagree on the scale, or on the rounding, of their common input.

    Args:
        tensors: The tensors that `absorb_scales` returns.
        merges: The names of the tensors that are merged, one tuple for each merged weight.
    """
    found = []
    for names in merges:
        codes = [tensors[name].codes for name in names if name in tensors]
        known = [each for each in codes if each is not None]
        if len(known) == len(codes) > 1 and len({each.dtype for each in known}) == 1 and not agree(known):
            found.append(names)
    return found


def spelled(tensors: Mapping[str, LazyTensor], spelling: Spelling) -> Tensors:
    """The tensors of a model as they are stored: codes, scales, and the notes that ComfyUI reads.

    Float8 weights that were stored without scales are written without scales.

    Raises:
        ValueError: the older spelling cannot hold these weights.
    """
    kept = _kept(tensors)
    found = dict(tensors)
    for key, codes in kept.items():
        found[key] = LazyTensor(codes.shape, codes.dtype, partial(_codes, codes.load), codes)
        scale, input_scale = scale_keys(key, older=spelling == "comfyui-old")
        found[scale] = LazyTensor.of(codes.scale)
        if codes.input_scale is not None:
            found[input_scale] = LazyTensor.of(codes.input_scale)
        if (
            spelling == "comfyui"
        ):  # notes per layer, because the names in the header are wrong once a loader has removed their prefix
            note = json.dumps(note_of(codes.recipe)).encode()
            found[note_key(key)] = LazyTensor.of(torch.frombuffer(bytearray(note), dtype=torch.uint8))
    if spelling == "comfyui-old" and kept:
        found[MARKER] = _marker(kept)
    return found


def metadata_in(tensors: Mapping[str, LazyTensor], spelling: Spelling) -> dict[str, str]:
    """The metadata of a file with these tensors."""
    metadata = metadata_of({key: Kind(codes.recipe, codes.logical) for key, codes in _kept(tensors).items()})
    if spelling == "comfyui-old":
        metadata.pop(HEADER, None)  # its presence makes ComfyUI read the newer spelling
    return metadata


def _kept(tensors: Mapping[str, LazyTensor]) -> dict[str, Codes]:
    return {key: lazy.codes for key, lazy in tensors.items() if lazy.codes is not None and not lazy.codes.plain}


def _marker(kept: Mapping[str, Codes]) -> LazyTensor:
    """The tensor `scaled_fp8`, which marks a file with scaled float8 and has the dtype of its weights.

    If it has two elements instead of none, ComfyUI dequantizes all weights before it multiplies.
    """
    if rows := [key for key, codes in kept.items() if codes.scale.ndim]:
        raise ValueError(f"the older spelling has one scale per weight, but {rows[0]!r} has one per row: use 'comfyui'")
    if other := [key for key, codes in kept.items() if codes.dtype != torch.float8_e4m3fn]:
        raise ValueError(
            f"the older spelling is read as E4M3 whatever it says, but {other[0]!r} is E5M2: use 'comfyui'"
        )
    widened = {codes.recipe.activation != "static" for codes in kept.values()}
    if len(widened) > 1:
        raise ValueError(
            "the older spelling has no way to say that only some layers have an input scale: use 'comfyui'"
        )
    return LazyTensor.of(torch.zeros(2 if widened.pop() else 0, dtype=torch.float8_e4m3fn))


def _codes(load: Callable[[torch.device], Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    assert dtype in FLOAT8, "codes are written as they are"
    return load(device)


def _scaled(name: str, lazy: LazyTensor, said: Stored, kind: Kind | None) -> LazyTensor:
    def load(dtype: torch.dtype, device: torch.device) -> Tensor:
        return dequantize(lazy.read(device=device), said.scale.to(device), name, dtype)

    codes = Codes(lazy.shape, AsStored(lazy), said.scale, said.input_scale, said.recipe)
    codes = codes if kind is None else replace(codes, logical=kind.dtype)
    return LazyTensor(lazy.shape, lazy.dtype, load, codes)


def _plain(name: str, lazy: LazyTensor) -> LazyTensor:
    if lazy.dtype not in FLOAT8 or not lazy.shape:
        return lazy
    one = torch.ones(())
    recipe = recipe_of(lazy.dtype, one, name, static=False)
    return replace(lazy, codes=Codes(lazy.shape, AsStored(lazy), one, None, recipe, plain=True))
