"""Which stage takes the memory of the process: before there is a model, while it loads, while it draws, afterwards.

"RssAnon" are pages that no file backs. Of these, what `malloc` has given out is in use; what it keeps was freed, and
goes back to the system when `malloc_trim` is called. Pages that CUDA pins are no part of what `malloc` counts, and
neither are the weights, which lie in pages of their own (`mmdit.runtime.host_memory`).
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, TypeVar

import torch

from mmdit.bench import memory as bench_memory
from mmdit.bench.rows import FAILURES, said_of
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.host_memory import give_back
from mmdit.utils import markdown_table

T = TypeVar("T")
_PAUSE = 0.01  # seconds between two readings of a peak


@dataclass
class Stage:
    """The memory of the process after a stage, in gigabytes (1e9 bytes); what cannot be read is 0."""

    name: str
    seconds: float = 0.0
    anon: float = 0.0  # RssAnon
    peak: float = 0.0  # of RssAnon within the stage
    weights: float = 0.0  # that are in host memory
    used: float = 0.0  # that malloc has given out, in its heaps and in mappings of their own
    kept: float = 0.0  # that was freed, and that malloc keeps
    pinned: float = 0.0  # that torch has pinned, its cache included
    objects: int = 0  # that Python's collector knows
    modules: int = 0  # that Python has imported
    failed: str = ""


class _Info(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "x")
    )


def malloc() -> tuple[int, int]:
    """Bytes that malloc has given out, and freed ones that it keeps, in all arenas; zeros where it does not say."""
    if sys.platform != "linux":
        return 0, 0
    with suppress(AttributeError, OSError):
        ask = ctypes.CDLL(None).mallinfo2
        ask.restype = _Info
        info: Any = ask()
        return info.uordblks + info.hblkhd, info.fordblks
    return 0, 0


def stages(
    model: str = "large",
    recipe: str = "fp8",
    budget: str = "8GB",
    *,
    fast: bool = False,
    steps: int = 6,
    size: int | None = None,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Stage]:
    """Load and draw as `mmdit.bench.memory.budgets` does, and read the memory of the process after each stage.

    Args:
        model: of `mmdit.bench.random_models.MODELS`.
        recipe: a name of `quant.RECIPES`, or "16".
        budget: a budget, or "stages".
        fast: whether to draw with the accelerated forward.
        steps: of a picture.
        size: side of the picture in pixels; None is the model's.
        device, dtype: of all models.
    """
    device = torch.device(device)
    watch = _Watch()
    yield watch("imports", lambda: None)
    try:
        yield watch("a first kernel (CUDA context)", lambda: torch.ones(16, device=device).sum().item())
        yield watch("a product and a convolution", lambda: bench_memory._base(device, dtype))
        encoders = watch.result(lambda: bench_memory._encoders(model, recipe, device, dtype))
        yield watch.row("text encoders and VAE on the device")
        pipe = watch.result(lambda: bench_memory._pipeline(model, recipe, encoders, device, dtype, None))
        watch.pipe = pipe
        yield watch.row("the transformer on the device")
        yield watch("weights to pinned host memory", lambda: _home(pipe, budget))
        if fast:
            yield watch("accelerate()", pipe.accelerate)
        how: dict[str, Any] = {"height": size, "width": size, "guidance_scale": 4.5, "seed": 0, "progress": False}
        for prompt, name in zip(bench_memory.PROMPTS, ("first", "second"), strict=True):
            draw = {"num_inference_steps": steps, "output_type": "latent", **how}
            latents = watch.result(lambda prompt=prompt, draw=draw: pipe(prompt, **draw).images)  # type: ignore[misc]
            yield watch.row(f"{name} picture, its {steps} steps")
            yield watch(f"{name} picture, decoded", lambda latents=latents: pipe.decode(latents))  # type: ignore[misc]
        yield watch("a garbage collection", gc.collect)
        yield watch("malloc_trim", give_back)
        yield watch("without models on the device", lambda: _left(pipe))
    except FAILURES as error:
        where = " < ".join(
            f"{one.filename.rpartition('/')[2]}:{one.lineno} {one.name}" for one in reversed(_frames(error))
        )
        yield Stage("failed", failed=f"{said_of(error, 600)} (in {where})")


def _frames(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


def _home(pipe: Pipeline, budget: str) -> None:
    """Have all weights on the host, in the pages of the units that visit the device; they were on the device before."""
    pipe._set_budget(bench_memory._bytes_of("resident"))
    pipe._enter("transformer")  # all models, with a budget that holds them
    pipe._set_budget(bench_memory._bytes_of(budget))
    bench_memory._emptied(pipe.device)


def _left(pipe: Pipeline) -> None:
    pipe._leave()
    bench_memory._emptied(pipe.device)


class _Watch:
    """Runs stages, and reads the memory of the process meanwhile."""

    def __init__(self) -> None:
        self.pipe: Pipeline | None = None
        self._seconds = self._peak = 0.0

    def __call__(self, name: str, run: Callable[[], object]) -> Stage:
        """The row of a stage."""
        self.result(run)
        return self.row(name)

    def result(self, run: Callable[[], T]) -> T:
        """What a stage gives."""
        stop, seen, start = Event(), [bench_memory.host_bytes()], time.perf_counter()

        def read() -> None:
            while not stop.wait(_PAUSE):
                seen[0] = max(seen[0], bench_memory.host_bytes())

        thread = Thread(target=read, daemon=True)
        thread.start()
        try:
            return run()
        finally:
            stop.set()
            thread.join()
            self._seconds, self._peak = time.perf_counter() - start, max(seen[0], bench_memory.host_bytes()) / 1e9

    def row(self, name: str) -> Stage:
        """The row of the last stage."""
        used, kept = malloc()
        return Stage(
            name,
            self._seconds,
            bench_memory.host_bytes() / 1e9,
            self._peak,
            self._weights() / 1e9,
            used / 1e9,
            kept / 1e9,
            _pinned() / 1e9,
            len(gc.get_objects()) + gc.get_freeze_count(),
            len(sys.modules),
        )

    def _weights(self) -> int:
        """Bytes of pages that units own."""
        turns = None if self.pipe is None else self.pipe._turns
        units = [] if turns is None else [unit for each in turns._units.values() for unit in each.values()]
        return sum(len(unit.memory) for unit in units)


def _pinned() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


_TITLES = (
    "after",
    "seconds",
    "RssAnon GB",
    "its peak meanwhile",
    "weights on the host",
    "RssAnon above them",
    "malloc in use",
    "malloc keeps freed",
    "pinned by torch",
    "Python objects",
    "modules",
)


def table(found: Sequence[Stage]) -> str:
    """The stages as Markdown."""
    rows = []
    for one in found:
        numbers = [f"{one.seconds:.1f}"]
        parts = (one.anon, one.peak, one.weights, one.anon - one.weights, one.used, one.kept, one.pinned)
        numbers += [f"{part:.2f}" for part in parts]
        numbers += [f"{one.objects}", f"{one.modules}"]
        rows.append((one.name, *(["-"] * len(numbers) if one.failed else numbers)))
    lines = markdown_table(_TITLES, rows)
    return "\n".join([*(one.failed for one in found if one.failed), *lines])
