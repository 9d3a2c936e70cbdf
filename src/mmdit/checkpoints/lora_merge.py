"""Merge LoRAs into weights: compute in float32 from the given weights, and round once to their dtype."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from operator import lt
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar, get_args, overload
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.checkpoints.components import REGISTRY, title
from mmdit.checkpoints.keymaps import some
from mmdit.checkpoints.lora import Lora, check_lora
from mmdit.checkpoints.lora_kinds import LowRank
from mmdit.checkpoints.lora_modules import Patch
from mmdit.checkpoints.lora_names import PARTS, Part
from mmdit.checkpoints.lora_rules import LoraRules
from mmdit.checkpoints.recognise import split, unwrapped
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.utils import number
from quant.formats import FORMAT_OF, Format
from quant.packing import scale_keys
from quant.scaling import all_finite, scale_of, to_codes
from quant.stochastic import stochastic_codes
from quant.tensor import Float8Tensor
from samplers import pick

Rounding = Literal["nearest", "comfyui", "comfyui-new-scale"]
Model = TypeVar("Model", bound=nn.Module)
Strength: TypeAlias = float | Callable[[str], float]
Shapes: TypeAlias = Mapping[str, torch.Size | tuple[int, ...]]
# ComfyUI's prefixes for the weights of each model; the seeds of stochastic rounding derive from the prefixed names.
COMFYUI_PREFIXES: Final[dict[Part, str]] = {
    "transformer": "diffusion_model.",
    "clip_l": "clip_l.transformer.",
    "clip_g": "clip_g.transformer.",
    "t5": "t5xxl.transformer.",
}


class Weighted(NamedTuple):
    """A patch, its strength, the rules for its file, and whether its two halves of rows are exchanged."""

    patch: Patch
    strength: float
    rules: LoraRules
    exchanged: bool


@overload
def merge_lora(
    model: Model,
    lora: Lora | Sequence[Lora],
    strength: float | Sequence[float] = ...,
    *,
    part: Part | None = ...,
    rounding: Rounding | None = ...,
) -> Model: ...
@overload
def merge_lora(
    model: Mapping[str, Tensor],
    lora: Lora | Sequence[Lora],
    strength: float | Sequence[float] = ...,
    *,
    part: Part | None = ...,
    rounding: Rounding | None = ...,
) -> dict[str, Tensor]: ...


def merge_lora(
    model: nn.Module | Mapping[str, Tensor],
    lora: Lora | Sequence[Lora],
    strength: float | Sequence[float] = 1.0,
    *,
    part: Part | None = None,
    rounding: Rounding | None = None,
) -> Any:
    """Add a LoRA, or several in this order, to the weights of a model.

    Each changed weight is computed in float32 (float64 for float64) and rounded once to its own dtype. A float8 weight
    is dequantized, changed and quantized again by its own recipe. If any patch does not fit, no weight is changed.

    Args:
        model: A model, which is changed in place (changed parameters are replaced by new ones), or a state dict in
            official names, with or without the prefixes of single files. For a dict, the result is a new dict that
            shares the unchanged tensors.
        lora: One or more results of `mmdit.load_lora`. LoRAs in one call are rounded once; separate calls round each
            time.
        strength: The strength of all LoRAs, or one for each.
        part: The model: "transformer", "clip_l", "clip_g" or "t5". None infers it from the class or the names. CLIP-L
            and CLIP-G have the same names, so it is required where a file changes both.
        rounding: How float8 is rounded. "nearest" computes a new scale; weights without a scale stay without one.
            "comfyui" keeps the scale and rounds stochastically with ComfyUI's seeds; "comfyui-new-scale" computes a new
            scale first. None uses the rule of the profile with which the LoRA was read.

    Returns:
        The model, or the new state dict.

    Raises:
        CheckpointError: shapes do not fit, or the LoRA changes nothing of this model.
        ValueError: a strength is not finite, the part is unknown or required, the names are not official, a new weight
            is not finite in its dtype, or scales or means were folded into the model's weights.
        TypeError: the model is no model, or a LoRA no result of `mmdit.load_lora`.
    """
    loras, strengths = _pairs(lora, strength)
    if part is not None:
        pick(dict.fromkeys(PARTS), part, "part")
    for name, names in _models(model, loras, part):
        if isinstance(model, nn.Module):
            refuse_folded(model)
        tensors = _tensors(model)
        local = {ours: tensors[key] for ours, key in names.items()}
        plan = planned(name, {key: tensor.shape for key, tensor in local.items()}, loras, strengths)
        new = {names[key]: merged(local[key], key, name, patches, rounding) for key, patches in plan.items()}
        model = _with(model, new)
    return model


def refuse_folded(model: nn.Module) -> None:
    """Raise ValueError for a transformer whose Linears read other inputs than those that LoRAs were trained on."""
    if getattr(model, "folded", False):
        raise ValueError(
            "scales or means were folded into the transformer's weights (smooth=, mean=), so that its Linears read "
            "other inputs than a LoRA was trained on: merge the LoRA before folding"
        )


def planned(
    part: Part, shapes: Shapes, loras: Sequence[Lora], strengths: Sequence[Strength], *, warn: bool = True
) -> dict[str, list[Weighted]]:
    """The patches of each tensor of a model, in order, after checking that all of them fit.

    Args:
        part: the model.
        shapes: the shapes of the model's tensors, by official name.
        loras, strengths: the LoRAs with their strengths; LoRAs that do not change this part are skipped. A strength may
            be a function of the official name.
        warn: whether to warn about patches whose tensors are missing from this model.

    Raises:
        CheckpointError: a patch does not fit its tensor, or all tensors that a LoRA changes in this part are missing.
    """
    plan: dict[str, list[Weighted]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        patches = lora.of(part)
        present = [patch for patch in patches if patch.target.key in shapes]
        _check_fit(lora, part, patches, present, shapes)
        if warn and len(present) < len(patches):
            missing = [patch.target.key for patch in patches if patch.target.key not in shapes]
            warnings.warn(
                f"{lora.source}: this {title(part)} has not all that the LoRA changes; {len(missing)} of "
                f"{len(patches)} patches are left out: {some(missing, 3)}",
                stacklevel=3,
            )
        for patch in present:
            value = strength(patch.target.key) if callable(strength) else strength
            weighted = Weighted(patch, value, lora.rules, _is_exchanged(patch, shapes))
            plan.setdefault(patch.target.key, []).append(weighted)
    return plan


def _check_fit(lora: Lora, part: Part, patches: Sequence[Patch], present: Sequence[Patch], shapes: Shapes) -> None:
    if patches and not present:
        raise CheckpointError(
            f"{lora.source}: this {title(part)} has none of the {len(patches)} tensors that the LoRA changes, "
            f"first {patches[0].target.key}; it fits {lora.base}"
        )
    if odd := [mistake for patch in present if (mistake := _mistake(patch, shapes))]:
        raise CheckpointError(
            f"{lora.source}: {len(odd)} of {len(patches)} patches do not fit this {title(part)}, which is not "
            f"changed: {some(odd, 3)}. The LoRA fits {lora.base}"
        )


def merged(
    tensor: Tensor, key: str, part: Part, patches: Sequence[Weighted], rounding: Rounding | None = None
) -> Tensor:
    """Apply patches to a tensor; the result has the tensor's dtype and float8 recipe.

    Args:
        tensor: the original weight, before any patch.
        key: the official name of the weight.
        part: the model.
        patches: the patches, in the order in which they are applied.
        rounding: see `merge_lora`.

    Raises:
        ValueError: a new value is not finite, or too large for the tensor's dtype.
    """
    values = tensor.dequantize(torch.float32) if isinstance(tensor, Float8Tensor) else tensor.detach()
    wide = torch.promote_types(torch.float32, values.dtype) if values.dtype not in FORMAT_OF else torch.float32
    how = rounding or patches[-1].rules.float8
    values = changed(values.to(wide), patches)
    if isinstance(tensor, Float8Tensor) or tensor.dtype in FORMAT_OF:
        check_finite(values, key, part, patches)
        return stored_as(tensor, values, f"{COMFYUI_PREFIXES[part]}{key}", how)
    return check_finite(stored_as(tensor, values, f"{COMFYUI_PREFIXES[part]}{key}", how), key, part, patches)


def check_finite(values: Tensor, key: str, part: Part, patches: Sequence[Weighted]) -> Tensor:
    """The values, which patches have made.

    Raises:
        ValueError: some are not finite, as where a sum is too large for their dtype.
    """
    if all_finite(values):
        return values
    bad, strengths = int((~values.isfinite()).sum()), ", ".join(f"{each.strength:g}" for each in patches)
    raise ValueError(
        f"{key} of the {title(part)}: {bad} of {values.numel()} values are not finite with LoRAs of "
        f"strength {strengths}; the largest {values.dtype} is {torch.finfo(values.dtype).max:g}. Nothing was changed: "
        "give smaller strengths, or a dtype that holds larger values (dtype=torch.bfloat16)"
    )


def changed(weight: Tensor, patches: Iterable[Weighted], base: Tensor | None = None) -> Tensor:
    """Apply patches to a weight in float32 or float64.

    Args:
        weight: the weight.
        patches: the patches, in the order in which they are applied.
        base: the weight before patches that `weight` holds already, whose norms peft's DoRA takes; None is `weight`.
    """
    base = weight if base is None else base
    for each in patches:
        target, padded = each.patch.target, _padding(each.patch)
        weight, base = (one if padded is None else _padded(one, padded) for one in (weight, base))
        rows = target.rows(len(weight))
        new = _changed_part(weight[rows], each, base[rows])
        if target.third is None:
            weight = new
        else:
            weight = weight.clone()
            weight[rows] = new
    return weight


def stored_as(like: Tensor, values: Tensor, name: str, rounding: str) -> Tensor:
    """Store values like another weight: cast them to its dtype, or quantize them by its recipe.

    Args:
        like: the weight that the values replace.
        values: the new values, in float32 or float64.
        name: ComfyUI's name of the weight, from which the seed of stochastic rounding derives.
        rounding: see `merge_lora`.
    """
    if rounding not in get_args(Rounding):
        pick(dict.fromkeys(get_args(Rounding)), rounding, "rounding")
    if isinstance(like, Float8Tensor):
        return _requantized(like, values, name, rounding)
    if like.dtype not in FORMAT_OF:
        return values.to(like.dtype)
    format = FORMAT_OF[like.dtype]
    if rounding == "nearest":
        return to_codes(values, torch.ones((), device=values.device), format)
    return stochastic_codes(values, format, crc32(name.encode()))


def _requantized(like: Float8Tensor, values: Tensor, name: str, rounding: str) -> Float8Tensor:
    recipe, input_scale = like.recipe, like.input_scale
    if rounding == "nearest":
        new = Float8Tensor.quantize(values, recipe=recipe, input_scale=input_scale)
        return Float8Tensor(new.qdata, new.scale, new.input_scale, recipe, like.dtype)
    scale = like.scale if rounding == "comfyui" else _new_scale(values, like, recipe.format)
    codes = stochastic_codes(values / scale, recipe.format, crc32(name.encode()))
    return Float8Tensor(codes.view(like.qdata.dtype), scale, input_scale, recipe, like.dtype)


def _new_scale(values: Tensor, like: Float8Tensor, format: Format) -> Tensor:
    amax = values.abs().amax(dim=-1, keepdim=True) if like.scale.ndim else values.abs().amax()
    return scale_of(amax, format)


def _changed_part(weight: Tensor, each: Weighted, base: Tensor) -> Tensor:
    """Apply one patch to its rows; exchanged halves are first brought into the order of the file.

    ComfyUI instead computes with the rows in official order and exchanges only the change, not DoRA's norms.
    """
    if each.exchanged and each.rules.exchanges_magnitude:
        return _halves_exchanged(_applied(_halves_exchanged(weight), each, _halves_exchanged(base)))
    return _applied(weight, each, base, exchanges_change=each.exchanged)


def _applied(weight: Tensor, each: Weighted, base: Tensor, *, exchanges_change: bool = False) -> Tensor:
    norms, strength = each.patch.magnitude, each.strength
    change = each.patch.change.of(weight, strength if norms is None or norms.rule == "peft" else 1.0)
    change = _halves_exchanged(change) if exchanges_change else change
    return weight + change if norms is None else norms.changed(weight, change, strength, base)


def _halves_exchanged(tensor: Tensor) -> Tensor:
    return tensor.roll(len(tensor) // 2, dims=0)


def _padded(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad the weight with zeros to a larger shape."""
    grown = [side for size, wanted in zip(weight.shape[::-1], shape[::-1], strict=True) for side in (0, wanted - size)]
    return F.pad(weight, grown)


