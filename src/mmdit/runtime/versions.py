"""Which state of a model a second forward was built for, which kernels it takes, and what it cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.attention import Attend
from mmdit.runtime import plain_kernels
from mmdit.runtime.compiled import modules_of, refuse_changed
from quant.tensor import Float8Tensor

_SLOTS = ("attend", "attend2")


def version_of(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> object:
    """Equal as long as no parameter was replaced, moved or written to.

    Args:
        model: whose parameters and buffers are looked at, before each drawing.
        modules: all modules of the model, where they are known.
    """
    modules = modules_of(model) if modules is None else modules
    with torch._C.DisableTorchFunctionSubclass():  # each attribute of a float8 tensor would call a Python function
        return _states(modules, parts=True, places=True)


def contents_of(model: nn.Module, *, parts: bool = True) -> object:
    """Equal as long as no parameter or buffer was replaced or written to, wherever its memory lies.

    Args:
        model: whose parameters and buffers are looked at, before each drawing.
        parts: whether to see what was written to the codes or scales of a float8 weight directly, such as
            `weight.qdata`; False where weights move, because copies on the way are written to as well.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return _states(modules_of(model), parts=parts, places=False)


def _states(modules: Sequence[nn.Module], *, parts: bool, places: bool) -> list[object]:
    """Which tensors there are, how often each was written to and, for `places`, where its memory lies.

    A drawing on a fast GPU waits for this: one loop, in which nothing is called that is not needed.
    """
    found: list[object] = []
    add = found.append
    for module in modules:
        own = module.__dict__
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                add(id(tensor))
                add(_written(tensor))
                if type(tensor) in _WITHOUT_PARTS or not hasattr(tensor, "__tensor_flatten__"):
                    if places:
                        add(tensor.data_ptr())
                elif parts:
                    found += _of_parts(tensor, places)
    return found


_WITHOUT_PARTS = (Tensor, nn.Parameter)


def _of_parts(tensor: Any, places: bool) -> list[object]:
    """The state of the tensors that a tensor subclass, such as a float8 weight, consists of."""
    names = ("qdata", "scale", "input_scale") if type(tensor) is Float8Tensor else tensor.__tensor_flatten__()[0]
    found: list[object] = []
    for part in [getattr(tensor, name) for name in names]:
        if part is not None:
            found += (id(part), _written(part), part.data_ptr() if places else 0)
    return found


def _written(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count, in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return None


def kernels_for(weight: Tensor) -> ModuleType:
    """The kernels that run for a model with such weights: Triton's, or those in plain torch."""
    if why_no_triton(weight):
        return plain_kernels
    from mmdit.runtime import kernels

    return kernels


def why_no_triton(weight: Tensor) -> str:
    """Return why Triton kernels cannot run for a model with such weights; empty where they can."""
    if weight.device.type != "cuda":
        return f"they run on GPUs, the model is on {weight.device}"
    if find_spec("triton") is None:
        return "triton is not installed"
    return f"they compute in float32, the model in {weight.dtype}" if weight.dtype == torch.float64 else ""


def check_whole(model: nn.Module, called: str = "the model") -> list[nn.Module]:
    """Raise ValueError where the model runs what the fast forward would not; returns all its modules."""
    modules = refuse_changed(model, called)
    if _have_plain_slots(modules):
        return modules
    for name, module in model.named_modules():
        if name.endswith(_SLOTS) and not _is_plain(module):
            raise ValueError(f"{name} is replaced, and the fast forward would not run it: restore it first")
    return modules


def _have_plain_slots(modules: Sequence[nn.Module]) -> bool:
    slots = (slot for one in modules if one._modules for slot in map(one._modules.get, _SLOTS))
    return all(slot is None or _is_plain(slot) for slot in slots)


def _is_plain(slot: nn.Module) -> bool:
    """Return whether a slot holds exactly torch's attention."""
    return type(slot) is Attend and not slot.strategies and slot.kernel is F.scaled_dot_product_attention
