"""The prompts of a call: texts, or conditionings that were encoded before, each for a range of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor

from encoders import Conditioning, checked_prompts
from mmdit.models.config import MMDiTConfig
from mmdit.pipeline.arguments import check_tensor
from mmdit.pipeline.control import Control
from mmdit.utils import number
from samplers import Window, gap, percents


@dataclass(frozen=True)
class Ranged:
    """A conditioning that is used from `start` to `stop` of the way from noise to picture, both ends included.

    `start` and `stop` are shares of the evenly spaced timesteps, as in ComfyUI's ConditioningSetTimestepRange: with
    shift 3, the share 0.1 is sigma 0.964286, see `samplers.percents`. Several ranges together form one conditioning;
    where they overlap, their predictions are averaged. The negative prompt of ComfyUI's workflow for SD3-Medium is:

        bad = pipe.encode("blurry")
        pipe(prompt, [Ranged(bad, 0.0, 0.1), Ranged(bad.zeroed(), 0.1, 1.0)])

    Raises:
        ValueError: start and stop are not 0 <= start < stop <= 1.
    """

    conditioning: Conditioning
    start: float = 0.0
    stop: float = 1.0
    control: tuple[Control, ...] = ()  # ControlNets that act on it, as `Pipeline.control` makes them

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            object.__setattr__(self, name, number(f"Ranged {name}", getattr(self, name)))
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"Ranged start {self.start} and stop {self.stop} must be 0 <= start < stop <= 1")

    def window(self, shift: float) -> Window:
        """The window of sigmas in which the conditioning is used, for a schedule with this shift."""
        return percents(self.start, self.stop, shift)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Ranged:
        """The same range with its conditioning on another device or in another dtype."""
        return replace(self, conditioning=self.conditioning.to(device, dtype))

    def repeat(self, times: int) -> Ranged:
        """The same range with each prompt of its conditioning `times` in a row."""
        return replace(self, conditioning=self.conditioning.repeat(times))


ConditioningLike = Conditioning | Sequence[Ranged]  # what an argument for one conditioning takes
PromptLike = (
    str | Sequence[str] | Conditioning | Ranged | Sequence[Ranged]
)  # what the arguments `prompt` and `negative_prompt` take


def checked_ranges(
    name: str, given: ConditioningLike, sigmas: Tensor, shift: float, pictures: int
) -> tuple[Ranged, ...]:
    """The argument `name` as ranges that cover every sigma of a drawing.

    Args:
        name: the argument's name, for errors.
        given: a conditioning for all steps, or several ranges.
        sigmas: the falling noise levels, float64 [steps + 1].
        shift: the shift of the schedule.
        pictures: the number of pictures; each conditioning must have one prompt per picture.

    Raises:
        TypeError: `given` is neither a conditioning nor a list of ranges.
        ValueError: a sigma has no conditioning, or the number of prompts is not the number of pictures.
    """
    found = (Ranged(given),) if isinstance(given, Conditioning) else tuple(given)
    if other := [one for one in found if not isinstance(one, Ranged)]:
        raise TypeError(f"{name} holds {type(other[0]).__name__}, expected a Conditioning, or a list of mmdit.Ranged")
    for count in (len(one.conditioning) for one in found):
        if count != pictures:
            raise ValueError(f"{name} holds {count} prompts for {pictures} pictures; give one prompt for each picture")
    hole = gap([one.window(shift) for one in found], float(sigmas[0]), float(sigmas[-2]))
    if hole is None:
        return found
    raise ValueError(
        f"{name} has no conditioning from sigma {hole[0]:.6g} to {hole[1]:.6g}; let the ranges meet, the first from 0, "
        "the last to 1"
    )


@dataclass(frozen=True)
class Prompts:
    """The prompts or the negative prompts of a call: texts, conditionings, or neither."""

    name: str  # the argument's name: "prompt" or "negative_prompt"
    texts: tuple[str, ...] | None = None
    conditionings: tuple[Ranged, ...] = ()

    @classmethod
    def of(cls, name: str, given: PromptLike | None, embeds: Tensor | None, pooled: Tensor | None) -> Self:
        """Make them from the arguments `name`, `name_embeds` and `pooled_name_embeds` of a call.

        Raises:
            ValueError: prompts and embeddings are both given, or only one of the two embeddings.
            TypeError: a prompt is not a string.
        """
        pooled_name = f"{'negative_' if name.startswith('negative') else ''}pooled_prompt_embeds"
        if (embeds is None) != (pooled is None):
            there, lacking = (f"{name}_embeds", pooled_name)[:: 1 if pooled is None else -1]
            raise ValueError(f"{there} are given without {lacking}; the model reads both")
        if embeds is not None and given is not None:
            raise ValueError(f"{name} and {name}_embeds are both given; give one of them")
        if embeds is not None and pooled is not None:
            given = Conditioning(embeds, pooled)
        if isinstance(given, Conditioning):
            given = Ranged(given)
        if isinstance(given, Ranged):
            given = [given]
        if conditionings := _ranges_in(given):
            return cls(name, None, conditionings)
        texts = None if given is None else checked_prompts(cast("str | Sequence[str]", given), name.replace("_", " "))
        return cls(name, None if texts is None else tuple(texts))

    def __len__(self) -> int:
        """The number of prompts; 0 where none were given."""
        return len(self.conditionings[0].conditioning) if self.conditionings else len(self.texts or ())

    def check(self, config: MMDiTConfig) -> None:
        """Raise TypeError where no prompts were given, and ValueError where embeddings do not fit the transformer."""
        if not self:
            raise TypeError(
                f"{self.name} is NoneType, expected str or a list of str: None (or give prompt_embeds and "
                "pooled_prompt_embeds)"
            )
        for one in self.conditionings:
            for what in ("context", "pooled"):
                check_tensor(f"{self.name}: {what}", getattr(one.conditioning, what), finite=True)
            found, pooled = list(one.conditioning.context.shape), list(one.conditioning.pooled.shape)
            if len(found) != 3 or found[2] != config.context_dim or pooled != [len(self), config.pooled_dim]:
                raise ValueError(
                    f"{self.name}_embeds have shape {found} and their pooled ones {pooled}, expected "
                    f"[b, tokens, {config.context_dim}] and [b, {config.pooled_dim}]"
                )

    def for_each(self, count: int, config: MMDiTConfig) -> Prompts:
        """Repeat negative prompts for `count` prompts: one for each, and empty ones where none were given.

        Raises:
            ValueError: the numbers differ, or embeddings do not fit the transformer.
        """
        if not self.conditionings and len(self) <= 1:
            return Prompts(self.name, (self.texts or ("",)) * count)
        self.check(config)
        if len(self) != count:
            raise ValueError(f"{len(self)} negative prompts for {count} prompts; give one, or one for each")
        return self


def _ranges_in(given: object) -> tuple[Ranged, ...]:
    """The ranges in a list; () for any other value.

    Raises:
        TypeError: the list holds `Ranged` and other objects.
    """
    parts = () if isinstance(given, str) or not isinstance(given, Sequence) else tuple(given)
    ranged = tuple(one for one in parts if isinstance(one, Ranged))
    if ranged and len(ranged) < len(parts):
        other = next(type(one).__name__ for one in parts if not isinstance(one, Ranged))
        raise TypeError(f"a list that stands for one prompt holds mmdit.Ranged and {other}; give Ranged alone")
    return ranged
