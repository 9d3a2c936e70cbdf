"""Reading and writing safetensors files, tensor by tensor.

What the safetensors library would do, and why it is done here instead:

- Headers: the library accepts duplicate keys and does not explain a broken download.
- Reading: the library maps the file, and a mapped file that is cut short while it is read kills the process; here that
  is an error. Tensors are read directly into their final memory by several threads, which was quicker into
  the host's memory in every row of the table in README.md and took no more of it; for a GPU see staging.py.
- Writing: the library wants all tensors at once; here one tensor at a time is in memory.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from encoders.json_files import JSONError, described, parse_json, printable
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.utils import replacing

DTYPES = {  # in the order in which the safetensors library writes them
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_TENSORS = 100_000  # tensors in one file; the largest official file has 2,500
MAX_DIMENSIONS = 16
MAX_DEPTH = 8  # nested brackets in a header; two suffice
_LOCAL = threading.local()
STAGING = 8 * 2**20  # bytes read at a time where a tensor is cast or moved to another device
_MAX_ELEMENTS = 2**59  # torch counts bytes in signed 64 bits, and an element has up to 16 bytes
_SPACE = b" \t\r\n"
_PICKLE = "pickles can run code and are never opened"
_OTHER_FILES = {  # first bytes of files that are mistaken for safetensors
    b"PK\x03\x04": ("a PyTorch pickle (zip)", _PICKLE),
    b"\x80\x02": ("a Python pickle", _PICKLE),
    b"\x80\x03": ("a Python pickle", _PICKLE),
    b"\x80\x04": ("a Python pickle", _PICKLE),
    b"\x80\x05": ("a Python pickle", _PICKLE),
    b"GGUF": ("a GGUF file", "its quantizations are not read"),
    b"version https://git-lfs": ("a Git LFS pointer", "it only names the file, which `git lfs pull` downloads"),
    b"\x89PNG": ("a PNG picture", "it holds no weights"),
    b"\xff\xd8\xff": ("a JPEG picture", "it holds no weights"),
    b"<": ("a web page", "the download gave an error page or asked to log in"),
}
_PACKED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")  # MX and NVFP4 formats


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, what was found, what was expected and what to do."""


class Entry(NamedTuple):
    """One tensor of a file: where its bytes are, counted from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Identity(NamedTuple):
    """Numbers by which a file differs from another one of the same name."""

    device: int
    inode: int
    size: int
    changed: int  # time of the last change in nanoseconds

    @classmethod
    def of(cls, descriptor: int) -> Identity:
        """The identity of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """The header of a file: its tensors and metadata."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    identity: Identity

    def tensors(self) -> dict[str, LazyTensor]:
        """The tensors of the file, which are read on demand."""
        return {key: LazyTensor(one.entry.shape, one.entry.dtype, one) for key, one in self.stored().items()}

    def stored(self) -> dict[str, FileTensor]:
        """The tensors of the file, each a function that reads it."""
        return {key: FileTensor(self, entry) for key, entry in self.entries.items()}


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a safetensors file, is truncated, or its header contradicts itself.
    """
    path = Path(path)
    with opened(path) as file:
        identity = Identity.of(file)
        text = _header_text(path, file, identity.size)
    header, metadata = _parsed(path, text)
    start = 8 + len(text)
    entries = {key: _entry(path, key, value, start) for key, value in header.items()}
    _check_offsets(path, entries, start, identity.size)
    return Header(path, entries, metadata, identity)


