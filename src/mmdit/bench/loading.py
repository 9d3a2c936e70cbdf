"""From a file to the device: speed and memory of loading, beside reading alone and the safetensors library.

`mmdit bench loading` writes random files with the keys and shapes of an official transformer into a temporary folder.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mmdit.bench import cold as cold_ways
from mmdit.bench.cold import read_part
from mmdit.bench.random_models import MODELS, check_names
from mmdit.bench.rows import Cells, attempted
from mmdit.checkpoints.float8 import metadata_in, spelled
from mmdit.checkpoints.lazy import Codes, LazyTensor
from mmdit.checkpoints.load import build, check_loads, load_mmdit, open_model
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.safetensors_io import read_header, stream_tensors
from mmdit.checkpoints.staging import PIECE, READERS, filled
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.utils import weight_bytes
from quant.quantize import kept, linears_of
from quant.recipe import RECIPES, Recipe

COLUMNS = (
    *("", "in the page cache before", "seconds", "GB/s", "to reading"),
    *("peak of the device, GB", "result, GB", "peak - result", "RssAnon, GB"),
)
_RECIPE = "fp8"
_COLD = "from the disk"
_LARGE = 4 * PIECE  # bytes of a buffer, in the row that tells whether larger ones are quicker
_SWITCH = 2e-4  # seconds after which a thread may run Python, in the row that tells whether threads wait for each other


def loading(
    model: str = "large",
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    readers: Sequence[int] = (1, 2, 4, 8),
    folder: Path | None = None,
    seconds: float = 80.0,
) -> Iterator[Cells]:
    """Rows of `COLUMNS` for a float8 file, and for a 16-bit file that is quantized while it is read.

    Each file is read and loaded from the page cache, and the float8 file also from the disk: its pages are written back
    and dropped, and the second column says which share of them is in the cache all the same. Where that is not 0 %, as
    in a folder that has no disk, the row is no reading of a disk. "To reading" compares with the quickest reading from
    the same place, by one or four threads, that does nothing with what it reads.

    Args:
        model: one of `MODELS`, whose transformer is written.
        device: where to load.
        dtype: of the 16-bit weights.
        blocks: write so many blocks only; None writes all.
        readers: numbers of threads that fill the tensors, a row for each.
        folder: where to make the temporary folder; None is the system's choice.
        seconds: time limit, after which no further row is started.
    """
    check_names((model,), MODELS)
    config = MODELS[model] if blocks is None else replace(MODELS[model], depth=blocks)
    start = time.monotonic()
    took = _warmed(torch.device(device), dtype)
    yield ["the first float8 model of a process, which is tiny", "-", f"{took:.2f}", *["-"] * (len(COLUMNS) - 3)]
    for recipe in (RECIPES[_RECIPE], None):
        with TemporaryDirectory(dir=folder) as place:
            with torch.device("meta"):
                shapes = MMDiT(config)
            bench = _Bench(Path(place) / "model.safetensors", shapes, recipe, torch.device(device), dtype, readers)
            yield from attempted(bench.tasks(), len(COLUMNS), seconds - (time.monotonic() - start))


def from_disk(
    model: str = "large",
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    folder: Path | None = None,
    seconds: float = 60.0,
) -> Iterator[Cells]:
    """Rows of `mmdit.bench.cold.COLUMNS`: the float8 file read and loaded from the disk, and ways to fill its tensors.

    The arguments are those of `loading`.
    """
    check_names((model,), MODELS)
    end, device = time.monotonic() + seconds, torch.device(device)
    config = MODELS[model] if blocks is None else replace(MODELS[model], depth=blocks)
    _warmed(device, dtype)
    with TemporaryDirectory(dir=folder) as place:
        with torch.device("meta"):
            shapes = MMDiT(config)
        bench = _Bench(Path(place) / "model.safetensors", shapes, RECIPES[_RECIPE], device, dtype, ())
        bench.write()
        bench.flush()
        whole = {
            f"the whole file {name}": partial(_first_cells, task)
            for name, task in bench.loads().items()
            if name in (f"{_COLD}: read by 4 threads", f"{_COLD}: loaded")
        }
        yield from attempted(whole, len(cold_ways.COLUMNS), end - time.monotonic())
        yield from cold_ways.cold(bench.path, device, partial(bench.drop, True), end - time.monotonic())


def _first_cells(task: Callable[[], Cells]) -> Cells:
    """Whether the file was in the page cache, seconds, and gigabytes a second."""
    return task()[: len(cold_ways.COLUMNS) - 1]


def _warmed(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the first model with float8 weights, after one without."""
    load_mmdit(EMBEDDED, device=device, dtype=dtype)
    start = time.perf_counter()
    build(open_model(locate(EMBEDDED), "transformer"), device, dtype, recipe=RECIPES[_RECIPE])
    return time.perf_counter() - start


