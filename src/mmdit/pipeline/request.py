"""What a call asks for: its arguments, gathered and checked before any model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from torch import Tensor

from mmdit.pipeline.arguments import LEAST_TILE, check_latents, check_output_type
from mmdit.pipeline.callbacks import OnStepEnd, tensor_inputs_of
from mmdit.pipeline.control_inputs import ControlInput, check_counts
from mmdit.pipeline.hires import Hires
from mmdit.pipeline.image_inputs import ImageInputs, PictureSize
from mmdit.pipeline.images import OutputType
from mmdit.pipeline.plan import PlanArguments, SamplingPlan
from mmdit.pipeline.prompts import Prompts, checked_ranges
from mmdit.pipeline.seeds import Generators, SeedLike, check_draws_nothing, checked_seeds, fresh_seeds, generators
from mmdit.pipeline.steps import PipelineSteps
from mmdit.utils import whole


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One call of the pipeline: its arguments, checked, with every default filled in.

    `make_request` makes it, and `mmdit.Pipeline` draws it. Arguments that belong together are one field, a frozen value
    whose own file checks it, as `Prompts` and `SamplingPlan` are.
    """

    prompts: Prompts
    negatives: Prompts | None  # one for each prompt; None where the unconditional branch does not run
    per_prompt: int  # pictures of each prompt
    seeds: int | list[int] | None  # one for all pictures, or one for each; None with generators or latents
    latents: Tensor | None  # [b, c, h, w] in model space, in place of noise
    images: ImageInputs | None  # pictures to start from
    size: PictureSize  # the size of the drawing
    plan: SamplingPlan
    controls: tuple[ControlInput, ...]  # ControlNets with their hints
    hires: Hires | None  # a second pass
    second: SamplingPlan | None  # the plan of the second pass
    max_sequence_length: int | None
    callback: OnStepEnd | None
    tensor_inputs: tuple[str, ...]  # names of the tensors that the callback is given
    vae_tile: int | None  # pixels of a side
    output_type: OutputType
    progress: bool | None

    @property
    def count(self) -> int:
        """The number of pictures."""
        return self.plan.shape[0]

    @property
    def facts(self) -> dict[str, object]:
        """What the ranks of a parallel run must be given alike, by the name of the argument."""
        plan, images = self.plan, self.images
        return {
            "prompt": _facts_of(self.prompts),
            "negative_prompt": _facts_of(self.negatives),
            "seed": self.seeds,
            "generator": plan.generator,
            "latents": self.latents,
            "image": _facts_of_images(images),
            "strength": plan.strength,
            "hires": None if self.hires is None else self.hires.to_text(),
            "controlnet": [one.words for one in self.controls],
            "height, width and number of pictures": plan.shape,
            "sampler": plan.sampler,
            "sigmas": plan.sigmas,
            "guidance_scale": plan.guidance_scale,
            "guidance": "a function" if plan.guidance.is_own else plan.guidance.to_text(),
            "max_sequence_length": self.max_sequence_length,
            "vae_tile": self.vae_tile,
        }

    @property
    def draws_once(self) -> bool:
        """Whether the starting noise is all that generators draw, and nobody else has these generators."""
        stochastic = self.plan.solver.is_stochastic or self.plan.is_own
        return self.seeds is not None and self.images is None and self.second is None and not stochastic

    @property
    def reads_last_latent(self) -> bool:
        """Whether anything but the decoder is given the latent of the last step, which must be known to be finite."""
        return self.callback is not None or self.second is not None or self.output_type == "latent"

    @property
    def has_settings(self) -> bool:
        """Whether `mmdit.Settings` can describe the drawing."""
        given = self.latents is not None or self.callback is not None or self.plan.schedule is None
        given = given or (self.images is not None and self.images.latents is not None)
        return not given and not self.plan.is_own


def _facts_of(prompts: Prompts | None) -> object:
    """Texts, or the tensors of conditionings and the ranges of the steps in which they are used."""
    if prompts is None or prompts.texts is not None:
        return None if prompts is None else prompts.texts
    return [(one.conditioning.context, one.conditioning.pooled, one.start, one.stop) for one in prompts.conditionings]


def _facts_of_images(images: ImageInputs | None) -> object:
    """Digests of pictures and masks with their settings, or the latents that are given instead."""
    if images is None or images.latents is not None:
        return None if images is None else images.latents
    return [sorted(one.items()) for one in images.settings(max(images.count, 1), 0.0)]


