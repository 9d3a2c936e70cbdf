"""What a call is asked to draw: prompts, or what stands for them already encoded, and what to keep away from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor

from encoders import Conditioning, checked_prompts
from mmdit.models.config import MMDiTConfig
from samplers import Window, gap, percents


@dataclass(frozen=True)
class Ranged:
    """A conditioning from `start` to `stop` of the way, both inside, as ComfyUI's ConditioningSetTimestepRange counts.

    The way is that of the even timesteps: 0.1 of it ends at noise level 0.964286 with shift 3, see `samplers.percents`.
    Several of them stand for one conditioning; where they overlap, their predictions are averaged. The negative of
    ComfyUI's workflow for SD3-Medium:

        bad = pipe.encode("blurry")
        pipe(prompt, [Ranged(bad, 0.0, 0.1), Ranged(bad.zeroed(), 0.1, 1.0)])

    Raises:
        ValueError: start and stop are not 0 <= start < stop <= 1.
    """

    conditioning: Conditioning
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"Ranged start {self.start} and stop {self.stop} must be 0 <= start < stop <= 1")

    def window(self, shift: float) -> Window:
        """Its noise levels."""
        return percents(self.start, self.stop, shift)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Ranged:
        """The same on another device or in another dtype."""
        return replace(self, conditioning=self.conditioning.to(device, dtype))

    def repeat(self, times: int) -> Ranged:
        """Each prompt `times` in a row."""
        return replace(self, conditioning=self.conditioning.repeat(times))


Conditionings = Conditioning | Sequence[Ranged]  # what stands for one conditioning


def ranges(name: str, given: Conditionings, levels: Tensor, shift: float, pictures: int) -> tuple[Ranged, ...]:
    """The argument `name` as ranges that hold at every level of a drawing.

    Raises:
        TypeError: it holds something else.
        ValueError: it leaves levels without a conditioning, or holds other than one prompt per picture.
    """
    found = (Ranged(given),) if isinstance(given, Conditioning) else tuple(given)
    if other := [one for one in found if not isinstance(one, Ranged)]:
        raise TypeError(f"{name} holds {type(other[0]).__name__}, expected a Conditioning, or a list of mmdit.Ranged")
    for count in (len(one.conditioning) for one in found):
        if count != pictures:
            raise ValueError(f"{name} is of {count} prompts, the noise of {pictures} pictures; give a prompt for each")
    hole = gap([one.window(shift) for one in found], float(levels[0]), float(levels[-2]))
    if hole is None:
        return found
    raise ValueError(
        f"{name} has no conditioning from noise level {hole[0]:.6g} to {hole[1]:.6g}; let ranges meet, "
        "the first from 0, the last to 1"
    )


Prompts = str | Sequence[str]
Asked = Prompts | Conditioning | Ranged | Sequence[Ranged]  # what a call takes for a prompt


@dataclass(frozen=True)
class Texts:
    """Prompts, or conditionings of them, or neither; `name` is the argument's."""

    name: str
    prompts: list[str] | None = None
    encoded: tuple[Ranged, ...] = ()

    @classmethod
    def of(cls, name: str, prompts: Asked | None, embeds: Tensor | None, pooled: Tensor | None) -> Self:
        """The arguments `name`, `name_embeds` and `pooled_name_embeds` of a call.

        Raises:
            ValueError: prompts and embeddings are both given, or one half of the embeddings.
            TypeError: a prompt is not a string.
        """
        pooled_name = f"{'negative_' if name.startswith('negative') else ''}pooled_prompt_embeds"
        if (embeds is None) != (pooled is None):
            there, lacking = (f"{name}_embeds", pooled_name)[:: 1 if pooled is None else -1]
            raise ValueError(f"{there} are given without {lacking}; the model reads both")
        if embeds is not None and prompts is not None:
            raise ValueError(f"{name} and {name}_embeds are both given; give one of them")
        if embeds is not None and pooled is not None:
            prompts = Conditioning(embeds, pooled)
        if isinstance(prompts, Conditioning):
            prompts = [Ranged(prompts)]
        if isinstance(prompts, Ranged):
            prompts = [prompts]
        if encoded := _encoded(prompts):
            return cls(name, None, encoded)
        return cls(name, None if prompts is None else checked_prompts(cast(Prompts, prompts), name.replace("_", " ")))

    def __len__(self) -> int:
        """How many; 0 where neither is given."""
        return len(self.encoded[0].conditioning) if self.encoded else len(self.prompts or ())

    def with_negatives(self, negatives: Texts, config: MMDiTConfig, *, read: bool) -> tuple[Texts, Texts | None]:
        """These, and as many negatives: empty prompts where none are given, None where none are read.

        Raises:
            TypeError: nothing is given to draw.
            ValueError: numbers differ, or embeddings do not fit the model.
        """
        if not self:
            raise TypeError(
                f"{self.name} is NoneType, expected str or a list of str: None (or give prompt_embeds and "
                "pooled_prompt_embeds)"
            )
        self._check(config)
        if not read:
            return self, None
        count = len(self)
        if not negatives.encoded and len(negatives) <= 1:
            return self, Texts(negatives.name, (negatives.prompts or [""]) * count)
        negatives._check(config)
        if len(negatives) != count:
            raise ValueError(f"{len(negatives)} negative prompts for {count} prompts; give one, or one for each")
        return self, negatives

    def _check(self, config: MMDiTConfig) -> None:
        for one in self.encoded:
            found, pooled = list(one.conditioning.context.shape), list(one.conditioning.pooled.shape)
            if len(found) != 3 or found[2] != config.context_dim or pooled != [len(self), config.pooled_dim]:
                raise ValueError(
                    f"{self.name}_embeds have shape {found} and their pooled ones {pooled}, expected "
                    f"[b, tokens, {config.context_dim}] and [b, {config.pooled_dim}]"
                )


def _encoded(prompts: object) -> tuple[Ranged, ...]:
    """The conditionings of a list of them; none of what has a string in it.

    Raises:
        TypeError: the list is of both.
    """
    parts = () if isinstance(prompts, str) or not isinstance(prompts, Sequence) else tuple(prompts)
    encoded = tuple(one for one in parts if isinstance(one, Ranged))
    if encoded and len(encoded) < len(parts):
        other = next(type(one).__name__ for one in parts if not isinstance(one, Ranged))
        raise TypeError(f"a list that stands for one prompt holds mmdit.Ranged and {other}; give Ranged alone")
    return encoded
