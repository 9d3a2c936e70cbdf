"""The plan of a drawing: what happens between its noise and its latent, resolved and checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

import samplers
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.arguments import Shift, shift_for
from mmdit.pipeline.failures import Call, FiniteCheck
from mmdit.pipeline.guidance import Guidance, GuidanceLike, as_guidance
from mmdit.pipeline.masks import Blend, Source, noisy
from mmdit.pipeline.passes import Branch, Drawing
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.prompts import ConditioningLike, Ranged, checked_ranges
from mmdit.pipeline.seeds import Generators, next_noise, solver_options
from mmdit.utils import number, shortened, whole
from samplers import (
    SOLVERS,
    Guide,
    Guided,
    Predict,
    ResolutionShift,
    SamplingDefaults,
    Solver,
    Step,
    as_solver,
    only_x0,
    pick,
)
from samplers.checks import MAX_STEPS

FULL_STRENGTH = 0.9999  # from here on ComfyUI draws from all of the noise
SigmasLike = Sequence[float] | np.ndarray | Tensor  # what `sigmas=` takes
PredictInStep = Callable[[Tensor, float, Sequence[Branch], int], list[Tensor]]
SamplerLike = str | Solver | Callable[..., Iterator[Step]]  # what `sampler=` takes


class PlanArguments(TypedDict, total=False):
    """The sampling arguments of `mmdit.Pipeline.sample`, which `make_plan` resolves; None is the profile's default."""

    num_inference_steps: int | None
    guidance_scale: float | None
    sampler: SamplerLike | None
    schedule: str | None
    sigmas: SigmasLike | None
    shift: Shift
    guidance: GuidanceLike | None
    strength: float | None
    start: int | None
    stop: int | None
    leftover_noise: bool


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """One drawing with every default filled in and every name looked up; later code resolves no argument again.

    `make_plan` makes it. `Pipeline.__call__` and `Pipeline.sample` make one each, before any model runs.
    """

    profile: Profile
    sampler: str  # the name of the solver; "" for a solver of the caller
    solver: Solver
    schedule: str | None  # None where the caller gave the sigmas
    num_inference_steps: int
    sigmas: Tensor  # float64 [steps + 1], falling, in [0, 1]
    shift: float
    guidance_scale: float
    guidance: Guidance  # with the profile's numbers filled in
    uses_uncond: bool  # whether the unconditional branch runs
    strength: float | None  # strength of a drawing that starts from a picture; None for a drawing from noise
    all_noise: bool  # whether the initial latent is noise of unit variance, whatever the first sigma is
    shape: tuple[int, ...]  # shape of the latents, [b, c, h, w]
    generator: Generators  # draws the noise that a stochastic solver adds
    options: Mapping[str, Any]  # keyword arguments of the solver from the scheduler's config

    @property
    def is_own(self) -> bool:
        """Whether a function of the caller samples or guides, which settings cannot describe."""
        return not self.sampler or self.guidance.is_own

    def ranges(self, name: str, given: ConditioningLike) -> tuple[Ranged, ...]:
        """The argument `name` as ranges with one prompt per picture that cover every sigma of this plan.

        Raises:
            TypeError, ValueError: see `mmdit.pipeline.prompts.checked_ranges`.
        """
        return checked_ranges(name, given, self.sigmas, self.shift, self.shape[0])

    def guide(
        self,
        predict: Predict,
        cond: Sequence[Ranged],
        uncond: Sequence[Ranged] | None,
        kept: list[Tensor] | None = None,
    ) -> Guide:
        """What the solver calls at each sigma: the branches of the guidance, predicted and combined.

        `kept` is what momentum keeps of the calls before, see `samplers.projected`.
        """
        controls = {id(one): one for ranged in (*cond, *(uncond or ())) for one in ranged.control}
        placed = {key: one.placed(self.profile, self.sigmas, self.shift) for key, one in controls.items()}
        given, against = (
            None
            if ranges is None
            else [replace(r, control=tuple(placed[id(one)] for one in r.control)) for r in ranges]
            for ranges in (cond, uncond)
        )
        assert given is not None
        return self.guidance.build(
            predict,
            given,
            against,
            self.guidance_scale,
            profile=self.profile,
            sigmas=self.sigmas,
            shift=self.shift,
            read_uncond=self.uses_uncond and self.solver.guided,
            kept=kept,
        )

    def forecast(self, cond: Sequence[Ranged], uncond: Sequence[Ranged] | None) -> Drawing:
        """The branches that the transformer will run in each step, found by running the guidance without a model."""
        asked: list[Branch] = []

        def stand_in(x: Tensor, sigma: float, branches: Sequence[Branch]) -> list[Tensor]:
            asked.extend(branches)
            return [x] * len(branches)

        def branches_at(guide: Guide, sigma: float) -> tuple[Branch, ...]:
            asked.clear()
            guide(torch.ones(1, 1, 1, 1, device="cpu"), sigma)
            return tuple(asked)

        # A separate guide, because guidance with momentum has a state; a function of the caller is not called.
        plan = replace(self, guidance=replace(self.guidance, kind="cfg")) if self.guidance.is_own else self
        guide = plan.guide(stand_in, cond, uncond)
        sigmas = tuple(self.sigmas.tolist())
        return Drawing(sigmas, tuple(branches_at(guide, sigma) for sigma in sigmas[:-1]), self.shape)

    def start(self, noise: Tensor, source: Source | None = None) -> Tensor:
        """The latents at the first noise level, [b, c, h, w], in float32 at least.

        Args:
            noise: of unit variance, [b, c, h, w].
            source: the picture to start from. Without one, the profile decides how the noise is scaled.
        """
        x = noise.to(torch.promote_types(noise.dtype, torch.float32))
        first = float(self.sigmas[0])
        if source is None:
            return x if self.all_noise else x * first
        if source.mask is not None and self.all_noise:
            return x
        x = noisy(source.latents.to(x), x, first)
        return x.to(noise.dtype).to(x.dtype) if self.profile.state_dtype == "model" else x

    def steps(self, guide: Guide, x: Tensor, noise: Tensor, source: Source | None = None) -> Iterator[Step]:
        """The solver's steps.

        Args:
            guide: what the solver calls.
            x: the latents at the first noise level, [b, c, h, w], in float32 at least; see `start`.
            noise: noise of unit variance, which is added to the picture outside of a mask; it is not added to x.
            source: the picture, and the mask of the region that is drawn anew.
        """
        blend = None if source is None else Blend.of(source.to(x), self._mask_noise(x, noise), self.sigmas, self.shift)
        if blend is not None and self.profile.mask_acts == "around_model":
            guide = blend.around(guide)
        options = solver_options(self.solver, x, self.sigmas, self.shift, self.generator, self.profile.step_noise)
        options |= self.options
        found = self.solver(guide if self.solver.guided else only_x0(guide), x, self.sigmas, **options)
        return found if blend is None or self.profile.mask_acts == "around_model" else blend.after(found)

    def may_end(self, step: Step) -> bool:
        """Whether the solver may end with this step. Of a solver of the caller nobody knows, so that it always may."""
        if not any(self.solver is one for one in SOLVERS.values()):
            return True
        if not self.solver.own_steps:
            return step.i == len(self.sigmas) - 2
        end = min(sigma for sigma in self.sigmas.tolist() if sigma > 0)
        return step.sigma <= end * (1 + 1e-4)  # the solvers stop within 1e-5 of it

    def _mask_noise(self, x: Tensor, noise: Tensor) -> Tensor:
        """The noise for the picture outside of a mask, with the shape, device and dtype of x."""
        if self.sampler == "ddim" and self.profile.ddim_mask_noise == "of_the_next_seed":
            return next_noise(x, self.generator)
        return noise.to(x)


