"""How much memory a drawing takes, from its sizes and the configs of the models alone, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.checkpoints.components import Component
from mmdit.checkpoints.load import StoredModel, compute_dtype, empty
from mmdit.models.config import MMDiTConfig
from mmdit.pipeline.profiles import Profile
from mmdit.runtime import activations as count
from mmdit.runtime.device_memory import context_of
from mmdit.runtime.devices import suited_dtype
from mmdit.runtime.plan import Activations, ModelBytes, plan
from mmdit.runtime.streaming import model_bytes
from quant import observers
from quant.emulation import HAS_TRITON
from quant.matmul import Runs, backend_of, multiplies_by_half
from quant.quantize import kept, linears_of
from quant.recipe import Recipe

ENCODERS: tuple[Component, ...] = ("clip_l", "clip_g", "t5")
_TILES = (256, 128, 64)  # pixels
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}  # by bytes; float16 takes what bfloat16 does


@dataclass(frozen=True)
class Sizes:
    """What of a drawing decides how much memory it takes.

    Args:
        pictures: that are decoded at once.
        samples: rows of the transformer's largest batch.
        height, width: of the latents, in cells.
        tokens: text tokens of the transformer.
        rows, length: prompts that an encoder reads at once, and their tokens.
        steps: for which the modulation is computed ahead.
        encodes: whether pictures are encoded.
        tile: side of the VAE's tiles in pixels that the caller asks for; 0 is none.
    """

    pictures: int = 1
    samples: int = 2
    height: int = 128
    width: int = 128
    tokens: int = 333
    rows: int = 1
    length: int = 256
    steps: int = 28
    encodes: bool = False
    tile: int = 0

    def covers(self, other: Sizes) -> bool:
        """Whether a plan for these sizes is enough for others."""
        return self == self.merged(other)

    def merged(self, other: Sizes) -> Sizes:
        """The larger one of each number; of tiles the smaller one."""
        larger = {one.name: max(getattr(self, one.name), getattr(other, one.name)) for one in fields(self)}
        return Sizes(**(larger | {"tile": other.tile}))


@dataclass(frozen=True)
class Setting:
    """What else decides how much memory a drawing takes.

    Args:
        configs: configs of the models, by component.
        itemsize: bytes of a value in each model.
        device: where models compute.
        recipe: the transformer's float8 recipe, if any.
        upcast: whether text encoders compute in float32.
        fast, graph: whether the fast forward runs, and in CUDA graphs where blocks stay in place.
        residuals: bytes of a ControlNet's residuals per sample and image token; 0 without one.
        context: what the process takes of a GPU and torch does not count.
        observed: bytes of the statistics that `quant.observe` keeps of the transformer's inputs; 0 where none are made.
    """

    configs: Mapping[Component, Any]
    itemsize: Mapping[Component, int]
    device: torch.device
    recipe: Recipe | None = None
    upcast: bool = False
    fast: bool = False
    graph: bool = False
    residuals: int = 0
    context: int = count.CONTEXT
    observed: int = 0

    def activations(self, sizes: Sizes) -> Activations:
        """Bytes of a drawing of these sizes, beside the weights."""
        config: MMDiTConfig = self.configs["transformer"]
        size = self.itemsize["transformer"]
        image = -(-sizes.height // config.patch_size) * -(-sizes.width // config.patch_size)
        runs = self._runs(config, size)
        step = count.step_bytes(
            config,
            samples=sizes.samples,
            image=image,
            text=sizes.tokens,
            itemsize=size,
            emulated=runs == "emulated",
            dequantized=runs == "dequantized",
            half=multiplies_by_half(runs, self.device, _DTYPES[size]),
            summed=runs == "emulated" and (self.fast or not HAS_TRITON),
            fast=self.fast,
        )
        if self.device.type == "cuda":
            step = int(count.FRAGMENTS * step)
        if self.observed:
            made = {"piece": observers.PIECE, "each": observers.ADDING}
            step += count.observing_bytes(config, samples=sizes.samples, tokens=max(image, sizes.tokens), **made)
        cells = sizes.height * sizes.width
        latents = count.latent_bytes(samples=sizes.samples, channels=config.in_channels, cells=cells)
        texts = 2 * sizes.samples * sizes.tokens * config.context_dim * size
        return Activations(
            text={name: self._text(name, sizes) for name in ENCODERS if name in self.configs},
            step=step + latents + self.residuals * sizes.samples * image,
            decode=self._vae(sizes, cells, sizes.tile or None),
            tiles={tile: self._vae(sizes, cells, tile) for tile in _TILES if not sizes.tile or tile < sizes.tile},
            table=count.table_bytes(config, samples=sizes.samples, steps=sizes.steps, itemsize=size),
            graph=step if self.graph else 0,
            kept=texts + latents + self.observed,
            reserve=self.context + count.WORKSPACE if self.device.type == "cuda" else 0,
        )

    def _runs(self, config: MMDiTConfig, size: int) -> Runs:
        """How products with float8 weights run; "native" without any."""
        if self.recipe is None:
            return "native"
        shape = config.hidden_size, config.hidden_size
        return backend_of(self.recipe, self.device, _DTYPES[size], shape)[0]

    def _text(self, name: Component, sizes: Sizes) -> int:
        config: T5Config | CLIPConfig = self.configs[name]
        return count.text_bytes(
            width=config.width,
            hidden=config.mlp_dim,
            heads=config.heads,
            rows=sizes.rows,
            tokens=sizes.length if name == "t5" else min(sizes.length, 77),
            itemsize=self.itemsize[name],
            upcast=self.upcast,
        )

    def _vae(self, sizes: Sizes, cells: int, tile: int | None) -> int:
        config: VAEConfig = self.configs["vae"]
        pixels, size = cells * config.downscale**2, self.itemsize["vae"]
        whole = count.vae_bytes(
            config.widths, pictures=sizes.pictures, pixels=pixels, itemsize=size, encodes=sizes.encodes
        )
        if tile is None:
            return whole
        return min(
            count.tile_bytes(config.widths, pictures=sizes.pictures, pixels=pixels, tile=tile, itemsize=size), whole
        )


def default_sizes(config: MMDiTConfig, profile: Profile) -> Sizes:
    """The sizes of a picture of the model's own size by the profile's defaults, with guidance."""
    side, text = config.sample_size or 128, profile.text
    tokens = text.clip_length + text.t5_length
    return Sizes(height=side, width=side, tokens=tokens, length=text.t5_length, steps=profile.steps)


def check_budget(
    budget: int,
    device: torch.device,
    dtype: torch.dtype | None,
    recipe: Recipe | None,
    profile: Profile,
    fast: bool,
    models: Mapping[Component, StoredModel],
) -> None:
    """Plan a picture of the model's own size from the headers of the files, before a weight is read.

    Args:
        budget: bytes.
        device, dtype, recipe, profile, fast: what the pipeline is loaded with.
        models: the located models.

    Raises:
        TooLittleMemory: no plan keeps the budget.
    """
    dtypes = {name: _dtype_of(model, dtype, device) for name, model in models.items()}
    quantized = {name: recipe if name in ("transformer", "t5") else None for name in models}
    stored = [lazy.codes for lazy in models["transformer"].tensors.values() if lazy.codes is not None]
    setting = Setting(
        {name: model.config for name, model in models.items()},
        {name: found.itemsize for name, found in dtypes.items()},
        device,
        stored[0].recipe if stored else recipe,
        profile.text.encoder_dtype == "float32",
        fast,
        fast and device.type == "cuda",
        context=context_of(device),
    )
    sizes = {name: _bytes_to_come(model, dtypes[name], quantized[name]) for name, model in models.items()}
    plan(budget, on_device(device, sizes), setting.activations(default_sizes(models["transformer"].config, profile)))


def _dtype_of(model: StoredModel, dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    found = compute_dtype(model, dtype, "keep")
    return suited_dtype(found, device) if dtype is None else found


def _bytes_to_come(stored: StoredModel, dtype: torch.dtype, recipe: Recipe | None) -> ModelBytes:
    """Bytes of a model by part once it is loaded and quantized."""
    model = empty(stored)
    linears = {f"{name}.weight": name for name, _ in linears_of(model)}

    def size(name: str, tensor: Tensor) -> int:
        is_code = name in linears and name in stored.tensors and stored.tensors[name].codes is not None
        if is_code or (recipe is not None and name in linears and kept(linears[name]) is None):
            return tensor.numel() + 4 * (tensor.shape[0] + 1)  # a byte each, and the scales
        return tensor.numel() * dtype.itemsize

    return model_bytes(model, size)


def on_device(device: torch.device, models: dict[Component, ModelBytes]) -> dict[Component, ModelBytes]:
    """Bytes that the models take of a device."""
    if device.type != "cuda":
        return models
    return {name: one.in_steps_of(count.SEGMENT) for name, one in models.items()}
