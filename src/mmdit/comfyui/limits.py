"""What a workflow may ask for at most. A workflow is data from strangers, and one number can take all memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

from mmdit.comfyui.errors import LimitError
from mmdit.utils import whole


@dataclass(frozen=True)
class WorkflowLimits:
    """Bounds of a run; what is beyond one is a `LimitError` that says how to raise it.

    Args:
        pixels: of all pictures of a batch together; a cell of a latent counts as 64.
        batch: pictures of a batch.
        steps: of one sampler or schedule.
        nodes: that are run.
        characters: of one text.
        tokens: of one prompt, after ConditioningConcat.
        prompts: that one CONDITIONING holds, after ConditioningCombine.
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
        """Raise LimitError where more is asked for than the limit of that name."""
        most: int = getattr(self, name)
        if asked > most:
            raise LimitError(f"{asked:,} {name} are asked for, the limit is {most:,}; raise it with --limit {name}=N")

    def check_pictures(self, count: int, height: int, width: int) -> None:
        """Raise LimitError for a batch of more or larger pictures, sides in pixels, than the limits allow."""
        self.check("batch", count)
        self.check("pixels", count * height * width)

    def check_latents(self, shape: Sequence[int]) -> None:
        """Raise LimitError for latents of a shape [b, c, h, w] beyond the limits."""
        self.check_pictures(shape[0], 8 * shape[2], 8 * shape[3])

    @classmethod
    def from_text(cls, words: Iterable[str]) -> Self:
        """From words NAME=NUMBER.

        Raises:
            ValueError: an unknown name, or no whole number.
        """
        names = [one.name for one in fields(cls)]
        found: dict[str, int] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in names or not value.isdecimal() or len(value) > 18:
                raise ValueError(f"limit {word!r}: expected NAME=NUMBER with one of {', '.join(names)}")
            found[name] = int(value)
        return cls(**found)