class _Progress:
    """How far a solver is, noted where it calls the model.

    A guide calls this and not the run, which has the guide: in a cycle they would keep the models in memory, after the
    pipeline is dropped, until a garbage collection.
    """

    def __init__(self, predict: PredictInStep) -> None:
        self.step = 0  # number of steps that the solver has finished
        self.calls: list[Call] = []  # calls of the model in this step
        self._predict_in_step = predict

    def __call__(self, x: Tensor, sigma: float, branches: Sequence[Branch]) -> list[Tensor]:
        self.calls.append(Call(x, sigma, branches))
        return self._predict_in_step(x, sigma, branches, self.step)


class Run:
    """A running plan: the progress of its solver, and the changes that callbacks have made.

    Args:
        plan: the plan of the drawing.
        predict: (x, sigma, branches, step) -> the predicted picture of each branch.
        cond: the prompts, encoded, as `SamplingPlan.ranges` gives them.
        uncond: the negative prompts; None where the unconditional branch does not run.
    """

    def __init__(
        self, plan: SamplingPlan, predict: PredictInStep, cond: Sequence[Ranged], uncond: Sequence[Ranged] | None
    ) -> None:
        self.plan, self.cond, self.uncond = plan, cond, uncond
        self.check: FiniteCheck | None = None  # of the last step, unless it has been read
        self.reads_last = True  # whether the check of the drawing's last step is read before the step is given out
        self._progress = _Progress(predict)
        self._kept: list[Tensor] = []  # by momentum of the guidance
        self.rebuild()

    def __call__(self, x: Tensor, sigma: float) -> Guided:
        """The combined prediction at a noise level, for the solver."""
        return self._guide(x, sigma)

    @property
    def step(self) -> int:
        """The number of steps that the solver has finished."""
        return self._progress.step

    @property
    def calls(self) -> list[Call]:
        """The calls of the model in this step."""
        return self._progress.calls

    def rebuild(self) -> None:
        """Continue with the present plan and conditionings."""
        uncond = self.uncond if self.plan.uses_uncond else None
        self._guide = self.plan.guide(self._progress, self.cond, uncond, self._kept)

    def scale(self, guidance_scale: float) -> None:
        """Continue with another guidance scale; the unconditional branch stops where the scale needs none."""
        reads = self.plan.profile.reads_negative(guidance_scale) or self.plan.solver.guided
        uses_uncond = reads and self.uncond is not None
        self.plan = replace(self.plan, guidance_scale=guidance_scale, uses_uncond=uses_uncond)
        self.rebuild()

    def read_check(self) -> None:
        """Raise FloatingPointError where the last step was not finite, see `FiniteCheck`."""
        check, self.check = self.check, None
        if check is not None:
            check.read()

    def finished(self, step: Step) -> None:
        """Note that this step is finished and the next one begins."""
        self._progress.step, self._progress.calls = step.i + 1, []


