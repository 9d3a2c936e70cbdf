"""Conditionings that count for a part of the way from noise to picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from encoders import Conditioning
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
