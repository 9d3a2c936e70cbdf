"""The models of a pipeline: their devices and dtypes, acceleration, and the state of each thread's drawings."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from encoders import VAE, CLIPText, T5Encoder
from encoders.conditioning import EncoderName
from mmdit.checkpoints.components import Component, title
from mmdit.checkpoints.load_pipeline import Components
from mmdit.models.controlnet import ControlNet
from mmdit.pipeline.arguments import Offload, cells, checked_memory, checked_offload, checked_quant, profile_of
from mmdit.pipeline.callbacks import CallState
from mmdit.pipeline.memory import PipelineMemory
from mmdit.pipeline.passes import Planner, Watcher
from mmdit.pipeline.plan import default_shift
from mmdit.pipeline.profiles import PRESETS, Profile, with_sampling
from mmdit.pipeline.settings import digest_of
from mmdit.runtime.accelerate import Accelerated, AccelerationReport
from mmdit.runtime.beside import Beside
from mmdit.runtime.devices import resolve_device, warn_if_slow
from mmdit.runtime.fast_vae import FastVAE
from mmdit.runtime.parallel import Parallel
from mmdit.runtime.versions import contents_of
from mmdit.utils import weight_bytes
from quant.quantize import is_quantized, quantize_, refuse_quantized
from quant.recipe import Recipe, recipe_name
from quant.tensor import Float8Tensor


class PipelineModels(PipelineMemory):
    """The models of a pipeline and its profile, on their device and in their dtype; `mmdit.Pipeline` draws with them.

    Args:
        parts: the models.
        profile: a name of `mmdit.PROFILES`, or a profile of your own (`dataclasses.replace`).
        preset: a name of `mmdit.PRESETS`: steps, guidance, sampler and shift of a kind of model. It takes precedence
            over the scheduler config of the model.
        offload: "stages" keeps the models where they are, and moves text encoders, transformer and VAE to `device` in
            turn.
        memory: a budget of the device's memory, such as "8GB", see `PipelineFiles.from_pretrained`.
        device: the device that models compute on with `offload` or `memory`.
        quant: a name of `quant.RECIPES` or a `quant.Recipe`. Linears of the transformer and of T5 are quantized to
            float8, except those of `quant.quantize.KEPT`. A model that was float8 in its file stays as it is; if the
            transformer's recipe in the file is another one, that is an error.
        name: the model's name in the settings of a picture.
    """

    def __init__(
        self,
        parts: Components,
        *,
        profile: str | Profile = "diffusers",
        preset: str | None = None,
        offload: Offload | None = None,
        memory: str | int | None = None,
        device: torch.device | str = "cuda",
        quant: str | Recipe | None = None,
        name: str = "",
    ) -> None:
        self.transformer, self.vae, self.tokenizers = parts.transformer, parts.vae, parts.tokenizers
        self.clip_l: CLIPText | None = parts.clip_l
        self.clip_g: CLIPText | None = parts.clip_g
        self.t5, self.name = parts.t5, name
        self.profile, asked = profile_of(profile, preset), None if preset is None else PRESETS[preset]
        self.sampling = parts.sampling  # the scheduler's config, where it contains more than a shift
        self.shift = self.profile.shift if parts.shift is None else parts.shift
        if asked is not None and asked.shift is not None:
            self.shift = asked.shift
            self.sampling = None if self.sampling is None else replace(self.sampling, shift=asked.shift)
        if self.sampling is not None:
            self.profile = with_sampling(self.profile, self.sampling, asked)
            self.shift = default_shift(self.sampling, self.shift, (self._cells(None, "height"),) * 2, self.transformer)
        recipe = checked_quant(quant)
        self.quant = None if recipe is None else recipe_name(recipe)
        if recipe is not None:
            refuse_quantized(
                self.transformer,
                f"{name or 'the pipeline'}: the transformer",
                f"quant= asks for {recipe_name(recipe)}; leave quant out, or give a 16-bit file",
                unless=recipe,
            )
            for model in (self.transformer, self.t5):
                if model is not None and not is_quantized(model):
                    quantize_(model, recipe)
        # The default net for calls that give control_image without controlnet; its component name is "controlnet".
        self.controlnet: ControlNet | None = None
        self._here = _PerThread()
        self._digest: tuple[object, str] | None = None  # (state of the weights, their digest)
        self.accelerated: Accelerated | None = None  # see `mmdit.Pipeline.accelerate`
        self._beside: Beside | None = None  # what runs faster beside the transformer
        self.parallel: Parallel | None = None  # see `mmdit.parallelize`
        moves = offload is not None or memory is not None
        place = resolve_device(device) if moves else self.transformer.pos_embed.device
        self._start_memory(place, checked_offload(offload), checked_memory(memory, offload))

    @property
    def watchers(self) -> list[Watcher]:
        """Functions that are called before every pass of the transformer in this thread."""
        return self._here.watchers

    @property
    def planners(self) -> list[Planner]:
        """Functions that are called before the first pass of every drawing of this thread."""
        return self._here.planners

    def __repr__(self) -> str:
        """A line about the profile, and one about the size, dtype, device and quantization of each model."""
        profile = self.profile
        lines = [
            f"{type(self).__name__} {self.name!r}, profile {profile.name}: {profile.steps} steps, guidance "
            f"{profile.guidance_scale:g}, {profile.sampler}, shift {self.shift:g}"
        ]
        return "\n".join([*lines, *(_line(title(name), model) for name, model in self.models.items())])

    @property
    def components(self) -> dict[str, Any]:
        """The loaded models and the tokenizers, by name."""
        return {**dict[str, Any](self.models.items()), "tokenizers": self.tokenizers}

    @property
    def models(self) -> dict[Component, nn.Module]:
        """The loaded models, by component."""
        every: dict[Component, nn.Module | None] = {
            "transformer": self.transformer,
            "vae": self.vae,
            "clip_l": self.clip_l,
            "clip_g": self.clip_g,
            "t5": self.t5,
            "controlnet": self.controlnet,
        }
        return {name: model for name, model in every.items() if model is not None}

    @property
    def device(self) -> torch.device:
        """The device that the transformer computes on."""
        return self._place

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the transformer computes in."""
        return self.transformer.pos_embed.dtype

    def to(self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or cast all models, as `nn.Module.to` does: `pipe.to("cuda")`, `pipe.to(torch.bfloat16)`, or both.

        With `offload` the models stay where they are, and from now on compute on the new device in turn.

        Args:
            device: a name, "auto" or a `torch.device`; a dtype is taken for `dtype`.
            dtype: the dtype of weights and arithmetic; None keeps it.

        Raises:
            ValueError: this machine has no such device, two dtypes are given, or the pipeline is parallel.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ValueError(f"two dtypes are given, {device} and {dtype}; give a device and a dtype")
            device, dtype = None, device
        device = None if device is None else resolve_device(device)
        if self.parallel is not None:
            raise ValueError("the pipeline is parallel; call pipe.parallel.close() on every rank before it is moved")
        warn_if_slow(self.device if device is None else device, dtype)
        if self._turns is not None:
            place = self._turns.device if device is None else device
            self._leave()
            self._start_memory(place, None if self._budget else "stages", self._budget)
            device = None
        for model in self.models.values():
            model.to(device=device, dtype=dtype)
        return self

    @property
    def digest(self) -> str:
        """The digest of the transformer's weights that settings contain, see `mmdit.pipeline.settings.digest_of`."""
        state = contents_of(self.transformer, parts=self._turns is None)  # what LoRAs attach are buffers
        if self._digest is None or self._digest[0] != state:
            if self._turns is not None:
                self._turns.queue.settle()  # weights that are on their way
            self._digest = state, digest_of(self.transformer)
        return self._digest[1]

    def accelerate(self, *, graph: bool | None = None, attention: str | None = None) -> AccelerationReport:
        """Draw faster from now on, with a second forward of the transformer over the same parameters.

        It uses few, fused kernels (Triton) and the fastest exact attention that is installed, computes the modulation
        of all steps at once, and runs each step as a CUDA graph, its ControlNets included. Text encoders run as CUDA
        graphs too. The VAE runs with channels last and fused norms, in half of the memory, and in tiles above 2048 x
        2048 pixels. Without Triton or a GPU, the report lists what is left out. Results are rounded a little
        differently, with no larger error. Changes of weights take effect at the next drawing. With `memory` or
        `offload`, steps are launched kernel by kernel where blocks of the transformer are streamed or a ControlNet
        acts, because a graph needs weights in place, and text encoders and VAE run their own forward; where the
        transformer moves between drawings only, each drawing records graphs of its own once the GPU waits for the
        host. `mmdit.capture`, `patch` and `attention_maps` refuse an accelerated pipeline: call `plain` first.

        Args:
            graph: whether to record steps as CUDA graphs; None does so on a GPU. A graph takes up to a gigabyte of
                memory, see the report.
            attention: "cudnn", "flash", "flash-attn-4" or "flash-attn-3"; None measures those that are installed and
                takes the fastest.

        Returns:
            The choices. Attention and graphs are filled in while pictures are drawn: print it after the first one.

        Raises:
            ValueError: the transformer is compiled, hooked or changed; or there is no such kernel.
        """
        self.plain()
        sequence = None if self.parallel is None else self.parallel.sequence
        how: dict[str, Any] = {"graph": graph, "attention": attention, "sequence": sequence}
        if self._turns is not None:
            with self._turns.lock, self._computing("the fast forward"):
                self._enter("transformer")
                self.accelerated = Accelerated(self.transformer, weights=self._turns, **how)
                report = self.accelerated.report()
            self._replan()
            report.left_out.append("text encoders and VAE, which take turns on the device")
            return report
        accelerated = Accelerated(self.transformer, **how)
        try:
            self._beside = Beside(self.vae, self._text_encoders, graph)
        except ValueError:
            accelerated.close()
            raise
        self.accelerated = accelerated
        report = accelerated.report()
        report.others |= self._beside.report
        report.left_out += self._beside.left_out
        return report

    def plain(self) -> None:
        """Undo `accelerate`: draw with the transformer's own forward, and free graphs and tables."""
        if self.accelerated is not None:
            self.accelerated.close()
            self.accelerated = None
            self._replan()
        if self._beside is not None:
            self._beside.close()
            self._beside = None

    @property
    def _fast_vae(self) -> VAE | FastVAE:
        """The VAE that encodes and decodes: the pipeline's, or its fast forward."""
        return self.vae if self._beside is None else self._beside.vae(self.vae)

    @property
    def _text_encoders(self) -> dict[EncoderName, CLIPText | T5Encoder | None]:
        return {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5": self.t5}

    def _as_saved(self) -> AbstractContextManager[None]:
        """Within the context, the weights are those that `save_pretrained` writes."""
        return nullcontext()

    def _cells(self, pixels: int | None, name: str) -> int:
        """The number of latent cells along a side of this many pixels."""
        config = self.transformer.config
        if pixels is None:
            return config.sample_size or 128
        return cells(pixels, name, config, self.vae.config.downscale, self._unit)

    @property
    def _unit(self) -> int:
        """The number of cells that the sides of a latent are multiples of."""
        return 1 if self.profile.odd_latents == "wrap" else self.transformer.config.patch_size


class _PerThread(threading.local):
    """The state of the drawings of one thread. A copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self.watchers: list[Watcher] = []
        self.planners: list[Planner] = []
        self.predictions = 0  # number of calls of `predict` so far
        self.call: CallState | None = None  # the values that callbacks read and write
        self.pending: Callable[[], None] | None = None  # reads the check of the last step, once decoding is launched

    def __reduce__(self) -> tuple[type[_PerThread], tuple[()]]:
        return type(self), ()


def _line(called: str, model: nn.Module) -> str:
    """A line with the size, dtype, device and quantization of a model."""
    weights = list(model.parameters())
    dtypes = " and ".join(sorted({str(one.dtype).removeprefix("torch.") for one in weights}))
    devices = " and ".join(sorted({str(one.device) for one in weights}))
    recipes = sorted({recipe_name(one.recipe) for one in weights if isinstance(one, Float8Tensor)})
    quantized = f", quantized to {' and '.join(recipes)}" if recipes else ""
    size = f"{sum(one.numel() for one in weights) / 1e6:,.1f} M parameters, {weight_bytes(model) / 1e9:.2f} GB"
    return f"  {called}: {size}, {dtypes} on {devices}{quantized}"
