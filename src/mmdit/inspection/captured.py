"""The values of a capture: tensors by point, labelled by step, noise level, branch and sample, in memory or a file."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from encoders.json_files import JSONError, parse_json
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import CheckpointError, open_tensors, write_tensors
from mmdit.inspection.addresses import Label
from mmdit.inspection.budget import size
from mmdit.inspection.hooks import plain
from mmdit.inspection.labelled import Labelled
from mmdit.utils import make_folder


class Entry(NamedTuple):
    """The value of one call, [samples, axes of the point]."""

    label: Label
    samples: tuple[int, ...]
    value: Tensor | LazyTensor

    def read(self) -> Tensor:
        """The value, from memory or from the file."""
        return self.value.read() if isinstance(self.value, LazyTensor) else self.value


@dataclass
class Series:
    """All values of one point."""

    axes: tuple[str, ...] = ()  # names of the dimensions after the sample
    labels: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    running: bool = False  # whether all samples and calls of a branch are merged into one value
    reduced: bool = False
    entries: list[Entry] = field(default_factory=list)


class Captured(Mapping[str, Tensor]):
    """Values by the name of their point: `seen["joint_blocks.2.x_block.resid_post"]`.

    A value is [steps, branches, samples, axes of the point]. It has no dimension for branches where one branch was
    requested by name or the model has none. The value of a running reducer is [branches, axes]. `labelled` gives the
    labels of all dimensions.

    Args:
        names: names of the requested points.
        one_branch: whether one branch was requested by name.
    """

    def __init__(self, names: Sequence[str], *, one_branch: bool = False) -> None:
        self.names, self.one_branch = tuple(names), one_branch
        self.series: dict[str, Series] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.labelled(name).values

    def __iter__(self) -> Iterator[str]:
        return iter(self.series)

    def __len__(self) -> int:
        return len(self.series)

    def __repr__(self) -> str:
        lines = [
            f"{name}: {len(one.entries)} calls of {list(one.entries[0].value.shape)} [sample, {', '.join(one.axes)}]"
            for name, one in self.series.items()
        ]
        return "\n".join([*lines, f"{len(self.series)} of {len(self.names)} points: {size(self.nbytes)}"])

    def _ipython_key_completions_(self) -> list[str]:
        """The completions that Jupyter offers on Tab after `seen[`."""
        return list(self)

    @property
    def nbytes(self) -> int:
        """The size of all values in bytes, in memory or in a file."""
        return sum(entry.value.nbytes for one in self.series.values() for entry in one.entries)

    def of(self, name: str) -> Series:
        """All values of one point, call by call.

        Raises:
            KeyError: the point was not requested, or no value passed it.
        """
        name = plain(name)
        if name in self.series:
            return self.series[name]
        if name in self.names:
            raise KeyError(f"{name!r} was never passed at the address that was asked for: did the model run inside?")
        nearest = ", ".join(get_close_matches(name, self.names, cutoff=0))
        raise KeyError(f"{name!r} was not captured; nearest of {len(self.names)} are {nearest}")

    def labelled(self, name: str, *, branch: str | None = None, run: int | None = None) -> Labelled:
        """A value with names for its dimensions and labels along them.

        Args:
            name: the name of the point.
            branch: selects this branch, without a dimension for branches.
            run: selects this drawing.

        Raises:
            KeyError: see `of`.
            ValueError: the calls differ in shape or branches, so that they cannot be stacked.
        """
        one = self.of(name)
        entries = [e for e in one.entries if branch in (None, e.label.branch) and run in (None, e.label.run)]
        if not entries:
            branches = ", ".join(map(repr, dict.fromkeys(entry.label.branch for entry in one.entries)))
            raise ValueError(f"{name!r} was captured of branches {branches}, not of branch={branch!r}, run={run!r}")
        grid = _Grid(name, entries)
        without_branches = branch is not None or self.one_branch or grid.branches == [None]
        value = grid.stacked(without_branches=without_branches)
        axes: dict[str, tuple[Any, ...]] = {} if one.running else {"step": tuple(time.step for time in grid.times)}
        if not without_branches:
            axes["branch"] = tuple(grid.branches)
        if one.running:
            value = value.squeeze(0).squeeze(0 if without_branches else 1)
        else:
            axes["sample"] = entries[0].samples
        notes = {} if one.running else {what: ("step", tuple(getattr(t, what) for t in grid.times)) for what in _NOTES}
        for axis, length in zip(one.axes, value.shape[len(axes) :], strict=True):
            axes[axis] = one.labels.get(axis, tuple(range(length)))
        return Labelled(value, axes, notes)

    def at(self, name: str, label: Label) -> Entry:
        """The value of a point in the call with this label, or in the only call of a capture.

        Raises:
            KeyError: see `of`.
            ValueError: the capture has no such call.
        """
        entries = [entry for entry in self.of(name).entries if entry.label.branch in (label.branch, None)]
        same = [entry for entry in entries if entry.label[1:3] == label[1:3]]
        if same or len(entries) == 1:
            return (same or entries)[0]
        raise ValueError(
            f"the capture holds no {name!r} of step {label.step}, call {label.call}, branch {label.branch!r}; it holds "
            f"{len(self.of(name).entries)} others: capture the same steps and branches"
        )

    def gradients(self, metric: Tensor) -> Captured:
        """d metric / d value for all values captured with `grad=True`; 0 where the metric does not depend on the value.

        Args:
            metric: a scalar that was computed from the model's output, within or after the capture.

        Raises:
            ValueError: the values were captured without grad.
        """
        places = [(name, entry) for name, one in self.series.items() for entry in one.entries]
        values = [entry.read() for _, entry in places]
        if not all(value.requires_grad for value in values):
            raise ValueError("gradients need a capture with grad=True")
        found = torch.autograd.grad(metric, values, retain_graph=True, allow_unused=True, materialize_grads=True)
        out = Captured(self.names, one_branch=self.one_branch)
        for (name, entry), gradient in zip(places, found, strict=True):
            one = self.series[name]
            into = out.series.setdefault(name, Series(one.axes, one.labels))
            into.entries.append(entry._replace(value=gradient))
        return out

    def add(self, name: str, like: Callable[[], Series], entry: Entry) -> None:
        """Add a value."""
        if name not in self.series:
            self.series[name] = like()
        self.series[name].entries.append(entry)


_NOTES = ("sigma", "call", "run")


class _Grid:
    """The entries of a point, arranged by time and branch."""

    def __init__(self, name: str, entries: Sequence[Entry]) -> None:
        self.name = name
        self.entries = {(_time(entry.label), entry.label.branch): entry for entry in entries}
        self.times = list({_time(entry.label): entry.label for entry in entries}.values())
        self.branches = list(dict.fromkeys(entry.label.branch for entry in entries))

    def stacked(self, *, without_branches: bool) -> Tensor:
        """[steps, branches, samples, ...]."""
        rows = []
        for time in self.times:
            some = [self.entries.get((_time(time), branch)) for branch in self.branches]
            if any(entry is None for entry in some):
                self._refuse(f"step {time.step} ran only some of the branches {self.branches}")
            rows.append([entry.read() for entry in some if entry is not None])
        if len(shapes := {tuple(value.shape) for row in rows for value in row}) > 1:
            self._refuse(f"values have shapes {', '.join(str(list(shape)) for shape in shapes)}")
        if len({entry.samples for entry in self.entries.values()}) > 1:
            self._refuse("samples differ")
        value = torch.stack([torch.stack(row) for row in rows])
        return value[:, 0] if without_branches and len(self.branches) == 1 else value

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"{self.name!r} does not stack: {why}. Take a branch, seen.labelled({self.name!r}, branch=...), or calls "
            "one by one, seen.of(name).entries"
        )


def _time(label: Label) -> tuple[int, int, int]:
    return label.run, label.step, label.call


_FORMAT = "mmdit capture 1"
_MAX_NOTES = 2**28  # bytes of the description of the values; enough for some million calls


class Spool:
    """A temporary file beside the target, which is removed when it is closed."""

    def __init__(self, target: str | Path) -> None:
        self.target = Path(target)
        if self.target.suffix != ".safetensors":
            raise ValueError(f"to={str(target)!r} must end in .safetensors")
        if self.target.exists():
            raise FileExistsError(f"{self.target} exists already; give another place, or remove it first")
        make_folder(self.target.parent)
        self._file: Any = None  # open inside the `with` alone

    def __enter__(self) -> Self:
        # A new file under a random name, never one that exists or that a link leads to.
        self._file = tempfile.NamedTemporaryFile("w+b", dir=self.target.parent, prefix=".", suffix=".spool")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, value: Tensor) -> LazyTensor:
        """Write a value, and return a function that reads it while the spool is open."""
        start, dtype, shape = self._file.seek(0, os.SEEK_END), value.dtype, tuple(value.shape)
        flat: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._file.write(memoryview(flat))

        def load(wanted: torch.dtype, device: torch.device) -> Tensor:
            self._file.seek(start)
            read = (
                torch.frombuffer(bytearray(self._file.read(flat_bytes)), dtype=dtype) if flat_bytes else torch.empty(0)
            )
            return read.reshape(shape).to(device, wanted)

        flat_bytes = value.nbytes
        return LazyTensor(shape, dtype, load)

    def save(self, captured: Captured) -> None:
        """Write the safetensors file, from which the capture reads afterwards."""
        tensors, notes = {}, []
        for name, one in captured.series.items():
            for i, entry in enumerate(one.entries):
                value = entry.value
                tensors[f"{name}/{i}"] = value if isinstance(value, LazyTensor) else LazyTensor.of(value.detach().cpu())
            entries = [[list(entry.label), list(entry.samples)] for entry in one.entries]
            labels = {axis: [_written(label) for label in of] for axis, of in one.labels.items()}
            notes.append([name, list(one.axes), labels, one.running, one.reduced, entries])
        about = {"names": list(captured.names), "one_branch": captured.one_branch, "series": notes}
        text = json.dumps(about, allow_nan=False)
        write_tensors(self.target, tensors, {"format": _FORMAT, "capture": text})
        captured.series = load_capture(self.target).series


def load_capture(path: str | Path) -> Captured:
    """Open a capture that was written with `to=`; values are read on access.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is broken or is not a capture; the message tells what was found where.
    """
    tensors, metadata = open_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not a capture: its format is {_short(metadata.get('format'))}, expected {_FORMAT!r}"
        )
    try:
        about = parse_json(metadata.get("capture", ""), f"{path}: capture", kind=dict, max_bytes=_MAX_NOTES)
        return _Reader(tensors).captured(about)
    except (JSONError, _BrokenError) as error:
        raise CheckpointError(f"{path} is a broken capture: {_cut(str(error), 600)}. Capture again") from error


class _BrokenError(ValueError):
    """The description of a capture in a file contradicts itself or the file's tensors."""


