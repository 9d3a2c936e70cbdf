"""Writing a checkpoint with its Linears in float8, tensor by tensor: `mmdit quantize`."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from mmdit.checkpoints.components import Component
from mmdit.checkpoints.float8 import Spelling
from mmdit.checkpoints.lazy import Codes, LazyTensor
from mmdit.checkpoints.load import StoredModel, empty
from mmdit.checkpoints.locate import Found, locate
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.checkpoints.write import OUT_LAYOUTS, opened, tokenizers_of, write_checkpoint
from mmdit.utils import bar
from quant.formats import DTYPES, FLOAT8
from quant.quantize import kept, linears_of
from quant.recipe import Recipe, as_recipe
from quant.scaling import checked_input_scale, scale_of, to_codes
from samplers import pick

Linear = tuple[Component, str]  # model and name
# Models that are quantized by default, as in `Pipeline(quant=)`; ComfyUI reads no scales for CLIP.
USUAL: tuple[Component, ...] = ("transformer", "t5")
OTHER_FILES = (".safetensor", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
PIECE = 2**22  # values that are rounded at a time, so that float32 copies stay small


class Quantized(NamedTuple):
    """A summary of the file or folder that was written."""

    path: Path
    layers: int  # Linears in float8
    linears: int  # Linears of all models
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        before, after = self.bytes_before / 1e9, self.bytes_after / 1e9
        return f"{self.path}: {self.layers} of {self.linears} Linears in float8, {before:.3f} -> {after:.3f} GB"


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: Recipe | str,
    *,
    spelling: Spelling = "comfyui",
    select: str | Sequence[str] | None = None,
    input_scales: Mapping[str, Tensor] | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Write the checkpoint at `source`, of any layout, with Linears in float8; all other tensors keep their bytes.

    Codes and scales are those of `quant.Float8Tensor.quantize`. Only one tensor at a time is in memory; a weight is
    read twice, for its scale and for its codes. ComfyUI also loads files with one scale per weight.

    Args:
        source: A file or folder; all models in it are written.
        target: A .safetensors file, which gets official names, or a folder, which gets the layout of the source.
        recipe: A recipe, or the name of one of `quant.RECIPES`.
        spelling: The spelling of scales; "comfyui-old" (`scaled_fp8`, `scale_weight`) has one per weight, and no E5M2.
        select: Globs over names of Linears, with their model ("t5.*") or without; None takes those of transformer and
            T5 except `quant.quantize.KEPT` (those of CLIP where there is neither), and leaves models that are float8
            already as they are.
        input_scales: The scales of inputs by such names, for recipes with static activations.
        progress: Whether to show a bar; None shows it in terminals and notebooks.

    Raises:
        FileExistsError: there is something at `target`.
        CheckpointError: the source is broken, incomplete or float8 already, or a weight is not finite.
        ValueError: the spelling cannot express the recipe; a glob matches nothing; or input scales are missing, name
            no Linear, or are given for a recipe that has none.
    """
    recipe, target = _checked(recipe, spelling), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already; give another place, or remove it first")
    found = locate(source)
    layout = layout_of(found, target)
    models = opened(found)
    linears = {model.component: [name for name, _ in linears_of(empty(model))] for model in models}
    every = {(component, name) for component, names in linears.items() for name in names}
    chosen = _chosen(models, every, select)
    scales = _input_scales(every, chosen, recipe, input_scales or {})
    total = len(chosen) + sum(len(model.tensors) for model in models)
    with _ticking(total, progress) as tick:
        quantized = [_quantized(model, chosen, recipe, scales, tick) for model in models]
        shift = 3.0 if found.shift is None else found.shift
        tokenizers = tokenizers_of(found, models)
        write_checkpoint(
            quantized,
            target,
            layout,
            shift=shift,
            sampling=found.sampling,
            tokenizers=tokenizers,
            spelling=spelling,
        )
    return Quantized(target, len(chosen), sum(map(len, linears.values())), _bytes(models), _bytes_at(target))


def _checked(recipe: Recipe | str, spelling: Spelling) -> Recipe:
    recipe = as_recipe(recipe)
    pick(dict.fromkeys(get_args(Spelling)), spelling, "spelling")
    if spelling == "comfyui-old" and (recipe.granularity, recipe.format) != ("tensor", "e4m3"):
        raise ValueError(
            "spelling='comfyui-old' is for E4M3 with one scale per weight, but the recipe is "
            f"{recipe.format.upper()} with one per {recipe.granularity}: use recipe='fp8-tensor', or spelling='comfyui'"
        )
    if recipe.granularity == "row":
        warnings.warn(
            "this recipe has a scale per row, which we read and ComfyUI does not: use recipe='fp8-tensor' for it",
            stacklevel=3,
        )
    return recipe


def layout_of(found: Found, target: Path) -> str:
    """The layout that is written: one file, or that of the source."""
    if target.suffix == ".safetensors":
        return "single"
    if target.suffix.lower() in OTHER_FILES:
        raise ValueError(f"{target} would be a folder of that name: end it in .safetensors for a file")
    if found.layout not in OUT_LAYOUTS:
        raise ValueError(f"{found.path} is one file, so {target} must be one too: end it in .safetensors")
    return found.layout


