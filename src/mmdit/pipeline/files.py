"""Loading a pipeline from files, and saving it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypedDict

import torch

from mmdit.checkpoints.components import Component
from mmdit.checkpoints.hub import Variant
from mmdit.checkpoints.load import model_in_memory
from mmdit.checkpoints.load_pipeline import DEMO, Components, Source, load
from mmdit.checkpoints.write import write_checkpoint
from mmdit.pipeline.arguments import Offload, checked_memory, checked_offload, checked_quant, profile_of
from mmdit.pipeline.base import PipelineModels
from mmdit.pipeline.diffusers_names import LOAD, explains_names
from mmdit.pipeline.footprint import check_budget
from mmdit.pipeline.profiles import Profile
from mmdit.runtime.devices import resolve_device, suited_dtype, warn_if_slow
from quant.recipe import Recipe
from samplers import ResolutionShift, SamplingDefaults


class LoadArguments(TypedDict):
    """The arguments that every way to load a pipeline shares."""

    device: torch.device | str
    dtype: torch.dtype | None
    quant: str | Recipe | None
    profile: str | Profile
    preset: str | None


class PipelineFiles(PipelineModels):
    """The methods that load a pipeline from any layout of files and save it; `mmdit.Pipeline` inherits them."""

    @classmethod
    def demo(
        cls,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        quant: str | Recipe | None = None,
        profile: str | Profile = "diffusers",
        preset: str | None = None,
        offload: Offload | None = None,
        memory: str | int | None = None,
        fast: bool = False,
    ) -> Self:
        """Load the embedded model, which draws 128 x 128 pictures of 1 to 4 shapes.

        Its prompts follow a small grammar, such as "a large red circle above a blue star, on a white background": 7
        shapes, 8 colours, 2 sizes, 6 backgrounds, counts and relations. `mmdit.demo.captions` makes prompts.

        Args:
            device, dtype, quant, profile, preset, offload, memory, fast: see `from_pretrained`; the files hold float16.
        """
        how = LoadArguments(device=device, dtype=dtype, quant=quant, profile=profile, preset=preset)
        return cls.load(Source(DEMO), offload=offload, memory=memory, fast=fast, **how)

    @classmethod
    def load(
        cls,
        source: Source | str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quant: str | Recipe | None = None,
        profile: str | Profile = "diffusers",
        preset: str | None = None,
        offload: Offload | None = None,
        memory: str | int | None = None,
        fast: bool = False,
    ) -> Self:
        """Load from any source: a file, a folder of any layout, a repository, or "demo".

        Args:
            source: a path or name, or a `mmdit.checkpoints.load_pipeline.Source`, which is a path with options.
            device, dtype, quant, profile, preset, offload, memory, fast: see `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError, mmdit.CheckpointError, mmdit.HubError: see `mmdit.checkpoints.load_pipeline`.
        """
        source = source if isinstance(source, Source) else Source(source)
        budget = checked_memory(memory, offload)
        place = _place(device, dtype, "stages" if budget is not None else offload)
        profile_of(profile, preset)  # an unknown name is said before anything is read
        recipe = checked_quant(quant)
        rest: dict[str, Any] = {"profile": profile, "preset": preset, "quant": recipe}
        rest |= {"offload": checked_offload(offload), "memory": memory, "device": place.device}
        check = None
        if budget is not None:
            how = (place.device, place.dtype, recipe, profile_of(profile, preset), fast)
            check = partial(check_budget, budget, *how)
        parts = load(source, place.home, place.dtype, quant=recipe, check=check)
        pipe = cls(_suited(parts, place), name=source.name, **rest)
        return pipe._faster() if fast else pipe

    @classmethod
    @explains_names(LOAD)
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quant: str | Recipe | None = None,
        profile: str | Profile = "diffusers",
        preset: str | None = None,
        offload: Offload | None = None,
        memory: str | int | None = None,
        fast: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        variant: Variant | None = None,
        cache_dir: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a folder in the official, diffusers or ComfyUI layout, or a repository of the Hugging Face Hub.

        Args:
            folder: a folder, or "owner/name" of a repository, from which the files that are needed are downloaded.
            device: the device that the models are loaded to and compute on. "auto" is CUDA where there is one, else
                MPS, else the CPU.
            dtype: the dtype of weights and arithmetic. None keeps the dtype of the files, but on a CPU float16 and
                bfloat16 become float32, which is far faster there, and bfloat16 becomes float16 on GPUs without it.
            quant: quantize transformer and T5 to float8: a name of `quant.RECIPES`, such as "fp8", or a `quant.Recipe`.
            profile: the reference whose behaviour to follow, a name of `mmdit.PROFILES` or an `mmdit.Profile`.
            preset: default settings of a kind of model, such as "turbo": a name of `mmdit.PRESETS`. They take
                precedence over the scheduler config of the folder.
            offload: "stages" keeps the models on the CPU, and moves text encoders, transformer and VAE to the device in
                turn.
            memory: a budget of the device's memory, such as "8GB", for tensors, workspaces and the CUDA context of
                this process. What is needed of these means is used, in this order: text encoders, VAE and ControlNets
                by turns; T5 block by block; adaLN weights once per drawing; blocks of the transformer streamed from
                pinned host memory; the VAE in tiles. `pipe.memory_plan` says what. Every drawing is planned for its
                size before it runs. On a CPU, the budget is for what is computed with, beside the weights themselves.
            fast: whether to `accelerate` the pipeline.
            revision: branch, tag or commit of the repository.
            token: an access token of the hub, for repositories that need one.
            variant: the variant of the files, such as "fp16".
            cache_dir: the folder of the cache of downloads.
            torch_dtype: diffusers' name for `dtype`.

        Raises:
            FileNotFoundError: there is no such folder.
            mmdit.CheckpointError: a file is broken, or files are missing; the message tells which, and where to get
                them.
            mmdit.HubError: the repository cannot be downloaded; the message tells why, and what to do.
            mmdit.TooLittleMemory: no plan for a picture of the model's own size keeps the budget; the message has the
                sum and the smallest budget that works. Nothing has been loaded then.
        """
        path = Path(folder) if folder == DEMO else folder  # a folder with that name, not the embedded model
        source = Source(path, revision=revision, token=token, variant=variant, cache_dir=cache_dir)
        dtype = _one_dtype(dtype, torch_dtype)
        how = LoadArguments(device=device, dtype=dtype, quant=quant, profile=profile, preset=preset)
        return cls.load(source, offload=offload, memory=memory, fast=fast, **how)

    @classmethod
    @explains_names(LOAD)
    def from_single_file(
        cls,
        path: str | Path,
        *,
        clip_l: str | Path | None = None,
        clip_g: str | Path | None = None,
        t5: str | Path | None = None,
        vae: str | Path | None = None,
        tokenizers: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quant: str | Recipe | None = None,
        profile: str | Profile = "diffusers",
        preset: str | None = None,
        offload: Offload | None = None,
        memory: str | int | None = None,
        fast: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a single file; text encoders are in it, given as arguments, or beside it in `text_encoders/`.

        Args:
            path: a safetensors file that holds the transformer.
            clip_l, clip_g, t5, vae: files or folders that hold these models.
            tokenizers: the folder that holds tokenizer, tokenizer_2 and tokenizer_3; None looks for it beside the file.
            device, dtype, quant, profile, preset, offload, memory, fast, torch_dtype: see `from_pretrained`.

        Raises:
            FileNotFoundError, mmdit.CheckpointError: see `from_pretrained`.
        """
        others: Mapping[Component, str | Path | None] = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5, "vae": vae}
        source = Source(Path(path), others, tokenizers)
        dtype = _one_dtype(dtype, torch_dtype)
        how = LoadArguments(device=device, dtype=dtype, quant=quant, profile=profile, preset=preset)
        return cls.load(source, offload=offload, memory=memory, fast=fast, **how)

    def save_pretrained(self, folder: str | Path, layout: str = "official") -> Path:
        """Write all models and tokenizers into a new folder, and return its path. LoRAs are merged into the weights.

        Args:
            folder: the new folder.
            layout: its layout: "official", "diffusers" or "comfyui".

        Raises:
            FileExistsError: the folder exists.
        """
        how: dict[str, Any] = {"shift": self.shift, "sampling": self._saved_sampling()}
        with self._as_saved():
            parts = [model_in_memory(name, model) for name, model in self.models.items()]
            return write_checkpoint(parts, folder, layout, tokenizers=self.tokenizers.save, **how)

    def _saved_sampling(self) -> SamplingDefaults | None:
        """The contents of the scheduler's config to save, with the pipeline's shift, which the user may have set."""
        if self.sampling is None or isinstance(self.sampling.shift, ResolutionShift):
            return self.sampling
        return replace(self.sampling, shift=float(self.shift))

    def _faster(self) -> Self:
        self.accelerate()
        return self


class _Place(NamedTuple):
    """The device that models are loaded to, the device that they compute on, and their dtype."""

    home: torch.device
    device: torch.device
    dtype: torch.dtype | None


def _one_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype, given under our name or under diffusers' name."""
    if dtype is not None and torch_dtype is not None:
        raise ValueError("dtype and torch_dtype are both given; give one of them")
    return torch_dtype if dtype is None else dtype


def _place(device: torch.device | str, dtype: torch.dtype | None, offload: str | None) -> _Place:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {type(dtype).__name__} {dtype!r}, expected a torch.dtype such as torch.bfloat16")
    found = resolve_device(device)
    warn_if_slow(found, dtype)
    return _Place(torch.device("cpu") if offload else found, found, dtype)


def _suited(parts: Components, place: _Place) -> Components:
    """Models in the dtype that suits the device where the caller gave none: 16 bits become float32 on a CPU."""
    if place.dtype is None:
        for model in (parts.transformer, parts.vae, parts.clip_l, parts.clip_g, parts.t5):
            if model is not None:
                stored = next(model.parameters()).dtype
                suited = suited_dtype(stored, place.device)
                if suited != stored:
                    model.to(suited)
    return parts
