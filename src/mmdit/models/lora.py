"""Linears with attached LoRAs: the product of low-rank factors, or a full matrix, is added to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.models.layers import Mlp

_PLAIN = (Tensor, nn.Parameter)  # no tensor subclass


class Gelu(Protocol):
    """GELU of what `LoraProducts.add_up` gives, [rows, out], which may change the output that it is given.

    The second result is the product of the first one and the down projection of the next Linear, [rows, r]; None where
    there is no such projection, or where it is as quick to multiply by it afterwards.
    """

    def __call__(
        self, output: Tensor, low: Tensor, up: Tensor, next_down: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]: ...


class LoraProducts(NamedTuple):
    """The products with low-rank factors where no gradient is recorded, and all operands have one dtype."""

    low: Callable[[Tensor, Tensor], Tensor]  # x [rows, in], down [r, in]: [rows, r]
    add_up: Callable[[Tensor, Tensor, Tensor], None]  # output [rows, out], low [rows, r], up: changes the output
    up_and_bias: Callable[[Tensor, Tensor, Tensor], Tensor]  # low [rows, r], up, bias [out]: [rows, out]
    gelu: Gelu


def _low(x: Tensor, down: Tensor) -> Tensor:
    return x.mm(down.mT)


def _add_up(output: Tensor, low: Tensor, up: Tensor) -> None:
    output.addmm_(low, up.mT)


def _up_and_bias(low: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, low, up.mT)


def _gelu(output: Tensor, low: Tensor, up: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return F.gelu(output.addmm_(low, up.mT), approximate="tanh"), None


class Operands(NamedTuple):
    """What a Linear with attached factors multiplies by."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    down: Tensor  # [r, in]
    up: Tensor  # [out, r]


