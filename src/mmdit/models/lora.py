"""Something added beside a Linear: the low-rank products of LoRAs, or a whole matrix."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """A Linear W x + b, to which up (down x) and delta x are added; its weight and bias stay as they are.

    It stands in the place of a Linear and shares its parameters and hooks, so that whatever looks for the Linear, its
    weight or its name finds them. Make one by `beside`, and take it away by `without`. `down` [r, in], `up` [out, r]
    and `delta` [out, in] are buffers that are not saved; a pair or a matrix that is not there is None.
    """

    down: Tensor | None
    up: Tensor | None
    delta: Tensor | None
    plain: tuple[nn.Linear]  # the Linear in whose place it stands; in a tuple, so that it is no submodule

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return super().forward(x) + self.added(x)

    def added(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """What is added to the Linear's output."""
        low = None if self.down is None or self.up is None else F.linear(F.linear(x, self.down), self.up)
        if self.delta is None:
            assert low is not None, "a LoraLinear adds a pair of factors, a matrix, or both"
            return low
        whole = F.linear(x, self.delta)
        return whole if low is None else low + whole


def beside(
    model: nn.Module,
    name: str,
    *,
    factors: tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]] | None = None,
    delta: Float[Tensor, "o i"] | None = None,
) -> LoraLinear:
    """Add something beside a Linear of a model, in the place of what was beside it before.

    Args:
        model: holds the Linear.
        name: of the Linear.
        factors: down and up.
        delta: a matrix that is added to the weight in effect.

    Raises:
        ValueError: nothing is given to add.
        TypeError: there is no Linear of that name.
    """
    if factors is None and delta is None:
        raise ValueError(f"{name}: give factors, a delta, or both")
    without(model, name)
    linear = model.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, and a LoRA goes beside Linears")
    new = LoraLinear.__new__(LoraLinear)
    new.__dict__.update(linear.__dict__)  # the same dicts of parameters and hooks: a change in one is one in the other
    new.__dict__["_buffers"] = dict(linear._buffers)
    new.__dict__["_non_persistent_buffers_set"] = set(linear._non_persistent_buffers_set)
    new.plain = (linear,)
    down, up = (None, None) if factors is None else factors
    for key, tensor in (("down", down), ("up", up), ("delta", delta)):
        new.register_buffer(key, tensor, persistent=False)
    _put(model, name, new)
    return new


def without(model: nn.Module, name: str) -> None:
    """Take away what stands beside a Linear, if anything does."""
    found = model.get_submodule(name)
    if isinstance(found, LoraLinear):
        _put(model, name, found.plain[0])


def all_beside(model: nn.Module) -> dict[str, LoraLinear]:
    """The Linears of a model beside which something stands, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLinear)}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._modules[last] = module
