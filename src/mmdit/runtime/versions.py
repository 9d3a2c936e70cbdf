"""Which state of a model a second forward was built for, which kernels it takes, and what it cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.attention import Attend
from mmdit.runtime import plain_kernels
from mmdit.runtime.compiled import modules_of, refuse_changed

_SLOTS = ("attend", "attend2")


def version_of(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> object:
    """Equal as long as no parameter was replaced, moved or written to.

    Args:
        model: whose parameters and buffers are looked at, before each drawing.
        modules: all modules of the model, where they are known.
    """
    modules = modules_of(model) if modules is None else modules
    with torch._C.DisableTorchFunctionSubclass():  # each attribute of a float8 tensor would call a Python function
        return tuple(map(_identity, _tensors(modules)))


def contents_of(model: nn.Module, *, parts: bool = True) -> object:
    """Equal as long as no parameter or buffer was replaced or written to, wherever its memory lies.

    Args:
        model: whose parameters and buffers are looked at, before each drawing.
        parts: whether to see what was written to the codes or scales of a float8 weight directly, such as
            `weight.qdata`; False where weights move, because copies on the way are written to as well.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(
            (id(tensor), _written(tensor), *_of_parts(tensor, parts)) for tensor in _tensors(modules_of(model))
        )


def _of_parts(tensor: Tensor, wanted: bool) -> Iterator[int | None]:
    """How often each part of a float8 tensor was written to."""
    flatten = getattr(tensor, "__tensor_flatten__", None) if wanted else None
    return iter(()) if flatten is None else (_written(getattr(tensor, name)) for name in flatten()[0])


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    yield tensor


def _written(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Which tensor it is, where its memory lies and how often it was written to; of a float8 one, of its codes too."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return (id(tensor), _written(tensor), *(_identity(getattr(tensor, name)) for name in flatten()[0]))
    return (id(tensor), _written(tensor), tensor.data_ptr())


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
    slots = (slot for one in modules for name, slot in one._modules.items() if name.endswith(_SLOTS))
    if all(slot is None or _is_plain(slot) for slot in slots):
        return modules
    for name, module in model.named_modules():
        if name.endswith(_SLOTS) and not _is_plain(module):
            raise ValueError(f"{name} is replaced, and the fast forward would not run it: restore it first")
    return modules


def _is_plain(slot: nn.Module) -> bool:
    """Return whether a slot holds exactly torch's attention."""
    return type(slot) is Attend and not slot.strategies and slot.kernel is F.scaled_dot_product_attention
