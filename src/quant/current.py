"""The current GPU: Triton launches its kernels there, wherever their tensors are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that launches Triton kernels: the GPU of its first tensor is the current one inside.

    A compiler that traces the function does this by itself.
    """

    @wraps(launch)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return launch(*args, **kwargs)
        index = _gpu_of(args)
        if index < 0 or index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(index):
            return launch(*args, **kwargs)

    return launched


def _gpu_of(args: tuple[Any, ...]) -> int:
    """The number of the GPU that the first tensor is on, which may be in a tuple; -1 where it is on none."""
    for one in args:
        if isinstance(one, Tensor):
            return one.get_device() if one.is_cuda else -1
        if isinstance(one, tuple) and (found := _gpu_of(one)) >= 0:
            return found
    return -1
