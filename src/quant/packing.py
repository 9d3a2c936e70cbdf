"""State dicts with `Float8Tensor`s as plain tensors that safetensors can hold, and back without losing a bit.

The spelling is ComfyUI's newer one: `<layer>.weight` (qdata), `<layer>.weight_scale`, `<layer>.input_scale`, and the
formats of layers in the metadata as `_quantization_metadata`. That spelling has no words for the rest of a recipe and
for the logical dtype, so these are in a metadata entry of our own, `mmdit_quant`; readers that do not know the entry
dequantize the weight. Files with one scale per weight load in ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.formats import DTYPES, FILE_NAMES, FORMAT_OF
from quant.recipe import Recipe
from quant.scaling import checked_input_scale
from quant.spellings import HEADER, NOTE, Parse, layers_in, parse_text, weight_of
from quant.stored import Stored, checked_scale, recipe_of, stored_weights
from quant.tensor import LOGICAL, Float8Tensor

_LOGICAL = {str(dtype).removeprefix("torch."): dtype for dtype in LOGICAL}
OWN, VERSION = "mmdit_quant", 1


class Kind(NamedTuple):
    """Recipe and logical dtype of a packed weight, which our metadata entry keeps."""

    recipe: Recipe
    dtype: torch.dtype


def pack(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Plain tensors and metadata for a safetensors file, from which `unpack` makes the same state dict.

    To write the file:

        tensors, metadata = quant.pack(model.state_dict())
        safetensors.torch.save_file(tensors, path, metadata)

    Args:
        state_dict: Float8Tensors become qdata, scale and input scale under keys of their own; other tensors stay.

    Raises:
        ValueError: A Float8Tensor is transposed or lacks the input scale of its recipe, or a key that its parts need is
            taken.
        TypeError: It is no mapping of keys to tensors.
    """
    _check_mapping(state_dict, "pack")
    tensors = {key: tensor for key, tensor in state_dict.items() if not isinstance(tensor, Float8Tensor)}
    kinds, taken = {}, set[int]()
    for key, tensor in state_dict.items():
        if isinstance(tensor, Float8Tensor):
            parts = _parts(key, tensor, taken)
            if double := sorted(parts.keys() & tensors.keys()):
                raise ValueError(f"{double[0]!r:.200} is a key of its own, and a part of the Float8Tensor {key!r:.200}")
            tensors |= parts
            kinds[key] = Kind(tensor.recipe, tensor.dtype)
    return tensors, metadata_of(kinds)


def unpack(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """The state dict of a file in any spelling of scaled float8; a file that `pack` made comes back as it was.

    Float8 tensors without a scale stay plain float8 tensors, because a state dict does not say which of them are
    weights of Linears (`mmdit.load_mmdit` knows).

    Args:
        tensors, metadata: The tensors and the metadata of the file.
        dtype: The logical dtype of weights that our own metadata entry does not name.

    Raises:
        ValueError: Scales and weights do not pair, a scale is not a positive number, or the metadata contradict the
            tensors.
        TypeError: Tensors or metadata are no mapping.
    """
    _check_mapping(tensors, "unpack")
    _check_mapping(metadata or {}, "unpack (metadata)")
    kinds = kinds_in(metadata or {})
    if missing := sorted({part for key in kinds for part in (key, scale_keys(key)[0])} - tensors.keys()):
        raise ValueError(f"{OWN} names {missing[0]!r:.200}, and there is no such tensor; the file is incomplete")
    unspelled = {key: kind for key, kind in kinds.items() if not _is_weight(key)}
    apart = {part for key in unspelled for part in _keys(key)}
    rest = {key: tensor for key, tensor in tensors.items() if key not in apart}
    scales, found = stored_weights(
        {key: tensor.shape for key, tensor in rest.items()},
        {key: tensor.dtype for key, tensor in rest.items()},
        rest.__getitem__,
        layers_in(metadata or {}),
        {key: kind.recipe for key, kind in kinds.items()},
    )
    found |= {key: _stored(key, tensors, kind.recipe) for key, kind in unspelled.items()}
    state = {key: tensor for key, tensor in tensors.items() if key not in scales.keys | apart - unspelled.keys()}
    for key, said in found.items():
        logical = kinds[key].dtype if key in kinds else dtype
        state[key] = Float8Tensor(tensors[key], said.scale, said.input_scale, said.recipe, logical)
    return state


def metadata_of(kinds: Mapping[str, Kind]) -> dict[str, str]:
    """The metadata of a file with these float8 weights, by key; empty where there is none."""
    if not kinds:
        return {}
    layers = {layer_of(key): note_of(kind.recipe) for key, kind in kinds.items() if _is_weight(key)}
    own = {
        key: {"dtype": str(kind.dtype).removeprefix("torch."), "recipe": _of_files(kind.recipe)}
        for key, kind in kinds.items()
    }
    return {
        HEADER: json.dumps({"format_version": "1.0", "layers": layers}, sort_keys=True),
        OWN: json.dumps({"version": VERSION, "weights": own}, sort_keys=True),
    }


def _of_files(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe).items() if key != "gradient"}


def note_of(recipe: Recipe) -> dict[str, Any]:
    """The note about a layer that ComfyUI reads.

    Without a static scale ComfyUI would round activations under a scale of 1, so the note asks for full precision.
    """
    note: dict[str, Any] = {"format": FILE_NAMES[recipe.format]}
    return note if recipe.activation == "static" else note | {"full_precision_matrix_mult": True}