def _chosen(models: Sequence[StoredModel], every: set[Linear], select: str | Sequence[str] | None) -> set[Linear]:
    """The Linears to quantize, as component and name."""
    patterns = [select] if isinstance(select, str) else select
    if patterns is None:
        usual = [model.component for model in models if model.component in USUAL] or [
            model.component for model in models
        ]
        chosen = {(where, name) for where, name in every if where in usual and kept(name) is None}
    else:
        chosen = {linear for pattern in patterns for linear in _matches(pattern, every)}
    done = [
        model for model in models if model.dtypes & set(FLOAT8) and any(where == model.component for where, _ in chosen)
    ]
    left = {(where, name) for where, name in chosen if where not in [model.component for model in done]}
    if done and (patterns is not None or not left):
        raise CheckpointError(
            f"{done[0].source}: the {done[0].kind.title} is float8 already ({done[0].scales.spelling}), and to "
            "round it again would lose more: quantize the 16- or 32-bit file of the same model"
        )
    for model in done:
        warnings.warn(f"{model.source}: the {model.kind.title} is float8 already and stays as it is", stacklevel=3)
    if not left:
        why = "there is no Linear" if not every else "select= names none"
        raise CheckpointError(f"{', '.join(str(model.source) for model in models)}: nothing to quantize, {why}")
    return left


def _matches(pattern: str, every: set[Linear]) -> set[Linear]:
    found = {
        (where, name) for where, name in every if fnmatchcase(name, pattern) or fnmatchcase(f"{where}.{name}", pattern)
    }
    if not found:
        such = ", ".join(".".join(linear) for linear in sorted(every)[:3])
        raise ValueError(f"{pattern!r} matches none of {len(every)} Linears, such as {such}")
    return found


def _input_scales(
    every: set[Linear], chosen: set[Linear], recipe: Recipe, given: Mapping[str, Tensor]
) -> dict[Linear, Tensor]:
    if recipe.activation != "static":
        if given:
            raise ValueError(f"input_scales are for static activations; the recipe has {recipe.activation!r}")
        return {}
    known = {name for where, linear in every for name in (linear, f"{where}.{linear}")}
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"input_scales name {len(unknown)} that are no Linears of the file, first {unknown[0]!r}")
    found = {(where, name): given.get(f"{where}.{name}", given.get(name)) for where, name in chosen}
    if without := sorted(linear for linear, scale in found.items() if scale is None):
        raise ValueError(
            f"static activations need an input scale for every layer; {len(without)} have none, first "
            f"{'.'.join(without[0])!r}: run mmdit.calibrate and give what it finds as input_scales"
        )
    return {
        linear: checked_input_scale(scale, ".".join(linear)).cpu()
        for linear, scale in found.items()
        if scale is not None
    }


def _quantized(
    model: StoredModel,
    chosen: set[Linear],
    recipe: Recipe,
    input_scales: Mapping[Linear, Tensor],
    tick: Callable[[], None],
) -> StoredModel:
    """The model with the chosen weights in float8; scales are computed here, codes when the file is written."""
    tensors = dict(model.tensors)
    for key, lazy in model.tensors.items():
        linear = model.component, key.removesuffix(".weight")
        if key.endswith(".weight") and linear in chosen:
            # Scales are allocated before any weight is read; between weights they would fragment the heap.
            scale = torch.empty((lazy.shape[0], 1) if recipe.granularity == "row" else ())
            load = partial(_codes, lazy, scale, recipe)
            codes = Codes(lazy.shape, load, scale, input_scales.get(linear), recipe, logical=lazy.dtype)
            tensors[key] = replace(lazy, codes=codes)
    for key, lazy in tensors.items():
        if lazy.codes is not None and lazy is not model.tensors[key]:
            lazy.codes.scale.copy_(_scale(model.source, key, lazy, recipe))
            tick()
    return replace(model, tensors={key: _counted(lazy, tick) for key, lazy in tensors.items()})


def _scale(source: Path, key: str, lazy: LazyTensor, recipe: Recipe) -> Tensor:
    weight = lazy.read()
    low, high = weight.aminmax(dim=-1, keepdim=True) if recipe.granularity == "row" else weight.aminmax()
    amax = torch.maximum(-low, high)
    if not amax.isfinite().all():
        bad = int((~weight.isfinite()).sum())
        raise CheckpointError(
            f"{source}: {bad} of {weight.numel()} numbers of {key} are not finite; float8 keeps finite ones only"
        )
    return scale_of(amax, recipe.format)


def _codes(lazy: LazyTensor, scale: Tensor, recipe: Recipe, device: torch.device) -> Tensor:
    weight = lazy.read(device=device)
    codes = torch.empty(lazy.shape, dtype=DTYPES[recipe.format], device=device)
    rows = max(1, PIECE // weight.shape[1])
    for i in range(0, len(weight), rows):
        part = slice(i, i + rows)
        codes[part] = to_codes(weight[part], scale[part] if scale.ndim else scale, recipe.format)
    return codes


def _counted(lazy: LazyTensor, tick: Callable[[], None]) -> LazyTensor:
    """The same tensor, which calls `tick` when it is first read."""
    once = iter([tick])

    def load(dtype: torch.dtype, device: torch.device) -> Tensor:
        next(once, lambda: None)()
        return lazy.load(dtype, device)

    def load_codes(device: torch.device) -> Tensor:
        assert lazy.codes is not None
        next(once, lambda: None)()
        return lazy.codes.load(device)

    return replace(lazy, load=load, codes=lazy.codes and replace(lazy.codes, load=load_codes))


@contextmanager
def _ticking(total: int, progress: bool | None) -> Iterator[Callable[[], None]]:
    """A function that advances a progress bar by one step in each call."""
    ticks = bar(repeat(None, total), total, progress)
    yield lambda: next(ticks, None)
    deque(ticks, maxlen=0)  # advance to the end, past tensors that the layout has no place for


def _bytes(models: Sequence[StoredModel]) -> int:
    return sum(lazy.nbytes for model in models for lazy in model.tensors.values())


def _bytes_at(target: Path) -> int:
    files = [target] if target.is_file() else target.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)
