"""Rows of a bench that go on when one of them fails, within a time limit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch

from quant.timing import milliseconds

Cells = Sequence[object]
# Errors by which a row fails while the others go on. Where a pipeline or the loader runs out of memory, MemoryError is
# raised; FloatingPointError is an ArithmeticError.
FAILURES = (
    *(RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, OSError, MemoryError),
    ArithmeticError,
)


def attempted(tasks: Mapping[str, Callable[[], Cells]], columns: int, seconds: float = float("inf")) -> Iterator[Cells]:
    """The rows of a table, each with its name first; a row that fails says why, and the next one starts all the same.

    Args:
        tasks: what measures each row.
        columns: the cells of a row, its name included.
        seconds: time limit, after which no further row is started.
    """
    start = time.monotonic()
    for name, measure in tasks.items():
        if time.monotonic() - start > seconds:
            yield [name, f"not started, {seconds:g} s are over", *["-"] * (columns - 2)]
            continue
        try:
            yield [name, *measure()]
        except FAILURES as error:
            yield [name, f"failed: {said_of(error, 200)}", *["-"] * (columns - 2)]
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def said_of(error: Exception, most: int) -> str:
    """The class of an error, and the first line of its message, where it has one, cut after so many characters."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:most]}"


def step_time(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a step, launches included: on a GPU between two events, else by the clock."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            run()
            return milliseconds(run, repeats)
    return median(_clocked(run) for _ in range(repeats))


def peak_of(run: Callable[[], object], device: torch.device) -> float:
    """Peak of the device's memory while this runs, in units of 1e9 bytes; 0 on devices that do not count."""
    if device.type != "cuda":
        run()
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def _clocked(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)
