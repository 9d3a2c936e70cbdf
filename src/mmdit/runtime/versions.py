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
from mmdit.runtime.compiled import SLOTS, Found, computes_as_built, found_in, refuse_changed
from quant.tensor import Float8Tensor


def version_of(model: nn.Module, found: Found | None = None) -> object:
    """Equal as long as no parameter was replaced, moved or written to.

    Args:
        model: whose parameters and buffers are looked at, before each drawing.
        found: what the model consists of, where that is known.
    """
    tensors = (found_in(model) if found is None else found).tensors
    with torch._C.DisableTorchFunctionSubclass():  # each attribute of a float8 tensor would call a Python function
        return _states(tensors, parts=True, places=True)


def contents_of(model: nn.Module, *, parts: bool = True) -> object:
    """Equal as long as no parameter or buffer was replaced or written to, wherever its memory lies.

    Args:
        model: whose parameters and buffers are looked at, before each drawing.
        parts: whether to see what was written to the codes or scales of a float8 weight directly, such as
            `weight.qdata`; False where weights move, because copies on the way are written to as well.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return _states(found_in(model).tensors, parts=parts, places=False)


def _states(tensors: Sequence[Tensor], *, parts: bool, places: bool) -> list[object]:
    """Which tensors there are, how often each was written to and, for `places`, where its memory lies.

    A drawing on a fast GPU waits for this, so that nothing is called that is not needed.
    """
    whole = [one for one in tensors if type(one) in _WITHOUT_PARTS or not hasattr(one, "__tensor_flatten__")]
    found = [list(map(id, tensors)), _written(tensors), [one.data_ptr() for one in whole] if places else []]
    if parts and len(whole) < len(tensors):
        inner = [part for one in tensors if type(one) not in _WITHOUT_PARTS for part in _parts_of(one)]
        found += [list(map(id, inner)), _written(inner), [one.data_ptr() for one in inner] if places else []]
    return found


_WITHOUT_PARTS = (Tensor, nn.Parameter)


def _parts_of(tensor: Any) -> list[Tensor]:
    """The tensors that a tensor subclass, such as a float8 weight, consists of; none where it is one tensor."""
    if type(tensor) is Float8Tensor:
        parts = tensor.qdata, tensor.scale, tensor.input_scale
        return [one for one in parts if one is not None]
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [one for one in (getattr(tensor, name) for name in names) if one is not None]


def _written(tensors: Sequence[Tensor]) -> list[int | None]:
    """How often each tensor was written to; None where torch does not count, in inference mode."""
    try:
        return [one._version for one in tensors]
    except RuntimeError:
        return [None if one.is_inference() else one._version for one in tensors]


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


def check_whole(model: nn.Module, called: str = "the model") -> Found:
    """Raise ValueError where the model runs what the fast forward would not; returns what it consists of."""
    found = refuse_changed(model, called)
    kinds: set[Any] = {type(module) for module in found.modules}
    if all(map(_is_plain, found.slots)) and all(map(computes_as_built, kinds)):
        return found
    for name, module in model.named_modules():
        kind: Any = type(module)
        if not computes_as_built(kind):
            raise ValueError(
                f"{name or called} is a {kind.__name__} with a forward of its own, which the fast forward would not "
                "run: put back what it replaced"
            )
        if name.endswith(SLOTS) and not _is_plain(module):
            raise ValueError(f"{name} is replaced, and the fast forward would not run it: restore it first")
    return found


def _is_plain(slot: nn.Module) -> bool:
    """Return whether a slot holds exactly torch's attention."""
    return type(slot) is Attend and not slot.strategies and slot.kernel is F.scaled_dot_product_attention
