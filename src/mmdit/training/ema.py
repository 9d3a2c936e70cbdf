"""An exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """An exponential average of parameters, kept beside them in their dtype.

    The decay grows to its value as (1 + n) / (10 + n), so that the average forgets the start early on.

    Args:
        parameters: a module, or its parameters.
        decay: the share of the average that an update keeps.
    """

    def __init__(self, parameters: nn.Module | Iterable[Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.live = list(_parameters(parameters))
        self.average = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def write_to(self, parameters: nn.Module | Iterable[Tensor]) -> None:
        """Copy the average to parameters of the same shapes."""
        for into, value in zip(_parameters(parameters), self.average, strict=True):
            into.copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold their average; afterwards their own values again."""
        before = [p.detach().clone() for p in self.live]
        self.write_to(self.live)
        try:
            yield
        finally:
            with torch.no_grad():
                for into, value in zip(self.live, before, strict=True):
                    into.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        return {"average": self.average, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved average."""
        self.updates = state["updates"]
        for into, value in zip(self.average, state["average"], strict=True):
            into.copy_(value)


def _parameters(given: nn.Module | Iterable[Tensor]) -> Iterable[Tensor]:
    return given.parameters() if isinstance(given, nn.Module) else given
