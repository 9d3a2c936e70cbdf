"""Limits for workflows. A workflow is untrusted data, and a single number in it could exhaust the memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

from mmdit.comfyui.errors import LimitError
from mmdit.utils import whole


@dataclass(frozen=True)
class WorkflowLimits:
    """Limits of a run. Exceeding one raises a `LimitError` that tells how to raise the limit.

    Args:
        pixels: total number of pixels in a batch of pictures; a latent cell counts as 64 pixels.
        batch: number of pictures in a batch.
        steps: number of steps of one sampler or schedule.
        nodes: number of nodes that run.
        characters: number of characters in one text.
        tokens: number of tokens of one prompt, after ConditioningConcat.
        prompts: number of prompts in one CONDITIONING, after ConditioningCombine.
    """

    pixels: int = 2**25
    batch: int = 64
    steps: int = 1000
    nodes: int = 500
    characters: int = 200_000
    tokens: int = 8192
    prompts: int = 64

    def __post_init__(self) -> None:
        for one in fields(self):
            whole(f"limit {one.name}", getattr(self, one.name), 1)

    def check(self, name: str, asked: int) -> None:
        """Raise LimitError if `asked` exceeds the limit called `name`."""
        most: int = getattr(self, name)
        if asked > most:
            raise LimitError(f"{asked:,} {name} are asked for, the limit is {most:,}; raise it with --limit {name}=N")

    def check_pictures(self, count: int, height: int, width: int) -> None:
        """Raise LimitError if a batch has too many pictures, or too many pixels; sides are in pixels."""
        self.check("batch", count)
        self.check("pixels", count * height * width)

    def check_latents(self, shape: Sequence[int]) -> None:
        """Raise LimitError if latents of shape [b, c, h, w] exceed the limits."""
        self.check_pictures(shape[0], 8 * shape[2], 8 * shape[3])

    @classmethod
    def from_text(cls, words: Iterable[str]) -> Self:
        """Parse words of the form NAME=NUMBER.

        Raises:
            ValueError: a name is unknown, or a value is not a whole number.
        """
        names = [one.name for one in fields(cls)]
        found: dict[str, int] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in names or not value.isdecimal() or len(value) > 18:
                raise ValueError(f"limit {word!r}: expected NAME=NUMBER with one of {', '.join(names)}")
            found[name] = int(value)
        return cls(**found)
