"""Writing a checkpoint in any layout, tensor by tensor; it gets its name only when it is complete."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from encoders.clip import CLIPConfig
from encoders.tokenizer_files import KNOWN_FILES
from encoders.vae import VAEConfig
from mmdit.checkpoints.components import REGISTRY, title
from mmdit.checkpoints.files import is_file
from mmdit.checkpoints.float8 import Spelling, Tensors, metadata_in, spelled
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import StoredModel, check_loads, open_model, say_notes
from mmdit.checkpoints.locate import TOKENIZERS, Found, ambiguous, locate
from mmdit.checkpoints.missing import unknown
from mmdit.checkpoints.safetensors_io import CheckpointError, write_tensors
from mmdit.models.config import MMDiTConfig
from mmdit.utils import replacing, replacing_folder
from samplers import SamplingDefaults, pick, to_scheduler_config

OUT_LAYOUTS = ("official", "diffusers", "comfyui", "single")
METADATA = {"format": "pt"}  # transformers refuses files without this metadata
MAX_SHARD = 10**10  # bytes of a shard, as in diffusers
_DTYPE_WORDS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e5m2: "fp8_e5m2",
}
_PLACES = {  # folders by the place of a kind of model
    "official": {"main": "", "text": "text_encoders/", "control": "controlnet/"},
    "comfyui": {"main": "models/checkpoints/", "text": "models/text_encoders/", "control": "models/controlnet/"},
}
_OTHER_CLASSES = {
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
}
MAX_TOKENIZER = 64 * 2**20  # bytes of the largest tokenizer file


@dataclass
class Plan:
    """The files of a checkpoint to be written, by path relative to its folder."""

    spelling: Spelling  # of float8
    weights: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)


def convert(
    source: str | Path,
    target: str | Path,
    layout: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD,
) -> Path:
    """Write the checkpoint at `source`, of any layout, to `target` in `layout`.

    Args:
        source: a file or folder; all models in it are converted.
        target: a folder, or for "single" a .safetensors file; it must not exist yet.
        layout: "official", "diffusers", "comfyui" or "single" (one file with the official prefixes, weights only).
        dtype: The dtype of all tensors; None keeps the stored bytes, with float8 scales in ComfyUI's newer spelling.
        max_shard_bytes: files of the diffusers layout are split at this size.

    Raises:
        FileExistsError: there is something at `target`.
        CheckpointError: the source is broken or incomplete.
    """
    pick(dict.fromkeys(OUT_LAYOUTS), layout, "layout")
    found = locate(source)
    models = opened(found)
    shift = 3.0 if found.shift is None else found.shift
    return write_checkpoint(
        models,
        target,
        layout,
        shift=shift,
        sampling=found.sampling,
        tokenizers=tokenizers_of(found, models),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def opened(found: Found) -> list[StoredModel]:
    """All models of a located checkpoint, after the checks of loading.

    Raises:
        CheckpointError: there is no model, or one is broken or incomplete.
    """
    if not found.weights and not found.several:
        raise unknown(found)
    _say_left_out(found)
    components = {**found.weights, **{name: files for name, files in found.several.items() if not REGISTRY[name].many}}
    models = [open_model(found, component) for component in components]
    for model in models:
        check_loads(model)
    say_notes(models)
    return models


def _say_left_out(found: Found) -> None:
    """Warn of models that lie side by side and are not written.

    Raises:
        CheckpointError: there is nothing else.
    """
    for component, files in found.several.items():
        if REGISTRY[component].many and component not in found.weights:
            if not found.weights:
                raise ambiguous(found, component)
            warnings.warn(f"{len(files)} {title(component)}s are left out; give each by its path", stacklevel=4)


def write_checkpoint(
    models: Sequence[StoredModel],
    target: str | Path,
    layout: str,
    *,
    shift: float,
    sampling: SamplingDefaults | None = None,
    tokenizers: Callable[[Path], None] | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD,
    spelling: Spelling = "comfyui",
) -> Path:
    """Write models in a layout; see `convert`.

    Args:
        models: the models to write; each is checked, so that everything that is written can be read again.
        target, layout, dtype, max_shard_bytes: see `convert`.
        shift: the timestep shift of the scheduler.
        sampling: the contents of the scheduler's config; None is Euler on the default schedule with `shift`.
        tokenizers: a function that writes the three tokenizer folders into a folder.
        spelling: the spelling of float8 scales.

    Raises:
        FileExistsError: `target` exists, or was created by another program in the meantime.
        CheckpointError: the tensors of a model are not exactly those of its config.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already; give another place, or remove it first")
    pick(dict.fromkeys(OUT_LAYOUTS), layout, "layout")
    for model in models:
        check_loads(model)
    sampling = sampling or SamplingDefaults(shift=float(shift))
    cast = [model if dtype is None else _cast(model, dtype) for model in models]
    if layout == "single":
        if target.suffix != ".safetensors":
            raise ValueError(f"layout 'single' writes one file: {target} must end in .safetensors")
        _warn_of_loss(models, sampling)
        _write(Plan(spelling, {target.name: single_file(cast, spelling)}), target.parent, None)
        return target
    if layout == "comfyui":
        _warn_of_loss(models, sampling)
    diffusers = layout == "diffusers"
    plan = _diffusers(cast, max_shard_bytes, spelling) if diffusers else _files(cast, _PLACES[layout], spelling)
    if layout != "comfyui":
        plan.texts |= _small_files(cast, to_scheduler_config(sampling), has_tokenizers=tokenizers is not None)
    with replacing_folder(target) as folder:
        _write(plan, folder, tokenizers)
    return target


