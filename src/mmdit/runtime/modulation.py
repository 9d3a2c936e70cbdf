"""The modulation of the plain forward, computed for all steps of a drawing at once, so that adaLN weights come once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmdit.models.blocks import JointBlock
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.activations import TABLE_BYTES
from mmdit.runtime.streaming import Residency, arrive

T = TypeVar("T")


class ModulationTable:
    """What the adaLN layers of a model give at each step, bit for bit: the same products in batches of the same size.

    Args:
        model: an MMDiT whose adaLN weights `weights` brings.
        weights: has the rest of the model on the device.
    """

    def __init__(self, model: MMDiT, weights: Residency) -> None:
        self.model, self.weights = model, weights
        self._planned: tuple[float, ...] = ()
        self._rows: dict[tuple[object, ...], list[Tensor]] = {}
        self._sources: dict[tuple[int, ...], tuple[Tensor, ...]] = {}  # what the keys are made of must live

    def begin(self, timesteps: Sequence[float] = ()) -> None:
        """Before a drawing, and after it: forget everything.

        Args:
            timesteps: 1000 x sigma of the steps that are planned, falling.
        """
        self._planned = tuple(timesteps)
        self._rows.clear()
        self._sources.clear()

    def drawing(self, steps: Iterable[T], timesteps: Sequence[float]) -> Iterator[T]:
        """The steps, with `begin` before the first one, and everything forgotten after the last one."""
        self.begin(timesteps)
        try:
            yield from steps
        finally:
            self.begin()

    @contextmanager
    def reading(self, timestep: float, pooled: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the adaLN layers of the blocks give their row of the table.

        Args:
            timestep: 1000 x sigma of the samples.
            pooled: pooled vectors of parts of the batch, [b / parts, k] each.
        """
        layers = self._layers()
        if self._is_watched(layers):  # what watches or changes these layers wants them to run in every step
            with self.weights.visiting(self.model), _instead(layers, [partial(_run, layer) for layer in layers]):
                yield
            return
        rows = self._row(timestep, pooled, layers)
        with _instead(layers, [partial(_given, row) for row in rows]):
            yield

    def _layers(self) -> list[nn.Module]:
        blocks = [block for block in self.model.joint_blocks if isinstance(block, JointBlock)]
        return [stream.adaLN_modulation for block in blocks for stream in (block.context_block, block.x_block)]

    def _is_watched(self, layers: Sequence[nn.Module]) -> bool:
        inner = [part for layer in layers for part in layer.children()]
        embedders = [*self.model.t_embedder.modules(), *self.model.y_embedder.modules()]
        return any(part._forward_hooks or part._forward_pre_hooks for part in (*inner, *embedders))

    def _row(self, timestep: float, pooled: Sequence[Tensor], layers: Sequence[nn.Module]) -> list[Tensor]:
        text = tuple(map(id, pooled))
        if (text, timestep) not in self._rows:
            self._sources[text] = tuple(pooled)
            self._compute(text, timestep, torch.cat(list(pooled)), layers)
        return self._rows[text, timestep]

    @torch.no_grad()
    def _compute(self, text: tuple[int, ...], timestep: float, pooled: Tensor, layers: Sequence[nn.Module]) -> None:
        """The rows of this step and of those that are planned after it, as far as there is room."""
        features = sum(_out_features(layer) for layer in layers)
        most = max(TABLE_BYTES // max(features * len(pooled) * pooled.element_size(), 1), 1)
        wanted = list(dict.fromkeys([timestep, *(one for one in self._planned if one < timestep)]))[:most]
        self._make_room(most - len(wanted))
        embedded = self.model.y_embedder(pooled)
        vectors = [self.model.t_embedder(_filled(one, pooled)) + embedded for one in wanted]
        found: list[list[Tensor]] = [[] for _ in wanted]
        with self.weights.visiting(self.model):
            for layer in layers:
                arrive(layer)
                for rows, vector in zip(found, vectors, strict=True):
                    rows.append(layer.forward(vector))
        self._rows |= {(text, one): rows for one, rows in zip(wanted, found, strict=True)}

    def _make_room(self, left: int) -> None:
        """Forget the oldest rows beyond so many."""
        while len(self._rows) > max(left, 0):
            self._rows.pop(next(iter(self._rows)))


def _filled(timestep: float, pooled: Tensor) -> Tensor:
    """A timestep for each sample, as the forward is given it."""
    return torch.full((len(pooled),), timestep, dtype=torch.float32, device=pooled.device)


def _out_features(layer: nn.Module) -> int:
    return sum(part.out_features for part in layer.children() if isinstance(part, nn.Linear))


def _given(row: Tensor, _: Tensor) -> Tensor:
    return row


def _run(layer: nn.Module, c: Tensor) -> Tensor:
    """The layer's own forward, once its weights are there."""
    arrive(layer)
    found: Tensor = type(layer).forward(layer, c)
    return found


@contextmanager
def _instead(layers: Sequence[nn.Module], forwards: Sequence[partial[Tensor]]) -> Iterator[None]:
    """Inside, calls of the layers, whose own hooks still run, give something else."""
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
