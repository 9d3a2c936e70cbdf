"""Reading and writing safetensors files, tensor by tensor.

The header is checked here because the safetensors library accepts duplicate keys, and because a broken download
should be explained. Tensors are read straight into their final memory, so a process holds no second copy.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

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
_LOCAL = threading.local()
STAGING = 8 * 2**20  # bytes read at a time where a tensor is cast or moved on its way
_MAX_SIDE = 2**63  # torch counts in 64 bits
_PICKLE = "pickles can run code and are never opened"
_OTHER_FILES = {  # how files begin that are taken for safetensors
    b"PK\x03\x04": ("a PyTorch pickle (zip)", _PICKLE),
    b"\x80\x02": ("a Python pickle", _PICKLE),
    b"\x80\x03": ("a Python pickle", _PICKLE),
    b"\x80\x04": ("a Python pickle", _PICKLE),
    b"\x80\x05": ("a Python pickle", _PICKLE),
    b"GGUF": ("a GGUF file", "its quantizations are not read"),
    b"version https://git-lfs": ("a Git LFS pointer", "it only names the file, which `git lfs pull` downloads"),
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


@dataclass(frozen=True)
class Header:
    """What a file says that it holds."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a safetensors file, is truncated, or its header contradicts itself.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        text = _header_text(path, file, size)
    header, metadata = _parsed(path, text)
    start = 8 + len(text)
    entries = {key: _entry(path, key, value, start) for key, value in header.items()}
    _check_offsets(path, entries, start, size)
    return Header(path, entries, metadata)


def open_tensors(path: str | Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file, each read when it is asked for, and the file's metadata.

    Raises:
        FileNotFoundError, CheckpointError: see `read_header`.
    """
    header = read_header(path)
    return {key: _lazy(header.path, entry) for key, entry in header.entries.items()}, header.metadata


def write_tensors(
    path: str | Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file tensor by tensor, in the order and with the header of the safetensors library.

    The file appears under its name only when it is complete.

    Raises:
        ValueError: a tensor has a dtype that is not written.
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
    with replacing(Path(path)) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(_bytes(tensors[key].read()))


def _header_text(path: Path, file: BinaryIO, size: int) -> bytes:
    first = file.read(32)
    if first[8:9] != b"{":  # a length can begin like a pickle does; what follows it cannot
        for magic, (what, why) in _OTHER_FILES.items():
            if first.startswith(magic):
                raise CheckpointError(
                    f"{path} is {what}, not safetensors; {why}. Use the .safetensors file of the same model"
                )
    if size < 8:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, a safetensors file begins with 8 of header length; "
            "download it again"
        )
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path} is not a safetensors file: its first 8 bytes claim a header of {length} bytes, "
            f"{MAX_HEADER} are the most. Use the .safetensors file of the model"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path} is truncated: the header takes {length} bytes, the file has {size - 8} after its length; "
            "download it again"
        )
    file.seek(8)
    return file.read(length)


def _parsed(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of a header and its metadata, checked to be JSON objects of unique keys."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); download the file again") from error
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{path}: the header names {error} twice; the file was written wrongly") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is a JSON {type(metadata).__name__}, expected an object")
    if odd := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise CheckpointError(
            f"{path}: __metadata__ must map strings to strings, but {odd[0]!r} is {metadata[odd[0]]!r}"
        )
    return header, metadata


class _DuplicateKeyError(Exception):
    """A JSON object names a key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(repr(next(name for name in names if names.count(name) > 1)))
    return found


def _entry(path: Path, key: str, value: Any, start: int) -> Entry:
    try:
        name, shape, (begin, end) = str(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header entry of {key!r} is {value!r}, expected dtype, shape and two data_offsets"
        ) from error
    if not all(type(number) is int and 0 <= number < _MAX_SIDE for number in (*shape, begin, end)):
        raise CheckpointError(
            f"{path}: {key!r} has shape {list(shape)} and offsets {[begin, end]}, expected counts (whole, not negative)"
        )
    if name not in DTYPES:
        what = "packed numbers of MX and NVFP4; use a float8 or 16-bit file" if name in _PACKED else "unknown"
        raise CheckpointError(f"{path}: {key!r} has dtype {name!r} ({what}); read are {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    if end - begin != prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: {key!r} is {name} {list(shape)}, which takes {prod(shape) * dtype.itemsize} bytes, "
            f"but its offsets span {end - begin}"
        )
    return Entry(dtype, shape, start + begin, start + end)


def _check_offsets(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """The tensors must lie side by side, without gap or overlap, up to the file's end."""
    end, before = start, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a gap after"
            raise CheckpointError(f"{path}: {key!r} {what} {before}; the file was written wrongly")
        end, before = entry.stop, repr(key)
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, its tensors end at {end} ({end - size} missing); "
            "download it again"
        )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor; the file was written wrongly")


def _lazy(path: Path, entry: Entry) -> LazyTensor:
    def load(dtype: torch.dtype, device: torch.device) -> Tensor:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            tensor = torch.empty(entry.shape, dtype=dtype, device=device)
            if dtype == entry.dtype and device.type == "cpu":
                _fill(path, file, tensor)
            else:
                _fill_through_staging(path, file, tensor, entry.dtype)
        return tensor

    return LazyTensor(entry.shape, entry.dtype, load)


def _fill_through_staging(path: Path, file: Any, tensor: Tensor, stored: torch.dtype) -> None:
    flat, staging = tensor.view(-1), _staging(pinned=tensor.device.type == "cuda").view(stored)
    for begin in range(0, flat.numel(), len(staging)):
        piece = staging[: min(len(staging), flat.numel() - begin)]
        _fill(path, file, piece)
        flat[begin : begin + len(staging)].copy_(piece)


def _staging(*, pinned: bool) -> Tensor:
    """This thread's buffer; one for all tensors, because buffers that come and go leave holes between the weights."""
    buffers: dict[bool, Tensor] = _LOCAL.__dict__.setdefault("staging", {})
    if pinned not in buffers:
        buffers[pinned] = torch.empty(STAGING, dtype=torch.uint8, pin_memory=pinned)
    return buffers[pinned]


def _fill(path: Path, file: Any, tensor: Tensor) -> None:
    rest = _bytes(tensor)
    while len(rest):
        done = file.readinto(rest)
        if not done:
            raise CheckpointError(f"{path} ended while it was being read; was it replaced?")
        rest = rest[done:]


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