def make_plan(
    profile: Profile,
    config: MMDiTConfig,
    shape: Sequence[int],
    *,
    default_shift: float,
    sampling: SamplingDefaults | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: SamplerLike | None = None,
    schedule: str | None = None,
    sigmas: SigmasLike | None = None,
    shift: Shift = None,
    generator: Generators = None,
    guidance: GuidanceLike | None = None,
    strength: float | None = None,
    start: int | None = None,
    stop: int | None = None,
    leftover_noise: bool = True,
    from_picture: bool = False,
) -> SamplingPlan:
    """Resolve and check the arguments of a drawing; None is the profile's default.

    Args:
        profile: the profile, whose rules apply.
        config: the transformer's config.
        shape: the shape of the latents, [b, c, h, w].
        default_shift: the shift of the model, where `shift` is None.
        sampling: the scheduler's config. Its options apply to its own sampler, and its terminal to its own schedule.
        num_inference_steps, guidance_scale, sampler, schedule, sigmas, shift, generator, guidance, strength, start,
            stop, leftover_noise: as `mmdit.Pipeline.sample` takes them.
        from_picture: whether the drawing starts from a picture.

    Raises:
        ValueError: a name is unknown, a number is out of its range, or arguments exclude each other.
    """
    name, solver = resolve_sampler(profile, sampler)
    shift = shift_for(shift, default_shift, shape[2:], config.patch_size)
    default_steps = (profile.image_steps if from_picture else None) or profile.steps
    steps = default_steps if num_inference_steps is None and sigmas is None else num_inference_steps
    strength = resolve_strength(profile, strength, from_picture)
    levels = resolve_sigmas(profile, solver, shift, steps, schedule, sigmas, sampling=sampling, strength=strength)
    levels = between(levels, start, stop, leftover_noise)
    asked = as_guidance(guidance)
    if asked.is_own and guidance_scale is not None:
        raise ValueError("guidance is a function, so guidance_scale has no effect; leave one of them out")
    scale = number("guidance_scale", profile.guidance_scale if guidance_scale is None else guidance_scale)
    # CFG++ and a guidance function take the unconditional branch at every scale.
    uses_uncond = profile.reads_negative(scale) or solver.guided or asked.is_own
    asked.check(profile, scale, mixed=uses_uncond, depth=config.depth, steps=len(levels) - 1)
    return SamplingPlan(
        profile=_profile_for(profile, name, sampling),
        sampler=name,
        solver=solver,
        schedule=None if sigmas is not None else profile.schedule if schedule is None else schedule,
        num_inference_steps=len(levels) - 1 if sigmas is not None else int(steps or default_steps),
        sigmas=levels,
        shift=shift,
        guidance_scale=scale,
        guidance=asked.of(profile),
        uses_uncond=uses_uncond,
        strength=strength,
        all_noise=profile.first_level == "all_noise" and strength in (None, 1) and not start,
        shape=tuple(shape),
        generator=generator,
        options=sampling.options if sampling is not None and name == sampling.sampler else {},
    )


