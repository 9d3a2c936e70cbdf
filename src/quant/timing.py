"""How long a GPU works on a call; the choice among kernels and the benches measure by it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median milliseconds of the current GPU's work, each run between two events, after one that does not count."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)
