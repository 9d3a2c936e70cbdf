"""The plan of a drawing: what happens between its noise and its latent, resolved and checked once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import samplers
from mmdit.models.config import MMDiTConfig
from mmdit.pipeline.arguments import Shift, shift_for
from mmdit.pipeline.failures import Call
from mmdit.pipeline.guidance import Guidance
from mmdit.pipeline.passes import Branch, Drawing
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.prompts import ConditioningLike, Ranged, checked_ranges
from mmdit.pipeline.seeds import Generators, solver_options
from mmdit.utils import whole
from samplers import SOLVERS, Guide, Predict, Solver, Step, only_x0, pick


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """One drawing with every default filled in and every name looked up; nothing that runs later resolves an argument.

    `make_plan` makes it. `Pipeline.__call__` and `Pipeline.sample` make one each, before any model runs.
    """

    profile: Profile
    sampler: str  # the name of the solver
    solver: Solver
    schedule: str | None  # None where the caller gave the sigmas
    num_inference_steps: int
    sigmas: Tensor  # float64 [steps + 1], falling, in [0, 1]
    shift: float
    guidance_scale: float
    guidance: Guidance  # with the profile's numbers filled in
    uses_uncond: bool  # whether the unconditional branch runs
    shape: tuple[int, ...]  # of the latents: [b, c, h, w]
    generator: Generators  # draws the noise that a stochastic solver adds

    def ranges(self, name: str, given: ConditioningLike) -> tuple[Ranged, ...]:
        """The argument `name` as ranges with one prompt per picture that cover every sigma of this plan.

        Raises:
            TypeError, ValueError: see `mmdit.pipeline.prompts.checked_ranges`.
        """
        return checked_ranges(name, given, self.sigmas, self.shift, self.shape[0])

    def guide(self, predict: Predict, cond: Sequence[Ranged], uncond: Sequence[Ranged] | None) -> Guide:
        """What the solver calls at each sigma: the branches of the guidance, predicted and combined."""
        return self.guidance.build(
            predict,
            cond,
            uncond,
            self.guidance_scale,
            profile=self.profile,
            sigmas=self.sigmas,
            shift=self.shift,
            read_uncond=self.uses_uncond and self.solver.guided,
        )

    def forecast(self, cond: Sequence[Ranged], uncond: Sequence[Ranged] | None) -> Drawing:
        """What the drawing will ask the transformer for, found by a run of the guidance with a stand-in for it."""
        asked: list[Branch] = []

        def stand_in(x: Tensor, sigma: float, branches: Sequence[Branch]) -> list[Tensor]:
            asked.extend(branches)
            return [x] * len(branches)

        def branches_at(guide: Guide, sigma: float) -> tuple[Branch, ...]:
            asked.clear()
            guide(torch.ones(1, 1, 1, 1), sigma)
            return tuple(asked)

        guide = self.guide(stand_in, cond, uncond)  # one of its own, because guidance with momentum remembers
        sigmas = tuple(self.sigmas.tolist())
        return Drawing(sigmas, tuple(branches_at(guide, sigma) for sigma in sigmas[:-1]), self.shape)

    def steps(self, guide: Guide, noise: Tensor) -> Iterator[Step]:
        """The solver's steps from noise of unit variance, [b, c, h, w]; they run in float32 at least."""
        x = noise.to(torch.promote_types(noise.dtype, torch.float32))
        if self.profile.first_level == "its_share":
            x = x * float(self.sigmas[0])
        options = solver_options(self.solver, x, self.sigmas, self.shift, self.generator, self.profile.step_noise)
        return self.solver(guide if self.solver.guided else only_x0(guide), x, self.sigmas, **options)


@dataclass
class Progress:
    """How far a drawing is: the steps that its solver has finished, and the calls of the model since."""

    step: int = 0
    calls: list[Call] = field(default_factory=list)


def make_plan(
    profile: Profile,
    config: MMDiTConfig,
    shape: Sequence[int],
    *,
    default_shift: float,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    shift: Shift = None,
    generator: Generators = None,
    guidance: Guidance | None = None,
) -> SamplingPlan:
    """Resolve and check the arguments of a drawing; None is the profile's default.

    Args:
        profile: whose rules hold.
        config: the transformer's.
        shape: of the latents, [b, c, h, w].
        default_shift: the shift of the model, where `shift` is None.
        num_inference_steps, guidance_scale, sampler, schedule, sigmas, shift, generator, guidance: as
            `mmdit.Pipeline.sample` takes them.

    Raises:
        ValueError: a name is unknown, a number is out of its range, or arguments exclude each other.
    """
    name, solver = resolve_sampler(profile, sampler)
    shift = shift_for(shift, default_shift, shape[2:], config.patch_size)
    levels = resolve_sigmas(profile, solver, shift, num_inference_steps, schedule, sigmas)
    scale = _resolve_guidance_scale(profile, guidance_scale)
    steps = len(levels) - 1
    asked = guidance or Guidance()
    uses_uncond = profile.reads_negative(scale) or solver.guided  # CFG++ takes the branch at every scale
    asked.check(profile, scale, mixed=uses_uncond, depth=config.depth, steps=steps)
    return SamplingPlan(
        profile=profile,
        sampler=name,
        solver=solver,
        schedule=None if sigmas is not None else schedule or profile.schedule,
        num_inference_steps=steps if sigmas is not None else num_inference_steps or profile.steps,
        sigmas=levels,
        shift=shift,
        guidance_scale=scale,
        guidance=asked.of(profile),
        uses_uncond=uses_uncond,
        shape=tuple(shape),
        generator=generator,
    )


def resolve_sampler(profile: Profile, sampler: str | None) -> tuple[str, Solver]:
    """The name of a solver, and the solver; None is the profile's.

    Raises:
        ValueError: the name is unknown; the nearest names are listed.
    """
    name = sampler or profile.sampler
    return name, pick(SOLVERS, name, "sampler")


def resolve_sigmas(
    profile: Profile,
    solver: Solver,
    shift: float,
    num_inference_steps: int | None = None,
    schedule: str | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """The noise levels of the steps, float64 [steps + 1]; see `mmdit.Pipeline.sigmas`.

    Raises:
        ValueError: no step, an unknown schedule, sigmas that do not fall from at most 1 to 0, or both are given.
    """
    if sigmas is not None:
        named = (("num_inference_steps", num_inference_steps), ("schedule", schedule))
        if given := [name for name, value in named if value is not None]:
            raise ValueError(f"sigmas and {given[0]} are both given; sigmas are all the steps: give one of them")
        return samplers.checked_sigmas(sigmas)
    steps = profile.steps if num_inference_steps is None else num_inference_steps
    steps = whole("num_inference_steps", steps, 1)
    one_more = profile.second_last == "left_out" and solver.drops_second_last
    found = samplers.sigmas(schedule or profile.schedule, steps + one_more, shift=shift)
    return torch.cat([found[:-2], found[-1:]]) if one_more else found


def _resolve_guidance_scale(profile: Profile, guidance_scale: float | None) -> float:
    scale = profile.guidance_scale if guidance_scale is None else guidance_scale
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, got {scale}")
    return scale