class _Reader:
    """Builds a capture from the description and the tensors of a file; each tensor must be described exactly once."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors, self.used = tensors, set[str]()

    def captured(self, about: Mapping[str, object]) -> Captured:
        names = [_typed(name, str, "a name") for name in _typed(about.get("names"), list, "names")]
        found = Captured(names, one_branch=_typed(about.get("one_branch"), bool, "one_branch"))
        for one in _typed(about.get("series"), list, "series"):
            name, series = self.series(_row(one, 6, "a series"))
            if name in found.series or name not in names:
                raise _BrokenError(f"the point {name!r} is there twice, or was not asked for")
            found.series[name] = series
        if spare := sorted(set(self.tensors) - self.used):
            raise _BrokenError(f"{len(spare)} tensors belong to no point, such as {spare[0]!r}")
        return found

    def series(self, row: list[Any]) -> tuple[str, Series]:
        name = _typed(row[0], str, "the name of a series")
        axes = tuple(_typed(axis, str, f"an axis of {name!r}") for axis in _typed(row[1], list, f"axes of {name!r}"))
        labels = {
            axis: tuple(_read(label) for label in _typed(of, list, f"labels of {name!r}"))
            for axis, of in _typed(row[2], dict, f"labels of {name!r}").items()
        }
        running, reduced = (_typed(one, bool, f"a mark of {name!r}") for one in row[3:5])
        entries = [self.entry(name, i, one) for i, one in enumerate(_typed(row[5], list, f"entries of {name!r}"))]
        if not entries or len(set(axes)) < len(axes) or not set(labels) <= set(axes):
            raise _BrokenError(f"{name!r} has {len(entries)} entries, axes {axes} and labels of {tuple(labels)}")
        for entry in entries:
            shape = tuple(entry.value.shape)
            wanted = [len(entry.samples), *(len(labels[axis]) if axis in labels else None for axis in axes)]
            fits = len(shape) == len(wanted) and all(
                size in (None, have) for size, have in zip(wanted, shape, strict=True)
            )
            if not fits:
                raise _BrokenError(f"a value of {name!r} has shape {list(shape)}, and its labels are for {wanted}")
        return name, Series(axes, labels, running, reduced, entries)

    def entry(self, name: str, number: int, row: object) -> Entry:
        label, samples = _row(row, 2, f"an entry of {name!r}")
        run, step, call, sigma, branch = _row(label, 5, f"a label of {name!r}")
        run, step, call = (_typed(one, int, f"a number of {name!r}") for one in (run, step, call))
        if sigma is not None and not isinstance(sigma, float):
            sigma = float(_typed(sigma, int, f"sigma of {name!r}"))
        if branch is not None:
            branch = _typed(branch, str, f"the branch of {name!r}")
        places = tuple(
            _typed(one, int, f"a sample of {name!r}") for one in _typed(samples, list, f"samples of {name!r}")
        )
        key = f"{name}/{number}"
        if key not in self.tensors:
            raise _BrokenError(f"the tensor {key!r} is missing")
        self.used.add(key)
        return Entry(Label(run, step, call, sigma, branch), places, self.tensors[key])


Kind = TypeVar("Kind")


def _typed(value: object, kind: type[Kind], what: str) -> Kind:
    if type(value) is not kind:
        raise _BrokenError(f"{what} should be of type {kind.__name__}, but is {_short(value)}")
    return value


def _row(value: Any, length: int, what: str) -> list[Any]:
    if len(_typed(value, list, what)) != length:
        raise _BrokenError(f"{what} should have {length} parts, but is {_short(value)}")
    return value


def _short(value: object) -> str:
    return _cut(repr(value), 60)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _written(label: object) -> Any:
    """A label in the form of JSON, without tuples and with infinite numbers as text."""
    if isinstance(label, tuple):
        return [_written(one) for one in label]
    return str(label) if isinstance(label, float) and not math.isfinite(label) else label


def _read(label: object) -> Any:
    """A label that `_written` wrote."""
    if isinstance(label, list):
        return tuple(_read(one) for one in label)
    if isinstance(label, dict):
        raise _BrokenError(f"a label should be a number, a text or a list, but is {_short(label)}")
    return float(label) if label in ("inf", "-inf") else label
