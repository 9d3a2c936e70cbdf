"""What a run gives: a LoRA file, a transformer, or a ControlNet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import model_in_memory
from mmdit.checkpoints.lora import Lora
from mmdit.checkpoints.lora_convert import diffusers_names_of, in_diffusers_names, in_official_names
from mmdit.checkpoints.lora_kinds import LowRank, Magnitude
from mmdit.checkpoints.lora_modules import Patch
from mmdit.checkpoints.lora_names import Target
from mmdit.checkpoints.lora_rules import HEADER, TRAINED
from mmdit.checkpoints.safetensors_io import CheckpointError, write_tensors
from mmdit.checkpoints.write import METADATA, official
from mmdit.training.adapters import Adapter, LowRankAdapter
from mmdit.training.config import Naming, TrainingConfig

_MODULES: Final = {"lora": "networks.lora_sd3", "dora": "networks.lora_sd3", "lokr": "lycoris.kohya"}


def write_lora(
    adapters: Mapping[str, Adapter], path: Path, config: TrainingConfig, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write adapters in the names of diffusers, ComfyUI or kohya, with PEFT's or kohya's header.

    diffusers' names: PEFT's `lora_A` and `lora_B` for each of q, k and v, alpha / rank multiplied into `lora_B`, and
    the header `lora_adapter_metadata`. kohya's and ComfyUI's: official names, alphas as tensors, `ss_network_*`.

    Raises:
        CheckpointError: the kind of adapter cannot be said in these names: diffusers reads no LoKr.
    """
    if config.naming == "diffusers":
        tensors = _diffusers(adapters, path)
    else:
        tensors = in_official_names(_lora(adapters, path, "official"), flat=config.naming == "kohya")
    lazy = {key: LazyTensor.of(one.detach().to("cpu", dtype).contiguous()) for key, one in tensors.items()}
    write_tensors(path, lazy, _header(adapters, config, tensors))
    return path


def write_model(component: str, model: nn.Module, path: Path, dtype: torch.dtype) -> Path:
    """Write a transformer or a ControlNet in official names."""
    stored = model_in_memory("controlnet" if component == "controlnet" else "transformer", model)
    cast = replace(stored, tensors={key: lazy.as_dtype(dtype) for key, lazy in stored.tensors.items()})
    write_tensors(path, official(cast, "comfyui"), METADATA)
    return path


def _lora(adapters: Mapping[str, Adapter], path: Path, naming: Naming | str) -> Lora:
    patches = tuple(patch for name, one in adapters.items() for patch in _patches(name, one, naming))
    return Lora(str(path), patches, {}, {}, TRAINED, "mmdit-lab")


def _patches(name: str, adapter: Adapter, naming: Naming | str) -> Iterator[Patch]:
    """The patches of an adapter; in diffusers' names, each of q, k and v has its own."""
    key = f"{name}.weight"
    if naming != "diffusers" or not isinstance(adapter, LowRankAdapter) or adapter.parts == 1:
        yield Patch(name, Target("transformer", key), adapter.change(), adapter.magnitude())
        return
    for third, (down, up) in enumerate(zip(adapter.down.detach().chunk(3), adapter.up.detach(), strict=True)):
        yield Patch(name, Target("transformer", key, third), LowRank(up=up, down=down, scale=adapter.scale))


def _diffusers(adapters: Mapping[str, Adapter], path: Path) -> dict[str, Tensor]:
    """PEFT's tensors; DoRA's norms are `lora_magnitude_vector` of the same modules."""
    lora = _lora(adapters, path, "diffusers")
    plain = replace(lora, patches=tuple(replace(patch, magnitude=None) for patch in lora.patches))
    tensors = in_diffusers_names(plain)
    names = diffusers_names_of(plain)
    for name, adapter in adapters.items():
        norms: Magnitude | None = adapter.magnitude()
        if norms is None:
            continue
        if "adaLN" in name:
            raise CheckpointError(f"{path}: DoRA of {name} in diffusers' names is not written; take naming comfyui")
        modules = names.get(name, (name,))
        for module, part in zip(modules, norms.values.flatten().chunk(len(modules)), strict=True):
            tensors[f"transformer.{module}.lora_magnitude_vector"] = part
    return tensors


def _header(adapters: Mapping[str, Adapter], config: TrainingConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    if config.naming == "diffusers":
        suffix = ".lora_A.weight"
        modules = [key.removeprefix("transformer.").removesuffix(suffix) for key in tensors if key.endswith(suffix)]
        ranks = {module: len(tensors[f"transformer.{module}{suffix}"]) for module in modules}
        peft = {
            "r": config.rank,
            "lora_alpha": config.rank,
            "rank_pattern": {module: rank for module, rank in ranks.items() if rank != config.rank},
            "alpha_pattern": {module: rank for module, rank in ranks.items() if rank != config.rank},
            "target_modules": modules,
            "use_dora": config.adapter == "dora",
        }
        return METADATA | {HEADER: json.dumps({f"transformer.{key}": value for key, value in peft.items()})}
    arguments = {"dora": {"use_dora": "True"}, "lokr": {"algo": "lokr", "factor": str(config.lokr_factor)}}
    return METADATA | {
        "ss_network_module": _MODULES[config.adapter],
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": f"{config.scale * config.rank:g}",
        "ss_network_args": json.dumps(arguments.get(config.adapter, {})),
        "ss_base_model_version": "sd3",
        "ss_learning_rate": f"{config.learning_rate:g}",
        "ss_max_train_steps": str(config.steps),
        "ss_seed": str(config.seed),
        "modelspec.architecture": "stable-diffusion-3/lora",
    }
