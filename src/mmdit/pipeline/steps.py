"""The steps of a drawing, one by one: encode, noise, predict, sample, decode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

import samplers
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
    shift_for,
)
from mmdit.pipeline.failures import Call, check_finite
from mmdit.pipeline.guidance import Guidance
from mmdit.pipeline.images import to_unit
from mmdit.pipeline.passes import Branch, Planner, Watcher
from mmdit.pipeline.predict import Predicting
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.prompts import Conditionings
from mmdit.pipeline.seeds import Generators, generators, solver_options
from mmdit.runtime.offload import Turns
from mmdit.utils import whole
from quant.quantize import is_quantized, quantize_, refuse_quantized
from quant.recipe import Recipe, recipe_name
from samplers import SOLVERS, Step, gaussian, only_x0, pick


class PipelineSteps(Predicting):
    """Models under a profile, and what is done with them; `mmdit.Pipeline` adds loading and the call that does all.

    Args:
        parts: the models.
        profile: a name of `mmdit.PROFILES`, or a profile of one's own (`dataclasses.replace`).
        preset: a name of `mmdit.pipeline.profiles.PRESETS`: steps, guidance, sampler and shift of a kind of model.
        offload: "stages" keeps the models where they are; text encoders, transformer and VAE take turns on `device`.
        device: for `offload`.
        quant: a name of `quant.RECIPES` or a `quant.Recipe`: the Linears of transformer and T5 become float8, but for
            `quant.quantize.KEPT`. What was float8 when it was loaded stays as it is; a transformer under another recipe
            is an error.
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
        self.watchers: list[Watcher] = []  # told of every pass of the transformer before it runs
        self.planners: list[Planner] = []  # told of every drawing before its first pass
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
        """Where the transformer computes."""
        return self.transformer.pos_embed.device if self._turns is None else self._turns.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
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
        """What the transformer reads of the prompts, on its device and in its dtype.

        Args:
            prompts: one or more.
            max_sequence_length: T5 tokens; None is the profile's number.

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
        """The latents to start from, in model space, drawn on the CPU (or on the generator's device).

        Args:
            seed: one per picture, whose noise is then that of the seed alone; or one, which for several pictures means
                what the profile says: parts of a single draw, or the same noise for each.
            count: pictures.
            height, width: of the picture in pixels, multiples of 16.
            generator: instead of a seed; one, or one per picture.

        Raises:
            ValueError: a size does not fit, or seeds and pictures differ in number.
        """
        rows, columns = self._cells(height, "height"), self._cells(width, "width")
        shape = (count, self.transformer.config.in_channels, rows, columns)
        dtype = self.dtype if self.profile.noise_dtype == "model" else torch.float32
        drawn_by = generators(seed, generator, count, alone=self.profile.one_seed == "each_alone")
        noise = gaussian(shape, drawn_by, dtype).to(self.device)
        return noise.half() if self.profile.noise_dtype == "float16" else noise

    def sample(
        self,
        cond: Conditionings,
        uncond: Conditionings | None,
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
        """The steps from noise to latent; change `step.x` and the solver goes on from there.

        Args:
            cond, uncond: of the prompts and the negative prompts, one per picture; no uncond without guidance. Each may
                be several `mmdit.Ranged`, which count for parts of the way.
            noise: [b, c, h, w], see `noise`.
            num_inference_steps, guidance_scale, sampler, schedule: None is the profile's.
            sigmas, shift: see `levels`; shift "resolution" is `samplers.resolution_shift` of the latent.
            generator: what drew `noise`: samplers that add noise go on with it, or with its seed, as the profile says.
            guidance: more than classifier-free guidance; None is that alone.

        Raises:
            ValueError: an unknown name, no step, or guidance that cannot be: the message says why.
            ImportError: ComfyUI's noise of *_sde samplers needs torchsde.
            FloatingPointError: a step gave what is not finite; its level and the first such layer are named.
        """
        solver, scale, count = self._solver(sampler), self._scale(guidance_scale), _Count()
        shift = shift_for(shift, self.shift, noise.shape[2:], self.transformer.config.patch_size)
        levels = self.sigmas(num_inference_steps, schedule, sigmas, shift, sampler)
        guided = self._guided(
            partial(_predict_at, self, count),
            cond,
            uncond,
            scale,
            guidance=guidance,
            sampler=sampler,
            levels=levels,
            shift=shift,
            shape=tuple(noise.shape),
        )
        x = noise.to(torch.promote_types(noise.dtype, torch.float32))
        if self.profile.first_level == "its_share":
            x = x * float(levels[0])
        options = solver_options(solver, x, levels, shift, generator, self.profile.step_noise)
        steps = solver(guided if solver.guided else only_x0(guided), x, levels, **options)
        return self._counted(steps, count)

    def sigmas(
        self,
        num_inference_steps: int | None = None,
        schedule: str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        shift: float | None = None,
        sampler: str | None = None,
    ) -> Tensor:
        """The noise levels of the steps, float64 [steps + 1].

        Args:
            num_inference_steps, schedule: None is the profile's.
            sigmas: instead of these, levels from at most 1 to 0, used as they are. (diffusers shifts a list of its
                user's and appends the 0: `samplers.shifted` does that.)
            shift, sampler: None is the model's, the profile's; for some ComfyUI leaves out the second-last level.

        Raises:
            ValueError: no step, an unknown name, levels that do not fall from at most 1 to 0; or both are given.
        """
        if sigmas is not None:
            named = (("num_inference_steps", num_inference_steps), ("schedule", schedule))
            if given := [name for name, value in named if value is not None]:
                raise ValueError(f"sigmas and {given[0]} are both given; sigmas are all the steps: give one of them")
            return samplers.checked_sigmas(sigmas)
        steps = self.profile.steps if num_inference_steps is None else num_inference_steps
        whole("num_inference_steps", steps, 1)
        more = self.profile.second_last == "left_out" and self._solver(sampler).drops_second_last
        shift = self.shift if shift is None else shift
        found = samplers.sigmas(schedule or self.profile.schedule, steps + more, shift=shift)
        return torch.cat([found[:-2], found[-1:]]) if more else found

    def decode(self, latent: Float[Tensor, "b c h w"], *, tile: int | None = None) -> Float[Tensor, "b 3 h8 w8"]:
        """The pictures of latents in model space, in [0, 1].

        Args:
            latent: of any picture size.
            tile: decode in tiles of so many pixels a side, for less memory; see `encoders.decode_tiled`.
        """
        self._enter("vae")
        first = next(self.vae.parameters())
        latent = latent.to(first.device, first.dtype)
        return to_unit(self.vae.decode(latent) if tile is None else decode_tiled(self.vae, latent, tile=tile))

    def _rules(self, max_sequence_length: int | None) -> TextRules:
        rules = self.profile.text
        if max_sequence_length is None:
            return rules
        return replace(rules, t5_length=whole("max_sequence_length", max_sequence_length, 2))

    def _scale(self, guidance_scale: float | None) -> float:
        scale = self.profile.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a finite number, got {scale}")
        return scale

    def _solver(self, sampler: str | None) -> samplers.Solver:
        return pick(SOLVERS, sampler or self.profile.sampler, "sampler")

    def _enter(self, *names: Component) -> None:
        """With `offload`, these models come to the device."""
        if self._turns is not None:
            self._turns.enter(model for name, model in self.models.items() if name in names)

    def _counted(self, steps: Iterator[Step], count: _Count) -> Iterator[Step]:
        """The steps, with their latents as the profile keeps them: diffusers rounds to the model's dtype."""
        for step in steps:
            if self.profile.state_dtype == "model":
                step.x = step.x.to(self.dtype).to(step.x.dtype)
            check_finite(step, count.calls, self._predict_unwatched, self.transformer)
            yield step
            count.step, count.calls = step.i + 1, []

    def _predict_unwatched(self, x: Tensor, sigma: float, branches: Sequence[Branch]) -> Sequence[Tensor]:
        """`predict`, of which no watcher is told."""
        watchers, self.watchers = self.watchers, []
        try:
            return self.predict(x, sigma, branches)
        finally:
            self.watchers = watchers

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


@dataclass
class _Count:
    """How many steps a solver has finished, and what it has asked the model for since."""

    step: int = 0
    calls: list[Call] = field(default_factory=list)


def _predict_at(
    pipe: PipelineSteps, count: _Count, x: Tensor, sigma: float, branches: Sequence[Branch]
) -> list[Tensor]:
    count.calls.append(Call(x, sigma, branches))
    return pipe.predict(x, sigma, branches, step=count.step)
