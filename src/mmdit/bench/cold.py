"""Ways of reading a file from the disk to the device, each on a part of the file that is not in the page cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmdit.bench.rows import Cells, attempted
from mmdit.checkpoints.safetensors_io import FileTensor, read_header, read_into
from mmdit.checkpoints.staging import PIECE, RUN, filled

COLUMNS = ("", "in the page cache before", "seconds", "GB/s")
PASSES = 2
Wanted = Mapping[str, FileTensor]
Way = Callable[[Wanted], object]
_MIB = 2**20


def cold(path: Path, device: torch.device, drop: Callable[[], float | None], seconds: float = 60.0) -> Iterator[Cells]:
    """Rows of `COLUMNS`: each way on a part of the file of its own, in several passes.

    The file is cut into as many parts as there are ways, and dropped from the page cache before each pass. In the next
    pass each way reads the part of its neighbour, so that a quick way and a quick place on the disk can be told apart.

    Args:
        path: a file that lies on a disk.
        device: where the tensors go.
        drop: drops the file from the page cache, and returns the share that is in it all the same.
        seconds: time limit, after which no further row is started.
    """
    ways = _ways(device)
    parts = cut(read_header(path).stored(), len(ways))
    end = time.monotonic() + seconds
    for number in range(PASSES):
        share = drop()
        cached = "-" if share is None else f"{100 * share:.0f} %"
        tasks = {
            f"pass {number + 1}: {name}": partial(_row, way, parts[(i + number) % len(parts)], device, cached)
            for i, (name, way) in enumerate(ways.items())
        }
        yield from attempted(tasks, len(COLUMNS), end - time.monotonic())


def cut(wanted: Wanted, count: int) -> list[Wanted]:
    """Tensors of a file in so many parts of neighbours that are about equally large."""
    parts: list[dict[str, FileTensor]] = [{} for _ in range(count)]
    ordered = sorted(wanted.items(), key=lambda item: item[1].entry.start)
    begin, stop = ordered[0][1].entry.start, ordered[-1][1].entry.stop
    for key, tensor in ordered:
        parts[min(count * (tensor.entry.start - begin) // (stop - begin), count - 1)][key] = tensor
    return list(parts)


def _ways(device: torch.device) -> dict[str, Way]:
    def into_tensors(readers: int, size: int, run: int) -> Way:
        def way(wanted: Wanted) -> object:
            with filled(wanted, device, readers=readers, size=size * _MIB, run=run * _MIB) as found:
                pass
            return found

        return way

    run = RUN // _MIB
    return {
        "only read by 4 threads": partial(_only_read, 4, device.type == "cuda"),
        "tensors filled by 4 threads, 8 MiB by turns": into_tensors(4, 8, 8),
        f"tensors filled by 4 threads, {run} MiB in order": into_tensors(4, 8, run),
        "only read by 16 threads": partial(_only_read, 16, device.type == "cuda"),
        f"tensors filled by 8 threads, {run} MiB in order": into_tensors(8, 8, run),
        f"tensors filled by 16 threads, {run} MiB in order": into_tensors(16, 8, run),
        "tensors filled by 16 threads, 8 MiB by turns": into_tensors(16, 8, 8),
        f"tensors filled by 8 threads, 2 MiB at a time, {run} MiB in order": into_tensors(8, 2, run),
    }


def _only_read(threads: int, locked: bool, wanted: Wanted) -> None:
    """Read what lies between the first and the last byte, a part by each thread, into one buffer of each."""
    path = next(iter(wanted.values())).header.path
    begin = min(one.entry.start for one in wanted.values())
    size = max(one.entry.stop for one in wanted.values()) - begin
    parts = [(begin + size * i // threads, begin + size * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(partial(read_part, path, locked=locked), parts))


def read_part(path: Path, part: tuple[int, int], *, locked: bool) -> None:
    """Read the bytes of a file from the first up to the second place into one buffer, which may be page-locked.

    Raises:
        CheckpointError: the file ends before the second place.
    """
    begin, end = part
    buffer = memoryview(bytearray(PIECE))
    if locked:
        into: Any = torch.empty(PIECE, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()
        buffer = memoryview(into)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while begin < end:
            piece = buffer[: end - begin]
            read_into(path, file.fileno(), piece)
            begin += len(piece)


def _row(way: Way, wanted: Wanted, device: torch.device, cached: str) -> Cells:
    start = time.perf_counter()
    made = way(wanted)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - start
    del made
    return [
        cached,
        f"{took:.2f}",
        f"{sum(one.entry.stop - one.entry.start for one in wanted.values()) / took / 1e9:.2f}",
    ]
