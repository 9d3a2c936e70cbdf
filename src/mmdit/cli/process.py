"""The process of a command: settings for the small steps of the embedded model on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from mmdit.cli.devices import DEMO

_WAITING: Final = "GOMP_SPINCOUNT"  # GNU's OpenMP reads it when it is loaded, which torch does
_SPINS: Final = "1000"  # some 50 microseconds; without it 300,000, milliseconds
_KEPT: Final = 256 * 2**20  # bytes of freed memory that the process keeps
_FROM_HEAP: Final = 32 * 2**20  # bytes of an allocation, the most that glibc allows


@contextmanager
def small_steps(model: str | None) -> Iterator[None]:
    """Import torch for the embedded model: waiting threads soon sleep, and freed memory stays with the process.

    A step of the embedded model is 350 parallel regions of some microseconds. By default a thread that waits for
    another one spins for milliseconds, which on a machine with other work takes the core that the other one needs. And
    by default glibc returns the memory of each step to the system, which makes 5000 page faults a step.

    Settings that the environment holds are kept. Where torch is imported already, nothing changes.

    Args:
        model: the model's name on the command line. For any other than the embedded one, nothing changes.
    """
    if model not in (None, DEMO) or "torch" in sys.modules:
        yield
        return
    _keep_freed_memory()
    if any(name in os.environ for name in (_WAITING, "OMP_WAIT_POLICY")):
        yield
        return
    os.environ[_WAITING] = _SPINS
    try:
        yield
    finally:
        os.environ.pop(_WAITING, None)


def _keep_freed_memory() -> None:
    """Let malloc keep freed memory, where it is glibc's."""
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
    mallopt(trim_threshold, _KEPT)
    mallopt(mmap_threshold, _FROM_HEAP)
