"""From a prompt to a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mmdit.checkpoints.components import Component
from mmdit.checkpoints.hub import Variant
from mmdit.checkpoints.load import model_in_memory
from mmdit.checkpoints.load_pipeline import DEMO, Source, load
from mmdit.checkpoints.write import write_checkpoint
from mmdit.pipeline.arguments import (
    Offload,
    Shift,
    check_latents,
    check_output_type,
    checked_offload,
    checked_quant,
    profile_of,
)
from mmdit.pipeline.failures import explained_memory_errors
from mmdit.pipeline.guidance import Guidance, with_skip_layers
from mmdit.pipeline.images import OutputType, convert_output
from mmdit.pipeline.plan import SamplingPlan
from mmdit.pipeline.profiles import Profile, is_known
from mmdit.pipeline.prompts import PromptLike, Prompts, Ranged, checked_ranges
from mmdit.pipeline.seeds import Generators, check_draws_nothing, generators, own_seeds
from mmdit.pipeline.settings import Settings, settings_of
from mmdit.pipeline.steps import PipelineSteps
from mmdit.runtime.accelerate import Accelerated, AccelerationReport
from mmdit.utils import bar, whole
from quant.recipe import Recipe
from samplers import Step

__all__ = ["DEMO", "Pipeline", "PipelineOutput"]
# (pipeline, step index, timestep, {"latents": [b, c, h, w], "denoised": [b, c, h, w]}) -> None, or {"latents": others}
OnStepEnd = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class PipelineOutput:
    """What a call drew.

    `images`: a list of PIL pictures, an array [b, h, w, 3], a tensor [b, 3, h, w] in [0, 1], or latents.
    `settings`: how each was drawn, for `mmdit.save_png`; empty where they could not say it: with given embeddings,
    latents, sigmas or a callback.
    """

    images: Any
    settings: tuple[Settings, ...] = ()


class Pipeline(PipelineSteps):
    """Stable Diffusion 3 / 3.5: text encoders, transformer, solver and VAE.

    `pipe("a cat").images[0]` draws; `encode`, `noise`, `predict`, `sample` and `decode` are the same in steps.
    The parts are plain attributes: `transformer`, `vae`, `clip_l`, `clip_g`, `t5`, `tokenizers`, `profile`.
    """

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
        fast: bool = False,
    ) -> Self:
        """Load the embedded model: 128 x 128 pictures of 1 to 4 shapes, as prompts of a small grammar say.

        "a large red circle above a blue star, on a white background": 7 shapes, 8 colours, 2 sizes, 6 backgrounds,
        counts and relations; `mmdit.demo.captions` makes more.

        Args:
            device, dtype, quant, profile, preset, offload, fast: see `from_pretrained`; stored is float16.
        """
        how: dict[str, Any] = {"device": device, "dtype": dtype, "quant": quant, "profile": profile, "preset": preset}
        return cls.load(Source(DEMO), offload=offload, fast=fast, **how)

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
        fast: bool = False,
    ) -> Self:
        """Load whatever the source is: a file, a folder of any layout, a repository, or "demo".

        Args:
            source: a path or name, or a `mmdit.checkpoints.load_pipeline.Source`, which says what goes with it.
            device, dtype, quant, profile, preset, offload, fast: see `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError, mmdit.CheckpointError, mmdit.HubError: see `mmdit.checkpoints.load_pipeline`.
        """
        source = source if isinstance(source, Source) else Source(source)
        rest: dict[str, Any] = {"profile": profile_of(profile, preset), "quant": checked_quant(quant)}
        rest |= {"offload": checked_offload(offload), "device": device}
        pipe = cls(load(source, "cpu" if offload else device, dtype), name=source.name, **rest)
        return pipe._faster() if fast else pipe

    @classmethod
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
        fast: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        variant: Variant | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Load a folder in the official, diffusers or ComfyUI layout, or a repository of the Hugging Face Hub.

        Args:
            folder: of the checkpoint, or "owner/name" of a repository, of which what is needed is downloaded.
            device: where all models go, or, with `offload`, take turns.
            dtype: None keeps what is stored.
            quant: float8 for transformer and T5: a name of `quant.RECIPES`, such as "fp8", or a `quant.Recipe`.
            profile: whose behaviour to follow, see `mmdit.PROFILES`.
            preset: settings that go with a model, such as "turbo"; see `mmdit.PRESETS`.
            offload: "stages" loads to the CPU; text encoders, transformer and VAE take turns on the device.
            fast: whether to `accelerate` it.
            revision, token, variant, cache_dir: of a repository, see `mmdit.checkpoints.hub.fetch`.

        Raises:
            FileNotFoundError: there is no such folder.
            mmdit.CheckpointError: something is missing (what, from where, to where) or broken.
            mmdit.HubError: the repository cannot be had; why, and what to do.
        """
        path = Path(folder) if folder == DEMO else folder  # a folder of that name, not the embedded model
        source = Source(path, revision=revision, token=token, variant=variant, cache_dir=cache_dir)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "quant": quant, "profile": profile, "preset": preset}
        return cls.load(source, offload=offload, fast=fast, **how)

    @classmethod
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
        fast: bool = False,
    ) -> Self:
        """Load a single file, with text encoders inside, given here, or lying beside it in `text_encoders/`.

        Args:
            path: of a safetensors file that holds the transformer.
            clip_l, clip_g, t5, vae: files or folders to take these from.
            tokenizers: the folder that holds tokenizer, tokenizer_2 and tokenizer_3; looked for beside the file.
            device, dtype, quant, profile, preset, offload, fast: see `from_pretrained`.

        Raises:
            FileNotFoundError, mmdit.CheckpointError: see `from_pretrained`.
        """
        others: Mapping[Component, Any] = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5, "vae": vae}
        source = Source(Path(path), others, tokenizers)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "quant": quant, "profile": profile, "preset": preset}
        return cls.load(source, offload=offload, fast=fast, **how)

    def accelerate(self, *, graph: bool | None = None, attention: str | None = None) -> AccelerationReport:
        """Draw faster from now on, by a second forward of the transformer over the same parameters.

        It has few kernels (Triton), the best exact attention that is installed, the modulation of all steps computed
        at once, and each step as a CUDA graph. Where there is no Triton or no GPU, the report says what is left out.
        It rounds a little differently; its error is no larger. A changed weight is noticed at the next drawing. What
        looks inside (`mmdit.capture`, `patch`, `attention_maps`) refuses an accelerated pipeline: call `plain` first.

        Args:
            graph: record steps as CUDA graphs; None does on a GPU. A graph holds up to a gigabyte, see the report.
            attention: "cudnn", "flash", "flash-attn-4" or "flash-attn-3"; None measures those that are installed.

        Returns:
            What was chosen. Attention and graphs are filled in as pictures are drawn: print it after the first.

        Raises:
            ValueError: the pipeline has `offload`; the transformer is compiled, hooked or changed; no such kernel.
        """
        if self._turns is not None:
            raise ValueError(
                "accelerate: graphs and tables need weights that stay in place, and offload='stages' moves them: load "
                "the pipeline without offload"
            )
        self.plain()
        self.accelerated = Accelerated(self.transformer, graph=graph, attention=attention)
        return self.accelerated.report()

    def plain(self) -> None:
        """Undo `accelerate`: draw by the transformer's own forward, and free graphs and tables."""
        if self.accelerated is not None:
            self.accelerated.close()
            self.accelerated = None

    def save_pretrained(self, folder: str | Path, layout: str = "official") -> Path:
        """Write all models and tokenizers; the folder must not exist yet.

        Raises:
            FileExistsError: it exists.
        """
        parts = [model_in_memory(name, model) for name, model in self.models.items()]
        return write_checkpoint(parts, folder, layout, shift=self.shift, tokenizers=self.tokenizers.save)

    @torch.no_grad()
    def __call__(
        self,
        prompt: PromptLike | None = None,
        negative_prompt: PromptLike | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        shift: Shift = None,
        seed: int | Sequence[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        skip_guidance_layers: Sequence[int] | None = None,
        skip_layer_guidance_scale: float | None = None,
        skip_layer_guidance_start: float | None = None,
        skip_layer_guidance_stop: float | None = None,
        guidance: Guidance | None = None,
        vae_tile: int | None = None,
        output_type: OutputType = "pil",
        progress: bool | None = None,
    ) -> PipelineOutput:
        """Draw. Names and defaults are diffusers' own; everything that is None is the profile's.

        Args:
            prompt, negative_prompt: one or more; no negative prompt is an empty one. It counts where the profile runs
                an unconditional pass, as a rule where guidance_scale is above 1. Encoded already: the `Conditioning`
                of all prompts, or several `mmdit.Ranged` of them, which count for parts of the way.
            height, width: in pixels, multiples of 16.
            num_inference_steps, guidance_scale, sampler, schedule: see `sample`.
            sigmas: see `levels`.
            shift: of the schedule, or "resolution"; see `sample`.
            seed, generator: see `noise`; samplers that add noise on the way take it from there too.
            latents: instead of noise, [b, c, h/8, w/8].
            prompt_embeds, pooled_prompt_embeds: instead of prompts, context [b, n, context_dim] and [b, pooled_dim]
                of `encode`; likewise the negative ones.
            num_images_per_prompt: pictures of each prompt, in a row.
            max_sequence_length: T5 tokens.
            callback_on_step_end: called after every step, see `mmdit.OnStepEnd`.
            skip_guidance_layers: blocks of skip-layer guidance, 7, 8, 9 for SD3.5-Medium; the three that follow are its
                scale and shares of the steps. As in diffusers, that profile leaves it out unless guidance_scale > 1.
            guidance: all else that guides, see `mmdit.Guidance`.
            vae_tile: see `decode`.
            output_type: "pil", "pt" ([b, 3, h, w] in [0, 1]), "np" ([b, h, w, 3]) or "latent".
            progress: show a bar; None shows it in terminals and notebooks.

        Raises:
            ValueError, TypeError: an argument is wrong; the message says what was found and expected.
            MemoryError: the device has too little memory; the message says what helps.
        """
        guidance = with_skip_layers(
            guidance,
            skip_guidance_layers,
            skip_layer_guidance_scale,
            skip_layer_guidance_start,
            skip_layer_guidance_stop,
        )
        prompts = Prompts.of("prompt", prompt, prompt_embeds, pooled_prompt_embeds)
        negatives = Prompts.of(
            "negative_prompt", negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds
        )
        prompts.check(self.transformer.config)
        count = len(prompts) * whole("num_images_per_prompt", num_images_per_prompt, 1)
        check_output_type(output_type)
        self._rules(max_sequence_length)
        if vae_tile is not None:
            vae_tile = whole("vae_tile", vae_tile, 1)
        shape = self._shape(latents, count, height, width)
        drawn_by = generators(seed, generator, count, alone=self.profile.one_seed == "each_alone")
        plan = self._plan(
            shape,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            schedule=schedule,
            sigmas=sigmas,
            shift=shift,
            generator=drawn_by,
            guidance=guidance,
        )
        if latents is not None and not plan.solver.is_stochastic:
            check_draws_nothing(seed=seed, generator=generator)
        pair = (prompts, negatives.for_each(len(prompts), self.transformer.config) if plan.uses_uncond else None)
        for one in pair:
            if one is not None and one.conditionings:
                checked_ranges(one.name, one.conditionings, plan.sigmas, plan.shift, len(one))
        with self._drawing(f"{count} pictures at once"):
            noise = self._start(latents, drawn_by, count, height, width)
            cond, uncond = (
                None if one is None else self._encoded(one, max_sequence_length, num_images_per_prompt) for one in pair
            )
            assert cond is not None
            latent = self._latent(plan, self._steps(plan, cond, uncond, noise), callback_on_step_end, progress)
            pictures = latent if output_type == "latent" else self.decode(latent, tile=vae_tile)
            images = convert_output(pictures, output_type, self.profile.to_uint8)
        if latents is not None or sigmas is not None or callback_on_step_end is not None:
            return PipelineOutput(images)
        seeds = own_seeds(seed, count, alone=self.profile.one_seed == "each_alone")
        common = self._settings(plan, max_sequence_length)
        return PipelineOutput(images, settings_of(pair, num_images_per_prompt, seeds, common))

    def _faster(self) -> Self:
        self.accelerate()
        return self

    def _latent(
        self, plan: SamplingPlan, steps: Iterator[Step], callback: OnStepEnd | None, progress: bool | None
    ) -> Tensor:
        """Run the steps; the last latent, in the transformer's dtype."""
        sigma = float(plan.sigmas[0])
        for step in bar(steps, None if plan.solver.own_steps else len(plan.sigmas) - 1, progress):
            if callback is not None:
                after_step(callback, self, step, sigma)
            sigma = step.sigma
        return step.x.to(self.dtype)

    def _settings(self, plan: SamplingPlan, max_sequence_length: int | None) -> dict[str, Any]:
        """What the settings of all pictures of a call have in common."""
        rows, columns = plan.shape[2:]
        return {
            "height": rows * self.vae.config.downscale,
            "width": columns * self.vae.config.downscale,
            "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": float(plan.guidance_scale),
            "guidance": plan.guidance.to_text(),
            "sampler": plan.sampler,
            "schedule": plan.schedule,
            "shift": plan.shift,
            "profile": self.profile.name if is_known(self.profile) else f"{self.profile.name}, changed",
            "max_sequence_length": max_sequence_length,
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quant": self.quant,
            "device": self.device.type,
        }

    @contextmanager
    def _drawing(self, what: str) -> Iterator[None]:
        """Explain running out of memory; with `offload`, leave nothing on the device, whatever happens."""
        try:
            with explained_memory_errors(self.models, what):
                yield
        finally:
            if self._turns is not None:
                self._turns.leave()

    def _shape(self, latents: Tensor | None, count: int, height: int | None, width: int | None) -> tuple[int, ...]:
        """The shape of the latents, [b, c, h, w]: of those given, or for pictures of this size."""
        if latents is None:
            return self._latent_shape(count, height, width)
        cell = self.vae.config.downscale
        check_latents(latents, count, self.transformer.config, cell, self._unit, height, width)
        return tuple(latents.shape)

    def _encoded(self, prompts: Prompts, max_sequence_length: int | None, times: int) -> list[Ranged]:
        """The conditionings of prompts, each prompt `times` in a row."""
        found = prompts.conditionings
        if prompts.texts is not None:
            found = (Ranged(self.encode(prompts.texts, max_sequence_length=max_sequence_length)),)
        return [one.to(self.device, self.dtype).repeat(times) for one in found]

    def _start(
        self, latents: Tensor | None, drawn_by: Generators, count: int, height: int | None, width: int | None
    ) -> Tensor:
        """The latents to start from: those given, or noise."""
        if latents is not None:
            return latents.to(self.device)
        return self.noise(count=count, height=height, width=width, generator=drawn_by)


def after_step(callback: OnStepEnd, pipe: object, step: Step, sigma: float) -> None:
    """Call `callback` as diffusers does; latents that it returns are what the solver goes on from.

    Args:
        callback: see `OnStepEnd`; diffusers passes the latents alone, here the predicted picture is there too.
        pipe: the pipeline.
        step: just made.
        sigma: the level that it started from; the timestep is 1000 times that.

    Raises:
        TypeError: the callback returned something else than a dict or None.
        ValueError: it returned another key than latents, or latents of another shape.
    """
    given = {"latents": step.x, "denoised": step.denoised}
    found = callback(pipe, step.i, 1000 * sigma, dict(given))
    if found is None:
        return
    if not isinstance(found, dict):
        raise TypeError(f"callback_on_step_end returned {type(found).__name__}, expected a dict or None")
    if odd := sorted(set(found) - set(given)):
        raise ValueError(f"callback_on_step_end returned {odd[0]!r}; what it can change is 'latents'")
    latents = found.get("latents", step.x)
    if latents.shape != step.x.shape:
        raise ValueError(f"callback_on_step_end returned latents {list(latents.shape)}, expected {list(step.x.shape)}")
    step.x = latents.to(step.x)
