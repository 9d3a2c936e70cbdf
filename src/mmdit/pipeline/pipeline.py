"""From a prompt to a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mmdit.checkpoints.load_pipeline import DEMO
from mmdit.pictures.overlay import paste_back
from mmdit.pictures.read import PictureLike, load_image
from mmdit.pipeline.adapters import PipelineAdapters
from mmdit.pipeline.arguments import Shift
from mmdit.pipeline.callbacks import CallState, OnStepEnd, after_step
from mmdit.pipeline.control_inputs import ControlNetLike, Numbers, control_inputs
from mmdit.pipeline.diffusers_names import CALL, explains_names
from mmdit.pipeline.files import PipelineFiles
from mmdit.pipeline.footprint import Sizes
from mmdit.pipeline.guidance import GuidanceLike, with_skip_layers
from mmdit.pipeline.hires import Hires
from mmdit.pipeline.image_inputs import ImageInputs, PictureSize, image_inputs
from mmdit.pipeline.images import OutputType, convert_output, to_pil
from mmdit.pipeline.invert import INVERTERS, Inversion, Inverter, rising
from mmdit.pipeline.masks import Source, repeated
from mmdit.pipeline.output import PipelineOutput
from mmdit.pipeline.plan import Run, SamplerLike, SamplingPlan, SigmasLike
from mmdit.pipeline.profiles import is_known
from mmdit.pipeline.prompts import PromptLike, Prompts, Ranged
from mmdit.pipeline.request import Request, make_request
from mmdit.pipeline.seeds import Generators, SeedLike, own_seeds
from mmdit.pipeline.settings import Settings, settings_of
from mmdit.pipeline.steps import PipelineSteps
from mmdit.pipeline.used_files import to_text, used_loras
from mmdit.utils import bar, number
from samplers import only_x0, pick

__all__ = ["DEMO", "Pipeline", "PipelineOutput"]


class Pipeline(PipelineFiles, PipelineAdapters, PipelineSteps):
    """Stable Diffusion 3 / 3.5: text encoders, transformer, solver and VAE.

    `pipe("a cat").images[0]` draws; `encode`, `noise`, `predict`, `sample` and `decode` are the same in steps.
    The models are plain attributes: `transformer`, `vae`, `clip_l`, `clip_g`, `t5`; so are `tokenizers` and `profile`.

    Several threads may draw with one pipeline: what looks inside (`mmdit.capture` and others) sees the drawings of its
    own thread. With `offload`, their calls run one after the other.
    """

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
        image: PictureLike | None = None,
        mask_image: PictureLike | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        keep_outside: bool = False,
        differential: float | bool = False,
        hires: Hires | None = None,
        controlnet: ControlNetLike | None = None,
        control_image: PictureLike | None = None,
        control_mask: PictureLike | None = None,
        controlnet_conditioning_scale: Numbers = 1.0,
        control_guidance_start: Numbers = 0.0,
        control_guidance_end: Numbers = 1.0,
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

        Arguments have diffusers' names. None selects the profile's default: for the profile "diffusers", 28 steps of
        euler on the schedule "normal" at guidance 7, see `mmdit.Profile`. All arguments are checked before a model
        runs.

        Args:
            prompt: a string, or a list with one for each picture; or a `Conditioning`, the result of `encode`; or a
                list of `mmdit.Ranged`, each a conditioning for a range of the steps.
            negative_prompt: a description of what to avoid; one for all prompts, or one for each. None is an empty
                prompt. It is used where the profile runs an unconditional branch: usually for guidance_scale above 1.
            height, width: the size of the pictures in pixels, multiples of 16; None is the model's own size.
            num_inference_steps: number of solver steps, at least 1.
            guidance_scale: weight of classifier-free guidance: x0 = uncond + guidance_scale (cond - uncond). 1 is none.
            sampler: the solver, a name of `samplers.SOLVERS`; or a function `(denoise, x, sigmas)` that yields
                `samplers.Step`, where `denoise(x, sigma)` gives x0, the predicted picture as a latent.
            schedule: how the noise levels are spaced, a name of `samplers.SCHEDULES`.
            sigmas: the noise levels themselves, falling from at most 1 to 0, instead of steps and schedule. As in
                diffusers, the profile "diffusers" shifts a list that does not end at 0, and appends the 0.
            shift: the shift of the schedule towards high noise levels, above 0; "resolution" computes it from the size
                of the picture, see `samplers.resolution_shift`. None is the model's shift, usually 3.
            seed: a whole number of at most 64 bits, or one for each picture; with one prompt, several seeds draw
                several pictures. None draws a random seed for each picture, which is recorded in `settings`. The noise
                that stochastic samplers add comes from the same seeds.
            generator: a `torch.Generator`, or one for each picture, instead of seeds.
            latents: initial latents instead of noise, [b, c, h/8, w/8], in model space.
            image: the picture to start from: a path, a PIL picture, an array [h, w, 3] or a tensor [3, h, w] in [0, 1],
                see `mmdit.images.load_image`; or latents [b, c, h/8, w/8]. A batch or a list has one for each drawing.
                Without height and width, the profile decides the size: the picture's own size, cropped to multiples
                (ComfyUI), or the model's size, to which the picture is resized (diffusers).
            mask_image: the region to draw anew: white (1) is drawn anew, black (0) is kept. A path, a PIL picture, an
                array or a tensor [h, w] in [0, 1] of the picture's size, or a batch or a list of these. The profile
                decides whether intermediate values are kept or thresholded.
            strength: how much of the picture is drawn anew, 0 to 1; None is the profile's value.
            padding_mask_crop: draw only the region around the mask, padded by this number of pixels on each side, at
                the size of the drawing, and paste the result back into the picture.
            keep_outside: whether to copy the pixels of the given picture outside of the mask into the result.
            differential: use Differential Diffusion, in which the gray values of a mask set the noise level at which a
                cell may change; True, or a share from 0 to 1.
            hires: a second pass, which enlarges the result and denoises it again from a lower noise level.
            controlnet: a net that makes the drawing follow a hint, see `mmdit.load_controlnet`; or a list of nets,
                whose residuals are added up. None uses `pipe.controlnet` if a control_image is given.
            control_image: the hint that the net was trained for: edges (`mmdit.canny`), a depth map, a blurred picture
                ...; of any size, in the forms that `image` accepts. For several nets, a list with an entry for each
                net. Each entry is one hint for all drawings, or one for each.
            control_mask: for an inpainting net, the region to draw anew (1), in the forms that `mask_image` accepts.
            controlnet_conditioning_scale: the factor of the residuals; or a list with one for each net.
            control_guidance_start: the share at which the net begins to be applied, 0 to 1; or a list with one for each
                net. The profile decides whether it is a share of the steps or of the noise levels.
            control_guidance_end: the share at which the net stops being applied, likewise.
            prompt_embeds: context of shape [b, tokens, context_dim], as `encode` returns it, instead of prompts.
            pooled_prompt_embeds: pooled text vectors of shape [b, pooled_dim], required with prompt_embeds.
            negative_prompt_embeds: the context of the negative prompts, likewise.
            negative_pooled_prompt_embeds: the pooled text vectors of the negative prompts, likewise.
            num_images_per_prompt: number of pictures per prompt; they are adjacent in the output.
            max_sequence_length: number of T5 tokens; None is the profile's number.
            callback_on_step_end: a function `(pipe, step, timestep, tensors)`, called after every step, or one of
                diffusers' callback objects. It may return a dict of tensors to continue with: "latents",
                "prompt_embeds", "pooled_prompt_embeds". While it runs, `pipe._interrupt = True` ends the drawing after
                this step, and `pipe.num_timesteps` and `pipe.guidance_scale` can be read. The timestep is a tensor,
                1000 sigma.
            callback_on_step_end_tensor_inputs: the names of the tensors that the callback gets: "latents",
                "denoised" (the predicted picture), "prompt_embeds" and "pooled_prompt_embeds" (negative prompts first).
                None gives it the first two.
            skip_guidance_layers: numbers of the blocks that skip-layer guidance skips; 7, 8, 9 for SD3.5-Medium. In the
                profile "diffusers", skip-layer guidance is only applied if guidance_scale is above 1.
            skip_layer_guidance_scale: the weight of skip-layer guidance.
            skip_layer_guidance_start: the share of the steps after which skip-layer guidance begins, 0 to 1.
            skip_layer_guidance_stop: the share of the steps at which skip-layer guidance ends, 0 to 1.
            guidance: further guidance settings, as `mmdit.Guidance`; or a function `(x, sigma, cond, uncond) -> x0`
                that replaces classifier-free guidance. It gets the latents [b, c, h, w], their sigma and the two
                predicted pictures; the unconditional branch then always runs.
            vae_tile: encode and decode in tiles of this many pixels a side, which takes less memory; see
                `encoders.decode_tiled`.
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

        def make() -> Request:
            request = make_request(
                self,
                Prompts.of("prompt", prompt, prompt_embeds, pooled_prompt_embeds),
                Prompts.of("negative_prompt", negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds),
                height=height,
                width=width,
                seed=seed,
                generator=generator,
                latents=latents,
                images=image_inputs(
                    image,
                    mask_image,
                    channels=self.vae.config.latent_channels,
                    keep_outside=keep_outside,
                    differential=differential,
                    padding_mask_crop=padding_mask_crop,
                ),
                hires=hires,
                controls=control_inputs(
                    self.controlnet if controlnet is None and control_image is not None else controlnet,
                    control_image,
                    control_mask,
                    scale=controlnet_conditioning_scale,
                    start=control_guidance_start,
                    stop=control_guidance_end,
                    config=self.transformer.config,
                ),
                strength=strength,
                num_images_per_prompt=num_images_per_prompt,
                max_sequence_length=max_sequence_length,
                callback=callback_on_step_end,
                tensor_inputs=callback_on_step_end_tensor_inputs,
                vae_tile=vae_tile,
                output_type=output_type,
                progress=progress,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                sampler=sampler,
                schedule=schedule,
                sigmas=sigmas,
                shift=shift,
                guidance=with_skip_layers(
                    guidance,
                    skip_guidance_layers,
                    skip_layer_guidance_scale,
                    skip_layer_guidance_start,
                    skip_layer_guidance_stop,
                ),
            )
            self._fit_request(request)
            return request

        request = self._agreed(make)
        with self._drawing(f"{request.count} pictures at once"):
            return self._draw(request)

    @torch.no_grad()
    def invert(
        self,
        image: PictureLike,
        prompt: PromptLike = "",
        negative_prompt: PromptLike | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        sampler: Inverter = "heun",
        schedule: str | None = None,
        sigmas: SigmasLike | None = None,
        shift: Shift = None,
        strength: float = 1.0,
        guidance: GuidanceLike | None = None,
        max_sequence_length: int | None = None,
        progress: bool | None = None,
    ) -> Inversion:
        """Find the noise from which these prompts draw the given pictures, by integrating the ODE towards noise.

        Args:
            image: the pictures, see `__call__`, or latents. In every profile, pictures are encoded to the means of
                their latent distributions.
            prompt, negative_prompt: one for all pictures, or one for each.
            height, width, schedule, sigmas, shift, guidance, max_sequence_length, progress: see `__call__`.
            num_inference_steps: number of steps of a full drawing; None is the profile's number.
            guidance_scale: 1 gives the most accurate inversion. Far above 1 the ODE is stiff, and drawing from the
                noise does not reproduce the picture.
            sampler: "heun" (second order, two NFE per step) or "euler" (first order).
            strength: the share of the steps to invert; 1 goes to the highest noise level.

        Raises:
            ValueError, TypeError: see `__call__`.
        """
        inverter = pick(INVERTERS, sampler, "sampler of invert")
        texts = Prompts.of("prompt", prompt, None, None)
        negatives = Prompts.of("negative_prompt", negative_prompt, None, None)
        with self._drawing("the inversion of pictures"):
            latents = self.encode_image(image, height=height, width=width, mean=True)
            plan = self._plan(
                latents.shape,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                schedule=schedule,
                sigmas=sigmas,
                shift=shift,
                guidance=guidance,
            )
            levels = rising(plan.sigmas, strength)
            texts.check(self.transformer.config)
            if len(texts) not in (1, len(latents)):
                raise ValueError(f"{len(texts)} prompts for {len(latents)} pictures are given; give one, or one each")
            against = negatives.for_each(len(texts), self.transformer.config) if plan.uses_uncond else None
            times = len(latents) // len(texts)
            cond = self._encoded(texts, max_sequence_length, times)
            uncond = None if against is None else self._encoded(against, max_sequence_length, times)
            run = self._run(plan, cond, uncond)
            x = latents.to(torch.promote_types(latents.dtype, torch.float32)) * (1 - float(levels[0]))
            steps = self._guarded(run, inverter(only_x0(run), x, levels), levels)
            found = [step.x for step in bar(steps, len(levels) - 1, progress)]
        return Inversion(found[-1], latents, (x, *found), levels)

    def _agreed(self, make: Callable[[], Request]) -> Request:
        """The request of a call; where ranks of a parallel run refuse theirs, or are given other ones, no rank draws.

        Raises:
            RanksDifferError: the ranks are to draw different pictures, on every rank.
        """
        if self.parallel is None:
            return make()
        return self.parallel.agreed(make, "the pictures to draw", lambda request: request.facts)

    def _draw(self, request: Request) -> PipelineOutput:
        """The pictures of a request: encode, start, sample, decode."""
        if request.latents is None:
            self._check_noise(request.plan.shape)
        source = self._source(request)  # before the noise, because it may draw from the same generators
        settings = cache(lambda: self._settings(request) if request.has_settings else ())
        with self._start(request) as start:
            self._encode_ahead(request.max_sequence_length, request.prompts, request.negatives)
            cond, uncond = self._encoded_both(request)
            noise = cache(start)
            if request.controls:  # hints draw from torch's global state, which a caller may give as generator
                noise()
            run = self._controlled(request, request.plan, cond, uncond)
            run.reads_last = request.reads_last_latent
            latent = self._latent(request, run, noise, source, meanwhile=settings if self._turns is None else None)
        if request.second is not None:
            latent = self._second_pass(request, request.second, latent, (cond, uncond))
        try:
            self._here.pending = run.read_check
            pictures = latent if request.output_type == "latent" else self._decoded(request, latent)
        finally:
            self._here.pending = None
        run.read_check()
        images = convert_output(pictures, request.output_type, self.profile.to_uint8)
        return PipelineOutput(images, settings())

    def _fit_request(self, request: Request) -> None:
        """Plan the memory of a drawing; TooLittleMemory, before anything runs, where no plan keeps the budget."""
        plans = [request.plan, *([] if request.second is None else [request.second])]
        batches = 1 if request.negatives is None else 2
        tokens = self._rules(request.max_sequence_length)
        sizes = Sizes(
            pictures=request.count,
            samples=batches * request.count,
            height=max(one.shape[2] for one in plans),
            width=max(one.shape[3] for one in plans),
            tokens=tokens.clip_length + tokens.t5_length,
            rows=max(1, len(request.prompts)),
            length=tokens.t5_length,
            steps=max(len(one.sigmas) - 1 for one in plans),
            encodes=request.images is not None or request.hires is not None or bool(request.controls),
            tile=request.vae_tile or 0,
        )
        self._fit(sizes, nets=[one.net for one in request.controls], anew=True)

    def _encode_ahead(self, length: int | None, *prompts: Prompts | None) -> None:
        """Where encoders take turns, run each one on all prompts before the next one, whose outputs are kept."""
        texts = [one.texts for one in prompts if one is not None and one.texts is not None]
        if len(texts) > 1 and self._keeps_texts:
            self._conditioner(length).run_ahead(texts)

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

    def _controlled(
        self, request: Request, plan: SamplingPlan, cond: Sequence[Ranged], uncond: Sequence[Ranged] | None
    ) -> Run:
        """Make the run of a plan with the ControlNets of the request; hints are encoded at the size of the plan."""
        if request.controls:
            height, width = (side * self.vae.config.downscale for side in plan.shape[2:])
            size = PictureSize(height, width, cut=False)
            controls = self._controls(request.controls, size, request.count, guided=uncond is not None)
            cond = [replace(one, control=controls) for one in cond]
            uncond = None if uncond is None else [replace(one, control=controls) for one in uncond]
        return self._run(plan, cond, uncond)

    def _start(self, request: Request) -> AbstractContextManager[Callable[[], Tensor]]:
        """Within the context, what gives the initial latents of a drawing: those of the caller, or noise.

        Noise from generators that the library has made is drawn while encoders run. A caller's generators are drawn
        from when the noise is asked for, after encoding, so that an error in encoding leaves them as they were.
        """
        if request.latents is not None:
            return nullcontext(partial(request.latents.to, self.device))
        shape, drawn_by = request.plan.shape, request.plan.generator
        if request.seeds is None:
            return nullcontext(partial(self._noise, shape, drawn_by))
        if self.parallel is not None and self.parallel.rank and request.draws_once:  # the noise of rank 0 replaces it
            return nullcontext(lambda: self._on_device(torch.empty(shape, dtype=self._noise_dtype, device="cpu")))
        return self._noise_ahead(shape, drawn_by)

    def _source(self, request: Request) -> Source | None:
        """The picture that a drawing starts from, encoded, and its mask."""
        given = request.images
        if given is None:
            return None
        drawn_by, tile = request.plan.generator, request.vae_tile
        latents = self._encoded_images(given, request.size, request.count, drawn_by, tile)
        mask = given.latent_masks(request.size, self.vae.config.downscale, self.profile)
        return Source(
            latents, None if mask is None else repeated(mask, request.count).to(latents.device), given.differential
        )

    def _decoded(self, request: Request, latent: Tensor) -> Tensor:
        """The pictures of the last latents, [b, 3, h, w] in [0, 1]."""
        given = request.images
        if given is None or not given.masks:
            return self.decode(latent, tile=request.vae_tile)
        if not self.profile.inpaint_shift:
            latent = latent - self.vae.config.shift * self.vae.config.scale
        found = self.decode(latent, tile=request.vae_tile)
        if given.pastes:
            return self._pasted(given, found)
        if not given.keep_outside:
            return found
        before, inside = (
            repeated(one, len(found)).to(found)
            for one in (given.drawn(request.size, self.profile), given.inside(request.size, self.profile))
        )
        return inside * found + (1 - inside) * before

    def _pasted(self, given: ImageInputs, drawn: Tensor) -> Tensor:
        """Paste the drawn regions back into the original pictures."""
        parts = to_pil(drawn, self.profile.to_uint8)
        pastes = [given.pastes[i * len(given.pastes) // len(parts)] for i in range(len(parts))]
        pictures = [
            paste_back(paste.original, paste.mask, part, paste.box) for paste, part in zip(pastes, parts, strict=True)
        ]
        return load_image(pictures).picture.movedim(-1, 1).to(drawn)

    def _second_pass(
        self,
        request: Request,
        plan: SamplingPlan,
        latent: Tensor,
        pair: tuple[Sequence[Ranged], Sequence[Ranged] | None],
    ) -> Tensor:
        """Enlarge the result of the first pass and denoise it again; returns the final latent."""
        hires, tile = request.hires, request.vae_tile
        assert hires is not None
        if hires.space == "latent":
            start = hires.enlarged_latent(latent.to(self._latent_dtype), self.vae, self._unit)
        else:
            pictures = self.decode(latent, tile=tile).movedim(1, -1)
            larger = hires.enlarged_picture(pictures, self.vae.config.downscale * self._unit)
            start = self._encoded_pixels(larger.movedim(-1, 1), len(latent), plan.generator, tile)
        noise = self._noise(plan.shape, plan.generator)
        return self._latent(request, self._controlled(request, plan, *pair), lambda: noise, Source(start))

    def _encoded(self, prompts: Prompts, length: int | None, times: int) -> list[Ranged]:
        """The conditionings of prompts, each prompt `times` in a row."""
        found = prompts.conditionings
        if prompts.texts is not None:
            found = (Ranged(self.encode(prompts.texts, max_sequence_length=length)),)
        return [one.to(self.device, self.dtype).repeat(times) for one in found]

    def _encoded_both(self, request: Request) -> tuple[list[Ranged], list[Ranged] | None]:
        """The conditionings of prompts and negative prompts, of which all ranks have the same ones."""
        both = [one for one in (request.prompts, request.negatives) if one is not None]
        texts = [one.texts for one in both if one.texts is not None]
        encoded = iter(self._encode_each(texts, request.max_sequence_length) if texts else ())
        found = []
        for one in both:
            ranges = one.conditionings if one.texts is None else (Ranged(next(encoded)),)
            found.append([each.to(self.device, self.dtype).repeat(request.per_prompt) for each in ranges])
        return found[0], found[1] if len(found) > 1 else None

    def _latent(
        self,
        request: Request,
        run: Run,
        noise: Callable[[], Tensor],
        source: Source | None = None,
        *,
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """Run the steps of a drawing; the last latent, in the transformer's dtype.

        Args:
            request: the request.
            run: the running plan.
            noise: gives the noise, before the first step.
            source: the picture to start from.
            meanwhile: called after every step has been launched, while a GPU computes it.
        """
        around = self._here.call  # of the drawing whose callback draws this one, if its run has not ended
        call = self._here.call = CallState(run.plan.guidance_scale)
        call.begin(run)
        dtype = self.dtype if run.plan.profile.state_dtype == "model" else torch.float32
        sigma = float(run.plan.sigmas[0])
        total = None if run.plan.solver.own_steps else call.num_timesteps
        try:
            for step in bar(self._late_steps(run, noise, source), total, request.progress):
                if meanwhile is not None:
                    meanwhile()
                if request.callback is not None:
                    after_step(request.callback, request.tensor_inputs, self, run, step, sigma, dtype)
                if call.interrupt:
                    run.read_check()
                    break
                sigma = step.sigma
        finally:
            call.end()
            if around is not None and around.run is not None:
                self._here.call = around
        return step.x.to(self.dtype)

    def _settings(self, request: Request) -> tuple[Settings, ...]:
        """The settings of each picture of a request."""
        seeds = own_seeds(request.seeds, request.count, alone=self.profile.one_seed == "each_alone")
        common = self._common_settings(request.plan, request.max_sequence_length)
        own = None
        if request.images is not None:
            assert request.plan.strength is not None
            own = request.images.settings(request.count, request.plan.strength)
        common["control"] = ";".join(one.words for one in request.controls)
        acting = [self._loras.adapters[name] for name in self.get_active_adapters()]
        common["loras"] = to_text(used_loras(acting))
        common["hires"] = "" if request.hires is None else request.hires.to_text()
        return settings_of((request.prompts, request.negatives), request.per_prompt, seeds, common, own)

    def _common_settings(self, plan: SamplingPlan, max_sequence_length: int | None) -> dict[str, Any]:
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