def _padding(patch: Patch) -> tuple[int, ...] | None:
    return patch.change.padded if isinstance(patch.change, LowRank) else None


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and inputs of a tensor."""
    return shape[0], prod(shape[1:])


def _is_exchanged(patch: Patch, shapes: Shapes) -> bool:
    """Whether the file has the two halves of rows in the opposite order; a bias has the order of its weight."""
    key = patch.target.key
    weight = f"{key.removesuffix('bias')}weight" if key.endswith(".bias") else key
    rows, columns = _matrix(shapes.get(weight, shapes[key]))
    return patch.target.is_exchanged(rows, columns)


def _mistake(patch: Patch, shapes: Shapes) -> str | None:
    """The reason why a patch does not fit its tensor; None if it fits."""
    shape, padded = tuple(shapes[patch.target.key]), _padding(patch)
    if padded is not None:
        if len(padded) != len(shape) or patch.target.third is not None or any(map(lt, padded, shape)):
            return f"{patch.module} grows {patch.target} to {list(padded)}, which has {list(shape)}"
        shape = padded
    rows, columns = _matrix(shape)
    rows = rows if patch.target.third is None else rows // 3
    said = patch.change.sizes
    norms = None if patch.magnitude is None else patch.magnitude.values
    fits = all(one in (None, other) for one, other in zip(said, (rows, columns), strict=True))
    if fits and (norms is None or norms.numel() in (rows, columns if len(shape) == 2 else shape[1])):
        return None
    words = " x ".join("any" if side is None else str(side) for side in said)
    scale = "" if norms is None else f" with norms {list(norms.shape)}"
    return f"{patch.module} is for {words}{scale}, and {patch.target} has {rows} x {columns}"


def _pairs(lora: Lora | Sequence[Lora], strength: float | Sequence[float]) -> tuple[Sequence[Lora], Sequence[float]]:
    """Return lists of LoRAs and strengths of equal length, after checking that all strengths are finite."""
    loras = list(lora) if isinstance(lora, Sequence) and not isinstance(lora, str) else [lora]
    for one in loras:
        check_lora(one)
    given = list(strength) if isinstance(strength, Sequence) else [strength] * len(loras)
    if len(given) != len(loras):
        raise ValueError(f"strength has {len(given)} numbers for {len(loras)} LoRAs; give one, or one for each")
    return loras, [number("strength", one) for one in given]


def _models(
    model: nn.Module | Mapping[str, Tensor], loras: Sequence[Lora], part: Part | None
) -> list[tuple[Part, dict[str, str]]]:
    """The models to change, with their tensors as `{official name: name in the model or dict}`."""
    wanted = [each for each in PARTS if any(lora.of(each) for lora in loras)]
    found = [(_part(known, wanted, part), names) for known, names in _known(model, part)]
    changed = [(each, names) for each, names in found if each in wanted]
    if not changed:
        given = type(model).__name__ if isinstance(model, nn.Module) else f"a dict of {len(model)} tensors"
        raise CheckpointError(
            f"{', '.join(lora.source for lora in loras)}: nothing of {given} is changed; the LoRA changes "
            f"{', '.join(map(title, wanted))}"
        )
    return [(each, names) for each, names in changed if each is not None]


def _known(model: nn.Module | Mapping[str, Tensor], part: Part | None) -> Iterator[tuple[list[Part], dict[str, str]]]:
    """The available models: for each, the parts that it could be, and its tensor names."""
    if isinstance(model, nn.Module):
        kinds = [each for each in PARTS if isinstance(model, REGISTRY[each].module)]
        yield kinds, {unwrapped(key): key for key in model.state_dict(keep_vars=True)}
        return
    if not isinstance(model, Mapping):
        hint = ": give one of its models, such as pipe.transformer" if hasattr(model, "transformer") else ""
        raise TypeError(f"model is {type(model).__name__}, expected an nn.Module or a state dict{hint}")
    _refuse_scales(model)
    models = split(model).models
    if not models and part is not None:
        yield [part], {key: key for key in model}
    for name, each in models.items():
        if name == "vae":
            continue
        if each.naming.name != "official":
            raise ValueError(
                f"the state dict has the names of {each.naming.name}, and merging needs the official ones: load the "
                "model by mmdit.load_mmdit (load_clip, load_t5), or convert the file by `mmdit convert`"
            )
        yield [kind for kind in PARTS if name in (kind, REGISTRY[kind].family)], each.keys


def _part(known: Sequence[Part], wanted: Sequence[Part], part: Part | None) -> Part | None:
    """Decide which of the possible parts a model is; None if no LoRA changes any of them."""
    if part is not None:
        if len(known) == 1 and known[0] != part:
            return None
        return part if part in known else None
    possible = [each for each in known if each in wanted]
    if len(possible) > 1:
        raise ValueError(f"the model may be {' or '.join(possible)}, and the LoRA changes both: say part=")
    return possible[0] if possible else None


def _refuse_scales(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for float8 weights with separate scales, because the qdata alone is not the weight."""
    for key, tensor in state.items():
        scales = [other for other in (scale_keys(key)[0], scale_keys(key, older=True)[0]) if other in state]
        if tensor.dtype in FORMAT_OF and scales:
            raise ValueError(
                f"{key} is float8 with its scale beside it ({scales[0]}): give quant.unpack(state_dict), or a model"
            )


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model


def _with(model: nn.Module | Mapping[str, Tensor], new: Mapping[str, Tensor]) -> nn.Module | dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return dict(model) | dict(new)
    for key, tensor in new.items():
        replace_tensor(model, key, tensor)
    return model


def replace_tensor(model: nn.Module, key: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer with a new one that holds `tensor`, or with `tensor` if it is a parameter.

    A parameter that comes back is again the one that other modules may share.
    """
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    old = owner._parameters.get(name)
    if old is None:
        owner._buffers[name] = tensor
        return
    new = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=old.requires_grad)
    new.requires_grad = old.requires_grad
    owner._parameters[name] = new