def make_request(
    pipe: PipelineSteps,
    prompts: Prompts,
    negatives: Prompts,
    *,
    height: int | None,
    width: int | None,
    seed: SeedLike | None,
    generator: Generators,
    latents: Tensor | None,
    images: ImageInputs | None,
    hires: Hires | None,
    controls: tuple[ControlInput, ...],
    num_images_per_prompt: int | None,
    max_sequence_length: int | None,
    callback: OnStepEnd | None,
    tensor_inputs: Sequence[str] | None,
    vae_tile: int | None,
    output_type: OutputType,
    progress: bool | None,
    **sampling: Unpack[PlanArguments],
) -> Request:
    """Check the arguments of `mmdit.Pipeline.__call__`, which describes them.

    Raises:
        ValueError: an argument is out of its range, unknown, or excludes another one; the message names it.
        TypeError: an argument is of another type.
    """
    config = pipe.transformer.config
    prompts.check(config)
    seeds = checked_seeds(seed)
    per_prompt = _pictures_per_prompt(num_images_per_prompt, prompts, seeds, images)
    count = len(prompts) * per_prompt
    check_output_type(output_type)
    pipe._rules(max_sequence_length)
    vae_tile = None if vae_tile is None else whole("vae_tile", vae_tile, LEAST_TILE)
    names = () if callback is None else tensor_inputs_of(callback, tensor_inputs)
    size = _size(pipe, latents, images, count, height, width)
    cell = pipe.vae.config.downscale
    shape = (count, config.in_channels, size.height // cell, size.width // cell)
    alone = pipe.profile.one_seed == "each_alone"
    drawn_by = generators(seeds, generator, count, alone=alone)
    if images is not None and images.padding_mask_crop is not None:
        if output_type == "latent":
            raise ValueError("padding_mask_crop pastes pictures, and output_type 'latent' gives none; use another one")
        images, size = images.cropped(size), size._replace(cut=False)
    plan = pipe._plan(shape, generator=drawn_by, from_picture=images is not None, **sampling)
    check_counts(controls, count)
    pipe._check_nets([one.net for one in controls])
    if latents is not None and not plan.solver.is_stochastic:
        check_draws_nothing(seed=seed)
    against = negatives.for_each(len(prompts), config) if plan.uses_uncond else None
    _check_ranges(plan, prompts, against)
    if seeds is None and generator is None and latents is None:
        seeds = fresh_seeds(count)
        plan = replace(plan, generator=generators(seeds, None, count))
    second = None
    if hires is not None:
        second = _second_plan(pipe, hires, plan, images, sampling)
        again = generators(seeds if hires.seed is None else hires.seed, None, count, alone=alone)
        second = replace(second, generator=plan.generator if again is None else again)
    return Request(
        prompts=prompts,
        negatives=against,
        per_prompt=per_prompt,
        seeds=seeds,
        latents=latents,
        images=images,
        size=size,
        plan=plan,
        controls=controls,
        hires=hires,
        second=second,
        max_sequence_length=max_sequence_length,
        callback=callback,
        tensor_inputs=names,
        vae_tile=vae_tile,
        output_type=output_type,
        progress=progress,
    )


def _check_ranges(plan: SamplingPlan, *sides: Prompts | None) -> None:
    """Raise ValueError where conditionings that were given as ranges do not cover every sigma of the plan."""
    for one in sides:
        if one is not None and one.conditionings:
            checked_ranges(one.name, one.conditionings, plan.sigmas, plan.shift, len(one))


def _second_plan(
    pipe: PipelineSteps,
    hires: Hires,
    plan: SamplingPlan,
    images: ImageInputs | None,
    sampling: PlanArguments,
) -> SamplingPlan:
    """The plan of a second pass, which starts from the result of the first one at another size."""
    if not isinstance(hires, Hires):
        raise TypeError(f"hires is {type(hires).__name__}, expected mmdit.Hires")
    if images is not None and images.masks:
        raise ValueError(
            "hires and mask_image are both given; a second pass draws all of the picture anew: leave one of them out"
        )
    cell = pipe.vae.config.downscale
    rows, columns = hires.size(plan.shape[2], plan.shape[3], pipe._unit)
    pipe._cells(rows * cell, "the height of the second pass")
    pipe._cells(columns * cell, "the width of the second pass")
    own: PlanArguments = {
        "strength": hires.strength,
        "num_inference_steps": hires.steps or plan.num_inference_steps,
        "sigmas": None,
        "sampler": sampling.get("sampler") if hires.sampler is None else hires.sampler,
        "schedule": sampling.get("schedule") if hires.schedule is None else hires.schedule,
    }
    return pipe._plan((*plan.shape[:2], rows, columns), from_picture=True, **(sampling | own))


def _size(
    pipe: PipelineSteps,
    latents: Tensor | None,
    images: ImageInputs | None,
    count: int,
    height: int | None,
    width: int | None,
) -> PictureSize:
    """The size of the drawing: that of the given latents or pictures, or the requested size."""
    if images is not None:
        if latents is not None:
            raise ValueError(
                "latents and image are both given; latents are what a drawing without a picture starts from: leave one "
                "out, or give `sample` noise and an image"
            )
        if count % images.count:
            raise ValueError(
                f"image and mask_image are for {images.count} drawings, but {count} are asked for; give one picture, "
                "or one for each"
            )
        return pipe._picture_size(images, height, width)
    cell = pipe.vae.config.downscale
    if latents is None:
        rows, columns = pipe._latent_shape(count, height, width)[2:]
    else:
        check_latents(latents, count, pipe.transformer.config, cell, pipe._unit, height, width)
        rows, columns = latents.shape[2:]
    return PictureSize(rows * cell, columns * cell, cut=False)


def _pictures_per_prompt(
    given: int | None, prompts: Prompts, seeds: int | list[int] | None, images: ImageInputs | None
) -> int:
    """The number of pictures of each prompt: as many as there are seeds or pictures, where there is one prompt."""
    count = 1 if given is None else whole("num_images_per_prompt", given, 1)
    if len(prompts) > 1 or count > 1:
        return count
    return len(seeds) if isinstance(seeds, list) and seeds else count if images is None else images.count
