"""Measure one run of a pipeline against the values that were kept from another run, stage by stage."""

from __future__ import annotations

import math
from itertools import zip_longest

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Kept:
    """A tap that keeps every value on the CPU, split into rows of the batch, so that batch sizes may differ."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        self.rows.setdefault(name, []).extend(_rows(value))
        return value

    def shape(self, name: str) -> Shape | None:
        """The shape of all rows together; None where the stage is missing."""
        rows = self.rows.get(name)
        return None if rows is None else (len(rows), *rows[0].shape)


class Score:
    """The difference between the measured and the kept rows of one stage."""

    def __init__(self) -> None:
        self.shapes: list[tuple[Shape, Shape | None]] = []
        self.maximum = self._error = 0.0
        self._sizes = [0.0, 0.0]
        self.finite = [True, True]  # whether all values of the measured and of the kept run are finite

    def add(self, row: Tensor, kept: Tensor | None) -> None:
        """Add a row and its counterpart, if there is one; of rows of different lengths, the common part is measured."""
        self.shapes.append((tuple(row.shape), None if kept is None else tuple(kept.shape)))
        if kept is None:
            return
        if row.ndim and row.shape[1:] == kept.shape[1:]:
            shared = min(len(row), len(kept))
            row, kept = row[:shared], kept[:shared]
        if row.shape != kept.shape:
            self._error = self.maximum = math.inf
            return
        pair = row.double(), kept.double()
        difference = pair[0] - pair[1]
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        self.maximum = max(self.maximum, largest) if math.isfinite(largest) else math.inf
        self._error += float(difference.square().sum())
        for i, part in enumerate(pair):
            self._sizes[i] += float(part.square().sum())
            self.finite[i] &= bool(part.isfinite().all())

    @property
    def fits(self) -> bool:
        """Whether every row has a counterpart of the same shape."""
        return all(shape == kept for shape, kept in self.shapes)

    @property
    def shape(self) -> Shape:
        """The shape of the measured rows together."""
        return (len(self.shapes), *self.shapes[0][0])

    def relative(self, base: int) -> float:
        """The error relative to the norm of the measured (0) or kept (1) rows, unless that is 0; inf if it is NaN."""
        error = math.sqrt(self._error) / (math.sqrt(self._sizes[base]) or 1.0)
        return error if math.isfinite(error) else math.inf


class Against:
    """A tap that measures every value against the value that was kept from another run.

    Args:
        kept: The values of the other run.
        feed: Continue with the kept value after every stage, so that no error reaches the next stage.
    """

    def __init__(self, kept: Kept, *, feed: bool) -> None:
        self.kept, self.feed = kept, feed
        self.scores: dict[str, Score] = {}
        self.ids = Kept()  # values that are whole numbers

    def __call__(self, name: str, value: Tensor) -> Tensor:
        score = self.scores.setdefault(name, Score())
        start = len(score.shapes)
        rows = self.kept.rows.get(name, [])[start : start + len(value)]
        for row, kept in zip_longest(_rows(value), rows):
            score.add(row, kept)
        if not value.is_floating_point():
            self.ids(name, value)
        return _instead(value, rows) if self.feed else value


def _instead(value: Tensor, kept: list[Tensor]) -> Tensor:
    """Replace a value with the kept rows, unless their shape or number differs.

    A single row may be longer or shorter, because the layers after it accept any number of tokens.
    """
    lengths = slice(1 if len(value) == 1 else 0, None)
    fit = all(row.ndim == value.ndim - 1 and row.shape[lengths] == value.shape[1:][lengths] for row in kept)
    if not fit or len(kept) != len(value):
        return value
    return torch.stack(kept).to(value.device, value.dtype)


def _rows(value: Tensor) -> list[Tensor]:
    return list(value.detach().to("cpu", copy=True))
