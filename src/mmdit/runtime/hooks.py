"""The one manager of hooks on modules: they act in one thread, and are gone afterwards whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident, local
from typing import Any, Literal, NamedTuple

from torch import nn

# (module, args, kwargs) -> None, or the args and kwargs to go on with
Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
# (module, args, kwargs, output) -> None, or the output to go on with
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class Hook(NamedTuple):
    """A function that is called before or after each call of a module.

    Args:
        module: the module that is called.
        side: "input" calls `call` as a `Before`, "output" as an `After`.
        call: what is called; it may change what the module reads or gives.
        first: before the hooks that the module has already.
        always: for side "output": also call it when the module raises.
    """

    module: nn.Module
    side: Literal["input", "output"]
    call: Before | After
    first: bool = False
    always: bool = False


@contextmanager
def hooks(wanted: Iterable[Hook]) -> Iterator[None]:
    """Inside, in this thread alone, these hooks run, on one module in the order in which they are given.

    Calls of the modules in other threads pass by. An interrupt at any line leaves no hook behind.
    """
    thread = get_ident()
    added: list[tuple[nn.Module, _InThread]] = []
    try:
        for hook in wanted:
            call = _InThread(hook.call, thread)
            added.append((hook.module, call))
            if hook.side == "input":
                hook.module.register_forward_pre_hook(call, prepend=hook.first, with_kwargs=True)
            else:
                hook.module.register_forward_hook(call, prepend=hook.first, with_kwargs=True, always_call=hook.always)
        yield
    finally:
        for module, call in added:
            _remove(module, call)


@contextmanager
def listening(listeners: list[Any], listener: Callable[..., None]) -> Iterator[None]:
    """Inside, a list of those who are told also has this listener, which hears what is said in this thread alone."""
    heard = _InThread(listener, get_ident())
    try:
        listeners.append(heard)
        yield
    finally:
        if heard in listeners:
            listeners.remove(heard)


class _State(local):
    repeated = False


_state = _State()


@contextmanager
def repeating() -> Iterator[None]:
    """Mark calls that this thread repeats to diagnose a fault; hooks that only observe skip these calls."""
    before = _state.repeated
    try:
        _state.repeated = True
        yield
    finally:
        _state.repeated = before


def is_repeated() -> bool:
    """Return whether the current call of this thread is a repeated one, see `repeating`."""
    return _state.repeated


def gone(*_: object) -> None:
    """What a deep copy of a module has in the place of a hook of `hooks`, which nobody would remove from the copy."""


class _InThread:
    """A call in one thread alone."""

    def __init__(self, call: Callable[..., Any], thread: int) -> None:
        self.call, self.thread = call, thread

    def __call__(self, *given: Any) -> Any:
        return self.call(*given) if get_ident() == self.thread else None

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return gone


def _remove(module: nn.Module, call: Callable[..., Any]) -> None:
    """Remove a hook by what it calls: an interrupt while it was added may have kept its handle from being returned."""
    tables: tuple[dict[int, Any], ...] = (module._forward_pre_hooks, module._forward_hooks)
    notes: tuple[dict[int, bool], ...] = (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
    for key in [key for table in tables for key, held in list(table.items()) if held is call]:
        for table in (*tables, *notes):
            table.pop(key, None)
