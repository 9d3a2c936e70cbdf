"""adaLN's modulation of many passes at once, so that its weights, a third of the model, need not be on the device.

The modulation depends on the timestep and the pooled text alone. Where neither adaLN nor the embedders before it are
trained, it can be computed ahead for the passes to come, whose times and captions follow from the seed: the weights
then visit the device once in `steps` passes, one Linear at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdit.models.mmdit import MMDiT

Conditions = Callable[[int], tuple[Tensor, Tensor]]  # number of a pass -> times [b] and pooled vectors [b, pooled_dim]


class Slot(nn.Module):
    """Takes the place of an `adaLN_modulation` and gives the modulation of the current pass."""

    value: Tensor

    def __init__(self, like: nn.Sequential, batch: int, device: torch.device) -> None:
        super().__init__()
        linear = like[1]
        assert isinstance(linear, nn.Linear), "adaLN is a SiLU and a Linear"
        value = torch.zeros(batch, linear.out_features, dtype=linear.weight.dtype, device=device)
        self.register_buffer("value", value, persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        return self.value


class _Place(NamedTuple):
    parent: nn.Module
    made: nn.Sequential
    slot: Slot
    stored: list[Tensor]  # the parameters of `made` on the CPU


class ModulationAhead:
    """The modulation of a transformer, computed for many passes at once.

    Args:
        transformer: frozen; its `adaLN_modulation`s move to the CPU (pinned where the device is a GPU) and slots take
            their places.
        batch: samples of a pass.
        steps: passes that are computed at once.
        conditions: what a pass is conditioned on.
        last: the number of passes of the run.
    """

    def __init__(self, transformer: MMDiT, batch: int, steps: int, conditions: Conditions, last: int) -> None:
        self.transformer, self.steps, self.conditions, self.last = transformer, steps, conditions, last
        self.device = transformer.pos_embed.device
        self.places = [self._place(parent, made, batch) for parent, made in _modulated(transformer)]
        self.table: list[Tensor] = []  # [passes, b, chunks * d] of each place
        self.first = 0

    def _place(self, parent: nn.Module, made: nn.Sequential, batch: int) -> _Place:
        stored = [one.data.cpu() for one in made.parameters()]
        if self.device.type == "cuda":
            stored = [one.pin_memory() for one in stored]
        place = _Place(parent, made, Slot(made, batch, self.device), stored)
        _leave(place)
        return place

    @torch.no_grad()
    def enter(self, place: int) -> None:
        """Set the modulation of the pass number `place`, computing the table where it has no such row."""
        if not self.table or not self.first <= place < self.first + len(self.table[0]):
            self._compute(place)
        for one, rows in zip(self.places, self.table, strict=True):
            one.slot.value.copy_(rows[place - self.first])

    def _compute(self, place: int) -> None:
        numbers = range(place, min(place + self.steps, self.last))
        pairs = [self.conditions(number) for number in numbers]
        model, dtype = self.transformer, self.transformer.pos_embed.dtype
        times = torch.cat([t for t, _ in pairs]).to(self.device)
        pooled = torch.cat([vector for _, vector in pairs]).to(self.device, dtype)
        c = nn.functional.silu(model.t_embedder(1000 * times) + model.y_embedder(pooled))
        self.first, self.table = place, []
        for one in self.places:
            weight, bias = (part.to(self.device, non_blocking=True) for part in one.made[1].parameters())
            self.table.append(nn.functional.linear(c, weight, bias).unflatten(0, (len(numbers), -1)))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the transformer has its own adaLN again, on its device: for pictures drawn during training."""
        self.restore()
        try:
            yield
        finally:
            for one in self.places:
                _leave(one)

    def restore(self) -> None:
        """Put the `adaLN_modulation`s back, on the device of the transformer."""
        for one in self.places:
            one.parent.adaLN_modulation = one.made.to(self.device)


def _leave(place: _Place) -> None:
    """Put the slot in the place of the `adaLN_modulation`, whose parameters are on the CPU again."""
    for parameter, stored in zip(place.made.parameters(), place.stored, strict=True):
        parameter.data = stored
    place.parent.adaLN_modulation = place.slot


def _modulated(transformer: MMDiT) -> Iterator[tuple[nn.Module, nn.Sequential]]:
    for module in transformer.modules():
        made = module._modules.get("adaLN_modulation")
        if isinstance(made, nn.Sequential):
            yield module, made
