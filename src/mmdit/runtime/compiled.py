"""Models whose modules' code is replaced at run time, by torch.compile or by acceleration."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from mmdit.runtime.streaming import arriving

PARALLEL: WeakSet[nn.Module] = WeakSet()  # models that compute on several ranks
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
    if not any(map(_is_compiled, modules_of(model))):
        return
    for part, module in model.named_modules():
        if _is_compiled(module):
            raise ValueError(
                f"{part or name} is compiled (torch.compile), and a hook that is added after compiling never fires: "
                "nothing would be seen or changed. Look into the model before it is compiled, or load it again"
            )


def refuse_changed(model: nn.Module, name: str) -> list[nn.Module]:
    """Raise ValueError where a second forward would not run what the model runs: compiled, hooked, replaced parts.

    Returns:
        All modules of the model, for those who look for more.
    """
    modules = modules_of(model)
    if all(map(_is_as_built, modules)):
        return modules
    refuse_compiled_parts(model, name)
    for path, module in model.named_modules():
        part = path or name
        if _is_hooked(module):
            raise ValueError(f"{part} has hooks, which the fast forward does not run: remove them first")
        if "forward" in vars(module):
            raise ValueError(f"{part} is replaced, and the fast forward would not run it: restore it first")
    return modules


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, in no order; several times faster than `named_modules`. Called before each drawing."""
    found, seen = [model], {id(model)}
    for module in found:  # which grows
        if children := module._modules:
            for child in children.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    found.append(child)
    return found


def _is_as_built(module: nn.Module) -> bool:
    """Whether a module is surely neither compiled nor hooked nor replaced; False where a closer look is needed."""
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own) and (
        "_orig_mod" not in own["_modules"] and own.get("_compiled_call_impl") is None
    )


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _is_hooked(module: nn.Module) -> bool:
    before = module._forward_pre_hooks
    return bool(module._forward_hooks) or (bool(before) and any(hook is not arriving for hook in before.values()))
