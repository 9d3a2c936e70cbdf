"""From a prompt to a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from mmdit.checkpoints.components import Component
from mmdit.checkpoints.hub import Variant
from mmdit.checkpoints.load import model_in_memory
from mmdit.checkpoints.load_pipeline import DEMO, Components, Source, load
from mmdit.checkpoints.write import write_checkpoint
from mmdit.pipeline.arguments import (
    LEAST_TILE,
    Offload,
    Shift,
    check_latents,
    check_output_type,
    checked_offload,
    checked_quant,
    profile_of,
)
from mmdit.pipeline.callbacks import CallState, OnStepEnd, after_step, tensor_inputs_of
from mmdit.pipeline.diffusers_names import CALL, LOAD, explains_names
from mmdit.pipeline.failures import explained_memory_errors
from mmdit.pipeline.guidance import GuidanceLike, with_skip_layers
from mmdit.pipeline.images import OutputType, convert_output
from mmdit.pipeline.plan import Run, SamplerLike, SamplingPlan, SigmasLike
from mmdit.pipeline.profiles import Profile, is_known
from mmdit.pipeline.prompts import PromptLike, Prompts, Ranged, checked_ranges
from mmdit.pipeline.seeds import (
    Generators,
    SeedLike,
    check_draws_nothing,
    checked_seeds,
    fresh_seeds,
    generators,
    own_seeds,
)
from mmdit.pipeline.settings import Settings, digest_of, grid, settings_of
from mmdit.pipeline.steps import PipelineSteps
from mmdit.runtime.accelerate import Accelerated, AccelerationReport
from mmdit.runtime.devices import resolve_device, warn_if_slow
from mmdit.utils import bar, number, whole
from quant.recipe import Recipe
from samplers import ResolutionShift, SamplingDefaults

__all__ = ["DEMO", "Pipeline", "PipelineOutput"]


@dataclass(frozen=True, repr=False)
class PipelineOutput:
    """The pictures of a call; a notebook shows them.

    `images`: a list of PIL pictures, an array [b, h, w, 3], a tensor [b, 3, h, w] in [0, 1], or latents [b, c, h, w].
    `settings`: how each picture was drawn, for `mmdit.save_png`. They are empty where settings cannot say it: with
    embeddings, latents, sigmas, a callback, or a sampler or guidance of your own.
    """

    images: Any
    settings: tuple[Settings, ...] = ()

    def __repr__(self) -> str:
        count = len(self.images)
        kind = (
            "pictures" if isinstance(self.images, list) else f"{type(self.images).__name__} {list(self.images.shape)}"
        )
        said = f"{count} {kind}" if isinstance(self.images, list) else kind
        seeds = [one.seed for one in self.settings]
        return f"PipelineOutput({said}{f', seeds {seeds}' if seeds else ''})"

    def _repr_png_(self) -> bytes | None:
        """The pictures side by side, for notebooks; None where they are no PIL pictures."""
        if not isinstance(self.images, list):
            return None
        with BytesIO() as file:
            grid(self.images).save(file, format="png")
            return file.getvalue()


class Pipeline(PipelineSteps):
    """Stable Diffusion 3 / 3.5: text encoders, transformer, solver and VAE.

    `pipe("a cat").images[0]` draws; `encode`, `noise`, `predict`, `sample` and `decode` are the same in steps.
    The models are plain attributes: `transformer`, `vae`, `clip_l`, `clip_g`, `t5`; so are `tokenizers` and `profile`.

    Several threads may draw with one pipeline: what looks inside (`mmdit.capture` and others) sees the drawings of its
    own thread. With `offload`, their calls run one after the other.
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
            device, dtype, quant, profile, preset, offload, fast: see `from_pretrained`; the files hold float16.
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
        place = _place(device, dtype, offload)
        rest: dict[str, Any] = {"profile": profile_of(profile, preset), "quant": checked_quant(quant)}
        rest |= {"offload": checked_offload(offload), "device": place.device}
        pipe = cls(_widened(load(source, place.home, place.dtype), place), name=source.name, **rest)
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
        fast: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        variant: Variant | None = None,
        cache_dir: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a folder in the official, diffusers or ComfyUI layout, or a repository of the Hugging Face Hub.

        Args:
            folder: a folder, or "owner/name" of a repository, of which the files that are needed are downloaded.
            device: where the models are loaded to and compute. "auto" is CUDA where there is one, else the CPU.
            dtype: of weights and arithmetic. None keeps the dtype of the files, but on a CPU float16 and bfloat16
                become float32, which is far faster there.
            quant: quantize transformer and T5 to float8: a name of `quant.RECIPES`, such as "fp8", or a `quant.Recipe`.
            profile: the reference whose behaviour to follow, a name of `mmdit.PROFILES` or an `mmdit.Profile`.
            preset: default settings of a kind of model, such as "turbo": a name of `mmdit.PRESETS`.
            offload: "stages" keeps the models on the CPU; text encoders, transformer and VAE take turns on the device.
            fast: whether to `accelerate` the pipeline.
            revision: branch, tag or commit of the repository.
            token: of the hub, for repositories that ask for one.
            variant: which files of the repository, such as "fp16".
            cache_dir: where downloads are kept.
            torch_dtype: diffusers' name for `dtype`.

        Raises:
            FileNotFoundError: there is no such folder.
            mmdit.CheckpointError: something is missing (what, from where, to where) or broken.
            mmdit.HubError: the repository cannot be had; why, and what to do.
        """
        path = Path(folder) if folder == DEMO else folder  # a folder of that name, not the embedded model
        source = Source(path, revision=revision, token=token, variant=variant, cache_dir=cache_dir)
        how: dict[str, Any] = {
            "device": device,
            "dtype": _one_dtype(dtype, torch_dtype),
            "quant": quant,
            "profile": profile,
            "preset": preset,
        }
        return cls.load(source, offload=offload, fast=fast, **how)

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
        fast: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a single file, with text encoders inside, given here, or lying beside it in `text_encoders/`.

        Args:
            path: a safetensors file that holds the transformer.
            clip_l, clip_g, t5, vae: files or folders that hold these models.
            tokenizers: the folder that holds tokenizer, tokenizer_2 and tokenizer_3; None looks for it beside the file.
            device, dtype, quant, profile, preset, offload, fast, torch_dtype: see `from_pretrained`.

        Raises:
            FileNotFoundError, mmdit.CheckpointError: see `from_pretrained`.
        """
        others: Mapping[Component, Any] = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5, "vae": vae}
        source = Source(Path(path), others, tokenizers)
        how: dict[str, Any] = {
            "device": device,
            "dtype": _one_dtype(dtype, torch_dtype),
            "quant": quant,
            "profile": profile,
            "preset": preset,
        }
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
        """Write all models and tokenizers into a new folder, and return its path.

        Args:
            folder: that is made.
            layout: "official", "diffusers" or "comfyui".

        Raises:
            FileExistsError: the folder exists.
        """
        parts = [model_in_memory(name, model) for name, model in self.models.items()]
        return write_checkpoint(
            parts, folder, layout, shift=self.shift, sampling=self._saved_sampling(), tokenizers=self.tokenizers.save
        )

    def _saved_sampling(self) -> SamplingDefaults | None:
        """What the scheduler's config of a saved pipeline says; its shift is the pipeline's, which may be set."""
        if self.sampling is None or isinstance(self.sampling.shift, ResolutionShift):
            return self.sampling
        return replace(self.sampling, shift=float(self.shift))

    @torch.no_grad()
    @explains_names(CALL)
    def __call__(
        self,
        prompt: PromptLike | None = None,
        negative_prompt: PromptLike | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerLike | None = None,
        schedule: str | None = None,
        sigmas: SigmasLike | None = None,
        shift: Shift = None,
        seed: SeedLike | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int | None = 1,
        max_sequence_length: int | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        skip_guidance_layers: Sequence[int] | None = None,
        skip_layer_guidance_scale: float | None = None,
        skip_layer_guidance_start: float | None = None,
        skip_layer_guidance_stop: float | None = None,
        guidance: GuidanceLike | None = None,
        vae_tile: int | None = None,
        output_type: OutputType = "pil",
        progress: bool | None = None,
    ) -> PipelineOutput:
        """Draw pictures of prompts.

        Arguments have diffusers' names. Where one is None, the profile's default counts: 28 steps of euler on the
        schedule "normal" at guidance 7 in the profile "diffusers", see `mmdit.Profile`. All arguments are checked
        before a model runs.

        Args:
            prompt: a string, or a list with one for each picture. Or what `encode` made of prompts, a `Conditioning`;
                or a list of `mmdit.Ranged`, each a conditioning for a part of the way.
            negative_prompt: what to keep away from; one for all prompts, or one for each. None is an empty prompt. It
                counts where the profile runs an unconditional branch: as a rule where guidance_scale is above 1.
            height: of the pictures, in pixels, a multiple of 16; None is the model's own size.
            width: likewise.
            num_inference_steps: steps of the solver, at least 1.
            guidance_scale: weight of classifier-free guidance: x0 = uncond + guidance_scale (cond - uncond). 1 is none.
            sampler: the solver, a name of `samplers.SOLVERS`; or a function `(denoise, x, sigmas)` that yields
                `samplers.Step`, where `denoise(x, sigma)` gives x0, the predicted picture as a latent.
            schedule: how the noise levels are spaced, a name of `samplers.SCHEDULES`.
            sigmas: the noise levels themselves, falling from at most 1 to 0, instead of steps and schedule. As in
                diffusers, the profile "diffusers" shifts a list that does not end at 0, and appends the 0.
            shift: how far the schedule is moved to high noise, above 0; "resolution" goes by the size of the picture,
                see `samplers.resolution_shift`. None is the model's, as a rule 3.
            seed: a whole number of at most 64 bits, or one for each picture; with one prompt, several seeds draw
                several pictures. None draws a seed for each picture, which is kept in `settings`. Samplers that add
                noise on the way take it from the same seeds.
            generator: a `torch.Generator`, or one for each picture, instead of seeds.
            latents: what to start from instead of noise, [b, c, h/8, w/8], in model space.
            prompt_embeds: context of shape [b, tokens, context_dim], as `encode` gives it, instead of prompts.
            pooled_prompt_embeds: of shape [b, pooled_dim], with prompt_embeds.
            negative_prompt_embeds: likewise, instead of negative prompts.
            negative_pooled_prompt_embeds: likewise.
            num_images_per_prompt: pictures of each prompt; they follow each other in the output.
            max_sequence_length: tokens that T5 reads; None is the profile's number.
            callback_on_step_end: a function `(pipe, step, timestep, tensors)`, called after every step, or one of
                diffusers' callback objects. It may return a dict of tensors to go on with: "latents", "prompt_embeds",
                "pooled_prompt_embeds". While it runs, `pipe._interrupt = True` ends the drawing after this step, and
                `pipe.num_timesteps` and `pipe.guidance_scale` can be read. The timestep is a tensor, 1000 sigma.
            callback_on_step_end_tensor_inputs: the names of the tensors that the callback gets: "latents",
                "denoised" (the predicted picture), "prompt_embeds" and "pooled_prompt_embeds" (negative prompts first).
                None gives it the first two.
            skip_guidance_layers: blocks that skip-layer guidance leaves out, 7, 8, 9 for SD3.5-Medium. As in diffusers,
                that profile leaves it out unless guidance_scale is above 1.
            skip_layer_guidance_scale: its weight.
            skip_layer_guidance_start: the share of the steps after which it begins, 0 to 1.
            skip_layer_guidance_stop: the share of the steps at which it ends, 0 to 1.
            guidance: all other ways to guide, as `mmdit.Guidance`; or a function `(x, sigma, cond, uncond) -> x0`, in
                place of classifier-free guidance, of the latents [b, c, h, w], their noise level and the two predicted
                pictures. The unconditional branch then always runs.
            vae_tile: decode in tiles of this many pixels a side, which takes less memory; see `encoders.decode_tiled`.
            output_type: "pil", "pt" (a tensor [b, 3, h, w] in [0, 1]), "np" (an array [b, h, w, 3]) or "latent".
            progress: whether to show a bar; None shows it in terminals and notebooks.

        Returns:
            The pictures, and the settings of each.

        Raises:
            ValueError: an argument is out of its range, unknown, or excludes another one; the message names it.
            TypeError: an argument is of another type, or its name is unknown.
            FloatingPointError: values are not finite; the step and the first such layer are named.
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
        against = (negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds)
        negatives = Prompts.of("negative_prompt", *against)
        prompts.check(self.transformer.config)
        seeds = checked_seeds(seed)
        per_prompt = _pictures_per_prompt(num_images_per_prompt, prompts, seeds)
        count = len(prompts) * per_prompt
        check_output_type(output_type)
        self._rules(max_sequence_length)
        vae_tile = None if vae_tile is None else whole("vae_tile", vae_tile, LEAST_TILE)
        names = (
            ()
            if callback_on_step_end is None
            else tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        )
        shape = self._shape(latents, count, height, width)
        alone = self.profile.one_seed == "each_alone"
        generators(seeds, generator, count, alone=alone)
        plan = self._plan(
            shape,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            schedule=schedule,
            sigmas=sigmas,
            shift=shift,
            guidance=guidance,
        )
        if latents is not None and not plan.solver.is_stochastic:
            check_draws_nothing(seed=seed)
        pair = (prompts, negatives.for_each(len(prompts), self.transformer.config) if plan.uses_uncond else None)
        for one in pair:
            if one is not None and one.conditionings:
                checked_ranges(one.name, one.conditionings, plan.sigmas, plan.shift, len(one))
        with self._drawing(f"{count} pictures at once"):
            if seeds is None and generator is None and latents is None:
                seeds = fresh_seeds(count)
            drawn_by = generators(seeds, generator, count, alone=alone)
            noise = self._start(latents, drawn_by, count, height, width)
            cond, uncond = (
                None if one is None else self._encoded(one, max_sequence_length, per_prompt) for one in pair
            )
            assert cond is not None
            run = self._run(replace(plan, generator=drawn_by), cond, uncond)
            latent = self._latent(run, noise, callback_on_step_end, names, progress)
            pictures = latent if output_type == "latent" else self.decode(latent, tile=vae_tile)
            images = convert_output(pictures, output_type, self.profile.to_uint8)
        if latents is not None or sigmas is not None or callback_on_step_end is not None or plan.is_own:
            return PipelineOutput(images)
        common = self._settings(plan, max_sequence_length)
        return PipelineOutput(images, settings_of(pair, per_prompt, own_seeds(seeds, count, alone=alone), common))

    @property
    def digest(self) -> str:
        """What settings of a picture call the weights of the transformer, see `mmdit.pipeline.settings.digest_of`."""
        state = tuple((id(weight), weight._version) for weight in self.transformer.parameters())
        if self._digest is None or self._digest[0] != state:
            self._digest = state, digest_of(self.transformer)
        return self._digest[1]

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of this thread's drawing, of its last one, or of the profile; callbacks read it."""
        call = self._here.call
        return self.profile.guidance_scale if call is None else call.guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of steps of this thread's drawing, or of its last one; callbacks read it."""
        return 0 if self._here.call is None else self._here.call.num_timesteps

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the profile runs an unconditional branch at `guidance_scale`."""
        return self.profile.reads_negative(self.guidance_scale)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended this thread's drawing."""
        return self._here.call is not None and self._here.call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:  # diffusers' name, which callbacks set
        if self._here.call is not None:
            self._here.call.interrupt = bool(value)

    @property
    def _guidance_scale(self) -> float:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:  # diffusers' name, which its callbacks set
        call = CallState(value) if self._here.call is None else self._here.call
        call.scale(number("guidance_scale", value))

    def _faster(self) -> Self:
        self.accelerate()
        return self

    def _latent(
        self, run: Run, noise: Tensor, callback: OnStepEnd | None, names: Sequence[str], progress: bool | None
    ) -> Tensor:
        """Run the steps of a drawing; the last latent, in the transformer's dtype."""
        call = self._here.call = CallState(run.plan.guidance_scale)
        call.begin(run)
        dtype = self.dtype if run.plan.profile.state_dtype == "model" else torch.float32
        sigma = float(run.plan.sigmas[0])
        try:
            for step in bar(
                self._steps(run, noise), None if run.plan.solver.own_steps else call.num_timesteps, progress
            ):
                if callback is not None:
                    after_step(callback, names, self, run, step, sigma, dtype)
                if call.interrupt:
                    break
                sigma = step.sigma
        finally:
            call.end()
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
            "model_digest": self.digest,
        }

    @contextmanager
    def _drawing(self, what: str) -> Iterator[None]:
        """Explain running out of memory; with `offload`, leave nothing on the device, whatever happens."""
        if self._turns is None:
            with explained_memory_errors(self.models, what):
                yield
            return
        with self._turns.lock:  # the models are on one device in turn, so one thread draws at a time
            try:
                with explained_memory_errors(self.models, what):
                    yield
            finally:
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


