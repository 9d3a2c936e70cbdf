"""Captures on disk: values go to a file as they come, which becomes a safetensors file at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import CheckpointError, open_tensors, write_tensors
from mmdit.inspection.addresses import Label
from mmdit.inspection.captured import Captured, Entry, Series

_FORMAT = "mmdit capture 1"


class Spool:
    """A temporary file beside the target; gone when it is closed."""

    def __init__(self, target: str | Path) -> None:
        self.target = Path(target)
        if self.target.suffix != ".safetensors":
            raise ValueError(f"to={str(target)!r} must end in .safetensors")
        if self.target.exists():
            raise FileExistsError(f"{self.target} exists already; give another place, or remove it first")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._path = self.target.with_name(f".{self.target.name}.{os.getpid()}.spool")
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._file = self._path.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()
        self._path.unlink(missing_ok=True)

    def put(self, value: Tensor) -> LazyTensor:
        """Write a value; what comes back reads it while the spool is open."""
        assert self._file is not None
        start, dtype, shape = self._file.seek(0, os.SEEK_END), value.dtype, tuple(value.shape)
        flat: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._file.write(memoryview(flat))

        def load(wanted: torch.dtype, device: torch.device) -> Tensor:
            assert self._file is not None
            self._file.seek(start)
            read = (
                torch.frombuffer(bytearray(self._file.read(flat_bytes)), dtype=dtype) if flat_bytes else torch.empty(0)
            )
            return read.reshape(shape).to(device, wanted)

        flat_bytes = value.nbytes
        return LazyTensor(shape, dtype, load)

    def save(self, captured: Captured) -> None:
        """Write the safetensors file; from then on the capture reads from it."""
        tensors, notes = {}, []
        for name, one in captured.series.items():
            for i, entry in enumerate(one.entries):
                value = entry.value
                tensors[f"{name}/{i}"] = value if isinstance(value, LazyTensor) else LazyTensor.of(value.detach().cpu())
            entries = [[list(entry.label), list(entry.samples)] for entry in one.entries]
            notes.append([name, list(one.axes), _plain(one.labels), one.running, one.reduced, entries])
        about = {"names": list(captured.names), "one_branch": captured.one_branch, "series": notes}
        write_tensors(self.target, tensors, {"format": _FORMAT, "capture": json.dumps(about)})
        captured.series = load_capture(self.target).series


def load_capture(path: str | Path) -> Captured:
    """A capture that was written with `to=`; values are read when they are asked for.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is broken, or holds something else.
    """
    tensors, metadata = open_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not a capture: it has format {metadata.get('format')!r}, expected {_FORMAT!r}"
        )
    about = json.loads(metadata["capture"])
    found = Captured(about["names"], one_branch=about["one_branch"])
    for name, axes, labels, running, reduced, entries in about["series"]:
        known = [
            Entry(Label(*label), tuple(samples), tensors[f"{name}/{i}"]) for i, (label, samples) in enumerate(entries)
        ]
        places = {
            axis: tuple(tuple(one) if isinstance(one, list) else one for one in of) for axis, of in labels.items()
        }
        found.series[name] = Series(tuple(axes), places, running, reduced, known)
    return found


def _plain(labels: Any) -> dict[str, list[Any]]:
    return {axis: list(places) for axis, places in labels.items()}
