"""What runs in one pass of the transformer: which rows of its batch are whose. For guidance, and for looking inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from encoders import Conditioning


class Half(NamedTuple):
    """One conditioning of a step, its name in guidance, and what the transformer leaves out for it.

    Halves with the same number of text tokens and the same `skip_layers` share a batch.
    """

    conditioning: Conditioning
    name: str = "cond"  # "cond", "uncond", "skip", ...
    skip_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pass:
    """A run of the transformer within a drawing. Its batch holds `samples` rows of each half, one half after another.

    `step` counts steps that the solver has finished, so that all calls of a step have one number; None outside of
    `sample`.
    """

    step: int | None
    sigma: float
    halves: tuple[Half, ...]
    samples: int

    def rows(self, half: str) -> slice:
        """The rows of the first half of that name.

        Raises:
            KeyError: there is none.
        """
        for i, one in enumerate(self.halves):
            if one.name == half:
                return slice(i * self.samples, (i + 1) * self.samples)
        raise KeyError(f"this pass has no half {half!r}, but {', '.join(one.name for one in self.halves)}")


@dataclass(frozen=True)
class Drawing:
    """What `sample` is about to do: known before the transformer runs, so that what it will take can be computed."""

    levels: tuple[float, ...]  # of the steps, and 0
    halves: tuple[tuple[Half, ...], ...]  # of each step
    shape: tuple[int, ...]  # of the latents


Watcher = Callable[[Pass], None]
Planner = Callable[[Drawing], None]