class LoraLinear(nn.Linear):
    """A Linear that computes W x + b + up (down x) + delta x; the weight and the bias are unchanged.

    It replaces a Linear and shares its parameters and hooks, so that code that looks up the Linear, its weight or its
    name still finds them. `beside` attaches it, and `without` removes it. `down` [r, in], `up` [out, r] and `delta`
    [out, in] are non-persistent buffers; each pair or matrix that is absent is None.

    The host launches each operation, and in a step on a fast GPU it may be the slower one. So where only factors are
    attached and no gradient is recorded, they cost two operations of the device, and few calls of Python.
    """

    down: Tensor | None
    up: Tensor | None
    delta: Tensor | None
    products: LoraProducts = LoraProducts(_low, _add_up, _up_and_bias, _gelu)
    plain: tuple[nn.Linear]  # the Linear that this module replaces; a tuple keeps it from being a submodule

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        if (operands := self.operands(x)) is None:
            return self.add_to(super().forward(x), x)
        if x.ndim == 2:
            return self.of_rows(x, operands)
        rows = x.view(-1, self.in_features) if x.is_contiguous() else x.reshape(-1, self.in_features)  # view is quicker
        return self.of_rows(rows, operands).view(*x.shape[:-1], self.out_features)

    def operands(self, x: Float[Tensor, "... i"]) -> Operands | None:
        """What few operations multiply by; None where a matrix is attached, a gradient is recorded, or dtypes differ.

        Tensors are looked up in the dicts of the module: an attribute of a module takes the host longer than all checks
        here, and one of a tensor subclass takes several times as long again.
        """
        parameters, buffers = self._parameters, self._buffers
        down, up, weight = buffers.get("down"), buffers.get("up"), parameters.get("weight")
        if down is None or up is None or weight is None or len(parameters) != 2 or buffers["delta"] is not None:
            return None
        if not x.dtype == down.dtype == up.dtype:
            return None
        bias = parameters["bias"]
        if torch.is_grad_enabled() and any(
            one is not None and one.requires_grad for one in (x, weight, bias, down, up)
        ):
            return None
        return Operands(weight, bias, down, up)

    def of_rows(
        self, rows: Float[Tensor, "n i"], operands: Operands, low: Float[Tensor, "n r"] | None = None
    ) -> Float[Tensor, "n o"]:
        """The output, where `operands` gives something; `low` is the down product, if there is one already.

        The down product comes first, while the rows are in the cache.
        """
        weight, bias, down, up = operands
        if low is None:
            low = self.products.low(rows, down)
        if low.dtype != up.dtype:  # under autocast
            return F.linear(rows, weight, bias) + F.linear(low, up)
        if type(weight) in _PLAIN and bias is not None and rows.is_cuda and weight.dtype == bias.dtype == up.dtype:
            return self._in_one_product(rows, low, weight, bias, up)
        output = F.linear(rows, weight, bias)
        self.products.add_up(output, low, up)
        return output

    def _in_one_product(self, rows: Tensor, low: Tensor, weight: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        """The output: the large product adds itself to the small one while it is written."""
        return self.products.up_and_bias(low, up, bias).addmm_(rows, weight.mT)

    @property
    def factors(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]] | None:
        """down and up; None where only a full matrix is attached."""
        down, up = self.down, self.up
        return None if down is None or up is None else (down, up)

    def add_to(self, output: Float[Tensor, "... o"], x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Add up (down x) + delta x to an output of the Linear, in place where the dtypes allow it."""
        if (factors := self.factors) is not None:
            down, up = factors
            output = add_product(output, F.linear(x, down), up)
        delta = self.delta
        return output if delta is None else add_product(output, x, delta)


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


class LoraMlp(Mlp):
    """An MLP with factors beside its first Linear, whose product GELU adds while it reads that Linear's output.

    It has no state of its own: `beside` sets it as the class of an `Mlp`, and `without` sets `Mlp` again, so that
    whoever holds the module keeps it. Where a hook looks at a Linear or at GELU, or one of them has been replaced, all
    of them are called as in `Mlp`.
    """

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        found = None if torch.compiler.is_compiling() else self._fused(x)  # compilers fuse by themselves
        return super().forward(x) if found is None else found

    def _fused(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"] | None:
        """The result, with the up product added by GELU; None where each module has to be called by itself."""
        first, second = self.fc1, self.fc2
        if not isinstance(first, LoraLinear) or not _is_gelu(self.act) or not _are_unseen(first, self.act):
            return None
        if (own := first.operands(x)) is None:
            return None
        rows = x.reshape(-1, first.in_features)
        low = first.products.low(rows, own.down)
        if low.dtype != own.up.dtype:  # under autocast
            return None
        others = second.operands(x) if isinstance(second, LoraLinear) and _are_unseen(second) else None
        next_down = None if others is None else others.down
        hidden, next_low = first.products.gelu(F.linear(rows, own.weight, own.bias), low, own.up, next_down)
        if isinstance(second, LoraLinear) and others is not None and next_low is not None:
            return second.of_rows(hidden, others, next_low).view(*x.shape[:-1], second.out_features)
        return second(hidden.view(*x.shape[:-1], first.out_features))


def _is_gelu(act: nn.Module) -> bool:
    """Whether it is GELU in the approximation of the model."""
    return type(act) is nn.GELU and act.approximate == "tanh"


def _are_unseen(*modules: nn.Module) -> bool:
    """Whether modules have no hooks, are not compiled, and have the forward of their class."""
    if torch.nn.modules.module._has_any_global_hook():
        return False
    for own in (module.__dict__ for module in modules):
        before, after = own["_forward_pre_hooks"] or own["_backward_pre_hooks"], own["_forward_hooks"]
        if before or after or own["_backward_hooks"] or "forward" in own or own.get("_compiled_call_impl") is not None:
            return False
    return True


Kind = TypeVar("Kind", bound=LoraLinear)


def beside(
    model: nn.Module,
    name: str,
    *,
    factors: tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]] | None = None,
    delta: Float[Tensor, "o i"] | None = None,
    products: LoraProducts | None = None,
) -> LoraLinear:
    """Attach low-rank factors or a full matrix to a Linear of a model; they replace anything attached before.

    Args:
        model: the model that contains the Linear.
        name: the name of the Linear in the model.
        factors: down [r, in] and up [out, r].
        delta: a matrix [out, in] whose product with the input is added to the output.
        products: what multiplies by the factors; None is torch.

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
    _exchange_mlp(model, name, Mlp, LoraMlp)
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
        _exchange_mlp(model, name, LoraMlp, Mlp)


def all_beside(model: nn.Module) -> dict[str, LoraLinear]:
    """The Linears of a model that have something attached, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLinear)}


def _exchange_mlp(model: nn.Module, name: str, old: type[Mlp], new: type[Mlp]) -> None:
    """Set the class of the MLP whose first Linear has this name, if it has the old one, and is of no subclass of it."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if last == "fc1" and type(owner) is old:
        owner.__class__ = new


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._modules[last] = module
