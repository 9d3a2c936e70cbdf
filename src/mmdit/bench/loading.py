"""From a file to the device: speed and memory of loading, beside reading alone and the safetensors library.

`mmdit bench loading` writes random files with the keys and shapes of an official transformer into a temporary folder.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mmdit.bench.random_models import MODELS, check_names
from mmdit.bench.rows import Cells, attempted
from mmdit.checkpoints.float8 import metadata_in, spelled
from mmdit.checkpoints.lazy import Codes, LazyTensor
from mmdit.checkpoints.load import READERS, build, load_mmdit, open_model
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.safetensors_io import STAGING, stream_tensors
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.utils import weight_bytes
from quant.quantize import kept, linears_of
from quant.recipe import RECIPES, Recipe

COLUMNS = ("", "seconds", "GB/s", "to reading", "peak of the device, GB", "result, GB", "peak - result", "RssAnon, GB")
_RECIPE = "fp8"


def loading(
    model: str = "large",
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    cold: bool = False,
    folder: Path | None = None,
    seconds: float = 75.0,
) -> Iterator[Cells]:
    """Rows of `COLUMNS` for a float8 file, and for a 16-bit file that is quantized while it is read.

    Args:
        model: one of `MODELS`, whose transformer is written.
        device: where to load.
        dtype: of the 16-bit weights.
        blocks: write so many blocks only; None writes all.
        cold: drop each file from the page cache before it is read, which takes the disk's time.
        folder: where to make the temporary folder; None is the system's choice.
        seconds: time limit, after which no further row is started.
    """
    check_names((model,), MODELS)
    config = MODELS[model] if blocks is None else replace(MODELS[model], depth=blocks)
    start = time.monotonic()
    load_mmdit(EMBEDDED, device=device, dtype=dtype)  # imports and page-locked memory are not what is measured
    for recipe in (RECIPES[_RECIPE], None):
        with TemporaryDirectory(dir=folder) as place:
            with torch.device("meta"):
                shapes = MMDiT(config)
            bench = _Bench(Path(place) / "model.safetensors", shapes, recipe, torch.device(device), dtype, cold)
            yield from attempted(bench.tasks(), len(COLUMNS), seconds - (time.monotonic() - start))


class _Bench:
    """The rows of one file."""

    def __init__(
        self, path: Path, shapes: MMDiT, recipe: Recipe | None, device: torch.device, dtype: torch.dtype, cold: bool
    ) -> None:
        self.path, self.shapes, self.recipe = path, shapes, recipe
        self.device, self.dtype, self.cold = device, dtype, cold
        self.rate = 0.0  # bytes a second of the quickest reading

    def tasks(self) -> dict[str, Callable[[], Cells]]:
        """By name: writing comes first, and reading before loading, which is compared with it."""
        name, threads = "float8 file" if self.recipe else "16-bit file", READERS[self.device.type == "cuda"]
        found = {
            f"{name}: written": self.write,
            f"{name}: read by one thread": lambda: self.read(1),
            f"{name}: read by {threads} threads": lambda: self.read(threads),
        }
        if self.device.type == "cuda" and self.recipe is not None:
            locked = "page-locked memory"
            found[f"{name}: read into {locked} by {threads} threads"] = lambda: self.read(threads, locked=True)
            found[f"{name}: as many bytes from {locked} to the device"] = self.link
            found[f"{name}: as many bytes allocated on the device"] = self.allocate
        if self.recipe is None:
            return {**found, f"{name}: loaded with quant={_RECIPE!r}": lambda: self.load(self.load_quantized)}
        return {
            **found,
            f"{name}: loaded": lambda: self.load(lambda: load_mmdit(self.path, device=self.device)),
            f"{name}: tensors read by safetensors": lambda: self.load(self.by_library),
        }

    def write(self) -> Cells:
        start = time.perf_counter()
        tensors = random_tensors(self.shapes, self.recipe, self.dtype)
        metadata = None if self.recipe is None else metadata_in(tensors, "comfyui")
        with self.path.open("wb") as file:
            stream_tensors(file, self.path, tensors if self.recipe is None else spelled(tensors, "comfyui"), metadata)
            if self.cold:
                file.flush()
                os.fsync(file.fileno())
        return self.cells(time.perf_counter() - start)

    def read(self, threads: int, *, locked: bool = False) -> Cells:
        """The whole file, a part by each thread, into a buffer of each that is used again."""
        self.drop()
        size = self.path.stat().st_size
        parts = [(size * i // threads, size * (i + 1) // threads) for i in range(threads)]
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(partial(self.read_part, locked=locked), parts))
        took = time.perf_counter() - start
        if not locked:
            self.rate = max(self.rate, size / took)
        return self.cells(took)

    def read_part(self, part: tuple[int, int], *, locked: bool) -> None:
        begin, end = part
        buffer = memoryview(bytearray(STAGING))
        if locked:
            into: Any = torch.empty(STAGING, dtype=torch.uint8, pin_memory=True).numpy()
            buffer = memoryview(into)
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            while begin < end:
                begin += file.readinto(buffer[: end - begin]) or end

    def link(self) -> Cells:
        """Copies of one buffer to the device."""
        source = torch.empty(STAGING, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=self.device)
        target.copy_(source)
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.path.stat().st_size // STAGING):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(self.device)
        return self.cells(time.perf_counter() - start)

    def allocate(self) -> Cells:
        """Tensors as many and as large as those of the model, one byte a value, not filled."""
        sizes = [one.numel() for one in self.shapes.state_dict().values()]
        start = time.perf_counter()
        filled = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        torch.cuda.synchronize(self.device)
        took = time.perf_counter() - start
        del filled
        return self.cells(took)

    def load(self, load: Callable[[], Any]) -> Cells:
        """Seconds of loading, the peak of the device above what it held, and by how much RssAnon grew."""
        self.drop()
        gc.collect()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.empty(1, device=self.device)  # the context is not what is measured
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        with anonymous_memory() as grown:
            start = time.perf_counter()
            loaded = load()
            if cuda:
                torch.cuda.synchronize(self.device)
            took = time.perf_counter() - start
        result = weight_bytes(loaded) if isinstance(loaded, MMDiT) else sum(one.nbytes for one in loaded.values())
        peak = torch.cuda.max_memory_allocated(self.device) - before if cuda else 0
        return self.cells(took, peak, result, grown[0])

    def load_quantized(self) -> MMDiT:
        """As a pipeline loads it with `quant=`."""
        stored = open_model(locate(self.path), "transformer")
        return build(stored, self.device, self.dtype, recipe=RECIPES[_RECIPE])

    def by_library(self) -> dict[str, Tensor]:
        """Every tensor by safetensors' own reader, mapped to nothing."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt", device=str(self.device)) as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        return found if self.device.type == "cuda" else {key: one.clone() for key, one in found.items()}

    def drop(self) -> None:
        """Drop the file from the page cache, where that is asked for."""
        if self.cold:
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def cells(self, took: float, peak: int = 0, result: int = 0, grown: int | None = None) -> Cells:
        size = self.path.stat().st_size
        ratio = f"{size / took / self.rate:.2f}" if self.rate and result else "-"
        memory = [f"{peak / 1e9:.2f}" if peak else "-", f"{result / 1e9:.2f}" if result else "-"]
        above = f"{(peak - result) / 1e9:.2f}" if peak else "-"
        return [f"{took:.2f}", f"{size / took / 1e9:.2f}", ratio, *memory, above, _gigabytes(grown)]


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f}"


