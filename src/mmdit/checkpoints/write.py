"""Writing a checkpoint in any layout: streamed tensor by tensor, and in place only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from encoders.clip import CLIPConfig
from encoders.vae import VAEConfig
from mmdit.checkpoints.components import PREFIXES, Component
from mmdit.checkpoints.config_json import to_diffusers
from mmdit.checkpoints.float8 import Spelling, Tensors, metadata_in, spelled
from mmdit.checkpoints.keymaps import mmdit_rules, to_theirs, vae_rules
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import StoredModel, check_tensors, empty, open_model
from mmdit.checkpoints.locate import DIFFUSERS_FOLDERS, TOKENIZERS, Found, locate
from mmdit.checkpoints.official import file_stem, unknown
from mmdit.checkpoints.safetensors_io import CheckpointError, write_tensors
from mmdit.models.config import MMDiTConfig
from samplers import pick

OUT_LAYOUTS = ("official", "diffusers", "comfyui", "single")
METADATA = {"format": "pt"}  # transformers refuses files without it
MAX_SHARD = 10**10  # bytes, as diffusers writes them
_PREFIX_OF: dict[Component, str] = {component: prefix for prefix, component in reversed(PREFIXES.items())}
_T5_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e5m2: "fp8_e5m2",
}
_PLACES = {"official": ("", "text_encoders/"), "comfyui": ("models/checkpoints/", "models/text_encoders/")}
_TEXT_ENCODERS = ("clip_l", "clip_g", "t5")
_PROJECTION = "text_projection.weight"
_CLASSES: dict[str, tuple[str, str]] = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


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
        dtype: None keeps what is stored, byte for byte; the scales of float8 are spelled as ComfyUI does now.
        max_shard_bytes: files of the diffusers layout are split at this size.

    Raises:
        FileExistsError: there is something at `target`.
        CheckpointError: the source is broken or incomplete.
    """
    pick(dict.fromkeys(OUT_LAYOUTS), layout, "layout")
    found = locate(source)
    if not found.weights:
        raise CheckpointError(unknown(found))
    parts = [open_model(found, component) for component in found.weights]
    for part in parts:
        check_tensors(part, empty(part))
    shift = 3.0 if found.shift is None else found.shift
    return write_checkpoint(
        parts,
        target,
        layout,
        shift=shift,
        tokenizers=tokenizers_of(found, parts),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def write_checkpoint(
    parts: Sequence[StoredModel],
    target: str | Path,
    layout: str,
    *,
    shift: float,
    tokenizers: Callable[[Path], None] | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD,
    spelling: Spelling = "comfyui",
) -> Path:
    """Write parts in a layout; see `convert`.

    Args:
        parts, target, layout, dtype, max_shard_bytes: see `convert`.
        shift: of the scheduler.
        tokenizers: writes the three tokenizer folders into a folder.
        spelling: of float8 that has scales.

    Raises:
        FileExistsError: there is something at `target`.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already; give another place, or remove it first")
    pick(dict.fromkeys(OUT_LAYOUTS), layout, "layout")
    cast = [part if dtype is None else _cast(part, dtype) for part in parts]
    if layout == "single":
        if target.suffix != ".safetensors":
            raise ValueError(f"layout 'single' writes one file: {target} must end in .safetensors")
        _warn_of_loss(parts, shift)
        _write(Plan(spelling, {target.name: single_file(cast, spelling)}), target.parent, None)
        return target
    if layout == "comfyui":
        _warn_of_loss(parts, shift)
    diffusers = layout == "diffusers"
    plan = _diffusers(cast, max_shard_bytes, spelling) if diffusers else _files(cast, _PLACES[layout], spelling)
    if layout != "comfyui":
        plan.texts |= _small_files(cast, shift, has_tokenizers=tokenizers is not None)
    with _replacing_folder(target) as folder:
        _write(plan, folder, tokenizers)
    return target


def _warn_of_loss(parts: Sequence[StoredModel], shift: float) -> None:
    """Say which numbers have no place in a layout without config files."""
    lost = [] if shift == 3.0 else [f"the scheduler's shift {shift}"]
    for config in (part.config for part in parts):
        if isinstance(config, VAEConfig) and (config.scale, config.shift, config.groups) != (1.5305, 0.0609, 32):
            lost.append(f"the VAE's scale {config.scale}, shift {config.shift}, groups {config.groups}")
        if isinstance(config, CLIPConfig) and config.heads != max(config.width // 64, 1):
            lost.append(f"{config.heads} heads of a CLIP tower of width {config.width}")
    if lost:
        warnings.warn(f"this layout has no place for {'; '.join(lost)}: readers will take defaults", stacklevel=4)


def _cast(part: StoredModel, dtype: torch.dtype) -> StoredModel:
    return replace(part, tensors={key: lazy.as_dtype(dtype) for key, lazy in part.tensors.items()})


def single_file(parts: Sequence[StoredModel], spelling: Spelling) -> Tensors:
    """All parts in one file, under the official prefixes; a text encoder alone has none, like the official files."""
    if len(parts) == 1 and parts[0].component in _TEXT_ENCODERS:
        return official(parts[0], spelling)
    return {_PREFIX_OF[part.component] + key: lazy for part in parts for key, lazy in official(part, spelling).items()}


def _files(parts: Sequence[StoredModel], places: tuple[str, str], spelling: Spelling) -> Plan:
    """One file for transformer and VAE, one for each text encoder."""
    main_folder, text_folder = places
    main = [part for part in parts if part.component in ("transformer", "vae")]
    weights = {f"{main_folder}{_main_stem(main)}.safetensors": single_file(main, spelling)} if main else {}
    plan = Plan(spelling, weights)
    for part in parts:
        if part not in main:
            name = f"t5xxl_{_dtype_name(part)}" if part.component == "t5" else part.component
            plan.weights[f"{text_folder}{name}.safetensors"] = official(part, spelling)
    return plan


def official(part: StoredModel, spelling: Spelling) -> Tensors:
    """The tensors as the official files hold them: T5's embedding twice, no projection of CLIP-L that does nothing."""
    tensors = dict(part.tensors)
    if part.component == "t5":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    if part.component == "clip_l" and _PROJECTION in tensors and _is_identity(tensors[_PROJECTION]):
        del tensors[_PROJECTION]
    return spelled(tensors, spelling)


def _diffusers(parts: Sequence[StoredModel], max_shard_bytes: int, spelling: Spelling) -> Plan:
    plan = Plan(spelling)
    for part in parts:
        stem = "diffusion_pytorch_model" if part.component in ("transformer", "vae") else "model"
        folder, tensors = DIFFUSERS_FOLDERS[part.component], spelled(_theirs(part), spelling)
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


def _theirs(part: StoredModel) -> Tensors:
    """The tensors under diffusers' names; CLIP-L gets the identity projection that its class needs."""
    if isinstance(part.config, MMDiTConfig):
        found, left = to_theirs(part.tensors, mmdit_rules(part.config.depth))
    elif isinstance(part.config, VAEConfig):
        found, left = to_theirs(part.tensors, vae_rules(len(part.config.widths), part.config.blocks_per_level))
    else:
        found, left = dict(part.tensors), []
    assert not left, f"no diffusers name for {left}"
    if isinstance(part.config, CLIPConfig) and _PROJECTION not in found:
        dtype = next(iter(found.values())).dtype
        found[_PROJECTION] = LazyTensor.of(torch.eye(part.config.width, dtype=torch.float32)).as_dtype(dtype)
    return found


def _shards(tensors: Mapping[str, LazyTensor], most: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    for key, lazy in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + lazy.nbytes > most:
            shards.append({})
        shards[-1][key] = lazy
    return shards


def _small_files(parts: Sequence[StoredModel], shift: float, *, has_tokenizers: bool) -> dict[str, dict[str, Any]]:
    """config.json of every part, the scheduler's, and model_index.json."""
    texts = {
        f"{DIFFUSERS_FOLDERS[part.component]}/config.json": to_diffusers(part.component, part.config) for part in parts
    }
    if not any(part.component == "transformer" for part in parts):
        return texts
    texts["scheduler/scheduler_config.json"] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
    }
    present = {"scheduler", *(DIFFUSERS_FOLDERS[part.component] for part in parts)}
    present |= set(TOKENIZERS) if has_tokenizers else set()
    classes = {name: list(pair) if name in present else [None, None] for name, pair in _CLASSES.items()}
    return texts | {"model_index.json": {"_class_name": "StableDiffusion3Pipeline", **classes}}


def _write(plan: Plan, folder: Path, tokenizers: Callable[[Path], None] | None) -> None:
    for name, tensors in plan.weights.items():
        write_tensors(folder / name, tensors, METADATA | metadata_in(tensors, plan.spelling))
    for name, value in plan.texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if tokenizers is not None:
        tokenizers(folder)


def tokenizers_of(found: Found, parts: Sequence[StoredModel]) -> Callable[[Path], None] | None:
    """What copies the tokenizers that go with the parts into a folder."""
    with_text = any(part.component in _TEXT_ENCODERS for part in parts)
    return partial(_copy_tokenizers, found.tokenizers) if with_text and found.tokenizers else None


def _copy_tokenizers(source: Path, folder: Path) -> None:
    for name in TOKENIZERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


@contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name at the end, and is removed if the writing fails."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _main_stem(parts: Sequence[StoredModel]) -> str:
    config = next((part.config for part in parts if isinstance(part.config, MMDiTConfig)), None)
    return "vae" if config is None else file_stem(config)


def _dtype_name(part: StoredModel) -> str:
    scaled = {lazy.codes.dtype for lazy in part.tensors.values() if lazy.codes is not None and not lazy.codes.plain}
    if scaled:
        return f"{_T5_DTYPES[scaled.pop()]}_scaled"
    return _T5_DTYPES[max((lazy.dtype for lazy in part.tensors.values()), key=lambda dtype: dtype.itemsize)]


def _is_identity(projection: LazyTensor) -> bool:
    square = len(projection.shape) == 2 and projection.shape[0] == projection.shape[1]
    return square and torch.equal(projection.read(torch.float32), torch.eye(projection.shape[0]))
