"""Watching what Linears read, for static scales and for folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from quant.convert import _selected, linears_of

_BINS_PER_OCTAVE: Final = 32  # of the histogram of |x|: a percentile is right to 2 %
_LOWEST, _HIGHEST = -40, 40  # octaves


class Observed:
    """Statistics of what one Linear read, [rows, in] in all; sums are in float64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.rows = 0
        self.channel_amax = torch.zeros(channels, dtype=torch.float32, device=device)
        self._sum, self._squares = (torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(2))
        bins = (_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE
        self._counts = torch.zeros(bins, dtype=torch.int64, device=device)

    def add(self, x: Tensor) -> None:
        """Count rows in; values that are not finite are refused.

        Raises:
            ValueError: there are such.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if bad := int((~rows.isfinite()).sum()):
            raise ValueError(f"{bad} of {rows.numel()} values are not finite")
        if not rows.numel():
            return
        self.rows += len(rows)
        size = rows.abs().float()
        self.channel_amax = torch.maximum(self.channel_amax, size.amax(0))
        wide = rows.double()
        self._sum += wide.sum(0)
        self._squares += wide.square().sum(0)
        octave = size[size > 0].log2()
        place = ((octave - _LOWEST) * _BINS_PER_OCTAVE).long().clamp(0, len(self._counts) - 1)
        self._counts += torch.bincount(place, minlength=len(self._counts))

    @property
    def amax(self) -> Tensor:
        """The largest absolute value, float32 ()."""
        return self.channel_amax.amax()

    @property
    def mean(self) -> Tensor:
        """Of each channel, float32 [in]."""
        return (self._sum / max(self.rows, 1)).float()

    @property
    def rms(self) -> Tensor:
        """Root of the mean square of each channel, float32 [in]."""
        return (self._squares / max(self.rows, 1)).sqrt().float()

    def percentile(self, share: float) -> Tensor:
        """The absolute value below which that percentage of all values lies, float32 (); to 2 %, never above amax.

        Raises:
            ValueError: not above 0 and at most 100.
        """
        if not 0 < share <= 100:
            raise ValueError(f"a percentile is above 0 and at most 100, got {share}")
        if share == 100:
            return self.amax
        zeros = self.rows * len(self.channel_amax) - int(self._counts.sum())
        reached = (self._counts.cumsum(0) + zeros) >= share / 100 * self.rows * len(self.channel_amax)
        place = int(reached.int().argmax())
        upper = 2.0 ** (_LOWEST + (place + 1) / _BINS_PER_OCTAVE)
        return self.amax.clamp(max=upper)


@contextmanager
def observe(module: nn.Module, select: str | Sequence[str] | None = None) -> Iterator[dict[str, Observed]]:
    """Within it, what the selected Linears read is counted; the hooks are gone afterwards, whatever happens.

    Args:
        module: runs as ever: outputs are bit-equal.
        select: globs over module names; None takes those that `quantize_` would.

    Raises:
        ValueError: a glob that matches nothing; values that are not finite, in which layer.
    """
    every = dict(linears_of(module))
    linears = {name: every[name] for name in _selected(every, select)}
    found = {name: Observed(linear.in_features, linear.weight.device) for name, linear in linears.items()}
    handles = [linear.register_forward_pre_hook(partial(_add, name, found[name])) for name, linear in linears.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _add(name: str, into: Observed, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    try:
        into.add(args[0])
    except ValueError as error:
        raise ValueError(f"the input of {name!r}: {error}") from error