def random_tensors(shapes: MMDiT, recipe: Recipe | None, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Tensors with the shapes of a model, all cut from one piece of random numbers; with a recipe, float8 Linears."""
    state = shapes.state_dict()
    largest = max(one.numel() for one in state.values())
    values = 0.02 * torch.randn(largest, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes = torch.randint(0, 127, (largest if recipe else 0,), dtype=torch.uint8).view(torch.float8_e4m3fn)
    rounded = {f"{name}.weight" for name, _ in linears_of(shapes) if recipe is not None and not kept(name)}
    found = {}
    for key, one in state.items():
        shape = tuple(one.shape)
        if key in rounded and recipe is not None:
            scale = torch.full((shape[0], 1), 1e-4)
            made = Codes(shape, _cut(codes, shape), scale, None, recipe)
            found[key] = LazyTensor(shape, codes.dtype, _cut_as(codes, shape), made)
        else:
            found[key] = LazyTensor(shape, dtype, _cut_as(values, shape))
    return found


def _cut(source: Tensor, shape: tuple[int, ...]) -> Callable[[torch.device], Tensor]:
    size = torch.Size(shape).numel()
    return lambda device: source[:size].view(shape).to(device)


def _cut_as(source: Tensor, shape: tuple[int, ...]) -> Callable[[torch.dtype, torch.device], Tensor]:
    size = torch.Size(shape).numel()
    return lambda dtype, device: source[:size].view(shape).to(device, dtype)


@contextmanager
def anonymous_memory() -> Iterator[list[int | None]]:
    """Inside, this process's anonymous memory is watched; the first item is then by how many bytes it grew at most.

    None where the system has no /proc.
    """
    before, stop = _rss_anon(), threading.Event()
    grown: list[int | None] = [None]
    if before is None:
        yield grown
        return
    most = [before]

    def watch() -> None:
        while not stop.wait(0.01):
            most[0] = max(most[0], _rss_anon() or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        stop.set()
        watcher.join()
        grown[0] = max(most[0], _rss_anon() or 0) - before


def _rss_anon() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="ascii").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), None)
