"""A device that counts: the live bytes of tensors that were made inside, on the CPU or the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, new storages count as the device's memory from when an operation makes them until they are freed.

    Args:
        capacity: bytes at which an allocation raises `torch.OutOfMemoryError`, as a full device does.
        fails: is called with the number of each operation; True raises `torch.OutOfMemoryError`.
    """

    def __init__(self, capacity: int | None = None, fails: Callable[[int], bool] | None = None) -> None:
        super().__init__()
        self.capacity, self.fails = capacity, fails
        self.live, self.peak, self.operations = 0, 0, 0
        self.at_peak: list[tuple[str, tuple[int, ...], int]] = []
        self._sizes: dict[int, tuple[int, str, tuple[int, ...]]] = {}
        self._known: set[int] = set()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations += 1
        if self.fails is not None and self.fails(self.operations):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB in {func}")
        given = {id_of(one) for one in tree_leaves((args, kwargs or {})) if isinstance(one, Tensor)}
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and (key := id_of(one)) is not None and key not in given:
                self._count(one, key, str(func))
        return found

    def _count(self, tensor: Tensor, key: int, name: str) -> None:
        if key in self._sizes:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if self.capacity is not None and self.live + size > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        self._sizes[key] = size, name, tuple(tensor.shape)
        weakref.finalize(storage, self._freed, key)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = [(name, shape, size) for size, name, shape in self._sizes.values()]

    def _freed(self, key: int) -> None:
        size, _, _ = self._sizes.pop(key)
        self.live -= size


def id_of(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage; None where it has none of its own."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None
