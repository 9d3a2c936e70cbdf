"""The result of a comparison, as a readable table and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from mmdit.parity.measure import Shape

_HEADER = ("stage", "a", "b", "error", "limit", "max", "carried", "")
_LEGEND = (
    "error: |a - b| / |b| of the stage alone, from the same inputs; limit: the largest error that rounding explains;\n"
    "max: the largest |a - b| of the stage alone; carried: |a - b| / |b| of two whole runs, so with all earlier errors."
)


class Limits(NamedTuple):
    """The largest relative errors of a stage that pass."""

    alone: float  # limit where both sides compute the stage from the same inputs
    carried: float = math.inf  # limit between two undisturbed runs


@dataclass(frozen=True)
class Stage:
    """The comparison of one stage."""

    name: str
    shape_a: Shape | None  # None: this side has no such stage
    shape_b: Shape | None
    relative: float  # |a - b| / |b|, both computed from the same inputs; inf for other shapes and non-finite numbers
    maximum: float  # the largest |a - b|, both computed from the same inputs
    tolerance: float  # the largest `relative` that passes
    ok: bool
    note: str
    carried: float  # |a - b| / |b| of two whole runs: the error of this stage and of all before it
    carried_tolerance: float = math.inf  # the largest `carried` that passes


@dataclass(frozen=True, repr=False)
class Comparison:
    """All stages of a comparison in the order of computation; printing shows a table and a verdict."""

    a: str
    b: str
    settings: str
    stages: tuple[Stage, ...]
    explanation: tuple[str, ...]  # reasons why stages differ beyond rounding, as far as they are known
    reasons: tuple[str, ...] = ()  # the reasons for fixed limits

    @property
    def first(self) -> Stage | None:
        """The first stage beyond rounding."""
        return next((stage for stage in self.stages if not stage.ok), None)

    @property
    def passed(self) -> bool:
        """Whether every stage agrees within its limits."""
        return self.first is None

    def to_json(self) -> str:
        """All fields as strict JSON; numbers that are not finite are null."""
        content = asdict(self) | {"first": None if self.first is None else self.first.name}
        return json.dumps(_finite(content), allow_nan=False, indent=1)

    def __str__(self) -> str:
        """A table and the verdict; stages that agree are summed up by layer and block."""
        rows = [_HEADER, *map(_row, _folded(self.stages))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        head = [f"a: {self.a}", f"b: {self.b}", self.settings, ""]
        return "\n".join([*head, *table, "", _LEGEND, *self.reasons, "", *self._verdict()])

    def __repr__(self) -> str:
        """Both sides, the number of stages, and the first that differs beyond rounding."""
        failed = [stage for stage in self.stages if not stage.ok]
        found = f"{len(failed)} beyond rounding, first {failed[0].name!r}" if failed else "all agree"
        return f"Comparison(a={self.a!r}, b={self.b!r}, {len(self.stages)} stages: {found}; print it for the table)"

    def _verdict(self) -> list[str]:
        first = self.first
        if first is None:
            return [f"PASS: all {len(self.stages)} stages agree within rounding."]
        failed = [stage.name for stage in self.stages if not stage.ok]
        more = f" and {len(failed) - 12} more" if len(failed) > 12 else ""
        why = self.explanation or ("nothing known: look at the code of these stages, or at hooks and patches on them",)
        return [
            f"FAIL: {len(failed)} of {len(self.stages)} stages differ beyond rounding: {', '.join(failed[:12])}{more}",
            f"First stage beyond rounding: {first.name}: {first.note or _beyond(first)}",
            "What explains it:",
            *(f"  {line}" for line in why),
        ]


def _beyond(stage: Stage) -> str:
    if stage.relative > stage.tolerance:
        return f"relative error {stage.relative:.1e}, rounding explains {stage.tolerance:.1e}"
    return f"relative error {stage.carried:.1e} of the whole runs, rounding explains {stage.carried_tolerance:.1e}"


def _row(stage: Stage) -> tuple[str, ...]:
    a, b = ("-" if shape is None else "x".join(map(str, shape)) for shape in (stage.shape_a, stage.shape_b))
    numbers = (f"{value:.1e}" for value in (stage.relative, stage.tolerance, stage.maximum, stage.carried))
    return (stage.name, a, "=" if a == b else b, *numbers, "" if stage.ok else f"BEYOND  {stage.note}".rstrip())


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if 3 <= i < len(row) - 1 else cell.ljust(width)


def _folded(stages: Sequence[Stage]) -> Iterator[Stage]:
    """Combine the rows of layers, of blocks and of steps that were not inspected, where they agree."""
    looked = {stage.name.split()[1] for stage in stages if stage.name.endswith(" guided")}

    def group(stage: Stage) -> str | None:
        layer = re.match(r"(.* )(?=(layer|block) \d+)", stage.name)
        step = re.match(r"step (\d+) ", stage.name)
        if not stage.ok or not (layer or step):
            return stage.name
        if layer:
            return layer[1]
        return "" if step and step[1] not in looked else stage.name

    for prefix, members in groupby(stages, key=group):
        first, *more = members
        yield _sum(first, more, prefix or "") if more else first


def _sum(first: Stage, more: Sequence[Stage], prefix: str) -> Stage:
    every = (first, *more)
    name = f"{first.name} … {more[-1].name.removeprefix(prefix)} ({len(every)})"
    largest = {
        field: max(getattr(stage, field) for stage in every)
        for field in ("relative", "maximum", "tolerance", "carried")
    }
    return replace(first, name=name, **largest)


def _finite(value: object) -> Any:
    """The value with None for numbers that are not finite, because JSON has no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
