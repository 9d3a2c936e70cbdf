"""The current GPU: Triton launches its kernels there, wherever their tensors are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that launches Triton kernels: the GPU of its first tensor on one is the current one inside.

    Tensors may be in tuples and lists, and may be given by keyword; those on other devices do not count. A compiler
    that traces the function does this by itself.
    """

    @wraps(launch)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return launch(*args, **kwargs)
        index = _gpu_of((*args, *kwargs.values()))
        if index < 0 or index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(index):
            return launch(*args, **kwargs)

    return launched


def _gpu_of(given: Sequence[Any]) -> int:
    """The number of the GPU that the first tensor on one is on, also in a tuple or list; -1 where none is."""
    for one in given:
        if isinstance(one, Tensor) and one.is_cuda:
            return one.get_device()
        if isinstance(one, tuple | list) and (found := _gpu_of(one)) >= 0:
            return found
    return -1
