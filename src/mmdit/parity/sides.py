"""A common interface for the two kinds of pipelines that can be compared, ours and diffusers'."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from encoders import Conditioning
from mmdit.checkpoints.components import Component, to_diffusers
from mmdit.checkpoints.keymaps import count, mmdit_rules, to_ours, vae_rules
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.recognise import UNUSED
from mmdit.parity.taps import Job, Modules, Run, restored_attributes
from mmdit.pipeline.images import to_pil
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import PROFILES, Profile

_THEIR_ENCODERS: dict[Component, str] = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
_THEIR_TOKENIZERS: dict[Component, str] = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
_THEIRS = (
    "transformer",
    "vae",
    "scheduler",
    "image_processor",
    "encode_prompt",
    "prepare_latents",
    *_THEIR_ENCODERS.values(),
)


class Side(ABC):
    """The interface of a pipeline for comparisons."""

    models: Mapping[Component, nn.Module]
    modules: Modules
    profile: Profile  # whose behaviour it follows

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    @abstractmethod
    def shift(self) -> float:
        """The shift of the noise schedule."""

    @property
    @abstractmethod
    def default_size(self) -> int:
        """The picture's side in pixels, where none is given."""

    @abstractmethod
    def noise(self, job: Job) -> Tensor:
        """The starting noise of the job's seed, of shape [1, c, h, w]."""

    @abstractmethod
    def encode(self, prompt: str) -> Conditioning:
        """The conditioning of a prompt, as its transformer reads it."""

    @abstractmethod
    def draw(self, run: Run, cond: Conditioning, uncond: Conditioning, noise: Tensor) -> Tensor:
        """The picture, of shape [1, 3, h, w] in [0, 1]; taps what no module computes: sigmas, guidance and latents."""

    @abstractmethod
    def eight_bits(self, pixels: Tensor) -> Tensor:
        """The picture as it is saved, uint8 [1, h, w, 3]."""

    @abstractmethod
    def config(self, component: Component) -> Mapping[str, Any]:
        """A model's config with the names of diffusers and transformers."""

    @abstractmethod
    def weights(self, component: Component) -> Mapping[str, LazyTensor]:
        """A model's weights under official keys."""

    @abstractmethod
    def end_token(self, encoder: Component) -> int:
        """The id that ends a prompt."""

    def dtype(self, component: Component) -> torch.dtype:
        """The least precise dtype of a model's parameters."""
        dtypes = {parameter.dtype for parameter in self.models[component].parameters()}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def longest_sum(self, component: Component) -> int:
        """The number of products in the longest dot product of a model's layers."""
        return max(weight[0].numel() for weight in self.models[component].parameters() if weight.ndim > 1)

    def _words(self) -> str:
        dtypes = {component: str(self.dtype(component)).removeprefix("torch.") for component in self.models}
        said = ", ".join(f"{component} {dtype}" for component, dtype in dtypes.items())
        return f"{said if len(set(dtypes.values())) > 1 else dtypes['transformer']} on {self._device}"

    @property
    def _device(self) -> torch.device:
        return next(self.models["transformer"].parameters()).device


