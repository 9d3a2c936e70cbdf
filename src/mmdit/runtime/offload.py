"""Models that take turns on a device that is too small for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Guest(NamedTuple):
    """A tensor that is temporarily on the device."""

    tensor: Tensor
    home: Tensor
    version: int  # version of the tensor on arrival; a higher one later means that it was written to on the device


class Turns:
    """One group of models at a time is on `device`; the others wait in their own memory (the CPU's, as a rule).

    The group stays until another one is asked for. Weights go one way only: on leaving, a tensor gets its old memory
    back, and is copied only where it was changed on the device. So an interrupted drawing leaves nothing to mend.

    Args:
        device: where models compute.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.lock = RLock()  # held by the caller that draws with the models
        self._guests: list[_Guest] = []
        self._group: frozenset[int] = frozenset()

    def enter(self, models: Iterable[nn.Module]) -> None:
        """Move these models to the device and the others back to their own memory."""
        models = list(models)
        group = frozenset(map(id, models))
        if group == self._group:
            return
        self.leave()
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                home = tensor.data
                there = home.to(self.device, non_blocking=True)
                if there is not home:
                    self._guests.append(_Guest(tensor, home, tensor._version))
                    tensor.data = there
        self._group = group

    def leave(self) -> None:
        """Move all models back to their own memory, including those that an interrupted `enter` had moved."""
        self._group = frozenset()
        while self._guests:
            tensor, home, version = self._guests[-1]
            if tensor._version != version:
                home.copy_(tensor.data)
            tensor.data = home
            self._guests.pop()
