"""Computing in float32 with weights that are stored in less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class _Widening(dict[str, Any]):
    """A module's parameters, each made float32 when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        stored = super().__getitem__(name)
        return stored.float() if stored is not None and stored.dtype in (torch.float16, torch.bfloat16) else stored


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 inside; what it stores, its memory included, stays as it is.

    A layer's weights are widened, which is exact, when the layer runs: there is never a float32 copy of the model.
    """
    stored = {module: module._parameters for module in model.modules()}
    for module, parameters in stored.items():
        module._parameters = _Widening(parameters)
    try:
        yield
    finally:
        for module, parameters in stored.items():
            module._parameters = parameters