class _Bench:
    """The rows of one file."""

    def __init__(
        self,
        path: Path,
        shapes: MMDiT,
        recipe: Recipe | None,
        device: torch.device,
        dtype: torch.dtype,
        readers: Sequence[int],
    ) -> None:
        self.path, self.shapes, self.recipe = path, shapes, recipe
        self.device, self.dtype, self.readers = device, dtype, readers
        self.rates = {False: 0.0, True: 0.0}  # bytes a second of the quickest reading, by whether it is from the disk

    def tasks(self) -> dict[str, Callable[[], Cells]]:
        """By name: writing comes first, and reading before loading, which is compared with it."""
        name = "float8 file" if self.recipe else "16-bit file"
        found: dict[str, Callable[[], Cells]] = {
            "written": self.write,
            "read by one thread": lambda: self.read(1),
            "read by 4 threads": lambda: self.read(4),
        }
        if self.recipe is None:
            found[f"loaded with quant={_RECIPE!r}"] = lambda: self.load(self.load_quantized)
        else:
            found |= self.parts() | self.loads()
        return {f"{name}: {key}": task for key, task in found.items()}

    def parts(self) -> dict[str, Callable[[], Cells]]:
        """What loading is made of, part by part."""
        found: dict[str, Callable[[], Cells]] = {}
        if self.device.type == "cuda":
            found |= {
                "read into page-locked memory by 4 threads": lambda: self.read(4, locked=True),
                "as many bytes from page-locked memory to the device": self.link,
                "as many bytes allocated on the device": self.allocate,
            }
        found |= {
            "header, names and scales read": lambda: self.timed(self.open),
            "the module made": lambda: self.timed(lambda: check_loads(self.opened)),
        }
        for count in self.readers:
            found[f"tensors filled by {_threads(count)}"] = partial(self.load, partial(self.fill, count))
        large = f"tensors filled by {_threads(READERS)}, {_LARGE / 2**20:g} MiB at a time"
        return found | {large: lambda: self.load(lambda: self.fill(READERS, _LARGE))}

    def loads(self) -> dict[str, Callable[[], Cells]]:
        """The file loaded, and read by safetensors; from the disk too."""

        def ours() -> MMDiT:
            return load_mmdit(self.path, device=self.device)

        return {
            "loaded": lambda: self.load(ours),
            "loaded, threads take turns after 0.2 ms": lambda: self.load(partial(_with_short_turns, ours)),
            "tensors read by safetensors": lambda: self.load(self.by_library),
            "flushed to the disk": lambda: self.timed(self.flush),
            f"{_COLD}: read by 4 threads": lambda: self.read(4, cold=True),
            f"{_COLD}: loaded": lambda: self.load(ours, cold=True),
            f"{_COLD}: read by one thread": lambda: self.read(1, cold=True),
            f"{_COLD}: tensors read by safetensors": lambda: self.load(self.by_library, cold=True),
        }

    def write(self) -> Cells:
        start = time.perf_counter()
        tensors = random_tensors(self.shapes, self.recipe, self.dtype)
        metadata = None if self.recipe is None else metadata_in(tensors, "comfyui")
        with self.path.open("wb") as file:
            stream_tensors(file, self.path, tensors if self.recipe is None else spelled(tensors, "comfyui"), metadata)
        return self.cells(time.perf_counter() - start)

    def flush(self) -> None:
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())

    def timed(self, run: Callable[[], object]) -> Cells:
        """A part that does not read the file's weights."""
        start = time.perf_counter()
        run()
        return ["-", f"{time.perf_counter() - start:.2f}", *["-"] * (len(COLUMNS) - 3)]

    def open(self) -> None:
        self.opened = open_model(locate(self.path), "transformer")

    def read(self, threads: int, *, locked: bool = False, cold: bool = False) -> Cells:
        """The whole file, a part by each thread, into a buffer of each that is used again."""
        cached = self.drop(cold)
        size = self.path.stat().st_size
        parts = [(size * i // threads, size * (i + 1) // threads) for i in range(threads)]
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(partial(read_part, self.path, locked=locked), parts))
        took = time.perf_counter() - start
        if not locked:
            self.rates[cold] = max(self.rates[cold], size / took)
        return self.cells(took, cached)

    def link(self) -> Cells:
        """Copies of one buffer to the device."""
        source = torch.empty(PIECE, dtype=torch.uint8, device="cpu", pin_memory=True)
        target = torch.empty_like(source, device=self.device)
        target.copy_(source)
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.path.stat().st_size // PIECE):
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

    def fill(self, readers: int, size: int = PIECE) -> dict[str, Tensor]:
        """All tensors of the file, as loading to a GPU reads them."""
        wanted = read_header(self.path).stored()
        with filled(wanted, self.device, readers=readers, size=size) as found:
            pass
        return found

    def load(self, load: Callable[[], Any], *, cold: bool = False) -> Cells:
        """Seconds of loading, the peak of the device above what it held, and by how much RssAnon grew."""
        cached = self.drop(cold)
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
        return self.cells(took, cached, peak, result, grown[0], self.rates[cold])

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

    def drop(self, cold: bool) -> float | None:
        """Drop the file from the page cache where it is to be read from the disk; returns what is in the cache then."""
        with self.path.open("rb") as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return in_page_cache(file.fileno())

    def cells(
        self,
        took: float,
        cached: float | None = None,
        peak: int = 0,
        result: int = 0,
        grown: int | None = None,
        rate: float = 0.0,
    ) -> Cells:
        size = self.path.stat().st_size
        share = "-" if cached is None else f"{100 * cached:.0f} %"
        ratio = f"{size / took / rate:.2f}" if rate else "-"
        memory = [f"{peak / 1e9:.2f}" if peak else "-", f"{result / 1e9:.2f}" if result else "-"]
        above = f"{(peak - result) / 1e9:.2f}" if peak else "-"
        return [share, f"{took:.2f}", f"{size / took / 1e9:.2f}", ratio, *memory, above, _gigabytes(grown)]


def in_page_cache(file: int, samples: int = 500) -> float | None:
    """The share of an open file that can be read without a disk, by samples; None where the system does not say."""
    size = os.fstat(file).st_size
    if not hasattr(os, "RWF_NOWAIT") or not size:
        return None
    found = 0
    for i in range(samples):
        try:
            found += bool(os.preadv(file, [bytearray(1)], size * i // samples, os.RWF_NOWAIT))
        except BlockingIOError:
            pass
        except OSError:
            return None
    return found / samples


def _with_short_turns(load: Callable[[], MMDiT]) -> MMDiT:
    """Load while threads that run Python take turns more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        return load()
    finally:
        sys.setswitchinterval(before)


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


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
        while not stop.wait(0.03):
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
