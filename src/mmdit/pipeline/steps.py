"""A drawing step by step: encode, noise, predict, sample, decode."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encoders import CLIPText, Conditioner, Conditioning, TextRules, checked_prompts, decode_tiled
from mmdit.checkpoints.components import Component, title
from mmdit.checkpoints.load_pipeline import Components
from mmdit.pipeline.arguments import (
    LEAST_TILE,
    Offload,
    Shift,
    cells,
    check_tensor,
    checked_offload,
    checked_quant,
    profile_of,
)
from mmdit.pipeline.callbacks import CallState
from mmdit.pipeline.failures import check_all_finite, check_finite
from mmdit.pipeline.guidance import GuidanceLike
from mmdit.pipeline.images import to_unit
from mmdit.pipeline.passes import Branch, Pass, Planner, Watcher
from mmdit.pipeline.plan import (
    Run,
    SamplerLike,
    SamplingPlan,
    SigmasLike,
    default_shift,
    make_plan,
    resolve_sampler,
    resolve_sigmas,
)
from mmdit.pipeline.predict import predict_branches, timestep_of
from mmdit.pipeline.profiles import Profile, with_sampling
from mmdit.pipeline.prompts import ConditioningLike, Ranged
from mmdit.pipeline.seeds import Generators, SeedLike, checked_seeds, generators
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.devices import resolve_device, warn_if_slow
from mmdit.runtime.offload import Turns
from mmdit.utils import number, weight_bytes, whole
from quant.quantize import is_quantized, quantize_, refuse_quantized
from quant.recipe import Recipe, recipe_name
from quant.tensor import Float8Tensor
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
        self.sampling = parts.sampling  # the scheduler's config, where it says more than a shift
        self.shift = self.profile.shift if parts.shift is None else parts.shift
        if self.sampling is not None:
            self.profile = with_sampling(self.profile, self.sampling)
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
        self._here = _PerThread()
        self._digest: tuple[tuple[tuple[int, int], ...], str] | None = None  # of the transformer in this state
        self.accelerated: Accelerated | None = None  # see `mmdit.Pipeline.accelerate`
        self._turns = None if checked_offload(offload) is None else Turns(resolve_device(device))

    @property
    def watchers(self) -> list[Watcher]:
        """Called before every pass of the transformer in this thread."""
        return self._here.watchers

    @property
    def planners(self) -> list[Planner]:
        """Called before the first pass of every drawing of this thread."""
        return self._here.planners

    def __repr__(self) -> str:
        """What the pipeline is made of: each model with its size, dtype, device and quantization."""
        profile = self.profile
        lines = [
            f"{type(self).__name__} {self.name!r}, profile {profile.name}: {profile.steps} steps, guidance "
            f"{profile.guidance_scale:g}, {profile.sampler}, shift {self.shift:g}"
        ]
        return "\n".join([*lines, *(_line(title(name), model) for name, model in self.models.items())])

    @property
    def components(self) -> dict[str, Any]:
        """The models that are there and the tokenizers, by name."""
        return {**dict[str, Any](self.models.items()), "tokenizers": self.tokenizers}

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

    def to(self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or cast all models, as `nn.Module.to` does: `pipe.to("cuda")`, `pipe.to(torch.bfloat16)`, or both.

        With `offload` the models stay where they are, and take their turns on the new device.

        Args:
            device: a name, "auto" or a `torch.device`; a dtype is taken for `dtype`.
            dtype: of weights and arithmetic; None keeps it.

        Raises:
            ValueError: there is no such device here, or two dtypes are given.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ValueError(f"two dtypes are given, {device} and {dtype}; give a device and a dtype")
            device, dtype = None, device
        device = None if device is None else resolve_device(device)
        warn_if_slow(self.device if device is None else device, dtype)
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
        seed: SeedLike | None = None,
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
        shape = self._latent_shape(whole("count", count, 1), height, width)
        dtype = self.dtype if self.profile.noise_dtype == "model" else torch.float32
        drawn_by = generators(checked_seeds(seed), generator, count, alone=self.profile.one_seed == "each_alone")
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

        Raises:
            ValueError: the latents or the conditionings have another shape, or there are several noise levels.
            TypeError: the latents are no tensor of floating-point numbers, or a conditioning is none.
        """
        branches = [one if isinstance(one, Branch) else Branch(one, None) for one in conditionings]
        self._check_prediction(x, branches)
        return self._predict(x, _one_level(sigma), branches, step, self.watchers)

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
        sampler: SamplerLike | None = None,
        schedule: str | None = None,
        sigmas: SigmasLike | None = None,
        shift: Shift = None,
        generator: Generators = None,
        guidance: GuidanceLike | None = None,
    ) -> Iterator[Step]:
        """Draw, step by step, from noise to latents. Change `step.x`, and the solver goes on from there.

        All arguments are checked before the first step is asked for.

        Args:
            cond: the prompts, encoded, one for each picture; or several `mmdit.Ranged`, each for a part of the way.
            uncond: the negative prompts, likewise; None where the profile runs no unconditional branch.
            noise: what to start from, [b, c, h, w], of unit variance; see `noise`.
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
        return self._steps(self._run(plan, plan.ranges("cond", cond), against), noise)

    def sigmas(
        self,
        num_inference_steps: int | None = None,
        schedule: str | None = None,
        sigmas: SigmasLike | None = None,
        shift: float | None = None,
        sampler: SamplerLike | None = None,
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
        return resolve_sigmas(
            self.profile, solver, shift, num_inference_steps, schedule, sigmas, sampling=self.sampling
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

    def _plan(self, shape: Sequence[int], **arguments: Any) -> SamplingPlan:
        """The plan of a drawing of latents of this shape, by the arguments of `sample`."""
        shift = default_shift(self.sampling, self.shift, shape[2:], self.transformer)
        return make_plan(
            self.profile,
            self.transformer.config,
            shape,
            default_shift=shift,
            sampling=self.sampling,
            **arguments,
        )

    def _run(self, plan: SamplingPlan, cond: Sequence[Ranged], uncond: Sequence[Ranged] | None) -> Run:
        """A plan that is ready to run; whoever listens has been told of the drawing."""
        if self.planners:
            drawing = plan.forecast(cond, uncond)
            for planner in self.planners:
                planner(drawing)
        return Run(plan, lambda x, sigma, branches, step: self.predict(x, sigma, branches, step=step), cond, uncond)

    def _steps(self, run: Run, noise: Tensor) -> Iterator[Step]:
        """The steps of a drawing, checked; the solver is set up before this returns."""
        steps = run.plan.steps(run, noise)
        if self.accelerated is not None:
            timesteps = [timestep_of(self.profile, one) for one in run.plan.sigmas.tolist()]
            steps = self.accelerated.drawing(steps, timesteps)
        return self._checked(run, steps)

    def _checked(self, run: Run, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, each finite, with latents in the dtype that the profile keeps (diffusers: the model's)."""
        for step in steps:
            if run.plan.profile.state_dtype == "model":
                step.x = step.x.to(self.dtype).to(step.x.dtype)
            again = partial(self._predict, step=None, watchers=(), plain=True)
            check_finite(step, run.calls, again, self.transformer)
            yield step
            run.finished(step)

    def _predict(
        self,
        x: Tensor,
        sigma: float,
        branches: Sequence[Branch],
        step: int | None,
        watchers: Sequence[Watcher],
        plain: bool = False,
    ) -> list[Tensor]:
        self._here.predictions += 1
        prediction = self._here.predictions

        def announce(batch: tuple[Branch, ...]) -> None:
            self._enter("transformer")
            for watcher in watchers:
                watcher(Pass(step, sigma, batch, len(x), prediction))

        accelerated = None if plain else self.accelerated
        return predict_branches(self.transformer, self.profile, x, sigma, branches, announce, accelerated)

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


