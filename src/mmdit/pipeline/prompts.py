"""What a call is asked to draw: prompts, or what stands for them already encoded, and what to keep away from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Self, cast

from torch import Tensor

from encoders import Conditioning, checked_prompts
from mmdit.models.config import MMDiTConfig
from mmdit.pipeline.ranges import Ranged
from mmdit.pipeline.settings import Settings

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


def settings_of(
    pairs: tuple[Texts, Texts | None], per_prompt: int, seeds: Sequence[int | None], common: Mapping[str, Any]
) -> tuple[Settings, ...]:
    """The settings of each picture of a call; none where something encoded took the place of a prompt.

    Args:
        pairs: what was asked for, and what to keep away from.
        per_prompt: pictures of each prompt.
        seeds: of each picture.
        common: the other settings.
    """
    asked, against = pairs
    if asked.prompts is None or (against is not None and against.prompts is None):
        return ()
    negatives = repeat("") if against is None or against.prompts is None else against.prompts
    texts = [pair for pair in zip(asked.prompts, negatives, strict=False) for _ in range(per_prompt)]
    return tuple(
        Settings(prompt=prompt, negative_prompt=negative, seed=seed, **common)
        for (prompt, negative), seed in zip(texts, seeds, strict=True)
    )
