"""A drawing step by step: encode, noise, predict, sample, decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from encoders import Conditioner, Conditioning, TextRules, checked_prompts, decode_tiled, encode_tiled
from mmdit.models.controlnet import ControlNet
from mmdit.pictures.read import PictureLike
from mmdit.pipeline.arguments import LEAST_TILE, Shift, check_latents, check_tensor
from mmdit.pipeline.base import PipelineModels
from mmdit.pipeline.control import Control
from mmdit.pipeline.control_inputs import (
    ControlInput,
    ControlNetLike,
    Numbers,
    check_counts,
    control_inputs,
    make_control,
    takes_shift,
)
from mmdit.pipeline.failures import check_all_finite, check_finite
from mmdit.pipeline.guidance import GuidanceLike
from mmdit.pipeline.image_inputs import ImageInputs, PictureSize, image_inputs, masks_of
from mmdit.pipeline.images import to_unit
from mmdit.pipeline.masks import Source, checked_source, repeated
from mmdit.pipeline.passes import Branch, Pass
from mmdit.pipeline.plan import (
    PlanArguments,
    Run,
    SamplerLike,
    SamplingPlan,
    SigmasLike,
    default_shift,
    make_plan,
    resolve_sampler,
    resolve_sigmas,
)
from mmdit.pipeline.predict import Predictor, predict_branches, timestep_of
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.prompts import ConditioningLike, Ranged
from mmdit.pipeline.seeds import Generators, SeedLike, checked_seeds, generators
from mmdit.pipeline.settings import MAX_T5_TOKENS
from mmdit.utils import number, whole
from samplers import Step, gaussian


class PipelineSteps(PipelineModels):
    """The steps of a drawing, a method for each; `mmdit.Pipeline` adds files and the call."""

    def encode(self, prompts: str | Sequence[str], *, max_sequence_length: int | None = None) -> Conditioning:
        """Encode prompts with the text encoders; the result is on the transformer's device and in its dtype.

        Args:
            prompts: one or more.
            max_sequence_length: number of T5 tokens; None is the profile's.

        Raises:
            ValueError, TypeError: no prompt, or one that is not a string.
        """
        rules = self._rules(max_sequence_length)
        conditioner = Conditioner(
            self.clip_l,
            self.clip_g,
            self.t5,
            self.tokenizers,
            rules,
            context_dim=self.transformer.config.context_dim,
            pooled_dim=self.transformer.config.pooled_dim,
        )
        prompts = checked_prompts(prompts)
        self._enter("clip_l", "clip_g", "t5")
        return conditioner(prompts).to(self.device, self.dtype)

    def noise(
        self,
        seed: SeedLike | None = None,
        *,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
    ) -> Float[Tensor, "b c h w"]:
        """Starting noise: latents of shape [b, c, h, w], in model space, drawn on the CPU.

        Args:
            seed: a whole number, or a list with one for each picture. Each seed of a list draws the same noise as it
                would alone. With one seed for several pictures, the profile decides: all noise comes from a single
                draw, or each picture has the same noise.
            count: number of pictures, b.
            height, width: size of the pictures in pixels, multiples of 16; None is the model's own size.
            generator: one, or a list with one for each picture, instead of seeds; noise is drawn on its device.

        Raises:
            ValueError: a size is not possible, or the numbers of seeds and pictures differ.
        """
        shape = self._latent_shape(whole("count", count, 1), height, width)
        alone = self.profile.one_seed == "each_alone"
        return self._noise(shape, generators(checked_seeds(seed), generator, shape[0], alone=alone))

    def predict(
        self,
        x: Tensor,
        sigma: float | Tensor,
        conditionings: Sequence[Conditioning | Branch],
        *,
        step: int | None = None,
        profile: Profile | None = None,
    ) -> list[Tensor]:
        """The predicted picture (x0, a latent) at noise level `sigma` under each conditioning.

        Conditionings with the same number of text tokens share a batch of the transformer.

        Args:
            x: latents of shape [b, c, h, w], in model space.
            sigma: the noise level of `x`, in [0, 1].
            conditionings: conditionings of b prompts each. `mmdit.Branch` gives one a name or changes the transformer
                for it. `mmdit.capture` and others refuse `branch=` where the branches have no names.
            step: the number of the step, for `mmdit.capture` and others. None counts each call of `predict` as a step.
            profile: the profile whose rules give the model's timestep; None is the pipeline's.

        Returns:
            One tensor [b, c, h, w] for each conditioning.

        Raises:
            ValueError: the latents or the conditionings have a wrong shape, or there are several noise levels.
            TypeError: the latents are not a floating-point tensor, or a conditioning is not a `Conditioning`.
        """
        branches = [one if isinstance(one, Branch) else Branch(one, None) for one in conditionings]
        self._check_prediction(x, branches)
        return self._predict(x, _one_level(sigma), branches, step, self.profile if profile is None else profile)

    def predictor(self, **conditionings: Conditioning) -> Predictor:
        """A function `(x, sigma) -> [x0, ...]` for a sampling loop of your own: `predict` with named conditionings.

            predict = pipe.predictor(cond=pipe.encode("a red ring"), uncond=pipe.encode(""))
            with_prompt, without = predict(x, sigma)

        Each call counts as one step, so `mmdit.capture` and others name the same steps and branches as in `sample`. A
        solver that calls the model several times a step gives the number of the step: `predict(x, sigma, step=i)`.

        Args:
            conditionings: conditionings by the names of their branches; the predictions have the same order.

        Raises:
            TypeError: no conditioning is given, or an argument is not a `Conditioning`.
        """
        return Predictor(lambda x, sigma, branches, step: self.predict(x, sigma, branches, step=step), conditionings)

    def sample(
        self,
        cond: ConditioningLike,
        uncond: ConditioningLike | None,
        noise: Tensor | None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerLike | None = None,
        schedule: str | None = None,
        sigmas: SigmasLike | None = None,
        shift: Shift = None,
        generator: Generators = None,
        guidance: GuidanceLike | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        differential: float = 0.0,
        start: int | None = None,
        stop: int | None = None,
        add_noise: bool = True,
        leftover_noise: bool = True,
    ) -> Iterator[Step]:
        """Draw step by step from noise to latents. If you change `step.x`, the solver continues from the new latent.

        All arguments are checked when `sample` is called, before the first step.

        Args:
            cond: the prompts, encoded, one for each picture; or several `mmdit.Ranged`, each for a part of the way.
            uncond: the negative prompts, likewise; None where the profile runs no unconditional branch.
            noise: what to start from, [b, c, h, w], of unit variance; see `noise`. None with an image and
                add_noise=False.
            num_inference_steps: steps of the schedule. Like all that follows, None is the profile's default.
            guidance_scale: weight of classifier-free guidance; 1 is none.
            sampler: a name of `samplers.SOLVERS`; or a function `(denoise, x, sigmas) -> iterator of samplers.Step`,
                where `denoise(x, sigma)` gives x0.
            schedule: a name of `samplers.SCHEDULES`.
            sigmas: noise levels to use as they are, see `Pipeline.sigmas`.
            shift: of the schedule, above 0; "resolution" is `samplers.resolution_shift` of the latents' size.
            generator: what drew `noise`. Samplers that add noise go on with it, or with its seed, as the profile says.
            guidance: settings beyond classifier-free guidance; None is that alone. Or a function
                `(x, sigma, cond, uncond) -> x0` of the latent, its noise level and the two predicted pictures.
            image: a picture to start from, as latents without noise in model space, [b, c, h, w] or [1, c, h, w]; see
                `encode_image`.
            mask: where the image is drawn anew, [b, 1, h, w] or [1, 1, h, w] in [0, 1]; see `encode_mask`.
            strength: how much of the image is drawn anew, 0 to 1: the profile says at which noise level that starts.
                With `start`, None is 1.
            differential: share of Differential Diffusion, in which a soft mask says at which level a cell may change.
            start, stop: begin with this step and end before that one, counted from 0; together with `add_noise` and
                `leftover_noise` they are ComfyUI's KSamplerAdvanced. To go on with the latent of another call, give
                its `step.x` as `noise` with `add_noise=False` and without `image`.
            add_noise: False takes `noise` as the latent at the first noise level, or with an image starts from
                (1 - sigma) image.
            leftover_noise: whether a drawing that ends at `stop` keeps the noise of that level; False draws its last
                step to 0.

        Returns:
            An iterator of `samplers.Step`; `step.x` of the last one is the latent to decode.

        Raises:
            ValueError: a name is unknown, a number is out of its range, or the guidance is not possible.
            ImportError: the sampler's noise needs torchsde, which is not installed.
            FloatingPointError: a step gave values that are not finite; its sigma and the first such layer are named.
        """
        noise, source = self._begun(noise, image, mask, differential, add_noise)
        if source is not None and strength is None and start is not None:
            strength = 1.0
        plan = self._plan(
            noise.shape,
            from_picture=source is not None,
            strength=strength,
            start=start,
            stop=stop,
            leftover_noise=leftover_noise,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            schedule=schedule,
            sigmas=sigmas,
            shift=shift,
            generator=generator,
            guidance=guidance,
        )
        if not plan.uses_uncond:
            uncond = None
        elif uncond is None:
            raise ValueError(
                f"guidance_scale {plan.guidance_scale} needs a conditioning to guide away from: give uncond"
            )
        against = None if uncond is None else plan.ranges("uncond", uncond)
        run = self._run(plan, plan.ranges("cond", cond), against)
        x = noise if source is None and not add_noise else None
        return self._steps(run, noise, source, x=x)

    def sigmas(
        self,
        num_inference_steps: int | None = None,
        schedule: str | None = None,
        sigmas: SigmasLike | None = None,
        shift: float | None = None,
        sampler: SamplerLike | None = None,
        strength: float | None = None,
    ) -> Tensor:
        """The noise levels of the steps, float64 [steps + 1], falling to 0.

        Args:
            num_inference_steps: steps of the schedule; None is the profile's default.
            schedule: a name of `samplers.SCHEDULES`; None is the profile's.
            sigmas: levels from at most 1 to 0, used as they are instead of a schedule. (diffusers shifts a list of its
                user's and appends the 0: `samplers.shifted` does that.)
            shift: of the schedule; None is the model's.
            sampler: for some, ComfyUI leaves out the second-last level; None is the profile's.
            strength: the levels of a drawing that starts from a picture, see `sample`; None is one that does not.

        Raises:
            ValueError: no step, an unknown name, levels that do not fall from at most 1 to 0; or both are given.
        """
        solver = resolve_sampler(self.profile, sampler)[1]
        shift = self.shift if shift is None else shift
        strength = None if strength is None else number("strength", strength, 0, 1)
        return resolve_sigmas(
            self.profile,
            solver,
            shift,
            num_inference_steps,
            schedule,
            sigmas,
            sampling=self.sampling,
            strength=strength,
        )

    def encode_image(
        self,
        image: PictureLike,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: SeedLike | None = None,
        generator: Generators = None,
        tile: int | None = None,
        mean: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """The latents of pictures, [b, c, h, w], in model space; see `sample(image=)`.

        Args:
            image: a path, a PIL picture, an array [h, w, 3] or a tensor [3, h, w] in [0, 1], a batch or a list of
                these. Latents are returned as they are.
            height, width: to draw at, in pixels. None is the profile's: the picture's own size, cut to multiples, or
                the model's.
            seed, generator: what samples the latent, where the profile does; see `noise`.
            tile: encode in tiles of this many pixels a side, which takes less memory; see `encoders.encode_tiled`.
            mean: take the mean of the latent's distribution, whatever the profile does.

        Raises:
            ValueError, TypeError: the picture, its size or the numbers of seeds are not possible.
            FloatingPointError: the latents that the VAE makes of it are not finite.
        """
        inputs = image_inputs(image, None, channels=self.vae.config.latent_channels)
        assert inputs is not None
        alone = self.profile.one_seed == "each_alone"
        drawn_by = generators(checked_seeds(seed), generator, inputs.count, alone=alone)
        size = self._picture_size(inputs, height, width)
        tile = None if tile is None else whole("tile", tile, LEAST_TILE)
        return self._encoded_images(inputs, size, inputs.count, drawn_by, tile, mean=mean)

    @torch.no_grad()
    def control(
        self,
        controlnet: ControlNetLike,
        control_image: PictureLike,
        control_mask: PictureLike | None = None,
        *,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        scale: Numbers = 1.0,
        start: Numbers = 0.0,
        stop: Numbers = 1.0,
        guided: bool = True,
    ) -> tuple[Control, ...]:
        """The controls of a conditioning, for `mmdit.Ranged` and `sample`: nets with their hints encoded.

            control = pipe.control(net, edges)
            cond, uncond = (Ranged(pipe.encode(text), control=control) for text in ("a red circle", ""))
            for step in pipe.sample([cond], [uncond], pipe.noise(seed=1)): ...

        Args:
            controlnet, control_image, control_mask: see `mmdit.Pipeline.__call__`.
            count: pictures that are drawn.
            height, width: of the drawing in pixels; None is the model's own size.
            scale, start, stop: `controlnet_conditioning_scale`, `control_guidance_start` and `control_guidance_end`.
            guided: whether an unconditional branch runs, which the profile "diffusers" gives noise of its own.

        Raises:
            TypeError, ValueError: see `mmdit.pipeline.control_inputs.control_inputs`.
        """
        inputs = control_inputs(
            controlnet,
            control_image,
            control_mask,
            scale=scale,
            start=start,
            stop=stop,
            config=self.transformer.config,
        )
        count, cell = whole("count", count, 1), self.vae.config.downscale
        rows, columns = self._latent_shape(count, height, width)[2:]
        return self._controls(inputs, PictureSize(rows * cell, columns * cell, cut=False), count, guided=guided)

    def _controls(
        self, inputs: Sequence[ControlInput], size: PictureSize, count: int, *, guided: bool
    ) -> tuple[Control, ...]:
        """The nets of a call with their hints encoded."""
        if not inputs:
            return ()
        check_counts(inputs, count)
        self._check_nets([one.net for one in inputs])
        self._enter("vae")
        first = takes_shift(inputs[0].net, self.profile) if self.profile.control_shift_of == "first" else None
        return tuple(
            make_control(one, self.vae, self.profile, size, count, twice=guided, shifted=first) for one in inputs
        )

    def _check_nets(self, nets: Sequence[ControlNet]) -> None:
        """Raise ValueError for a net on another device than the transformer; with `offload` it is brought there."""
        device = self.transformer.pos_embed.device
        for net in nets if self._turns is None else ():
            if net.pos_embed_input.proj.weight.device != device:
                raise ValueError(
                    f"the ControlNet is on {net.pos_embed_input.proj.weight.device}, the transformer on {device}: "
                    f"net.to({str(device)!r})"
                )

    def decode(
        self, latent: Float[Tensor, "b c h w"], *, tile: int | None = None, finite: bool = True
    ) -> Float[Tensor, "b 3 h8 w8"]:
        """The pictures of latents, [b, 3, 8 h, 8 w], in [0, 1].

        Args:
            latent: latents of shape [b, c, h, w], in model space, of any size.
            tile: decode in tiles of this many pixels a side, which takes less memory; see `encoders.decode_tiled`.
            finite: refuse latents and pictures that are not finite; False passes them on, to look at.

        Raises:
            ValueError: the latents have another number of channels than the VAE.
            FloatingPointError: the latents, or the pictures that the VAE makes of them, are not finite.
        """
        check_tensor("latent", latent)
        channels = self.vae.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(f"latent has shape {list(latent.shape)}, expected [b, {channels}, h, w] in model space")
        self._enter("vae")
        first = next(self.vae.parameters())
        latent = latent.to(first.device, first.dtype)
        if finite:
            check_all_finite(latent, "the latent to decode")
        tile = None if tile is None else whole("tile", tile, LEAST_TILE)
        decoded = self.vae.decode(latent) if tile is None else decode_tiled(self.vae, latent, tile=tile)
        if finite:
            check_all_finite(decoded, f"the picture that the VAE decoded in {str(first.dtype).removeprefix('torch.')}")
        return to_unit(decoded)

    def encode_mask(self, mask_image: PictureLike, latents: Tensor) -> Float[Tensor, "b 1 h w"]:
        """A mask at the size of latents, as the profile reads it; see `sample(mask=)`.

        Args:
            mask_image: where a picture is drawn anew, see `Pipeline.__call__`; of any size.
            latents: [b, c, h, w].

        Raises:
            ValueError, TypeError: the mask is none, or 0 everywhere.
        """
        cell = self.vae.config.downscale
        rows, columns = latents.shape[2:]
        masks = ImageInputs(masks=tuple(masks_of(mask_image)))
        found = masks.latent_masks(PictureSize(rows * cell, columns * cell, cut=False), cell, self.profile)
        assert found is not None
        return found.to(latents.device)

    def _picture_size(self, inputs: ImageInputs, height: int | None, width: int | None) -> PictureSize:
        """The size at which pictures are drawn."""
        cell = self.vae.config.downscale
        own = None
        if inputs.latents is not None:
            rows, columns = inputs.latents.shape[2:]
            check_latents(inputs.latents, len(inputs.latents), self.transformer.config, cell, self._unit, height, width)
            return PictureSize(rows * cell, columns * cell, cut=False)
        if height is None and width is None:
            own = inputs.size(self.profile, cell * self._unit)
        rows, columns = self._cells(own[0] if own else height, "height"), self._cells(own[1] if own else width, "width")
        return PictureSize(rows * cell, columns * cell, cut=own is not None)

    def _encoded_images(
        self,
        inputs: ImageInputs,
        size: PictureSize,
        count: int,
        drawn_by: Generators,
        tile: int | None = None,
        *,
        mean: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """The latents of `count` drawings; pictures are repeated, each after itself.

        A picture for several drawings has one sample for all of them, or one by each of several generators.
        """
        if inputs.latents is not None:
            return repeated(inputs.latents, count).to(self.device, self._latent_dtype)
        return self._encoded_pixels(inputs.drawn(size, self.profile), count, drawn_by, tile, mean=mean)

    def _encoded_pixels(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        count: int,
        drawn_by: Generators,
        tile: int | None = None,
        *,
        mean: bool = False,
    ) -> Float[Tensor, "b2 c h8 w8"]:
        """The latents of `count` drawings that start from these pictures, in [0, 1]; in tiles of so many pixels."""
        self._enter("vae")
        first = next(self.vae.parameters())
        given = (2 * pixels - 1).to(first.device, first.dtype)
        found = self.vae.encode(given) if tile is None else encode_tiled(self.vae, given, tile=tile)
        latents, std = found.mean, found.std
        if isinstance(drawn_by, Sequence):
            latents, std = repeated(latents, count), repeated(std, count)
        if self.profile.image_latent != "mean" and not mean:
            sampled_by = drawn_by if self.profile.image_latent == "sampled" else None
            latents = latents + std * gaussian(latents.shape, sampled_by, latents.dtype).to(latents.device)
        check_all_finite(latents, f"the VAE's latent of the picture in {str(first.dtype).removeprefix('torch.')}")
        return repeated(latents, count).to(self.device, self._latent_dtype)

    @property
    def _latent_dtype(self) -> torch.dtype:
        """The dtype that latents have between the parts of a drawing."""
        return self.dtype if self.profile.state_dtype == "model" else torch.float32

    def _begun(
        self, noise: Tensor | None, image: Tensor | None, mask: Tensor | None, differential: float, add_noise: bool
    ) -> tuple[Tensor, Source | None]:
        """What `sample` starts from: noise, and the picture that it is laid over."""
        if image is None:
            if noise is None or mask is not None:
                missing = "noise" if noise is None else "image"
                raise ValueError(f"{missing} is missing: give {missing}, latents [b, c, h, w]")
            return noise, None
        check_tensor("image", image)
        if noise is None or not add_noise:
            if add_noise:
                raise ValueError("noise is missing: give noise, latents [b, c, h, w], or add_noise=False")
            noise = torch.zeros_like(image if noise is None else noise)
        source = Source(image.to(noise.device), None if mask is None else mask.to(noise.device), differential)
        return noise, checked_source(source, noise.shape)

    def _noise(self, shape: Sequence[int], drawn_by: Generators) -> Tensor:
        dtype = self.dtype if self.profile.noise_dtype == "model" else torch.float32
        noise = gaussian(shape, drawn_by, dtype).to(self.device)
        return noise.half() if self.profile.noise_dtype == "float16" else noise

    def _plan(
        self,
        shape: Sequence[int],
        *,
        generator: Generators = None,
        from_picture: bool = False,
        **arguments: Unpack[PlanArguments],
    ) -> SamplingPlan:
        """The plan of a drawing of latents of this shape, by the arguments of `sample`."""
        shift = default_shift(self.sampling, self.shift, shape[2:], self.transformer)
        return make_plan(
            self.profile,
            self.transformer.config,
            shape,
            default_shift=shift,
            sampling=self.sampling,
            generator=generator,
            from_picture=from_picture,
            **arguments,
        )

    def _run(self, plan: SamplingPlan, cond: Sequence[Ranged], uncond: Sequence[Ranged] | None) -> Run:
        """A plan that is ready to run; whoever listens has been told of the drawing."""
        if self.planners:
            drawing = plan.forecast(cond, uncond)
            for planner in self.planners:
                planner(drawing)
        return Run(plan, partial(self._predict_in_step, plan.profile), cond, uncond)

    def _predict_in_step(
        self, profile: Profile, x: Tensor, sigma: float, branches: Sequence[Branch], step: int
    ) -> list[Tensor]:
        return self.predict(x, sigma, branches, step=step, profile=profile)

    def _steps(
        self, run: Run, noise: Tensor, source: Source | None = None, *, x: Tensor | None = None
    ) -> Iterator[Step]:
        """The steps of a drawing, checked; the solver is set up before this returns.

        Args:
            run: the drawing.
            noise: of unit variance.
            source: the picture to start from.
            x: the latents at the first level; None makes them of noise and source.
        """
        if x is None:
            x = run.plan.start(noise, source)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._guarded(run, run.plan.steps(run, x, noise, source), run.plan.sigmas)

    def _guarded(self, run: Run, steps: Iterator[Step], levels: Tensor) -> Iterator[Step]:
        """The steps along these levels, on the fast path where there is one, and checked."""
        if self.accelerated is not None:
            timesteps = [timestep_of(run.plan.profile, one) for one in levels.tolist()]
            steps = self.accelerated.drawing(steps, timesteps)
        return self._checked(run, steps)

    def _checked(self, run: Run, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, each finite, with latents in the dtype that the profile keeps (diffusers: the model's)."""
        for step in steps:
            if run.plan.profile.state_dtype == "model":
                step.x = step.x.to(self.dtype).to(step.x.dtype)
            again = partial(self._predict, step=run.step, profile=run.plan.profile, plain=True)
            check_finite(step, run.calls, again, self.transformer)
            yield step
            run.finished(step)

    def _predict(
        self,
        x: Tensor,
        sigma: float,
        branches: Sequence[Branch],
        step: int | None,
        profile: Profile,
        plain: bool = False,
    ) -> list[Tensor]:
        self._here.predictions += 1
        prediction = self._here.predictions

        def announce(batch: tuple[Branch, ...]) -> None:
            self._enter("transformer", also=[one.net for one in batch[0].control])
            for watcher in self.watchers:
                watcher(Pass(step, sigma, batch, len(x), prediction))

        accelerated = None if plain else self.accelerated
        return predict_branches(self.transformer, profile, x, sigma, branches, announce, accelerated)

    def _check_prediction(self, x: Tensor, branches: Sequence[Branch]) -> None:
        """Raise ValueError or TypeError where latents and conditionings do not fit the transformer or each other."""
        check_tensor("x", x)
        channels = self.transformer.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x has shape {list(x.shape)}, expected [b, {channels}, h, w]: latents in model space")
        if not branches:
            raise ValueError("no conditioning is given; give at least one, see pipe.encode")
        for branch in branches:
            if not isinstance(branch.conditioning, Conditioning):
                raise TypeError(
                    f"a conditioning is {type(branch.conditioning).__name__}, expected a Conditioning, see pipe.encode"
                )
            if len(branch.conditioning) != len(x):
                raise ValueError(
                    f"a conditioning holds {len(branch.conditioning)} prompts for {len(x)} latents; give one prompt "
                    "for each, such as conditioning.repeat(n)"
                )

    def _rules(self, max_sequence_length: int | None) -> TextRules:
        rules = self.profile.text
        if max_sequence_length is None:
            return rules
        return replace(rules, t5_length=whole("max_sequence_length", max_sequence_length, 2, MAX_T5_TOKENS))

    def _latent_shape(self, count: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """The shape [b, c, h, w] of the latents of pictures of this size in pixels; None is the model's own size."""
        return (
            count,
            self.transformer.config.in_channels,
            self._cells(height, "height"),
            self._cells(width, "width"),
        )


def _one_level(sigma: float | Tensor) -> float:
    """The noise level as a number; all latents of a call share it."""
    if isinstance(sigma, Tensor) and sigma.numel() != 1:
        raise ValueError(f"sigma has shape {list(sigma.shape)}, expected one noise level for all latents of a call")
    return number("sigma", sigma.item() if isinstance(sigma, Tensor) else sigma)
