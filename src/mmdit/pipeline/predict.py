"""Predicted pictures: the transformer on a latent under conditionings, alone and guided."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders import Conditioning
from mmdit.checkpoints.components import Component
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.guidance import Guidance
from mmdit.pipeline.passes import Branch, Drawing, Pass, Planner, Watcher, perturbed
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.prompts import Conditionings, ranges
from samplers import Guide, Predict, Solver

_SIGMA_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Predicting(ABC):
    """What `mmdit.pipeline.steps.PipelineSteps` predicts with."""

    transformer: MMDiT
    profile: Profile
    shift: float
    watchers: list[Watcher]  # told of every pass of the transformer before it runs
    planners: list[Planner]  # told what a drawing will do before it does anything

    def predict(
        self,
        x: Tensor,
        sigma: float | Tensor,
        conditionings: Sequence[Conditioning | Branch],
        *,
        step: int | None = None,
    ) -> list[Tensor]:
        """The predicted picture (x0, a latent) at noise level `sigma` under each conditioning.

        Those of one length and one change of the transformer share a batch; the batches run one after the other.

        Args:
            x: [b, c, h, w].
            sigma: its noise level.
            conditionings: of b prompts each; `mmdit.pipeline.passes.Branch` says more than a bare one.
            step: for `watchers`.
        """
        branches = [one if isinstance(one, Branch) else Branch(one) for one in conditionings]
        batches: dict[tuple[object, ...], list[int]] = {}
        for place, branch in enumerate(branches):
            batches.setdefault(branch.kind, []).append(place)
        found: dict[int, Tensor] = {}
        for places in batches.values():
            together = self._predict_together(x, float(sigma), tuple(branches[place] for place in places), step)
            found |= zip(places, together, strict=True)
        return [found[place] for place in range(len(branches))]

    def predictor(self, conditionings: Sequence[Conditioning]) -> Callable[[Tensor, float | Tensor], list[Tensor]]:
        """`predict` with the conditionings filled in: `(x, sigma) -> [x0, ...]`."""
        return lambda x, sigma: self.predict(x, sigma, conditionings)

    def _predict_together(
        self, x: Tensor, sigma: float, branches: tuple[Branch, ...], step: int | None
    ) -> list[Tensor]:
        """The pictures of branches that share a batch."""
        self._enter("transformer")
        first, times = branches[0], len(branches)
        (rows, columns), patch = x.shape[2:], self.transformer.config.patch_size
        filled = F.pad(x, (0, -columns % patch, 0, -rows % patch), mode="circular")
        level = torch.tensor(sigma, dtype=_SIGMA_DTYPES[self.profile.sigma_dtype], device=x.device)
        for watcher in self.watchers:
            watcher(Pass(step, sigma, branches, len(x)))
        with perturbed(self.transformer, first.perturbed_layers, first.conditioning.context.shape[1]):
            velocity = self.transformer(
                torch.cat([filled] * times).to(self.transformer.pos_embed.dtype),
                (level * 1000).float().expand(times * len(x)),
                torch.cat([branch.conditioning.context for branch in branches]),
                torch.cat([branch.conditioning.pooled for branch in branches]),
                skip_layers=first.skip_layers,
            )[..., :rows, :columns]
        known = sigma if self.profile.sigma_dtype == "float32" else float(level)
        return [x - known * part for part in velocity.to(x.dtype).chunk(times)]

    def _reads_negative(self, scale: float, sampler: str | None) -> bool:
        """Whether the unconditional pass runs: CFG++ needs it at every scale."""
        return self.profile.reads_negative(scale) or self._solver(sampler).guided

    def _check_guidance(self, guidance: Guidance | None, scale: float, sampler: str | None, levels: Tensor) -> Guidance:
        """The settings, or those of plain guidance, if the drawing can be guided so; ValueError otherwise."""
        found, mixed = guidance or Guidance(), self._reads_negative(scale, sampler)
        depth, steps = self.transformer.config.depth, len(levels) - 1
        found.check(self.profile, scale, mixed=mixed, depth=depth, steps=steps)
        return found

    def _guided(
        self,
        predict: Predict,
        cond: Conditionings,
        uncond: Conditionings | None,
        scale: float,
        *,
        guidance: Guidance | None,
        sampler: str | None,
        levels: Tensor,
        shift: float,
        shape: tuple[int, ...],
    ) -> Guide:
        """What a solver calls; its `only_x0` is what most of them take.

        Args:
            predict: of `Branch`s.
            cond, uncond: see `PipelineSteps.sample`.
            scale, guidance, sampler, levels, shift: of the drawing.
            shape: of the noise.
        """
        settings = self._check_guidance(guidance, scale, sampler, levels)
        if not (mixed := self._reads_negative(scale, sampler)):
            uncond = None
        elif uncond is None:
            raise ValueError(f"guidance_scale {scale} needs a conditioning to guide away from: give uncond")
        build = partial(
            settings.build,
            cond=ranges("cond", cond, levels, shift, shape[0]),
            uncond=None if uncond is None else ranges("uncond", uncond, levels, shift, shape[0]),
            scale=scale,
            profile=self.profile,
            levels=levels,
            shift=shift,
            read_uncond=mixed and self._solver(sampler).guided,
        )
        if self.planners:
            drawing = Drawing(tuple(levels.tolist()), tuple(_rehearsed(build, levels)), shape)
            for planner in self.planners:
                planner(drawing)
        return build(predict)

    @abstractmethod
    def _solver(self, sampler: str | None) -> Solver:
        """The solver of that name; None is the profile's."""

    @abstractmethod
    def _enter(self, *names: Component) -> None:
        """With `offload`, these models come to the device."""


def _rehearsed(build: Callable[[Predict], Guide], levels: Tensor) -> Iterator[tuple[Branch, ...]]:
    """The branches of each step, as the guidance asks for them; a guide of its own, since some remember."""
    asked: list[Branch] = []

    def predict(x: Tensor, sigma: float, branches: Sequence[Branch]) -> list[Tensor]:
        asked.extend(branches)
        return [x] * len(branches)

    guide = build(predict)
    for sigma in levels[:-1].tolist():
        asked.clear()
        guide(torch.ones(1, 1, 1, 1), sigma)
        yield tuple(asked)
