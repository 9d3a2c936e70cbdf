"""Host memory that a GPU reads at the speed of its link, and tensors that lie in one piece of it."""

from __future__ import annotations

import ctypes
import mmap
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_ALIGN = 256  # bytes


class _Pages(mmap.mmap):
    """Anonymous pages; they are unpinned before they are freed."""

    address = 0  # where they are pinned; 0 where they are not

    def __del__(self) -> None:
        if self.address:
            with suppress(Exception):  # the CUDA runtime may be gone when the process ends
                torch.cuda.cudart().cudaHostUnregister(self.address)


def host_memory(
    size: int, pinned_for: torch.device | None = None, fill: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Bytes of host memory, uint8 [size].

    Pages are pinned where they are. torch's own pinned memory is rounded up to a power of two, which would be half as
    much again for the blocks of a model.

    Args:
        size: number of bytes.
        pinned_for: pin the pages for this GPU; where the system refuses, a warning says so, and copies are slower.
        fill: writes to the memory before it is pinned. A page takes memory once it is written to, and pinning takes all
            of them at once.
    """
    if sys.platform == "win32":
        pages = _Pages(-1, max(size, 1))
    else:
        pages = _Pages(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # large pages are made and pinned sooner, where the system has them
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8, count=max(size, 1))[:size]
    if fill is not None:
        fill(memory)
    if pinned_for is not None and size:
        with torch.cuda.device(pinned_for):  # pinning makes a context on the current GPU
            _pin(pages, memory)
    return memory


def _pin(pages: _Pages, memory: Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0)
    if int(code) == 0:
        pages.address = memory.data_ptr()
        return
    warnings.warn(
        f"the system did not pin {len(memory)} bytes ({code}), so that copies to the GPU are slower", stacklevel=3
    )
    with suppress(RuntimeError):  # CUDA would report the refusal once more at its next launch
        torch.zeros(1, device="cuda")


def give_back() -> None:
    """Let malloc return to the system what was freed, where it is glibc's; it does so by itself at a heap's end only.

    What it keeps is left by the compiler of kernels, and by weights that moved into memory of their own.
    """
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class Layout:
    """Where the parts of some tensors lie in one piece of memory; a tensor subclass has several parts."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.offsets: list[int] = []
        self.size = 0
        for part in (part for tensor in tensors for part in parts_of(tensor)):
            self.offsets.append(self.size)
            self.size += -(-part.numel() * part.element_size() // _ALIGN) * _ALIGN

    def placed(self, tensors: Sequence[Tensor], memory: Tensor) -> list[Tensor]:
        """Tensors of the same shapes, dtypes and strides whose values are in this memory, uint8 [size]."""
        offsets = iter(self.offsets)
        return [_placed(tensor, lambda part: _view(memory, next(offsets), part)) for tensor in tensors]


def parts_of(tensor: Any) -> list[Tensor]:
    """The plain tensors that hold the values of a tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]


def copy_parts(into: Tensor, source: Tensor) -> None:
    """Copy the values of a tensor, part by part."""
    for one, other in zip(parts_of(into), parts_of(source), strict=True):
        one.detach().copy_(other.detach())


def _placed(tensor: Any, view: Any) -> Tensor:
    if not hasattr(tensor, "__tensor_flatten__"):
        found: Tensor = view(tensor.detach())
        return found
    names, context = tensor.__tensor_flatten__()
    parts = {name: _placed(getattr(tensor, name), view) for name in names}
    new = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    left = {*parts, "_is_param", *getattr(tensor, "not_copied", ())}
    notes = {key: value for key, value in vars(tensor).items() if key not in left}
    vars(new).update(notes)
    made: Tensor = new
    return made


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    # Metal has no float8; its codes are bytes there.
    is_code = like.dtype.is_floating_point and like.dtype.itemsize == 1
    dtype = torch.uint8 if memory.device.type == "mps" and is_code else like.dtype
    flat = memory[offset : offset + like.numel() * like.element_size()].view(dtype)
    if not like.numel() or not _is_dense(like):
        return flat.view(like.shape)
    return flat.as_strided(like.size(), like.stride(), flat.storage_offset())


def _is_dense(tensor: Tensor) -> bool:
    """Whether the values fill one piece of memory without gaps, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