class _Place(NamedTuple):
    """Where models are loaded to, where they compute, and in which dtype."""

    home: torch.device
    device: torch.device
    dtype: torch.dtype | None


def _one_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype, under our name or under that of diffusers."""
    if dtype is not None and torch_dtype is not None:
        raise ValueError("dtype and torch_dtype are both given; give one of them")
    return torch_dtype if dtype is None else dtype


def _place(device: torch.device | str, dtype: torch.dtype | None, offload: str | None) -> _Place:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {type(dtype).__name__} {dtype!r}, expected a torch.dtype such as torch.bfloat16")
    found = resolve_device(device)
    warn_if_slow(found, dtype)
    return _Place(torch.device("cpu") if offload else found, found, dtype)


def _widened(parts: Components, place: _Place) -> Components:
    """The models in float32 where they would compute in 16 bits on a CPU and nobody asked for that."""
    if place.dtype is None and place.device.type == "cpu":
        for model in (parts.transformer, parts.vae, parts.clip_l, parts.clip_g, parts.t5):
            if model is not None and next(model.parameters()).dtype in (torch.float16, torch.bfloat16):
                model.to(torch.float32)
    return parts


def _pictures_per_prompt(given: int | None, prompts: Prompts, seeds: int | list[int] | None) -> int:
    """The number of pictures of each prompt: as many as there are seeds, where there is one prompt."""
    count = 1 if given is None else whole("num_images_per_prompt", given, 1)
    return len(seeds) if isinstance(seeds, list) and seeds and len(prompts) == count == 1 else count