def open_tensors(path: str | Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file, which are read on demand, and the file's metadata.

    Raises:
        FileNotFoundError, CheckpointError: see `read_header`.
    """
    header = read_header(path)
    return header.tensors(), header.metadata


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    new: bool = False,
) -> None:
    """Write a file tensor by tensor, in the order and with the header of the safetensors library.

    The file appears under its name only when it is complete.

    Args:
        path: the file.
        tensors: its tensors, by name.
        metadata: its metadata, strings by name; None writes none.
        new: whether the file must not exist, neither before nor while it is written.

    Raises:
        FileExistsError: `new` is set, and the file exists.
        ValueError: a tensor has a dtype that cannot be written, or the header is larger than `MAX_HEADER`.
    """
    with replacing(Path(path), new=new) as part, part.open("wb") as file:
        stream_tensors(file, path, tensors, metadata)


def stream_tensors(
    file: BinaryIO, path: str | Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """`write_tensors` into an open file, which a reader may see half written.

    Args:
        file: where to write, from its start.
        path: its name, for errors.
        tensors, metadata: see `write_tensors`.

    Raises:
        ValueError: see `write_tensors`.
    """
    if odd := [f"{key!r} is {lazy.dtype}" for key, lazy in tensors.items() if lazy.dtype not in NAMES]:
        raise ValueError(f"{path}: {odd[0]}, which is not written; known are {', '.join(map(str, NAMES))}")
    rank = {dtype: place for place, dtype in enumerate(DTYPES.values())}
    order = sorted(tensors, key=lambda key: (rank[tensors[key].dtype], key))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        lazy = tensors[key]
        begin, end = end, end + lazy.nbytes
        header[key] = {"dtype": NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{path}: the header would take {len(text)} bytes, {MAX_HEADER} are the most that is read")
    file.write(len(text).to_bytes(8, "little") + text)
    for key in order:
        file.write(memory_of(tensors[key].read()))


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a regular file for reading, as a descriptor; pipes and folders are refused."""
    # O_NONBLOCK keeps a pipe from waiting for its writer; it has no effect on regular files.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path} is not a regular file; expected a safetensors file")
        yield descriptor
    finally:
        os.close(descriptor)


def _header_text(path: Path, file: int, size: int) -> bytes:
    first = os.read(file, 32)
    # The 8 bytes of a length may equal the first bytes of a pickle or web page, but then a brace or space follows.
    if first[8:9] not in (b"{", *(_SPACE[i : i + 1] for i in range(len(_SPACE)))):
        for magic, (what, why) in _OTHER_FILES.items():
            if first.startswith(magic):
                raise CheckpointError(
                    f"{path} is {what}, not safetensors; {why}. Use the .safetensors file of the same model"
                )
    if size < 8:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, but the header length alone takes 8; download it again"
        )
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path} is not a safetensors file: its first 8 bytes give a header length of {length} bytes, and the "
            f"largest allowed is {MAX_HEADER}. Use the .safetensors file of the model"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path} is truncated: the header takes {length} bytes, but only {size - 8} follow its length; "
            "download it again"
        )
    text = bytearray(length)
    os.lseek(file, 8, os.SEEK_SET)
    read_into(path, file, memoryview(text))
    return bytes(text)


def _parsed(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of a header and its metadata, after a check that they are JSON objects with unique keys."""
    if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:
        raise CheckpointError(f"{path} names {count} tensors; a checkpoint may have at most {MAX_TENSORS}")
    try:
        header = parse_json(text, f"{path}: the header", kind=dict, max_bytes=MAX_HEADER, max_depth=MAX_DEPTH)
    except JSONError as error:
        raise CheckpointError(str(error)) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ holds {described(metadata)}, expected an object")
    if odd := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise CheckpointError(
            f"{path}: __metadata__ must map strings to strings, but {printable(odd[0], 80)!r} is "
            f"{described(metadata[odd[0]])}"
        )
    return header, metadata


def _entry(path: Path, key: str, value: object, start: int) -> Entry:
    where = f"{path}: {printable(key, 200)!r}"
    sides, span = (value.get(name) if isinstance(value, dict) else None for name in ("shape", "data_offsets"))
    if not isinstance(value, dict) or not isinstance(sides, list) or not isinstance(span, list) or "dtype" not in value:
        raise CheckpointError(
            f"{path}: the header entry of {printable(key, 200)!r} is {_short(value)}, expected dtype, shape and two "
            "data_offsets"
        )
    if len(span) != 2 or not all(type(number) is int and number >= 0 for number in (*sides, *span)):
        raise CheckpointError(
            f"{where} has shape {_short(sides)} and offsets {_short(span)}; expected integers that are not negative"
        )
    name, dtype = value["dtype"], DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        what = "packed numbers of MX and NVFP4; use a float8 or 16-bit file" if name in _PACKED else "unknown"
        raise CheckpointError(f"{where} has dtype {_short(name)} ({what}); supported are {', '.join(DTYPES)}")
    # Strides are products of sides, also where another side is 0, and must not overflow either.
    if len(sides) > MAX_DIMENSIONS or prod(max(side, 1) for side in sides) > _MAX_ELEMENTS:
        raise CheckpointError(
            f"{where} has shape {_short(sides)}; at most {MAX_DIMENSIONS} dimensions and {_MAX_ELEMENTS} elements are "
            "supported"
        )
    begin, end = span
    if end - begin != prod(sides) * dtype.itemsize:
        raise CheckpointError(
            f"{where} is {name} {sides}, which takes {prod(sides) * dtype.itemsize} bytes, "
            f"but its offsets span {end - begin}"
        )
    return Entry(dtype, tuple(sides), start + begin, start + end)


def _short(value: object) -> str:
    return printable(repr(value), 120)


def _check_offsets(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Raise CheckpointError unless the tensors fill the file to its end without gap or overlap."""
    end, before = start, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a gap after"
            raise CheckpointError(f"{path}: {key!r} {what} {before}; the file was written wrongly")
        end, before = entry.stop, repr(key)
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, but its tensors end at {end} ({end - size} missing); "
            "download it again"
        )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor; the file was written wrongly")


