"""Linears with attached LoRAs: the product of low-rank factors, or a full matrix, is added to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)  # no tensor subclass


class UpProducts(NamedTuple):
    """What multiplies by up projections [out, r] where no gradient is recorded."""

    add_up: Callable[[Tensor, Tensor, Tensor], None]  # output [rows, out], low [rows, r], up: changes the output
    up_and_bias: Callable[[Tensor, Tensor, Tensor], Tensor]  # low [rows, r], up, bias [out]: [rows, out]


def _add_up(output: Tensor, low: Tensor, up: Tensor) -> None:
    output.addmm_(low, up.t())


def _up_and_bias(low: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, low, up.t())


class LoraLinear(nn.Linear):
    """A Linear that computes W x + b + up (down x) + delta x; the weight and the bias are unchanged.

    It replaces a Linear and shares its parameters and hooks, so that code that looks up the Linear, its weight or its
    name still finds them. `beside` attaches it, and `without` removes it. `down` [r, in], `up` [out, r] and `delta`
    [out, in] are non-persistent buffers; each pair or matrix that is absent is None.
    """

    down: Tensor | None
    up: Tensor | None
    delta: Tensor | None
    products: UpProducts = UpProducts(_add_up, _up_and_bias)
    plain: tuple[nn.Linear]  # the Linear that this module replaces; a tuple keeps it from being a submodule

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        if x.is_cuda and self._is_plain(x):
            return self.in_one_product(x)
        return self.add_to(super().forward(x), x)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether only factors are attached, to a weight that is no tensor subclass, and no gradient is recorded."""
        weight, bias, down, up = self.weight, self.bias, self.down, self.up
        if type(weight) not in _PLAIN or bias is None or down is None or up is None or self.delta is not None:
            return False
        operands = (x, weight, bias, down, up)
        if not weight.dtype == bias.dtype == down.dtype == up.dtype == x.dtype:
            return False
        if torch.is_grad_enabled() and any(one.requires_grad for one in operands):
            return False
        return all(type(one) in _PLAIN for one in operands) and not torch.is_autocast_enabled(x.device.type)

    def in_one_product(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """The output, with the small products first: the large one adds itself to them while it is written."""
        assert self.down is not None, "factors are attached"
        assert self.up is not None, "factors are attached"
        rows = x.reshape(-1, x.shape[-1])
        output = self.products.up_and_bias(rows @ self.down.t(), self.up, self.bias)
        return output.addmm_(rows, self.weight.t()).view(*x.shape[:-1], self.out_features)

    @property
    def factors(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]] | None:
        """down and up; None where only a full matrix is attached."""
        down, up = self.down, self.up
        return None if down is None or up is None else (down, up)

    def add_to(self, output: Float[Tensor, "... o"], x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Add up (down x) + delta x to an output of the Linear, in place where the dtypes allow it."""
        if (factors := self.factors) is not None:
            output = add_factors(output, x, *factors, self.products)
        delta = self.delta
        return output if delta is None else add_product(output, x, delta)


def add_factors(
    output: Float[Tensor, "... o"],
    x: Float[Tensor, "... i"],
    down: Float[Tensor, "r i"],
    up: Float[Tensor, "o r"],
    products: UpProducts,
) -> Float[Tensor, "... o"]:
    """Add up (down x) to an output, see `add_product`.

    On a GPU by as few operations as there can be, because the host launches each of them.
    """
    few = x.is_cuda and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
    if few and output.dtype == x.dtype == down.dtype == up.dtype and output.is_contiguous() and x.is_contiguous():
        products.add_up(output.view(-1, output.shape[-1]), torch.mm(x.view(-1, x.shape[-1]), down.t()), up)
        return output
    return add_product(output, F.linear(x, down), up)


def add_product(
    output: Float[Tensor, "... o"], x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"]
) -> Float[Tensor, "... o"]:
    """Add `F.linear(x, weight)` to an output in place, so that the output is read and written only once more.

    Under autocast, where the dtypes differ, and where gradients are recorded, the result is a new tensor: autograd lets
    nobody change the output of a custom function in place.
    """
    recorded = torch.is_grad_enabled() and (output.requires_grad or x.requires_grad or weight.requires_grad)
    if recorded or not output.dtype == x.dtype == weight.dtype or not output.is_contiguous():
        return output + F.linear(x, weight)
    output.view(-1, output.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return output


Kind = TypeVar("Kind", bound=LoraLinear)


def beside(
    model: nn.Module,
    name: str,
    *,
    factors: tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]] | None = None,
    delta: Float[Tensor, "o i"] | None = None,
    products: UpProducts | None = None,
) -> LoraLinear:
    """Attach low-rank factors or a full matrix to a Linear of a model; they replace anything attached before.

    Args:
        model: the model that contains the Linear.
        name: the name of the Linear in the model.
        factors: down [r, in] and up [out, r].
        delta: a matrix [out, in] whose product with the input is added to the output.
        products: what multiplies by `up`; None is torch.

    Raises:
        ValueError: neither factors nor a delta are given.
        TypeError: the module of this name is not a Linear.
    """
    if factors is None and delta is None:
        raise ValueError(f"{name}: give factors, a delta, or both")
    new = stand_in(model, name, LoraLinear)
    down, up = (None, None) if factors is None else factors
    for key, tensor in (("down", down), ("up", up), ("delta", delta)):
        new.register_buffer(key, tensor, persistent=False)
    if products is not None:
        new.products = products
    return new


def stand_in(model: nn.Module, name: str, kind: type[Kind]) -> Kind:
    """Replace a Linear by a module of a class that adds to its output, and that shares its parameters and hooks.

    Args:
        model: the model that contains the Linear; anything attached to the Linear before is removed.
        name: the name of the Linear in the model.
        kind: the class; its `__init__` is not called.

    Raises:
        TypeError: the module of this name is not a Linear.
    """
    without(model, name)
    linear = model.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, and a LoRA goes beside Linears")
    new = kind.__new__(kind)
    new.__dict__.update(linear.__dict__)  # share the dicts of parameters and hooks, so that changes apply to both
    new.__dict__["_buffers"] = dict(linear._buffers)
    new.__dict__["_modules"] = dict(linear._modules)
    new.__dict__["_non_persistent_buffers_set"] = set(linear._non_persistent_buffers_set)
    new.plain = (linear,)
    _put(model, name, new)
    return new


def without(model: nn.Module, name: str) -> None:
    """Restore the plain Linear of this name, if anything is attached to it."""
    found = model.get_submodule(name)
    if isinstance(found, LoraLinear):
        _put(model, name, found.plain[0])


def all_beside(model: nn.Module) -> dict[str, LoraLinear]:
    """The Linears of a model that have something attached, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLinear)}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._modules[last] = module