def _profile_for(profile: Profile, sampler: str, sampling: SamplingDefaults | None) -> Profile:
    """The profile of a drawing: timesteps without their fraction belong to the scheduler of the config alone.

    In diffusers they come with that scheduler's table, so that another scheduler takes them with their fraction; in
    ComfyUI every sampler does.
    """
    if sampling is None or not sampling.whole_timesteps or sampler == sampling.sampler:
        return profile
    return replace(profile, whole_timesteps=False)


def resolve_sampler(profile: Profile, sampler: SamplerLike | None) -> tuple[str, Solver]:
    """The name of a solver, and the solver.

    Args:
        profile: the profile, whose sampler is used for None.
        sampler: a name, or a function or `samplers.Solver` of the caller, see `samplers.as_solver`.

    Raises:
        ValueError: the name is unknown; the nearest names are listed.
        TypeError: the sampler is of another type.
    """
    if sampler is None or isinstance(sampler, str):
        name = profile.sampler if sampler is None else sampler
        return name, pick(SOLVERS, name, "sampler")
    return "", as_solver(sampler)


def resolve_strength(profile: Profile, strength: float | None, from_picture: bool) -> float | None:
    """The strength of a drawing; None where it starts from no picture.

    Raises:
        ValueError: it is not from 0 to 1, or given without a picture.
    """
    if not from_picture:
        if strength is not None:
            raise ValueError(f"strength {strength} is given without image; strength says how much of one is drawn anew")
        return None
    if strength is None:
        return profile.strength
    if isinstance(strength, Sequence | np.ndarray) or (isinstance(strength, Tensor) and strength.ndim):
        raise ValueError(
            f"strength is {shortened(strength)}, expected one number: all pictures of a call have the same noise "
            "levels; draw pictures with other strengths in calls of their own"
        )
    return number("strength", strength, 0, 1)


