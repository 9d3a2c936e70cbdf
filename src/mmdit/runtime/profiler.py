"""The kernels of a GPU, counted by torch's profiler, which is unloaded afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def kernels_of(run: Callable[[], object], device: torch.device) -> list[tuple[str, int, float]]:
    """Name, count and milliseconds of each kernel of the GPU, longest first.

    The library that counts them, CUPTI, slows every later launch of the process unless it is unloaded
    (pytorch/pytorch#144455), so that the host would take longer in the rows that follow.
    """
    with _unloading(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    torch.cuda.synchronize(device)  # CUPTI is unloaded in a call of CUDA
    found = [
        (event.key, int(event.count), event.self_device_time_total / 1000)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -kernel[2])


@contextmanager
def _unloading() -> Iterator[None]:
    """The environment in which the profiler unloads CUPTI; before CUDA 12.6, CUDA graphs do not survive that."""
    name, version = "TEARDOWN_CUPTI", torch.version.cuda
    before = os.environ.get(name)
    if before is None and version is not None and tuple(map(int, version.split(".")[:2])) >= (12, 6):
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