class OurSide(Side):
    """`mmdit.Pipeline`."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe, self.models, self.profile = pipe, pipe.models, pipe.profile
        model, decoder = pipe.transformer, pipe.vae.decoder
        levels = {f"up {i}": level for i, level in enumerate(decoder.up)}
        self.modules = Modules(
            encoders={name: self.models[name] for name in _THEIR_ENCODERS if name in self.models},
            transformer=model,
            latent=0,
            timestep=1,
            context=2,
            pooled=3,
            embedders={
                "t_embedder": model.t_embedder,
                "y_embedder": model.y_embedder,
                "x_embedder": model.x_embedder.proj,
                "context_embedder": model.context_embedder,
            },
            blocks=model.joint_blocks,
            x=1,
            vector=2,
            final=model.final_layer,
            decoder=decoder,
            decoder_parts={"conv_in": decoder.conv_in, "mid": decoder.mid, **levels, "conv_out": decoder.conv_out},
        )

    def __str__(self) -> str:
        return f"mmdit {type(self.pipe).__name__}, profile {self.profile.name!r}, {self._words()}"

    @property
    def shift(self) -> float:
        return self.pipe.shift

    @property
    def default_size(self) -> int:
        return (self.pipe.transformer.config.sample_size or 128) * self.pipe.vae.config.downscale

    def noise(self, job: Job) -> Tensor:
        return self.pipe.noise(job.seed, height=job.height, width=job.width)

    def encode(self, prompt: str) -> Conditioning:
        return self.pipe.encode(prompt)

    def draw(self, run: Run, cond: Conditioning, uncond: Conditioning, noise: Tensor) -> Tensor:
        pipe, job, x = self.pipe, run.job, noise.to(self.pipe.device, self.pipe.dtype)
        sigmas = run.tap("sigmas", pipe.sigmas(job.steps, sampler=job.sampler))
        settings: Any = {"sigmas": sigmas.clamp(max=1), "guidance_scale": job.guidance}  # the other side's are rounded
        settings |= {} if job.sampler is None else {"sampler": job.sampler}
        settings["generator"] = torch.Generator().manual_seed(job.seed)  # of samplers that add noise on the way
        for step in pipe.sample(cond, uncond, x, **settings):
            run.in_step("guided")(step.denoised)
            step.x = x = run.tap(f"step {run.step} latent", step.x)
            run.step += 1
        # Values that are not finite appear in the comparison instead of raising an error.
        return pipe.decode(run.tap("final latent", x.to(pipe.dtype)), finite=False)

    def eight_bits(self, pixels: Tensor) -> Tensor:
        return torch.stack([_array(picture) for picture in to_pil(pixels, self.profile.to_uint8)])

    def config(self, component: Component) -> Mapping[str, Any]:
        return to_diffusers(component, self.models[component].config)

    def weights(self, component: Component) -> Mapping[str, LazyTensor]:
        return _lazy(self.models[component])

    def end_token(self, encoder: Component) -> int:
        return int(getattr(self.pipe.tokenizers, encoder).eos)


class TheirSide(Side):
    """A live `diffusers.StableDiffusion3Pipeline`, or an object with the same components."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.profile = pipe, PROFILES["diffusers"]
        encoders = {name: getattr(pipe, attribute) for name, attribute in _THEIR_ENCODERS.items()}
        encoders = {name: model for name, model in encoders.items() if model is not None}
        self.models = {"transformer": pipe.transformer, "vae": pipe.vae, **encoders}
        model, decoder = pipe.transformer, pipe.vae.decoder
        levels = {f"up {len(decoder.up_blocks) - 1 - i}": block for i, block in enumerate(decoder.up_blocks)}
        self.modules = Modules(
            encoders=encoders,
            transformer=model,
            latent="hidden_states",
            timestep="timestep",
            context="encoder_hidden_states",
            pooled="pooled_projections",
            embedders={
                "t_embedder": model.time_text_embed.timestep_embedder,
                "y_embedder": model.time_text_embed.text_embedder,
                "x_embedder": model.pos_embed.proj,
                "context_embedder": model.context_embedder,
            },
            blocks=model.transformer_blocks,
            x="hidden_states",
            vector="temb",
            final=model.proj_out,
            decoder=decoder,
            decoder_parts={
                "conv_in": decoder.conv_in,
                "mid": decoder.mid_block,
                **levels,
                "conv_out": decoder.conv_out,
            },
        )

    def __str__(self) -> str:
        return f"diffusers {type(self.pipe).__name__}, {self._words()}"

    @property
    def shift(self) -> float:
        return float(self.pipe.scheduler.shift)

    @property
    def default_size(self) -> int:
        return int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)

    def noise(self, job: Job) -> Tensor:
        shape = (1, self.pipe.transformer.config.in_channels, job.height, job.width)
        generator = torch.Generator().manual_seed(job.seed)
        return self.pipe.prepare_latents(*shape, self.dtype("transformer"), torch.device("cpu"), generator)

    def encode(self, prompt: str) -> Conditioning:
        context, _, pooled, _ = self.pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return Conditioning(context, pooled)

    def draw(self, run: Run, cond: Conditioning, uncond: Conditioning, noise: Tensor) -> Tensor:
        pipe, scheduler, job = self.pipe, self.pipe.scheduler, run.job
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        def tapped_timesteps(*args: object, **kwargs: object) -> None:
            set_timesteps(*args, **kwargs)
            scheduler.sigmas = run.tap("sigmas", scheduler.sigmas)

        def tapped_step(velocity: Tensor, timestep: object, sample: Tensor, *args: object, **kwargs: object) -> Any:
            wide = torch.promote_types(sample.dtype, torch.float32)
            run.in_step("guided")(sample.to(wide) - scheduler.sigmas[run.step] * velocity.to(wide))
            return step(velocity, timestep, sample, *args, **kwargs)

        def after_step(_: Any, i: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            latent, run.step = run.tap(f"step {i} latent", tensors["latents"]), i + 1
            return {"latents": run.tap("final latent", latent) if run.step == pipe.num_timesteps else latent}

        with restored_attributes(scheduler):
            scheduler.set_timesteps, scheduler.step = tapped_timesteps, tapped_step
            return pipe(
                prompt_embeds=cond.context,
                pooled_prompt_embeds=cond.pooled,
                negative_prompt_embeds=uncond.context,
                negative_pooled_prompt_embeds=uncond.pooled,
                height=job.height,
                width=job.width,
                num_inference_steps=job.steps,
                guidance_scale=job.guidance,
                latents=noise,
                output_type="pt",
                callback_on_step_end=after_step,
            ).images

    def eight_bits(self, pixels: Tensor) -> Tensor:
        processor = self.pipe.image_processor
        return torch.stack([_array(picture) for picture in processor.numpy_to_pil(processor.pt_to_numpy(pixels))])

    def config(self, component: Component) -> Mapping[str, Any]:
        config: Any = self.models[component].config
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)

    def weights(self, component: Component) -> Mapping[str, LazyTensor]:
        tensors = _lazy(self.models[component])
        if component == "transformer":
            return to_ours(tensors, mmdit_rules(count(tensors, "transformer_blocks.{i}.")))[0]
        if component == "vae":
            levels, blocks = (count(tensors, f"encoder.down_blocks.{i}.") for i in ("{i}", "0.resnets.{i}"))
            return to_ours(tensors, vae_rules(levels, blocks))[0]
        tensors.pop("encoder.embed_tokens.weight", None)  # T5's token embedding once more
        return tensors

    def end_token(self, encoder: Component) -> int:
        return int(getattr(self.pipe, _THEIR_TOKENIZERS[encoder]).eos_token_id)


def side_of(pipe: object) -> Side:
    """The pipeline as a side of a comparison.

    Raises:
        TypeError: it is neither ours nor has the parts of diffusers' StableDiffusion3Pipeline.
    """
    if isinstance(pipe, Pipeline):
        return OurSide(pipe)
    if missing := [name for name in _THEIRS if not hasattr(pipe, name)]:
        raise TypeError(
            f"compare takes a mmdit.Pipeline or a diffusers StableDiffusion3Pipeline, got {type(pipe).__name__}, "
            f"which has no {', '.join(missing)}"
        )
    return TheirSide(pipe)


def _lazy(model: nn.Module) -> dict[str, LazyTensor]:
    return {key: LazyTensor.of(value) for key, value in model.state_dict().items() if not UNUSED.fullmatch(key)}


def _array(picture: object) -> Tensor:
    return torch.from_numpy(np.array(picture))