def resolve_sigmas(
    profile: Profile,
    solver: Solver,
    shift: float,
    num_inference_steps: int | None = None,
    schedule: str | None = None,
    sigmas: SigmasLike | None = None,
    *,
    sampling: SamplingDefaults | None = None,
    strength: float | None = None,
) -> Tensor:
    """The noise levels of the steps, float64 [steps + 1]; see `mmdit.Pipeline.sigmas`.

    Raises:
        ValueError: no step, an unknown schedule, sigmas that do not fall from at most 1 to 0, or both are given.
    """
    if sigmas is not None:
        sigmas = _levels(sigmas)
        if profile.open_sigmas == "shift" and len(sigmas) and float(sigmas[-1]) > 0:
            if num_inference_steps == len(sigmas):
                num_inference_steps = None  # users of diffusers give both
            shifted = samplers.shifted(sigmas, shift)
            sigmas = torch.cat([shifted, shifted.new_zeros(1)])
        named = (("num_inference_steps", num_inference_steps), ("schedule", schedule))
        if given := [name for name, value in named if value is not None]:
            raise ValueError(f"sigmas and {given[0]} are both given; sigmas are all the steps: give one of them")
        return _part_of(samplers.checked_sigmas(sigmas), profile, strength)
    steps = whole("num_inference_steps", profile.steps if num_inference_steps is None else num_inference_steps, 1)
    if steps > MAX_STEPS:
        raise ValueError(f"num_inference_steps must be at most {MAX_STEPS}, got {steps}")
    name = profile.schedule if schedule is None else schedule
    terminal = sampling.terminal if sampling is not None and name == sampling.schedule else None
    one_more = profile.second_last == "left_out" and solver.drops_second_last

    def of_schedule(steps: int) -> Tensor:
        found = samplers.sigmas(name, steps + one_more, shift=shift, terminal=terminal)
        return torch.cat([found[:-2], found[-1:]]) if one_more else found

    if strength is None or profile.strength_levels != "last_of_more" or strength > FULL_STRENGTH:
        return _part_of(of_schedule(steps), profile, strength)
    if not strength or steps / strength > MAX_STEPS:
        raise ValueError(f"strength {strength:g} leaves the picture as it is; give at least {steps / MAX_STEPS:g}")
    return of_schedule(int(steps / strength))[-(steps + 1) :]


def _part_of(levels: Tensor, profile: Profile, strength: float | None) -> Tensor:
    """The sigmas of a drawing that remain at this strength, by the profile's rule."""
    steps = len(levels) - 1
    match profile.strength_levels:
        case _ if strength is None:
            return levels
        case "without_first":
            first = int(max(steps - min(steps * strength, steps), 0))
        case "without_share":
            first = int(steps * (1 - strength))
        case _ if strength > FULL_STRENGTH:
            return levels
        case _:
            raise ValueError(
                f"sigmas and strength {strength:g} are given; in profile {profile.name!r} the first of the sigmas says "
                "how noisy the picture is: leave strength out"
            )
    if first >= steps:
        raise ValueError(f"strength {strength:g} leaves none of {steps} steps; give more strength or more steps")
    return levels[first:]


def between(levels: Tensor, start: int | None, stop: int | None, leftover_noise: bool) -> Tensor:
    """The levels from step `start` up to step `stop`, counted from 0; see `mmdit.Pipeline.sample`.

    Raises:
        ValueError: no step is left.
    """
    if start is None and stop is None:
        return levels
    steps = len(levels) - 1
    first = whole("start", 0 if start is None else start, 0)
    last = min(whole("stop", steps if stop is None else stop, 0), steps)
    if first >= last:
        raise ValueError(f"start {first} and stop {last} leave none of {steps} steps; give start < stop")
    found = levels[first : last + 1]
    return found if leftover_noise or not found[-1] else torch.cat([found[:-1], found.new_zeros(1)])


def _levels(sigmas: SigmasLike) -> Tensor:
    """The argument `sigmas` as a tensor of float64 on the CPU."""
    try:
        found = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"sigmas are {shortened(sigmas)}, expected a list of numbers") from error
    if found.ndim != 1:
        raise ValueError(f"sigmas have shape {list(found.shape)}, expected [steps + 1]")
    return found


def default_shift(sampling: SamplingDefaults | None, shift: float, sides: Sequence[int], transformer: MMDiT) -> float:
    """The model's shift, which its scheduler may compute from the sides of the latents."""
    if sampling is None or not isinstance(sampling.shift, ResolutionShift):
        return shift
    patch = transformer.config.patch_size
    return sampling.shift.at((sides[0] // patch) * (sides[1] // patch))