@dataclass(frozen=True)
class FileTensor:
    """Reads one tensor of a file, as it is or cast."""

    header: Header
    entry: Entry

    def __call__(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values in a dtype on a device.

        Raises:
            CheckpointError: the file has been replaced or changed since its header was read, or it ends too early.
        """
        header, entry = self.header, self.entry
        with opened(header.path) as file:
            check_same(header, file)
            os.lseek(file, entry.start, os.SEEK_SET)
            tensor = torch.empty(entry.shape, dtype=dtype, device=device)
            if dtype == entry.dtype and device.type == "cpu":
                read_into(header.path, file, memory_of(tensor))
            else:
                _fill_through_buffers(header.path, file, tensor, entry.dtype)
            check_same(header, file)
        return tensor


def check_same(header: Header, file: int) -> None:
    """Raise CheckpointError where the file has been replaced or changed since its header was read."""
    if Identity.of(file) != header.identity:
        raise CheckpointError(
            f"{header.path} was replaced or written to after its header was read; nothing of it is used: load it again"
        )


def _fill_through_buffers(path: Path, file: int, tensor: Tensor, stored: torch.dtype) -> None:
    """Read, and cast on the device: a piece is read while the one before it is copied."""
    flat, buffers = tensor.view(-1), _own_buffers(tensor.device)
    size = buffers.size // stored.itemsize
    for i, begin in enumerate(range(0, flat.numel(), size)):
        target = flat[begin : begin + size]
        piece = buffers.free(i)[: len(target) * stored.itemsize]
        read_into(path, file, memory_of(piece))
        values = piece.view(stored)
        there = values if stored == target.dtype else values.to(target.device, non_blocking=buffers.on_gpu)
        target.copy_(there, non_blocking=buffers.on_gpu)
        buffers.copied(i)
    buffers.wait()


class Buffers:
    """What pieces of files pass on their way to a device: while one buffer is copied to a GPU, the other one is filled.

    Buffers of a GPU are in page-locked memory. Elsewhere there is one, and a copy is done when it returns.

    Args:
        device: to which pieces are copied.
        size: bytes of a buffer.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.size, self.on_gpu = device, size, device.type == "cuda"
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.on_gpu) for _ in range(1 + self.on_gpu)
        ]
        self._copies: list[torch.cuda.Event | None] = [None] * len(self._buffers)

    def free(self, i: int) -> Tensor:
        """The buffer of the i-th piece, uint8 [size], once what it held is copied."""
        place = i % len(self._buffers)
        if (copy := self._copies[place]) is not None:
            copy.synchronize()
        return self._buffers[place]

    def copied(self, i: int) -> None:
        """Say that the copies of the i-th piece were launched on this thread's stream."""
        if self.on_gpu:
            place = i % len(self._buffers)
            copy = self._copies[place] = self._copies[place] or torch.cuda.Event()
            copy.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Wait until all copies are done."""
        for copy in self._copies:
            if copy is not None:
                copy.synchronize()


def _own_buffers(device: torch.device) -> Buffers:
    """Those of the calling thread, for all tensors, because short-lived buffers would fragment the heap."""
    found: dict[torch.device | None, Buffers] = _LOCAL.__dict__.setdefault("buffers", {})
    key = device if device.type == "cuda" else None
    if key not in found:
        found[key] = Buffers(device, STAGING)
    return found[key]


def read_into(path: Path, file: int, rest: memoryview) -> None:
    """Fill a buffer with the next bytes of a file."""
    while len(rest):
        done = os.readv(file, [rest]) if hasattr(os, "readv") else _read_once(file, rest)
        if not done:
            raise CheckpointError(f"{path} ended while it was being read; was it replaced?")
        rest = rest[done:]


def _read_once(file: int, rest: memoryview) -> int:
    """`os.readv` for systems that do not have it."""
    data = os.read(file, min(len(rest), STAGING))
    rest[: len(data)] = data
    return len(data)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, or of a copy."""
    flat: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
