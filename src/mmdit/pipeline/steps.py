"""A drawing step by step: predictions, noise levels and the sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from encoders import Conditioning
from mmdit.models.controlnet import ControlNet
from mmdit.pipeline.arguments import Shift, check_tensor
from mmdit.pipeline.failures import begin_check
from mmdit.pipeline.guidance import GuidanceLike
from mmdit.pipeline.masks import Source, checked_source
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
from mmdit.pipeline.predict import Predictor, control_timestep_of, predict_branches, timestep_of
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.prompts import ConditioningLike, Ranged
from mmdit.pipeline.seeds import Generators
from mmdit.pipeline.tensors import PipelineTensors
from mmdit.runtime.modulation import ModulationTable
from mmdit.utils import number
from samplers import Step


class PipelineSteps(PipelineTensors):
    """The sampling loop and its parts; `mmdit.Pipeline` adds files and the call."""

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
            noise: the initial noise, [b, c, h, w], of unit variance; see `noise`. None with an image and
                add_noise=False, where there is a latent of the image for each picture.
            num_inference_steps: steps of the schedule. For this and all further arguments, None is the default.
            guidance_scale: weight of classifier-free guidance; 1 is none.
            sampler: a name of `samplers.SOLVERS`; or a function `(denoise, x, sigmas) -> iterator of samplers.Step`,
                where `denoise(x, sigma)` gives x0.
            schedule: a name of `samplers.SCHEDULES`.
            sigmas: noise levels to use as they are, see `Pipeline.sigmas`.
            shift: the shift of the schedule, above 0; "resolution" is `samplers.resolution_shift` of the latents' size.
            generator: the generator that drew `noise`. The noise that stochastic samplers add comes from it, or from a
                new generator with its seed, as the profile says.
            guidance: guidance settings; None is plain classifier-free guidance. Or a function
                `(x, sigma, cond, uncond) -> x0` of the latent, its sigma and the two predicted pictures.
            image: a picture to start from, as latents without noise in model space, [b, c, h, w] or [1, c, h, w]; see
                `encode_image`.
            mask: where the image is drawn anew, [b, 1, h, w] or [1, 1, h, w] in [0, 1]; see `encode_mask`.
            strength: how much of the image is drawn anew, 0 to 1: the profile says at which noise level that starts.
                With `start`, None is 1.
            differential: share of Differential Diffusion, in which a soft mask says at which level a cell may change.
            start, stop: run the steps from number `start` up to, but excluding, number `stop`, counted from 0. Together
                with `add_noise` and `leftover_noise` they correspond to ComfyUI's KSamplerAdvanced. To continue with
                the latent of another call, pass its `step.x` as `noise` with `add_noise=False` and without `image`.
            add_noise: False uses `noise` as the latent at the first sigma or, with an image, starts from
                (1 - sigma) image.
            leftover_noise: whether a drawing that ends at `stop` keeps the noise of that level; with False, its last
                step goes to sigma 0.

        Returns:
            An iterator of `samplers.Step`; `step.x` of the last one is the latent to decode.

        Raises:
            ValueError: a name is unknown, a number is out of its range, or the guidance is not possible.
            ImportError: the sampler's noise needs torchsde, which is not installed.
            FloatingPointError: a step gave values that are not finite; its sigma and the first such layer are named. On
                a GPU, where the host does not wait for a step, this is raised when the step after it is asked for; the
                last step, and each step of a sampler of your own, is checked before it is given out. If you leave the
                loop earlier, `decode` checks its latent.
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
            sigmas: sigmas from at most 1 to 0, used unchanged instead of a schedule. (diffusers shifts the caller's
                sigmas and appends 0; use `samplers.shifted` for the shift.)
            shift: the shift of the schedule; None is the model's.
            sampler: the sampler, because ComfyUI omits the second-last sigma for some samplers; None is the profile's.
            strength: the strength of a drawing that starts from a picture, see `sample`; None is a drawing from noise.

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

    def _begun(
        self, noise: Tensor | None, image: Tensor | None, mask: Tensor | None, differential: float, add_noise: bool
    ) -> tuple[Tensor, Source | None]:
        """Check the start of `sample`: the noise, and the source picture with its mask."""
        if image is None:
            if noise is None or mask is not None:
                missing = "noise" if noise is None else "image"
                raise ValueError(f"{missing} is missing: give {missing}, latents [b, c, h, w]")
            return noise, None
        check_tensor("image", image)
        if add_noise == (noise is None):
            if add_noise:
                raise ValueError("noise is missing: give noise, latents [b, c, h, w], or add_noise=False")
            raise ValueError(
                "noise is given, and a drawing from an image with add_noise=False reads none: leave it out, or give it "
                "without image, as the latent at the first sigma"
            )
        noise = torch.zeros_like(image) if noise is None else noise
        source = Source(image.to(noise.device), None if mask is None else mask.to(noise.device), differential)
        return noise, checked_source(source, noise.shape)

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
        """Make the run of a plan, after announcing the drawing to the planners."""
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
            noise: noise of unit variance, [b, c, h, w].
            source: the picture to start from.
            x: the latents at the first sigma; None computes them from noise and source.
        """
        return self._guarded(run, self._solved(run, noise, source, x=x), run.plan.sigmas)

    def _late_steps(self, run: Run, noise: Callable[[], Tensor], source: Source | None) -> Iterator[Step]:
        """`_steps` of noise that is asked for as late as possible, after the fast path has looked at the weights."""

        def solved() -> Iterator[Step]:
            yield from self._solved(run, noise(), source)

        return self._guarded(run, solved(), run.plan.sigmas)

    def _solved(
        self, run: Run, noise: Tensor, source: Source | None = None, *, x: Tensor | None = None
    ) -> Iterator[Step]:
        """What the solver of a drawing yields; it is set up before this returns. For the arguments see `_steps`."""
        if self.parallel is not None:
            first = self.parallel.first
            noise, x = first(noise), None if x is None else first(x)
            source = None if source is None else replace(source, latents=first(source.latents))
        if x is None:
            x = run.plan.start(noise, source)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return run.plan.steps(run, x, noise, source)

    def _guarded(self, run: Run, steps: Iterator[Step], levels: Tensor) -> Iterator[Step]:
        """The steps along these levels, on the fast path where there is one, and checked."""
        timesteps = [timestep_of(run.plan.profile, one) for one in levels.tolist()]
        if self.accelerated is not None:
            of_nets = [control_timestep_of(run.plan.profile, one) for one in levels.tolist()]
            steps = self.accelerated.drawing(steps, timesteps, of_nets)
        elif self._table is not None:
            steps = self._table.drawing(steps, timesteps)
        return self._checked(run, steps)

    def _checked(self, run: Run, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, each finite, with latents in the dtype that the profile keeps (diffusers: the model's).

        On a GPU a step is given out before it is done. It is checked once the next one is launched, the last one, and
        each that may be the last, before it is given out; whoever leaves the loop before that, or sets `run.reads_last`
        to False, calls `run.read_check`.
        """
        try:
            for step in steps:
                run.read_check()
                if run.plan.profile.state_dtype == "model":
                    step.x = step.x.to(self.dtype).to(step.x.dtype)
                again = partial(self._predict, step=run.step, profile=run.plan.profile, plain=True)
                run.check = begin_check(step, run.calls, again, self.transformer)
                if run.reads_last and run.plan.may_end(step):
                    run.read_check()
                yield step
                run.finished(step)
            if run.reads_last:
                run.read_check()
        except Exception:  # a step fails where the one before it was not finite, which is what should be said
            run.read_check()
            raise

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
            nets = [one.net for one in batch[0].control]
            self._fit_step(x, batch, nets)
            self._enter("transformer", also=nets)
            for watcher in self.watchers:
                watcher(Pass(step, sigma, batch, len(x), prediction))

        def run(branches: Sequence[Branch]) -> list[Tensor]:
            fast = None if plain else self.accelerated
            with self._computing(f"a step of latents {list(x.shape)}"):
                how = (announce, fast, sequence, self._reads_table)
                return predict_branches(self.transformer, profile, x, sigma, branches, *how)

        if plain or self.parallel is None:
            sequence = None
            return run(branches)
        sequence = self.parallel.sequence
        with self.parallel.guarded():
            return self.parallel.predictions(branches, run, x)

    def _fit_step(self, x: Tensor, batch: tuple[Branch, ...], nets: Sequence[ControlNet]) -> None:
        """Plan for a batch that is larger than the drawing's plan says."""
        samples, height, width = len(batch) * len(x), *x.shape[2:]
        tokens = batch[0].conditioning.context.shape[1]
        sizes = self._sizes_now(samples=samples, height=height, width=width, tokens=tokens)
        new = [net for net in nets if net not in self._nets]
        self._fit(sizes, nets=[*self._nets, *new] if new else None)

    @property
    def _reads_table(self) -> ModulationTable | None:
        """The modulation table, where adaLN weights are not on the device."""
        return self._table if self.memory_plan is not None and self.memory_plan.visited else None

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


def _one_level(sigma: float | Tensor) -> float:
    """The noise level as a number; all latents of a call share it."""
    if isinstance(sigma, Tensor) and sigma.numel() != 1:
        raise ValueError(f"sigma has shape {list(sigma.shape)}, expected one noise level for all latents of a call")
    return number("sigma", sigma.item() if isinstance(sigma, Tensor) else sigma)