def _warn_of_loss(models: Sequence[StoredModel], sampling: SamplingDefaults) -> None:
    """Warn of settings that are lost in a layout without config files."""
    lost = [] if sampling.shift == 3.0 else [f"the scheduler's shift {sampling.shift}"]
    if not sampling.is_plain:
        lost.append(f"the scheduler's sampler {sampling.sampler} and schedule {sampling.schedule}")
    for config in (model.config for model in models):
        if isinstance(config, MMDiTConfig):
            _warn_of_size(config)
        if isinstance(config, VAEConfig) and (config.scale, config.shift, config.groups) != (1.5305, 0.0609, 32):
            lost.append(f"the VAE's scale {config.scale}, shift {config.shift}, groups {config.groups}")
        if isinstance(config, CLIPConfig) and config.heads != max(config.width // 64, 1):
            lost.append(f"{config.heads} heads of a CLIP tower of width {config.width}")
    if lost:
        warnings.warn(f"this layout has no place for {'; '.join(lost)}: readers will take defaults", stacklevel=4)


def _warn_of_size(config: MMDiTConfig) -> None:
    usual = replace(config, sample_size=None).sample_size
    if config.sample_size != usual:
        warnings.warn(
            f"this layout does not keep that pictures have {config.sample_size} latent cells a side: from it they will "
            f"have {usual}, unless height and width are given",
            stacklevel=5,
        )


def _cast(model: StoredModel, dtype: torch.dtype) -> StoredModel:
    return replace(model, tensors={key: lazy.as_dtype(dtype) for key, lazy in model.tensors.items()})


def single_file(models: Sequence[StoredModel], spelling: Spelling) -> Tensors:
    """All models in one file, under the official prefixes; a lone model that has its own file officially has none."""
    if len(models) == 1 and models[0].kind.place != "main":
        return official(models[0], spelling)
    return {model.kind.prefixes[0] + key: lazy for model in models for key, lazy in official(model, spelling).items()}


def _files(models: Sequence[StoredModel], places: Mapping[str, str], spelling: Spelling) -> Plan:
    """One file for the transformer and the models that share it, and one for each other model."""
    main = sorted(
        (model for model in models if model.kind.place == "main"), key=lambda model: [*REGISTRY].index(model.component)
    )
    weights = {f"{places['main']}{_file_name(main[0])}.safetensors": single_file(main, spelling)} if main else {}
    plan = Plan(spelling, weights)
    for model in models:
        if model not in main:
            plan.weights[f"{places[model.kind.place]}{_file_name(model)}.safetensors"] = official(model, spelling)
    return plan


def official(model: StoredModel, spelling: Spelling) -> Tensors:
    """The tensors of a model as the official files hold them."""
    return spelled(model.kind.write_official(model.tensors, model.config), spelling)


def _diffusers(models: Sequence[StoredModel], max_shard_bytes: int, spelling: Spelling) -> Plan:
    plan = Plan(spelling)
    for model in models:
        folder, stem = model.kind.folder, model.kind.stem
        tensors = spelled(model.kind.write_diffusers(model.tensors, model.config), spelling)
        shards = _shards(tensors, max_shard_bytes)
        if len(shards) == 1:
            plan.weights[f"{folder}/{stem}.safetensors"] = tensors
            continue
        names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        plan.weights |= {f"{folder}/{name}": shard for name, shard in zip(names, shards, strict=True)}
        plan.texts[f"{folder}/{stem}.safetensors.index.json"] = {
            "metadata": {"total_size": sum(lazy.nbytes for lazy in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in sorted(shard)},
        }
    return plan


def _shards(tensors: Mapping[str, LazyTensor], most: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    for key, lazy in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + lazy.nbytes > most:
            shards.append({})
        shards[-1][key] = lazy
    return shards


def _small_files(
    models: Sequence[StoredModel], scheduler: dict[str, Any], *, has_tokenizers: bool
) -> dict[str, dict[str, Any]]:
    """config.json of every model, the scheduler's, and model_index.json."""
    texts = {f"{model.kind.folder}/config.json": model.kind.to_json(model.config) for model in models}
    if not any(model.component == "transformer" for model in models):
        return texts
    texts["scheduler/scheduler_config.json"] = scheduler
    kinds = [kind for kind in REGISTRY.values() if not kind.many or kind in [model.kind for model in models]]
    present = {"scheduler", *(model.kind.folder for model in models), *(TOKENIZERS if has_tokenizers else ())}
    every = (
        _OTHER_CLASSES
        | {"scheduler": ("diffusers", scheduler["_class_name"])}
        | {kind.folder: (kind.library, kind.classes[0]) for kind in kinds}
    )
    classes = {name: list(pair) if name in present else [None, None] for name, pair in sorted(every.items())}
    pipeline = "StableDiffusion3ControlNetPipeline" if "controlnet" in present else "StableDiffusion3Pipeline"
    return texts | {"model_index.json": {"_class_name": pipeline, **classes}}


def _write(plan: Plan, folder: Path, tokenizers: Callable[[Path], None] | None) -> None:
    for name, tensors in plan.weights.items():
        write_tensors(folder / name, tensors, METADATA | metadata_in(tensors, plan.spelling), new=True)
    for name, value in plan.texts.items():
        with replacing(folder / name, new=True) as file:
            file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if tokenizers is not None:
        tokenizers(folder)


def tokenizers_of(found: Found, models: Sequence[StoredModel]) -> Callable[[Path], None] | None:
    """A function that copies the tokenizers of these models into a folder."""
    with_text = any(model.kind.place == "text" for model in models)
    return partial(_copy_tokenizers, found.tokenizers) if with_text and found.tokenizers else None


def _copy_tokenizers(source: Path, folder: Path) -> None:
    """Copy the files that tokenizers are read from, and no other files in their folders.

    Raises:
        CheckpointError: a file is a link to a place outside the folder, or is too large for a tokenizer file.
    """
    for name in TOKENIZERS:
        files = [source / name / file for file in KNOWN_FILES if is_file(source / name / file)]
        if files:
            (folder / name).mkdir()
        for file in files:
            if not _is_inside(file, source):
                raise CheckpointError(f"{file} is a link to {file.resolve()}, outside of {source}; copy the file there")
            if (size := file.stat().st_size) > MAX_TOKENIZER:
                raise CheckpointError(f"{file} has {size} bytes, {MAX_TOKENIZER} are the most of a tokenizer file")
            shutil.copyfile(file, folder / name / file.name)


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder after following links; links within the hub's cache are allowed."""
    target, root = file.resolve(), folder.resolve()
    cache = next((place for place in root.parents if place.name.startswith("models--")), root)
    return target.is_relative_to(root) or target.is_relative_to(cache / "blobs")


def _file_name(model: StoredModel) -> str:
    scaled = {lazy.codes.dtype for lazy in model.tensors.values() if lazy.codes is not None and not lazy.codes.plain}
    if scaled:
        return model.kind.file_name(model.config, f"{_DTYPE_WORDS[scaled.pop()]}_scaled")
    widest = max((lazy.dtype for lazy in model.tensors.values()), key=lambda dtype: dtype.itemsize)
    return model.kind.file_name(model.config, _DTYPE_WORDS[widest])
