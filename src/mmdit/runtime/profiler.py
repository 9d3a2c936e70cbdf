"""What the GPU computes, by torch's profiler, which does not stay in the way afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def kernels_of(run: Callable[[], object], device: torch.device) -> list[tuple[str, int, float]]:
    """Name, count and milliseconds of each kernel of the GPU, longest first.

    The library that counts them, CUPTI, stays in the way of every later launch of the process unless it is told to
    leave (pytorch/pytorch#144455), so that the host would take longer in the rows that follow.
    """
    with _leaving(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    torch.cuda.synchronize(device)  # CUPTI leaves in a call of CUDA
    found = [
        (event.key, int(event.count), event.self_device_time_total / 1000)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -kernel[2])


@contextmanager
def _leaving() -> Iterator[None]:
    """The environment in which the profiler lets CUPTI leave; before CUDA 12.6 CUDA graphs do not survive that."""
    name, version = "TEARDOWN_CUPTI", torch.version.cuda
    before = os.environ.get(name)
    if before is None and version is not None and tuple(map(int, version.split(".")[:2])) >= (12, 6):
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
