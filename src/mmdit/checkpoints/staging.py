"""Tensors of files read to a GPU in large pieces, each of which is read once and copied to all tensors that it holds.

A file is read by several threads. Each has `Buffers` and a stream of its own. Only one thread at a time runs Python, so
that a piece costs few calls beside reading, and no thread waits for what another one copies. A thread reads many
neighbouring pieces before it goes on elsewhere, because systems read ahead of a file that is read in order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.checkpoints.safetensors_io import Buffers, FileTensor, Header, check_same, memory_of, opened, read_into

READERS = 4  # threads
PIECE = 8 * 2**20  # bytes of a buffer
RUN = 256 * 2**20  # bytes that a thread reads in order


class Part(NamedTuple):
    """Bytes of a tensor in a piece: `size` of them, from `begin` in the tensor and from `offset` in the piece."""

    key: str
    begin: int
    offset: int
    size: int


@dataclass
class Piece:
    """Bytes of a file, from `start` up to `stop`, and the parts of tensors that they are."""

    header: Header
    start: int
    stop: int
    parts: list[Part] = field(default_factory=list)


def pieces(wanted: Mapping[str, FileTensor], size: int = PIECE) -> list[Piece]:
    """Pieces of at most `size` bytes that hold these tensors and nothing else, in the order of the files."""
    found: list[Piece] = []
    for key, tensor in sorted(wanted.items(), key=lambda item: (item[1].header.path, item[1].entry.start)):
        header, (_, _, at, stop) = tensor.header, tensor.entry
        while at < stop:
            piece = found[-1] if found else None
            if piece is None or piece.header is not header or piece.stop != at or piece.stop - piece.start >= size:
                piece = Piece(header, at, at)
                found.append(piece)
            offset = at - piece.start
            taken = min(stop - at, size - offset)
            piece.parts.append(Part(key, at - tensor.entry.start, offset, taken))
            at = piece.stop = at + taken
    return found


def runs(pieces: Sequence[Piece], size: int) -> list[list[Piece]]:
    """Neighbouring pieces together, until they have so many bytes."""
    found: list[list[Piece]] = []
    taken = size
    for piece in pieces:
        if taken >= size:
            found.append([])
            taken = 0
        found[-1].append(piece)
        taken += piece.stop - piece.start
    return found


@contextmanager
def filled(
    wanted: Mapping[str, FileTensor],
    device: torch.device,
    *,
    readers: int = READERS,
    size: int = PIECE,
    run: int = RUN,
) -> Iterator[dict[str, Tensor]]:
    """Tensors of files on a device in their stored dtypes. Inside they are being filled; afterwards they are filled.

    Args:
        wanted: the tensors to read, by any names.
        device: where they are to be; a CPU is for tests.
        readers: threads.
        size: bytes of a buffer; each thread has two.
        run: the most bytes that a thread reads in order before it goes on elsewhere.

    Raises:
        CheckpointError: a file has been replaced or changed since its header was read, or it ends too early.
        RuntimeError: the device has too little memory.
    """
    with torch.inference_mode(False):  # other threads write to them
        found = {key: torch.empty(one.entry.shape, dtype=one.entry.dtype, device=device) for key, one in wanted.items()}
        targets = {key: tensor.detach().view(-1).view(torch.uint8) for key, tensor in found.items() if tensor.numel()}
    work: SimpleQueue[list[Piece]] = SimpleQueue()
    stored = sum(tensor.entry.stop - tensor.entry.start for tensor in wanted.values())
    for one in runs(pieces(wanted, size), min(run, stored // (4 * readers))):  # so that all threads end together
        work.put(one)
    if work.empty():
        yield found
        return
    ready = None
    if device.type == "cuda":
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))  # what used the tensors' memory before is done then
    stop = Event()
    with ThreadPoolExecutor(readers) as pool:
        try:
            reading = partial(_read, work, targets, device, size, ready, stop)
            running = [pool.submit(reading) for _ in range(readers)]
            yield found
            for thread in running:
                thread.result()
        finally:
            stop.set()  # where anything has failed, the other threads end


def _read(
    work: SimpleQueue[list[Piece]],
    targets: Mapping[str, Tensor],
    device: torch.device,
    size: int,
    ready: torch.cuda.Event | None,
    stop: Event,
) -> None:
    """Read pieces and copy them to their tensors, until there are none left or somebody says to stop."""
    try:
        buffers = Buffers(device, size)
        with ExitStack() as stack, _copying(device, ready):
            stack.callback(buffers.wait)
            files = _Files(stack)
            for i, piece in enumerate(_taken(work, stop)):
                buffer = buffers.free(i)
                files.read(piece, buffer)
                for key, begin, offset, count in piece.parts:
                    targets[key][begin : begin + count].copy_(buffer[offset : offset + count], non_blocking=True)
                buffers.copied(i)
            files.check()
    except BaseException:
        stop.set()
        raise


def _copying(device: torch.device, ready: torch.cuda.Event | None) -> AbstractContextManager[object]:
    """Inside, this thread's copies are on a stream of its own, which has waited for `ready`."""
    if ready is None:
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_event(ready)
    return torch.cuda.stream(stream)


def _taken(work: SimpleQueue[list[Piece]], stop: Event) -> Iterator[Piece]:
    """The pieces of one run after the other, until there are none left or somebody says to stop."""
    while True:
        try:
            run = work.get_nowait()
        except Empty:
            return
        for piece in run:
            if stop.is_set():
                return
            yield piece


@dataclass
class _Files:
    """The files that a thread has open."""

    stack: ExitStack
    open: dict[Path, tuple[Header, int]] = field(default_factory=dict)

    def read(self, piece: Piece, buffer: Tensor) -> None:
        path = piece.header.path
        if path not in self.open:
            file = self.stack.enter_context(opened(path))
            check_same(piece.header, file)
            self.open[path] = piece.header, file
        _, file = self.open[path]
        os.lseek(file, piece.start, os.SEEK_SET)
        read_into(path, file, memory_of(buffer[: piece.stop - piece.start]))

    def check(self) -> None:
        """Raise CheckpointError where a file was changed meanwhile."""
        for header, file in self.open.values():
            check_same(header, file)
