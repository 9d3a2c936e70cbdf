"""Forecasts of the bytes that a capture will keep, made before a model runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod

import torch

from mmdit.inspection.addresses import Address, Label, Rows
from mmdit.inspection.dry_run import Sizes, rehearse
from mmdit.inspection.hooks import Target, Tracker
from mmdit.inspection.reducers import Reducer
from mmdit.inspection.views import Passing, kept_value
from mmdit.pipeline.passes import Branch, Drawing

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


class BudgetError(ValueError):
    """A capture would keep more than its budget; the call that would exceed it was neither run nor kept."""


def bytes_of(budget: int | float | str | None) -> int | None:
    """A number of bytes, given as a number or as text such as "500 MB".

    Raises:
        ValueError: it is neither.
    """
    if budget is None:
        return None
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?b?)\s*", str(budget).lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"budget must be a number of bytes, or like '500 MB' or '2 GB'; got {budget!r}")
    return int(float(found[1]) * _UNITS[found[2]])


class Forecast:
    """The bytes that a capture will keep in each call, from a dry run of the same code on the meta device.

    Args:
        address: the part of each point that is kept.
        reducer_of: returns the reducer of a target, if it has one.
        dtype: the dtype of kept values; None keeps the dtype in which they are computed.
    """

    def __init__(
        self,
        address: Address,
        reducer_of: Callable[[Target], Reducer | None],
        dtype: torch.dtype | None,
    ) -> None:
        self.address, self.reducer_of, self.dtype = address, reducer_of, dtype
        self._found: dict[tuple[object, ...], dict[str, int]] = {}
        self.last: dict[tuple[int, str], str] = {}  # the last target that passes, by model and entry

    def of_call(self, some: Sequence[Target], sizes: Sizes, rows: Rows) -> dict[str, int]:
        """Bytes by point for the rows of one branch, in a call of the model of these targets."""
        sizes, rows = sizes._replace(batch=rows.samples), rows._replace(first=0)
        prompts = rows.conditioning.prompts if rows.conditioning is not None and self.address.has_words else ()
        key = (id(some[0].model), some[0].entry, sizes, prompts)
        if key not in self._found:
            self._found[key] = self._rehearsed(some, sizes, rows)
        return self._found[key]

    def of_drawing(
        self, some: Sequence[Target], drawing: Drawing, wanted: Sequence[tuple[Label, Branch]]
    ) -> dict[str, int]:
        """Bytes by point for a drawing, with one call of the transformer in each requested step and branch."""
        total, counted = dict.fromkeys((target.name for target in some), 0), set()
        samples, _, height, width = drawing.shape
        for label, branch in wanted:
            sizes = Sizes(samples, height, width, branch.conditioning.context.shape[1])
            one = self.of_call(some, sizes, Rows(label, 0, samples, branch.conditioning, len(drawing.sigmas) - 1))
            for target in some:
                reducer, place = self.reducer_of(target), (target.name, branch.name)
                if reducer is None or not reducer.running or place not in counted:
                    total[target.name] += one[target.name]
                counted.add(place)
        return total

    def _rehearsed(self, some: Sequence[Target], sizes: Sizes, rows: Rows) -> dict[str, int]:
        found: dict[str, int] = {}

        def note(target: Target, passing: Passing, _: Tracker) -> None:
            reducer = self.reducer_of(target)
            value = kept_value(target.point, passing, rows, sizes.text_tokens, self.address, reducer).value
            dtype = value.dtype if self.dtype is None or (reducer is not None and reducer.exact) else self.dtype
            found[target.name] = prod(value.shape) * dtype.itemsize

        rehearse(some[0].model, some, sizes, note)
        self.last[id(some[0].model), some[0].entry] = list(found)[-1]
        return found


def check_drawing(
    forecast: dict[str, int], steps: Sequence[int], kept: int, budget: int | None, *, running: bool
) -> None:
    """Raise BudgetError where a drawing would take more than is left, with what would fit."""
    needed = sum(forecast.values())
    if budget is None or kept + needed <= budget:
        return
    left, largest = budget - kept, max(forecast, key=lambda name: forecast[name])
    fitting = 0 if running else int(len(steps) * left / needed)
    fits = [f"{fitting} of the {len(steps)} steps (steps=)"] if fitting else []
    if (points := int(len(forecast) * left / needed)) > 0:
        fits.append(f"about {points} of the {len(forecast)} points")
    fits.append("dtype=torch.float16, a part (branch=, samples=, heads=, tokens=), or a reducer (reduce=)")
    raise BudgetError(
        f"this capture would keep {size(needed)} ({len(forecast)} points x {len(steps)} steps; the largest is "
        f"{largest!r} with {size(forecast[largest])}){f' beside {size(kept)} that are there' if kept else ''}, "
        f"and the budget is {size(budget)}. What fits: {'; '.join(fits)}. Or give a larger budget="
    )


def size(count: int) -> str:
    """A number of bytes as text, such as 1.5 GB."""
    unit = next(unit for unit in ("TB", "GB", "MB", "kB", "") if count >= _UNITS[unit.lower()] or not unit)
    return f"{count / _UNITS[unit.lower()]:.3g} {unit}" if unit else f"{count} bytes"
