"""Reducers: functions whose results a capture keeps instead of whole values; patterns are reduced row by row.

Each maps [b, axes] to [b, fewer axes]. `running` merges all calls into one result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.inspection.attention import pattern_rows
from mmdit.models.attention import Attended
from mmdit.utils import taken

Merge = Callable[[Tensor, Tensor], Tensor]


class View(NamedTuple):
    """A description of a reducer's input: the names of its dimensions, and the rows of an attention pattern."""

    axes: tuple[str, ...]
    text_tokens: int = 0  # that come before the image's where both meet
    queries: Tensor | None = None  # numbers of the tokens that the rows are of; None: no pattern
    all_queries: Tensor | None = None  # the tokens of the whole pattern, which comes in blocks of rows
    keys: Tensor | None = None  # numbers of the tokens that the columns are of

    def axis(self, name: str) -> int:
        """The dimension of that name, the batch counted.

        Raises:
            ValueError: there is no such dimension.
        """
        if name not in self.axes:
            raise ValueError(f"there is no {name!r} to reduce in [batch, {', '.join(self.axes)}]")
        return self.axes.index(name) + 1


@dataclass(frozen=True)
class Reducer:
    """A function of a value, with the rules to combine its results.

    Args:
        name: its name in errors and files.
        apply: maps [b, axes] to a tensor [b, ...] and the names of its dimensions after the batch.
        join: combines the results of blocks of rows of an attention pattern, where the rows are reduced.
        merge: combines the results of several samples and calls; None where that is impossible.
        labels: labels along the dimensions that the reducer creates.
        exact: whether the result is kept in its own dtype.
        running: whether samples and calls are merged.
    """

    name: str
    apply: Callable[[Tensor, View], tuple[Tensor, tuple[str, ...]]]
    join: Merge | None = None
    merge: Merge | None = None
    labels: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    exact: bool = False
    running: bool = False

    def __call__(self, value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        """The result and the names of its dimensions after the batch.

        Raises:
            TypeError: `apply` gave something else; a result of other dimensions than their names says.
        """
        found = self.apply(value, view)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor):
            raise TypeError(
                f"reducer {self.name!r} gave {type(found).__name__}, expected a tensor [b, ...] and a tuple of the "
                "names of its dimensions after the batch"
            )
        result, axes = found
        if result.ndim != len(axes) + 1:
            raise TypeError(
                f"reducer {self.name!r} gave {list(result.shape)}, whose dimensions after the batch are not "
                f"{len(axes)} [{', '.join(axes)}]"
            )
        return result, axes


def reduced_pattern(reducer: Reducer | None, attended: Attended, view: View) -> tuple[Tensor, tuple[str, ...]]:
    """A reducer's result for the pattern of one call of attention; only some rows exist at a time.

    Args:
        reducer: None gives the pattern.
        attended: the rows of the batch and the heads that are meant. All keys count, `view.keys` are shown.
        view: describes the pattern; its `all_queries` are the tokens whose rows are meant.

    Raises:
        ValueError: the reducer needs all rows at once.
    """
    assert view.all_queries is not None
    parts: list[Tensor] = []
    axes = view.axes
    for first, block in pattern_rows(attended, view.all_queries):
        numbers = view.all_queries[..., first : first + block.shape[2]]
        rows = taken(block, 3, view.keys)
        part, axes = (rows, view.axes) if reducer is None else reducer(rows, view._replace(queries=numbers))
        if "query" in axes or not parts:
            parts.append(part)
        elif reducer is None or reducer.join is None:
            raise ValueError(f"{reducer and reducer.name} needs all rows of an attention pattern, which come in blocks")
        else:
            parts = [reducer.join(parts[0], part)]
    return (torch.cat(parts, dim=axes.index("query") + 1) if "query" in axes else parts[0]), axes


def mean(*names: str) -> Reducer:
    """The mean over these dimensions: `mean("head")`, `mean("token", "channel")`."""

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        rows = 1.0
        if view.queries is not None and view.all_queries is not None and "query" in names:
            rows = view.queries.shape[-1] / view.all_queries.shape[-1]  # so that blocks add up
        out = value.mean([view.axis(name) for name in names])
        return (out if rows == 1 else out * rows), _without(view, *names)

    return Reducer(f"mean({', '.join(names)})", apply, join=torch.add)


def norm(name: str = "channel", order: float = 2.0) -> Reducer:
    """The vector norm along a dimension, in float32 or wider."""

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        return torch.linalg.vector_norm(_wide(value), order, dim=view.axis(name)), _without(view, name)

    return Reducer(f"norm({name}, {order})", apply)


def entropy() -> Reducer:
    """-sum p log p of each row of an attention pattern, in nats: 0 where one token is read, log n where all are."""

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        return torch.special.entr(value).sum(view.axis("key")), _without(view, "key")

    return Reducer("entropy", apply)


def top_k(k: int, name: str | None = None) -> Reducer:
    """The k largest values along a dimension (None: the last), and their indices: [..., "part": value, place; "rank"].

    The result is float32, which represents the indices exactly.
    """

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        along = name or view.axes[-1]
        value = value.movedim(view.axis(along), -1)
        if k > value.shape[-1]:
            raise ValueError(f"top_k({k}) of {value.shape[-1]} along {along!r}")
        values, places = value.topk(k)
        return torch.stack([values.float(), places.float()], dim=-2), (*_without(view, along), "part", "rank")

    return Reducer(f"top_k({k})", apply, labels={"part": ("value", "place")}, exact=True)


QUADRANTS = ("text reads text", "text reads image", "image reads text", "image reads image")


