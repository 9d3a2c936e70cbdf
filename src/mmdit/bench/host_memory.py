"""Which stage takes the memory of the process: before there is a model, while it loads, while it draws, afterwards.

Nothing is done on the device but what loading and drawing do: random weights are made in host memory, where reading a
file would leave them. Each kernel that is used for the first time costs host memory, because the driver keeps the code
of its library; weights that are drawn and quantized on the device take 0.24 GB in this way.

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
from torch import Tensor, nn

from encoders import Tokenizers
from mmdit.bench import memory as bench_memory
from mmdit.bench.random_models import recipe_of
from mmdit.bench.rows import FAILURES, said_of
from mmdit.checkpoints.load_pipeline import Components
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.device_memory import memory_of
from mmdit.runtime.host_memory import give_back
from mmdit.utils import markdown_table, weight_bytes
from quant.quantize import kept, linears_of
from quant.recipe import Recipe
from quant.tensor import Float8Tensor

T = TypeVar("T")
_PAUSE = 0.01  # seconds between two readings of a peak
_SIDE = 1024  # of the piece of random numbers that weights are copies of


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
    """Have models in host memory, draw with them within a budget, and read the memory of the process after each stage.

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
        yield watch("CUDA context", lambda: memory_of(device))
        watch.pipe = pipe = watch.result(lambda: _pipeline(model, recipe, budget, device, dtype))
        yield watch.row("weights in host memory")
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


def _pipeline(model: str, recipe: str, budget: str, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """A pipeline as `Pipeline.load` returns it, with random weights."""
    parts = {"transformer": bench_memory.transformer_of(model), **bench_memory.encoders_of(model, dtype)}
    for name, part in parts.items():
        as_if_read(part, None if recipe == "16" or name not in ("transformer", "t5") else recipe_of(recipe), dtype)
    memory: dict[str, Any] = {"offload": "stages"} if budget == bench_memory.STAGES else {"memory": budget}
    found: Any = {"tokenizers": Tokenizers.from_folder(EMBEDDED), "shift": 3.0, **parts}
    return Pipeline(Components(**found), device=device, name="random weights", **memory)


@torch.no_grad()
def as_if_read(part: nn.Module, recipe: Recipe | None, dtype: torch.dtype) -> None:
    """Give a model random weights in host memory, float8 ones with a recipe, without a kernel of the device.

    All are copies of one small piece of random numbers: to draw 8 billion takes a CPU minutes.
    """
    values = 0.02 * torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    if recipe is not None:
        codes = Float8Tensor.quantize(values.to(dtype), recipe=recipe)
        for name, linear in linears_of(part):
            if kept(name) is None:
                linear.weight = _float8(linear.weight.shape, codes).as_parameter()
    bench_memory.make_empty(part, dtype)
    part.requires_grad_(False).eval()
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        if tensor.ndim > 1 and not isinstance(tensor, Float8Tensor):
            _repeat(values.to(tensor.dtype), tensor)
        elif tensor.ndim < 2 and tensor.is_floating_point():
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)


def _float8(shape: torch.Size, codes: Float8Tensor) -> Float8Tensor:
    """A weight of this shape with these codes again and again, under their largest scale."""
    qdata = torch.empty(shape, dtype=codes.qdata.dtype)
    _repeat(codes.qdata.view(torch.uint8), qdata.view(torch.uint8))
    scale = codes.scale.max().expand(shape[0], 1).contiguous() if codes.scale.ndim else codes.scale.clone()
    static = torch.tensor(6 / 448) if codes.recipe.activation == "static" else None
    return Float8Tensor(qdata, scale, static, codes.recipe, codes.dtype)


def _repeat(values: Tensor, into: Tensor) -> None:
    """Fill a contiguous tensor with these values, again and again."""
    values, into = values.reshape(-1), into.reshape(-1)
    whole = len(into) // len(values) * len(values)
    into[:whole].view(-1, len(values)).copy_(values)
    into[whole:].copy_(values[: len(into) - whole])


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
        """Bytes of the weights, which are all in host memory; of those that travel in one piece, with its gaps."""
        if self.pipe is None or self.pipe._turns is None:
            return 0
        units = self.pipe._turns._units
        return sum(
            sum(len(unit.memory) for unit in units[model].values()) if units.get(model) else weight_bytes(model)
            for model in self.pipe.models.values()
        )


def _pinned() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


_TITLES = (
    "after",
    "seconds",
    "RssAnon GB",
    "weights on the host",
    "RssAnon above them",
    "its peak meanwhile",
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
        above = (one.anon - one.weights, one.peak - one.weights)
        parts = (one.anon, one.weights, *above, one.used, one.kept, one.pinned)
        numbers += [f"{part:.2f}" for part in parts]
        numbers += [f"{one.objects}", f"{one.modules}"]
        rows.append((one.name, *(["-"] * len(numbers) if one.failed else numbers)))
    lines = markdown_table(_TITLES, rows)
    return "\n".join([*(one.failed for one in found if one.failed), *lines])