def kinds_in(metadata: Mapping[str, str], parse: Parse = parse_text) -> dict[str, Kind]:
    """Recipe and logical dtype of each weight, by key, from our own entry; empty where the file has none.

    Args:
        metadata: The file's metadata.
        parse: The JSON parser, see `quant.spellings.parse_text`.

    Raises:
        ValueError: The entry is not the expected JSON, or a newer version wrote it.
    """
    try:
        entry = parse(metadata.get(OWN, '{"weights": {}}'), OWN)
        newer = entry.get("version", VERSION) > VERSION
        kinds = {} if newer else {key: _kind(said) for key, said in entry["weights"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{OWN} is not the expected JSON, {{"weights": {{key: {{"dtype": ..., "recipe": {{...}}}}}}}} '
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if newer:
        raise ValueError(f"{OWN} has version {entry['version']}, this is {VERSION}: a newer mmdit-lab wrote the file")
    return kinds


def merge_metadata(shards: Iterable[Mapping[str, str]], parse: Parse = parse_text) -> dict[str, str]:
    """The metadata of a file in shards, of which each describes its own layers.

    Args:
        shards: The metadata of each shard.
        parse: The JSON parser, see `quant.spellings.parse_text`.

    Raises:
        ValueError: An entry is not the expected JSON.
    """
    shards = list(shards)
    merged = {key: value for shard in shards for key, value in shard.items()}
    for entry, inside in ((HEADER, "layers"), (OWN, "weights")):
        try:
            values = [parse(shard[entry], entry) for shard in shards if entry in shard]
            if len(values) > 1:
                whole = {name: said for value in values for name, said in value[inside].items()}
                merged[entry] = json.dumps(values[0] | {inside: whole}, sort_keys=True)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{entry} is not the expected JSON ({type(error).__name__}: {str(error)[:200]})"
            ) from error
    return merged


def scale_keys(key: str, *, older: bool = False) -> tuple[str, str]:
    """The keys of a weight's scale and of its input scale."""
    if not _is_weight(key):
        return f"{key}_scale", f"{key}_input_scale"
    names = ("scale_weight", "scale_input") if older else ("weight_scale", "input_scale")
    before = key.removesuffix("weight")
    return before + names[0], before + names[1]


def layer_of(key: str) -> str:
    """The name of the layer whose weight has this key."""
    return key.removesuffix("weight").removesuffix(".")


def note_key(key: str) -> str:
    """The key at which ComfyUI looks for the note of the layer whose weight has this key."""
    return key.removesuffix("weight") + NOTE


def _check_mapping(value: object, what: str) -> None:
    if isinstance(value, Mapping):
        return
    hint = "; give its state_dict()" if hasattr(value, "state_dict") else ""
    hint = "; give its two parts as two arguments" if isinstance(value, tuple) else hint
    raise TypeError(f"{what} takes a mapping of names, such as a state dict; got {type(value).__name__}{hint}")


def _is_weight(key: str) -> bool:
    return key == weight_of(layer_of(key))


def _keys(key: str) -> tuple[str, ...]:
    return (key, *scale_keys(key))


def _parts(key: str, tensor: Float8Tensor, taken: set[int]) -> dict[str, Tensor]:
    """qdata and scales, each in memory of its own; safetensors refuses shared memory, and split weights share a scale.

    `taken` holds the addresses of memory that other parts use; those of the new parts are added.
    """
    codes, scale = tensor.qdata, tensor.scale
    if scale.ndim and scale.shape != (*codes.shape[:-1], 1):
        raise ValueError(
            f"{key!r:.200} has scales of shape {list(scale.shape)} for qdata of shape {list(codes.shape)}; only "
            "weights with one scale or one per row are packed: pack the tensor before it is transposed"
        )
    if tensor.recipe.activation == "static" and tensor.input_scale is None:
        raise ValueError(f"{key!r:.200} has static activations and no input scale: run mmdit.calibrate first")
    codes = codes.cpu().view(DTYPES[tensor.recipe.format]) if codes.dtype == torch.uint8 else codes
    found = {}
    for name, part in zip(_keys(key), (codes, scale, tensor.input_scale), strict=True):
        if part is not None:
            found[name] = part.detach().contiguous()
            if found[name].untyped_storage().data_ptr() in taken:
                found[name] = found[name].clone()
            taken.add(found[name].untyped_storage().data_ptr())
    return found


def _stored(key: str, tensors: Mapping[str, Tensor], own: Recipe) -> Stored:
    """Scales and recipe of a weight whose key is not `<layer>.weight`, so that only our own entry names it."""
    codes, (scale_key, input_key) = tensors[key], scale_keys(key)
    if codes.dtype not in FORMAT_OF:
        raise ValueError(f"{OWN} names {key!r:.200} as float8, but it is {codes.dtype}; the file was written wrongly")
    scale = checked_scale(tensors[scale_key], codes.shape, key, own.granularity)
    input_scale = checked_input_scale(tensors[input_key], key) if input_key in tensors else None
    return Stored(scale, input_scale, recipe_of(codes.dtype, scale, key, own, static=input_scale is not None))


def _kind(said: Mapping[str, Any]) -> Kind:
    return Kind(Recipe(**said["recipe"]), _LOGICAL[said["dtype"]])
