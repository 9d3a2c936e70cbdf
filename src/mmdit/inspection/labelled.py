"""A tensor with named dimensions and labels along them: step, branch, sample, head, token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from samplers import pick


@dataclass(frozen=True, eq=False)
class Labelled:
    """Values with a name for every dimension and a label for every index along it.

    Args:
        values: a tensor of any shape.
        axes: name of each dimension -> its labels, in the order of the dimensions.
        notes: further labels along a dimension, name -> (dimension, labels), such as sigma along step.
    """

    values: Tensor
    axes: Mapping[str, tuple[Any, ...]]
    notes: Mapping[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError where labels and shape disagree."""
        sizes = [len(labels) for labels in self.axes.values()]
        if sizes != list(self.values.shape):
            raise ValueError(
                f"values have shape {list(self.values.shape)}, labels {dict(zip(self.axes, sizes, strict=True))}"
            )

    def __repr__(self) -> str:
        lines = [f"Labelled {str(self.values.dtype).removeprefix('torch.')} {list(self.values.shape)}"]
        width = max((len(name) for name in (*self.axes, *self.notes)), default=0)
        lines += [f"  {name:{width}}  {len(labels):>4}: {_shown(labels)}" for name, labels in self.axes.items()]
        lines += [f"  {note:{width}}  along {dim}: {_shown(labels)}" for note, (dim, labels) in self.notes.items()]
        return "\n".join(lines)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.values.detach().cpu()
        return np.asarray(values.float() if values.dtype.itemsize < 4 and values.is_floating_point() else values, dtype)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions."""
        return tuple(self.axes)

    def labels(self, name: str) -> tuple[Any, ...]:
        """The labels along a dimension, or those of a note.

        Raises:
            ValueError: there is no dimension or note of that name.
        """
        known = dict(self.axes) | {note: labels for note, (_, labels) in self.notes.items()}
        return pick(known, name, "dimension")

    def sel(self, **wanted: object) -> Labelled:
        """Select by label: a list or tuple keeps the dimension, a single label (of one index) drops it.

        `found.sel(step=3, branch="cond")`, `found.sel(token=[2, 5])`; notes work too: `found.sel(call=0)`.

        Raises:
            ValueError: there is no such dimension or label.
        """
        found = self
        for name, label in wanted.items():
            found = found._at(name, label)
        return found

    def mean(self, name: str) -> Labelled:
        """The mean along a dimension, which is dropped."""
        values = self.values.mean(self._place(name))
        return Labelled(values, {n: v for n, v in self.axes.items() if n != name}, self._notes_without(name))

    def _place(self, name: str) -> int:
        return pick({dim: i for i, dim in enumerate(self.axes)}, name, "dimension")

    def _at(self, name: str, label: Any) -> Labelled:
        along, labels = self.notes.get(name, (name, self.labels(name)))
        place, several = self._place(along), isinstance(label, Sequence) and not isinstance(label, str)
        wanted = list(label) if several else [label]
        if missing := [one for one in wanted if one not in labels]:
            raise ValueError(f"{name} has no {missing[0]!r}, but {', '.join(map(repr, dict.fromkeys(labels)))}")
        index = [i for one in wanted for i, found in enumerate(labels) if found == one]
        if not several and len(index) == 1:
            values = self.values.select(place, index[0])
            return Labelled(values, {n: v for n, v in self.axes.items() if n != along}, self._notes_without(along))
        values = self.values[(slice(None),) * place + (index,)]
        axes = {n: tuple(v[i] for i in index) if n == along else v for n, v in self.axes.items()}
        notes = {
            note: (dim, tuple(of[i] for i in index) if dim == along else of) for note, (dim, of) in self.notes.items()
        }
        return Labelled(values, axes, notes)

    def _notes_without(self, dim: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
        return {note: value for note, value in self.notes.items() if value[0] != dim}


def _shown(labels: Sequence[object]) -> str:
    """Labels as text of one line: all of them if they are few, otherwise the first and the last ones."""
    texts = [f"{label:.4g}" if isinstance(label, float) else str(label) for label in labels]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:3], "...", texts[-1]])