class _PerThread(threading.local):
    """What belongs to the drawings of one thread. A copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self.watchers: list[Watcher] = []
        self.planners: list[Planner] = []
        self.predictions = 0  # calls of `predict` until now
        self.call: CallState | None = None  # what callbacks see of the drawing

    def __reduce__(self) -> tuple[type[_PerThread], tuple[()]]:
        return type(self), ()


def _one_level(sigma: float | Tensor) -> float:
    """A noise level; all latents of a call have the same one."""
    if isinstance(sigma, Tensor) and sigma.numel() != 1:
        raise ValueError(f"sigma has shape {list(sigma.shape)}, expected one noise level for all latents of a call")
    return number("sigma", sigma.item() if isinstance(sigma, Tensor) else sigma)


def _line(called: str, model: nn.Module) -> str:
    """A line about a model."""
    weights = list(model.parameters())
    dtypes = " and ".join(sorted({str(one.dtype).removeprefix("torch.") for one in weights}))
    devices = " and ".join(sorted({str(one.device) for one in weights}))
    recipes = sorted({recipe_name(one.recipe) for one in weights if isinstance(one, Float8Tensor)})
    quantized = f", quantized to {' and '.join(recipes)}" if recipes else ""
    size = f"{sum(one.numel() for one in weights) / 1e6:,.1f} M parameters, {weight_bytes(model) / 1e9:.2f} GB"
    return f"  {called}: {size}, {dtypes} on {devices}{quantized}"


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