def quadrants() -> Reducer:
    """The shares of attention that text queries, and image queries, give to text and to image, by head."""

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        if view.queries is None or view.all_queries is None or view.queries.ndim > 1:
            raise ValueError("quadrants are of an attention pattern, such as joint_blocks.0.attend.pattern")
        query, text = view.axis("query"), view.text_tokens
        keys = torch.arange(value.shape[view.axis("key")]) if view.keys is None else view.keys
        found = []
        for reads_text in (True, False):
            rows = value.index_select(query, _places((view.queries < text) == reads_text, value.device))
            total = int(((view.all_queries < text) == reads_text).sum())
            for of_text in (True, False):
                some = rows.index_select(view.axis("key"), _places((keys < text) == of_text, value.device))
                found.append(some.sum((query, view.axis("key"))) / max(total, 1))
        return torch.stack(found, dim=-1), (*_without(view, "query", "key"), "quadrant")

    return Reducer("quadrants", apply, join=torch.add, labels={"quadrant": QUADRANTS})


def max_abs(name: str = "channel") -> Reducer:
    """The largest absolute value at each index along a dimension, which shows outlier channels."""

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        others = [view.axis(other) for other in view.axes if other != name]
        view.axis(name)
        return (value.abs().amax(others) if others else value.abs()), (name,)

    return Reducer(f"max_abs({name})", apply, join=torch.maximum, merge=torch.maximum)


MOMENTS = ("count", "mean", "variance")


def moments(name: str = "channel") -> Reducer:
    """Count, mean and (uncorrected) variance at each index of a dimension: float64 [b, "moment", name]."""

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        rows = value.movedim(view.axis(name), -1).flatten(1, -2) if value.ndim > 2 else value.unsqueeze(1)
        rows = rows.double()
        variance, average = torch.var_mean(rows, dim=1, correction=0)
        return torch.stack([torch.full_like(average, rows.shape[1]), average, variance], dim=1), ("moment", name)

    labels = {"moment": MOMENTS}
    return Reducer(f"moments({name})", apply, join=_joint_moments, merge=_joint_moments, labels=labels, exact=True)


def histogram(edges: Sequence[float] | Tensor) -> Reducer:
    """The number of values below the first edge, between each two edges, and above the last: [b, edges + 1].

    An edge counts with those below it.
    """
    borders = torch.as_tensor(edges, dtype=torch.float64)
    if borders.ndim != 1 or not len(borders) or bool((borders.diff() <= 0).any()):
        raise ValueError(f"edges must be a list of rising numbers, got {edges}")

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        places = torch.bucketize(value.flatten(1).double(), borders.to(value.device))
        counts = torch.zeros(len(value), len(borders) + 1, dtype=torch.int64, device=value.device)
        return counts.scatter_add(1, places, torch.ones_like(places)), ("bin",)

    ends = (float("-inf"), *borders.tolist(), float("inf"))
    labels = {"bin": tuple(pairwise(ends))}
    return Reducer("histogram", apply, join=torch.add, merge=torch.add, labels=labels, exact=True)


def chain(*reducers: Reducer) -> Reducer:
    """Apply reducers one after the other; only the last one may reduce the rows of an attention pattern.

    Raises:
        TypeError: something is not a reducer.
        ValueError: none is given.
    """
    if not reducers:
        raise ValueError("chain() needs at least one reducer")
    for one in reducers:
        _check_reducer(one)

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        for i, reducer in enumerate(reducers):
            value, axes = reducer(value, view)
            if view.queries is not None and "query" not in axes and i < len(reducers) - 1:
                raise ValueError(f"{reducer.name} takes away the rows of an attention pattern: it must come last")
            view = view._replace(axes=axes)
        return value, view.axes

    last = reducers[-1]
    labels = {name: of for reducer in reducers for name, of in reducer.labels.items()}
    return replace(last, name=" + ".join(reducer.name for reducer in reducers), apply=apply, labels=labels)


def running(reducer: Reducer) -> Reducer:
    """Apply a reducer to all samples and calls of a branch together; the result has a fixed size.

    Raises:
        ValueError: the reducer's results cannot be merged; those of max_abs, moments and histogram can.
        TypeError: it is not a reducer.
    """
    _check_reducer(reducer)
    if reducer.merge is None:
        raise ValueError(f"results of {reducer.name} do not join; those of max_abs, moments and histogram do")
    merge = reducer.merge

    def apply(value: Tensor, view: View) -> tuple[Tensor, tuple[str, ...]]:
        found, axes = reducer(value, view)
        return reduce(merge, found.unbind()).unsqueeze(0), axes

    return replace(reducer, name=f"running {reducer.name}", apply=apply, running=True)


def _check_reducer(given: object) -> None:
    if not isinstance(given, Reducer):
        raise TypeError(
            f"expected a reducer, such as mmdit.reducers.norm(), got {given!r}; a function of your own goes into "
            "mmdit.reducers.Reducer(name, apply)"
        )


def _joint_moments(a: Tensor, b: Tensor) -> Tensor:
    """Merge the moments of two groups along the second-last dimension (Chan, Golub & LeVeque 1979)."""
    (n, mean_a, var_a), (m, mean_b, var_b) = a.unbind(-2), b.unbind(-2)
    count, gap = n + m, mean_b - mean_a
    average = mean_a + gap * (m / count)
    variance = (n * var_a + m * var_b) / count + gap.square() * (n * m / count.square())
    return torch.stack([count, average, variance], dim=-2)


def _without(view: View, *names: str) -> tuple[str, ...]:
    return tuple(axis for axis in view.axes if axis not in names)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _places(mask: Tensor, device: torch.device) -> Tensor:
    return mask.nonzero().flatten().to(device)
