"""Models whose modules' code is replaced at run time, by torch.compile or by acceleration."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from mmdit.runtime.hooks import gone
from mmdit.runtime.streaming import arriving

PARALLEL: WeakSet[nn.Module] = WeakSet()  # models that compute on several ranks
SLOTS = ("attend", "attend2")  # names of modules that attend
ACCELERATED: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()  # by model, its `Accelerated`s


def refuse_compiled(model: nn.Module, name: str) -> None:
    """Raise ValueError for a model that is accelerated, shared by several ranks, or partly compiled."""
    if ACCELERATED.get(model):
        raise ValueError(
            f"{name} is accelerated, and the fast forward runs none of its modules: nothing would be seen or changed. "
            "Call pipe.plain() first; pipe.accelerate() makes it fast again"
        )
    if model in PARALLEL:
        raise ValueError(
            f"{name} is parallelized: each rank computes some branches, tokens and heads, so what is seen or "
            "changed on one of them is a part. Call pipe.parallel.close() on every rank first"
        )
    refuse_compiled_parts(model, name)


def refuse_compiled_parts(model: nn.Module, name: str) -> None:
    """Raise ValueError for a model of which any part is compiled."""
    if not any(map(_is_compiled, found_in(model).modules)):
        return
    for part, module in model.named_modules():
        if _is_compiled(module):
            raise ValueError(
                f"{part or name} is compiled (torch.compile), and a hook that is added after compiling never fires: "
                "nothing would be seen or changed. Look into the model before it is compiled, or load it again"
            )


@cache
def computes_as_built(kind: type[nn.Module]) -> bool:
    """Return whether modules of a class compute by a forward of torch's or of this library's models.

    Others, such as a subclass of Linear with a forward of its own, look like what a second forward or a LoRA reads.
    """
    owner = next(one for one in kind.__mro__ if "forward" in vars(one))
    return owner.__module__.partition(".")[0] in ("torch", "mmdit", "encoders")


def refuse_own_forward(model: nn.Module, name: str) -> None:
    """Raise ValueError for a Linear with a forward of its own, which a module that stands in for it would not run."""
    kind: Any = type(model.get_submodule(name))
    if issubclass(kind, nn.Linear) and not computes_as_built(kind):
        raise ValueError(
            f"{name} is a {kind.__name__} with a forward of its own, which a LoRA beside it would not run: "
            "merge the LoRA into the weights, or put a plain Linear there first"
        )


def refuse_changed(model: nn.Module, name: str) -> Found:
    """Raise ValueError where a second forward would not run what the model runs: compiled, hooked, replaced parts.

    Returns:
        What the model consists of, for those who look for more.
    """
    found = found_in(model)
    if found.is_as_built:
        return found
    refuse_compiled_parts(model, name)
    for path, module in model.named_modules():
        part = path or name
        if _is_hooked(module):
            raise ValueError(f"{part} has hooks, which the fast forward does not run: remove them first")
        if "forward" in vars(module):
            raise ValueError(f"{part} is replaced, and the fast forward would not run it: restore it first")
    return found


class Found(NamedTuple):
    """What a model consists of, each once, in no order.

    Attributes:
        modules: all modules.
        tensors: their parameters and buffers; one that several modules share is there several times.
        slots: what stands in the slots for attention.
        is_as_built: whether it is sure that nothing is compiled, hooked or replaced; else a closer look is needed.
    """

    modules: list[nn.Module]
    tensors: list[Tensor]
    slots: list[nn.Module]
    is_as_built: bool


def found_in(model: nn.Module) -> Found:
    """What a model consists of; several times faster than `named_modules`, because each drawing waits for it."""
    found, seen, tensors, slots, as_built = [model], {id(model)}, list[Any](), list[nn.Module](), True
    for module in found:  # which grows
        own = module.__dict__
        if own["_parameters"]:
            tensors += own["_parameters"].values()
        if own["_buffers"]:
            tensors += own["_buffers"].values()
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            as_built = False
        if own.get("_compiled_call_impl") is not None:
            as_built = False
        if children := own["_modules"]:
            for name, child in children.items():
                if child is None:
                    continue
                if id(child) not in seen:
                    seen.add(id(child))
                    found.append(child)
                if name in SLOTS:
                    slots.append(child)
            if "_orig_mod" in children:
                as_built = False
    return Found(found, [one for one in tensors if one is not None], slots, as_built)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _is_hooked(module: nn.Module) -> bool:
    every = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(hook is not arriving and hook is not gone for hook in every)
