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
    for part, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"{part or name} is compiled (torch.compile), and a hook that is added after compiling never fires: "
                "nothing would be seen or changed. Look into the model before it is compiled, or load it again"
            )


def refuse_changed(model: nn.Module, name: str) -> None:
    """Raise ValueError where a second forward would not run what the model runs: compiled, hooked, replaced parts."""
    refuse_compiled_parts(model, name)
    for path, module in model.named_modules():
        part = path or name
        if module._forward_hooks or any(hook is not arriving for hook in module._forward_pre_hooks.values()):
            raise ValueError(f"{part} has hooks, which the fast forward does not run: remove them first")
        if "forward" in vars(module):
            raise ValueError(f"{part} is replaced, and the fast forward would not run it: restore it first")
