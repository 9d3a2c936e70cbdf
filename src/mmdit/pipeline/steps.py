"""A drawing step by step: encode, noise, predict, sample, decode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encoders import CLIPText, Conditioner, Conditioning, TextRules, checked_prompts, decode_tiled
from mmdit.checkpoints.components import Component
from mmdit.checkpoints.load_pipeline import Components
from mmdit.pipeline.arguments import (
    Offload,
    Shift,
    cells,
    checked_offload,
    checked_quant,
    profile_of,
)
from mmdit.pipeline.failures import Call, check_finite
from mmdit.pipeline.guidance import Guidance
from mmdit.pipeline.images import to_unit
from mmdit.pipeline.passes import Branch, Pass, Planner, Watcher
from mmdit.pipeline.plan import Progress, SamplingPlan, make_plan, resolve_sampler, resolve_sigmas
from mmdit.pipeline.predict import predict_branches, timestep_of
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.prompts import ConditioningLike, Ranged
from mmdit.pipeline.seeds import Generators, generators
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.offload import Turns
from mmdit.utils import whole
from quant.quantize import is_quantized, quantize_, refuse_quantized
from quant.recipe import Recipe, recipe_name
from samplers import Step, gaussian


class PipelineSteps:
    """The models and a profile, with a method for each step of a drawing; `mmdit.Pipeline` adds loading and the call.

    Args:
        parts: the models.
        profile: a name of `mmdit.PROFILES`, or a profile of your own (`dataclasses.replace`).
        preset: a name of `mmdit.PRESETS`: steps, guidance, sampler and shift of a kind of model.
        offload: "stages" keeps the models where they are; text encoders, transformer and VAE take turns on `device`.
        device: where models compute with `offload`.
        quant: a name of `quant.RECIPES` or a `quant.Recipe`. Linears of the transformer and of T5 are quantized to
            float8, except those of `quant.quantize.KEPT`. A model that was float8 in its file stays as it is; if the
            transformer's recipe in the file is another one, that is an error.
        name: what the settings of a picture call the model.
    """

    def __init__(
        self,
        parts: Components,
        *,
        profile: str | Profile = "diffusers",
        preset: str | None = None,
        offload: Offload | None = None,
        device: torch.device | str = "cuda",
        quant: str | Recipe | None = None,
        name: str = "",
    ) -> None:
        self.transformer, self.vae, self.tokenizers = parts.transformer, parts.vae, parts.tokenizers
        self.clip_l: CLIPText | None = parts.clip_l
        self.clip_g: CLIPText | None = parts.clip_g
        self.t5, self.name = parts.t5, name
        self.profile = profile_of(profile, preset)
        self.shift = self.profile.shift if parts.shift is None else parts.shift
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
        self.watchers: list[Watcher] = []  # called before every pass of the transformer
        self.planners: list[Planner] = []  # called before the first pass of every drawing
        self._predictions = count()
        self.accelerated: Accelerated | None = None  # see `mmdit.Pipeline.accelerate`
        self._turns = None if checked_offload(offload) is None else Turns(device)

    @property
    def models(self) -> dict[Component, nn.Module]:
        """The models that are there, by component."""
        every: dict[Component, nn.Module | None] = {
            "transformer": self.transformer,
            "vae": self.vae,
            "clip_l": self.clip_l,
            "clip_g": self.clip_g,
            "t5": self.t5,
        }
        return {name: model for name, model in every.items() if model is not None}

    @property
    def device(self) -> torch.device:
        """The device that the transformer computes on."""
        return self.transformer.pos_embed.device if self._turns is None else self._turns.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the transformer computes in."""
        return self.transformer.pos_embed.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or cast all models; with `offload` they stay, and take their turns on the new device."""
        if self._turns is not None:
            self._turns.leave()
            self._turns = Turns(self._turns.device if device is None else device)
            device = None
        for model in self.models.values():
            model.to(device=device, dtype=dtype)
        return self

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
        seed: int | Sequence[int] | None = None,
        *,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
    ) -> Float[Tensor, "b c h w"]:
        """Noise to start from: latents of shape [b, c, h, w], in model space, drawn on the CPU.

        Args:
            seed: a whole number, or a list with one for each picture. A seed of a list draws the noise that it would
                draw alone. One seed for several pictures draws what the profile says: all noise in a single draw, or
                the same noise for each picture.
            count: number of pictures, b.
            height, width: of the pictures in pixels, multiples of 16; None is the model's own size.
            generator: one, or a list with one for each picture, instead of seeds; noise is drawn on its device.

        Raises:
            ValueError: a size is not possible, or the numbers of seeds and pictures differ.
        """
        shape = self._latent_shape(count, height, width)
        dtype = self.dtype if self.profile.noise_dtype == "model" else torch.float32
        drawn_by = generators(seed, generator, count, alone=self.profile.one_seed == "each_alone")
        noise = gaussian(shape, drawn_by, dtype).to(self.device)
        return noise.half() if self.profile.noise_dtype == "float16" else noise

    def predict(
        self,
        x: Tensor,
        sigma: float | Tensor,
        conditionings: Sequence[Conditioning | Branch],
        *,
        step: int | None = None,
    ) -> list[Tensor]:
        """The predicted picture (x0, a latent) at noise level `sigma` under each conditioning.

        Conditionings with the same number of text tokens share a batch of the transformer.

        Args:
            x: latents of shape [b, c, h, w], in model space.
            sigma: the noise level of `x`, in [0, 1].
            conditionings: each of b prompts. `mmdit.Branch` gives one a name or changes the transformer for it. What
                looks inside refuses `branch=` where the branches have no names.
            step: the number of the step, for what looks inside (`mmdit.capture` and others). None counts each call of
                `predict` as a step.

        Returns:
            One tensor [b, c, h, w] for each conditioning.
        """
        branches = [one if isinstance(one, Branch) else Branch(one, None) for one in conditionings]
        return self._predict(x, float(sigma), branches, step, self.watchers)

    def predictor(self, **conditionings: Conditioning) -> Predictor:
        """A function `(x, sigma) -> [x0, ...]` for a sampling loop of your own: `predict` with named conditionings.

            predict = pipe.predictor(cond=pipe.encode("a red ring"), uncond=pipe.encode(""))
            with_prompt, without = predict(x, sigma)

        Each call counts as one step, so what looks inside names the same steps and branches as in `sample`. A solver
        that calls the model several times a step says which step it is: `predict(x, sigma, step=i)`.

        Args:
            conditionings: by the name of their branch; the predictions come in the order in which they are given.

        Raises:
            TypeError: none is given, or one is no `Conditioning`.
        """
        return Predictor(self, conditionings)

    def sample(
        self,
        cond: ConditioningLike,
        uncond: ConditioningLike | None,
        noise: Tensor,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        shift: Shift = None,
        generator: Generators = None,
        guidance: Guidance | None = None,
    ) -> Iterator[Step]:
        """Draw, step by step, from noise to latents. Change `step.x`, and the solver goes on from there.

        All arguments are checked before the first step is asked for.

        Args:
            cond: the prompts, encoded, one for each picture; or several `mmdit.Ranged`, each for a part of the way.
            uncond: the negative prompts, likewise; None where the profile runs no unconditional branch.
            noise: what to start from, [b, c, h, w], of unit variance; see `noise`.
            num_inference_steps: steps of the schedule. Like all that follows, None is the profile's default.
            guidance_scale: weight of classifier-free guidance; 1 is none.
            sampler: a name of `samplers.SOLVERS`.
            schedule: a name of `samplers.SCHEDULES`.
            sigmas: noise levels to use as they are, see `Pipeline.sigmas`.
            shift: of the schedule, above 0; "resolution" is `samplers.resolution_shift` of the latents' size.
            generator: what drew `noise`. Samplers that add noise go on with it, or with its seed, as the profile says.
            guidance: settings beyond classifier-free guidance; None is that alone.

        Returns:
            An iterator of `samplers.Step`; `step.x` of the last one is the latent to decode.

        Raises:
            ValueError: a name is unknown, a number is out of its range, or the guidance is not possible.
            ImportError: the sampler's noise needs torchsde, which is not installed.
            FloatingPointError: a step gave values that are not finite; its sigma and the first such layer are named.
        """
        plan = self._plan(
            noise.shape,
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
        return self._steps(plan, plan.ranges("cond", cond), against, noise)

    def sigmas(
        self,
        num_inference_steps: int | None = None,
        schedule: str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        shift: float | None = None,
        sampler: str | None = None,
    ) -> Tensor:
        """The noise levels of the steps, float64 [steps + 1], falling to 0.

        Args:
            num_inference_steps: steps of the schedule; None is the profile's default.
            schedule: a name of `samplers.SCHEDULES`; None is the profile's.
            sigmas: levels from at most 1 to 0, used as they are instead of a schedule. (diffusers shifts a list of its
                user's and appends the 0: `samplers.shifted` does that.)
            shift: of the schedule; None is the model's.
            sampler: for some, ComfyUI leaves out the second-last level; None is the profile's.

        Raises:
            ValueError: no step, an unknown name, levels that do not fall from at most 1 to 0; or both are given.
        """
        solver = resolve_sampler(self.profile, sampler)[1]
        shift = self.shift if shift is None else shift
        return resolve_sigmas(self.profile, solver, shift, num_inference_steps, schedule, sigmas)

    def decode(self, latent: Float[Tensor, "b c h w"], *, tile: int | None = None) -> Float[Tensor, "b 3 h8 w8"]:
        """The pictures of latents, [b, 3, 8 h, 8 w], in [0, 1].

        Args:
            latent: latents of shape [b, c, h, w], in model space, of any size.
            tile: decode in tiles of this many pixels a side, which takes less memory; see `encoders.decode_tiled`.
        """
        self._enter("vae")
        first = next(self.vae.parameters())
        latent = latent.to(first.device, first.dtype)
        return to_unit(self.vae.decode(latent) if tile is None else decode_tiled(self.vae, latent, tile=tile))

    def _plan(self, shape: Sequence[int], **arguments: Any) -> SamplingPlan:
        """The plan of a drawing of latents of this shape, by the arguments of `sample`."""
        return make_plan(self.profile, self.transformer.config, shape, default_shift=self.shift, **arguments)

    def _steps(
        self, plan: SamplingPlan, cond: Sequence[Ranged], uncond: Sequence[Ranged] | None, noise: Tensor
    ) -> Iterator[Step]:
        """The steps of a plan; whoever listens is told of the drawing before this returns."""
        if self.planners:
            drawing = plan.forecast(cond, uncond)
            for planner in self.planners:
                planner(drawing)
        progress = Progress()

        def predict(x: Tensor, sigma: float, branches: Sequence[Branch]) -> list[Tensor]:
            progress.calls.append(Call(x, sigma, branches))
            return self.predict(x, sigma, branches, step=progress.step)

        steps = plan.steps(plan.guide(predict, cond, uncond), noise)
        if self.accelerated is not None:
            steps = self.accelerated.drawing(steps, [timestep_of(self.profile, one) for one in plan.sigmas.tolist()])
        return self._checked(steps, plan.profile, progress)

    def _checked(self, steps: Iterator[Step], profile: Profile, progress: Progress) -> Iterator[Step]:
        """The steps, each finite, with latents in the dtype that the profile keeps (diffusers: the model's)."""
        for step in steps:
            if profile.state_dtype == "model":
                step.x = step.x.to(self.dtype).to(step.x.dtype)
            again = partial(self._predict, step=None, watchers=(), plain=True)
            check_finite(step, progress.calls, again, self.transformer)
            yield step
            progress.step, progress.calls = step.i + 1, []

    def _predict(
        self,
        x: Tensor,
        sigma: float,
        branches: Sequence[Branch],
        step: int | None,
        watchers: Sequence[Watcher],
        plain: bool = False,
    ) -> list[Tensor]:
        prediction = next(self._predictions)

        def announce(batch: tuple[Branch, ...]) -> None:
            self._enter("transformer")
            for watcher in watchers:
                watcher(Pass(step, sigma, batch, len(x), prediction))

        accelerated = None if plain else self.accelerated
        return predict_branches(self.transformer, self.profile, x, sigma, branches, announce, accelerated)

    def _rules(self, max_sequence_length: int | None) -> TextRules:
        rules = self.profile.text
        if max_sequence_length is None:
            return rules
        return replace(rules, t5_length=whole("max_sequence_length", max_sequence_length, 2))

    def _enter(self, *names: Component) -> None:
        """With `offload`, these models come to the device."""
        if self._turns is not None:
            self._turns.enter(model for name, model in self.models.items() if name in names)

    def _latent_shape(self, count: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """The shape [b, c, h, w] of the latents of pictures of this size in pixels; None is the model's own size."""
        return (
            count,
            self.transformer.config.in_channels,
            self._cells(height, "height"),
            self._cells(width, "width"),
        )

    def _cells(self, pixels: int | None, name: str) -> int:
        """The latent cells along a side of so many pixels."""
        config = self.transformer.config
        if pixels is None:
            return config.sample_size or 128
        return cells(pixels, name, config, self.vae.config.downscale, self._unit)

    @property
    def _unit(self) -> int:
        """What the sides of a latent are multiples of."""
        return 1 if self.profile.odd_latents == "wrap" else self.transformer.config.patch_size


class Predictor:
    """`PipelineSteps.predict` under conditionings that have names; see `PipelineSteps.predictor`."""

    def __init__(self, pipe: PipelineSteps, conditionings: Mapping[str, Conditioning]) -> None:
        if not conditionings:
            raise TypeError("predictor takes conditionings by name, such as cond=pipe.encode(prompt); got none")
        for name, one in conditionings.items():
            if not isinstance(one, Conditioning):
                raise TypeError(f"predictor: {name} is {type(one).__name__}, expected a Conditioning, see pipe.encode")
        self.branches = tuple(Branch(one, name) for name, one in conditionings.items())
        self._pipe, self._step = pipe, 0

    def __call__(self, x: Tensor, sigma: float | Tensor, *, step: int | None = None) -> list[Tensor]:
        """The predicted pictures (x0) of latents [b, c, h, w] at a noise level, one for each conditioning."""
        number = self._step if step is None else whole("step", step, 0)
        found = self._pipe.predict(x, sigma, self.branches, step=number)
        self._step = number + 1
        return found
