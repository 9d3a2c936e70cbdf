"""What a GPU's memory holds now: in all, free, torch's, and what this process takes of it beside torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmdit.runtime.activations import CONTEXT, MOST_CONTEXT


class DeviceMemory(NamedTuple):
    """Bytes of a device's memory: all of them, those that nobody uses, and those that torch has."""

    total: int
    free: int
    ours: int

    @property
    def available(self) -> int:
        """What a budget may be: what is free or torch's, rounded down to a tenth of a gigabyte."""
        return (self.free + self.ours) // 10**8 * 10**8

    def __str__(self) -> str:
        return (
            f"The device has {self.total / 1e9:.2f} GB: {self.ours / 1e9:.2f} GB are this process's, "
            f"{self.free / 1e9:.2f} GB are free."
        )


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, torch.cuda.memory_reserved(device))


def context_of(device: torch.device, most: int | None = MOST_CONTEXT) -> int:
    """Bytes that this process takes of a GPU and torch does not count: its context, and the code of libraries.

    It is at least `CONTEXT`, because code is loaded when it first runs, and more where the device holds more beside
    torch's memory now. What other processes hold cannot be told apart, so that it is `most` at most; None is no limit,
    for a GPU that nobody else uses.
    """
    there = memory_of(device)
    outside = 0 if there is None else there.total - there.free - there.ours
    found = max(outside, CONTEXT)
    return found if most is None else min(found, most)
