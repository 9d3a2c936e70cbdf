"""State dicts with `Float8Tensor`s as plain tensors that safetensors can hold, and back without losing a bit.

The spelling is ComfyUI's newer one: `<layer>.weight` (codes), `<layer>.weight_scale`, `<layer>.input_scale`, and the
formats of layers in the metadata as `_quantization_metadata`. What it has no word for (how activations are treated
beyond a static scale, what the codes stand for) is in an entry of our own, `mmdit_quant`; readers that do not know it
widen the weight. With one scale per weight such files load in ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.recipe import Recipe
from quant.scaling import DTYPES
from quant.spellings import FORMAT_OF, FORMATS, HEADER, NOTE, layers_in, weight_of
from quant.stored import Stored, checked_input_scale, checked_scale, recipe_of, stored_weights
from quant.tensor import Float8Tensor

OWN, VERSION = "mmdit_quant", 1
_NAMES = {FORMAT_OF[dtype]: name for name, dtype in FORMATS.items()}


class Kind(NamedTuple):
    """What a packed weight is, beside its codes and scales."""

    recipe: Recipe
    dtype: torch.dtype  # what it stands for


def pack(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, e.g. for `safetensors.torch.save_file(*pack(model.state_dict()), path)`.

    Args:
        state_dict: Float8Tensors are taken apart, all other tensors stay what they are.

    Raises:
        ValueError: a Float8Tensor that is transposed or lacks its input scale, or whose parts need a key that is taken.
    """
    tensors = {key: tensor for key, tensor in state_dict.items() if not isinstance(tensor, Float8Tensor)}
    kinds, taken = {}, set[int]()
    for key, tensor in state_dict.items():
        if isinstance(tensor, Float8Tensor):
            parts = _parts(key, tensor, taken)
            if double := sorted(parts.keys() & tensors.keys()):
                raise ValueError(f"{double[0]!r} is a key of its own, and a part of the Float8Tensor {key!r}")
            tensors |= parts
            kinds[key] = Kind(tensor.recipe, tensor.dtype)
    return tensors, metadata_of(kinds)


def unpack(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """The state dict of a file in any spelling of scaled float8; what `pack` wrote comes back as it was.

    Float8 tensors that have no scale stay what they are: which of them are weights of Linears, a state dict cannot say
    (`mmdit.load_mmdit` can).

    Args:
        tensors, metadata: of a file.
        dtype: what weights stand for of which our own entry in the metadata says nothing.

    Raises:
        ValueError: scales and weights do not pair, a scale is no positive number, or the metadata say otherwise.
    """
    kinds = kinds_in(metadata or {})
    if missing := sorted({part for key in kinds for part in (key, scale_keys(key)[0])} - tensors.keys()):
        raise ValueError(f"{OWN} speaks of {missing[0]!r}, and there is no such tensor; the file is incomplete")
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
    """The metadata of a file with these weights, by key; empty for none."""
    if not kinds:
        return {}
    layers = {layer_of(key): note_of(kind.recipe) for key, kind in kinds.items() if _is_weight(key)}
    own = {
        key: {"dtype": str(kind.dtype).removeprefix("torch."), "recipe": asdict(kind.recipe)}
        for key, kind in kinds.items()
    }
    return {
        HEADER: json.dumps({"format_version": "1.0", "layers": layers}, sort_keys=True),
        OWN: json.dumps({"version": VERSION, "weights": own}, sort_keys=True),
    }


def note_of(recipe: Recipe) -> dict[str, Any]:
    """What ComfyUI is told of a layer.

    Without a static scale it would round activations under a scale of 1, so that it is told to leave them be.
    """
    note: dict[str, Any] = {"format": _NAMES[recipe.format]}
    return note if recipe.activation == "static" else note | {"full_precision_matrix_mult": True}


def kinds_in(metadata: Mapping[str, str]) -> dict[str, Kind]:
    """`{key of a weight: what it is}` of our own entry; empty where there is none.

    Raises:
        ValueError: it is not the expected JSON.
    """
    try:
        entry = json.loads(metadata.get(OWN, '{"weights": {}}'))
        newer = entry.get("version", VERSION) > VERSION
        kinds = {} if newer else {key: _kind(said) for key, said in entry["weights"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{OWN} is not the expected JSON, {{"weights": {{key: {{"dtype": ..., "recipe": {{...}}}}}}}} '
            f"({type(error).__name__}: {error})"
        ) from error
    if newer:
        raise ValueError(f"{OWN} has version {entry['version']}, this is {VERSION}: a newer mmdit-lab wrote the file")
    return kinds


def merge_metadata(shards: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The metadata of a file that is cut in shards: each speaks of its own layers.

    Raises:
        ValueError: an entry is not the expected JSON.
    """
    shards = list(shards)
    merged = {key: value for shard in shards for key, value in shard.items()}
    for entry, inside in ((HEADER, "layers"), (OWN, "weights")):
        try:
            values = [json.loads(shard[entry]) for shard in shards if entry in shard]
            if len(values) > 1:
                whole = {name: said for value in values for name, said in value[inside].items()}
                merged[entry] = json.dumps(values[0] | {inside: whole}, sort_keys=True)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{entry} is not the expected JSON ({type(error).__name__}: {error})") from error
    return merged


def scale_keys(key: str, *, older: bool = False) -> tuple[str, str]:
    """Where the scales of a weight and of its input are."""
    if not _is_weight(key):
        return f"{key}_scale", f"{key}_input_scale"
    names = ("scale_weight", "scale_input") if older else ("weight_scale", "input_scale")
    before = key.removesuffix("weight")
    return before + names[0], before + names[1]


def layer_of(key: str) -> str:
    """The name of the layer of a weight."""
    return key.removesuffix("weight").removesuffix(".")


def note_key(key: str) -> str:
    """Where ComfyUI looks for what is said of the layer of a weight."""
    return key.removesuffix("weight") + NOTE


def _is_weight(key: str) -> bool:
    return key == weight_of(layer_of(key))


def _keys(key: str) -> tuple[str, ...]:
    return (key, *scale_keys(key))


def _parts(key: str, tensor: Float8Tensor, taken: set[int]) -> dict[str, Tensor]:
    """Codes and scales, each with memory of its own: pieces of a split weight have one scale, which no file can hold.

    `taken` are the addresses of memory that is used already; those of the parts are added.
    """
    codes, scale = tensor.qdata, tensor.scale
    if scale.ndim and scale.shape != (*codes.shape[:-1], 1):
        raise ValueError(
            f"{key!r} has scales of shape {list(scale.shape)} for codes of shape {list(codes.shape)}; what is packed "
            "has one scale, or one per row: pack it as it was before it was transposed"
        )
    if tensor.recipe.activation == "static" and tensor.input_scale is None:
        raise ValueError(f"{key!r} has static activations and no input scale: run mmdit.calibrate first")
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
    """A weight under a name that only our own entry knows."""
    codes, (scale_key, input_key) = tensors[key], scale_keys(key)
    if codes.dtype not in FORMAT_OF:
        raise ValueError(f"{OWN} speaks of {key!r} as float8, but it is {codes.dtype}; the file was written wrongly")
    scale = checked_scale(tensors[scale_key], codes.shape, key, own.granularity)
    input_scale = checked_input_scale(tensors[input_key], key) if input_key in tensors else None
    return Stored(scale, input_scale, recipe_of(codes.dtype, scale, key, own, static=input_scale is not None))


def _kind(said: Mapping[str, Any]) -> Kind:
    dtype = getattr(torch, said["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype {said['dtype']!r}")
    return Kind(Recipe(**said["recipe"]), dtype)
