"""Which state of a model a second forward was built for, which kernels it takes, and what it cannot run."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.attention import Attend
from mmdit.runtime import plain_kernels
from mmdit.runtime.compiled import modules_of, refuse_changed

_SLOTS = ("attend", "attend2")


def version_of(model: nn.Module) -> object:
    """Equal as long as no parameter was replaced, moved or written to."""
    return tuple(
        _identity(tensor)
        for module in modules_of(model)
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if tensor is not None
    )


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Which tensor it is, where its memory lies and how often it was written to; of a float8 one, of its codes too."""
    version = None if tensor.is_inference() else tensor._version
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return (id(tensor), version, *(_identity(getattr(tensor, name)) for name in flatten()[0]))
    return (id(tensor), version, tensor.data_ptr())


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


def check_whole(model: nn.Module, called: str = "the model") -> None:
    """Raise ValueError where the model runs what the fast forward would not."""
    refuse_changed(model, called)
    slots = (slot for one in modules_of(model) for name, slot in one._modules.items() if name.endswith(_SLOTS))
    if all(slot is None or _is_plain(slot) for slot in slots):
        return
    for name, module in model.named_modules():
        if name.endswith(_SLOTS) and not _is_plain(module):
            raise ValueError(f"{name} is replaced, and the fast forward would not run it: restore it first")


def _is_plain(slot: nn.Module) -> bool:
    """Return whether a slot holds exactly torch's attention."""
    return type(slot) is Attend and not slot.strategies and slot.kernel is F.scaled_dot_product_attention
