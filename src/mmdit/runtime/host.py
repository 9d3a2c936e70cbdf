"""Copies of a GPU's tensors in the CPU's memory."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_PIECE = 2**26  # bytes of each of two page-locked buffers
_SMALL = 2**20  # bytes of tensors that are copied at once


class HostCopies:
    """Copies tensors to pageable memory of the CPU, by way of two small page-locked buffers.

    The GPU fills one buffer at the speed of its bus while the CPU empties the other one with all its threads. A plain
    `.to("cpu")` is slower several times: one thread meets every new page of memory. Tensors of the CPU are returned as
    they are.
    """

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, ...] = ()

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor; subclasses of tensors made of others (`Float8Tensor`) are copied part by part."""
        if not tensor.is_cuda:
            return tensor
        tensor = tensor.detach()
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is None:
            return self._copied(tensor)
        names, context = flatten()
        parts = {name: self._copied(getattr(tensor, name)) for name in names}
        whole: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
        return whole

    def _copied(self, tensor: Tensor) -> Tensor:
        if tensor.nbytes < _SMALL:
            return tensor.to("cpu")
        if not self._buffers:
            self._buffers = tuple(
                torch.empty(_PIECE, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)
            )
        return through(self._buffers, tensor)


def through(buffers: tuple[Tensor, ...], tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor in the CPU's memory, made through these buffers in turn."""
    found = _fresh(tensor)
    source, target = (one.reshape(-1).view(torch.uint8) for one in (tensor.contiguous(), found))
    waiting: list[tuple[Tensor, Tensor, torch.cuda.Event | None]] = []  # at most one filled buffer
    size = len(buffers[0])
    for place, start in enumerate(range(0, len(source), size)):
        piece = source[start : start + size]
        buffer = buffers[place % len(buffers)][: len(piece)]
        buffer.copy_(piece, non_blocking=True)
        event = torch.cuda.Event() if tensor.is_cuda else None
        if event is not None:
            event.record(torch.cuda.current_stream(tensor.device))
        if waiting:
            _empty(*waiting.pop())
        waiting.append((target[start : start + size], buffer, event))
    for one in waiting:
        _empty(*one)
    return found


def _fresh(like: Tensor) -> Tensor:
    """Memory for a contiguous tensor of the same shape and dtype, in huge pages where the system has them.

    A page of 4 KiB takes the kernel longer to hand out than it takes to be filled; huge pages are asked for by name
    under the usual setting "madvise".
    """
    if like.nbytes < _SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")
    memory = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype).view(like.shape)


def _empty(target: Tensor, buffer: Tensor, event: torch.cuda.Event | None) -> None:
    if event is not None:
        event.synchronize()
    target.copy_(buffer)
