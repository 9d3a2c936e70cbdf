"""`capture`: keep activations of models while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from encoders import VAE, CLIPText, T5Encoder
from mmdit.inspection import reducers
from mmdit.inspection.addresses import Address, Numbers, Rows, Tokens, wanted_steps
from mmdit.inspection.budget import BudgetError, Forecast, bytes_of, check_drawing, size
from mmdit.inspection.captured import Captured, Entry, Series, Spool
from mmdit.inspection.dry_run import Sizes
from mmdit.inspection.hooks import Inspected, Target, Tracker, check_address, hooked, plain, selected
from mmdit.inspection.points import DERIVED, Stream
from mmdit.inspection.reducers import Reducer
from mmdit.inspection.shapes import check_parts
from mmdit.inspection.views import Kept, Passing, kept_value, put_back, shown
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.passes import Drawing
from mmdit.pipeline.steps import PipelineSteps
from mmdit.runtime.hooks import is_repeated, listening
from mmdit.utils import checks_names

Reduce = Reducer | Mapping[str, Reducer] | None
Wrong = Callable[..., Any] | str  # often mistaken for reducers; the error tells what to write instead
BUDGET = "4 GB"


@checks_names
@contextmanager
def capture(
    model: Inspected,
    patterns: str | Sequence[str],
    *,
    steps: Numbers | None = None,
    sigmas: tuple[float, float] | None = None,
    branch: str | Sequence[str] | None = None,
    samples: Numbers | None = None,
    heads: Numbers | None = None,
    tokens: Tokens | None = None,
    queries: Tokens | None = None,
    channels: Numbers | None = None,
    stream: Stream | None = None,
    reduce: Reduce | Wrong | Mapping[str, Wrong] = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    to: str | Path | None = None,
    budget: int | float | str | None = BUDGET,
    stop: bool = False,
    grad: bool = False,
) -> Iterator[Captured]:
    """Keep the values at the named points, within the context and in this thread; hooks are removed afterwards.

        with mmdit.capture(pipe, "joint_blocks.*.x_block.resid_post", steps=[0, 10], branch="cond") as seen:
            pipe("a red circle", seed=1)
        seen["joint_blocks.2.x_block.resid_post"]  # [steps, samples, tokens, channels]

    Args:
        model: a pipeline, or one of its models; for a model alone, each call counts as a step.
        patterns: globs over the names that `mmdit.points` lists; "transformer." may be left out.
        steps, sigmas, branch, samples, heads, tokens, queries, channels: see `mmdit.inspection.addresses.Address`.
        stream: "text", "image" or "joint" selects the points of this stream.
        reduce: a reducer of `mmdit.reducers`, whose result is kept instead of the value; or reducers by glob, of which
            the first that matches is used.
        dtype: the dtype of kept values; None keeps the dtype in which they are computed.
        device: the device of kept values.
        to: a .safetensors file to write to instead of memory. It appears only when it is complete;
            `mmdit.load_capture` reads it.
        budget: the largest number of bytes to keep, as a number or as text such as "2 GB"; None for no limit. The size
            of a drawing is computed before its first pass, and again before each call of a model.
        stop: whether to end the `with` block after the last requested point (for a model alone, in its first requested
            call; for a solver with several calls a step, in the first call of the last requested step).
        grad: whether to keep the values in the graph, for `Captured.gradients`. This needs a run with gradients: a
            model, or the pipeline's `predict` and `sample` (a call of the pipeline has no gradients).

    Raises:
        ValueError: a glob matches nothing, a model is compiled, or the address does not fit a point.
        BudgetError: the budget would be exceeded; it is raised before the call that would exceed it.
    """
    address = Address(steps, sigmas, branch, samples, heads, tokens, queries, channels)
    targets = selected(model, patterns, stream)
    for target in targets:
        check_address(model, target, address)
    reducers = _reducers(targets, reduce)
    if grad and (reducers or to or any(target.point.layout in DERIVED for target in targets)):
        raise ValueError("grad=True keeps values as they pass: no reduce=, no to=, and no pattern or out_by_head")
    seen = Captured([target.name for target in targets], one_branch=isinstance(branch, str))
    planners = model.planners if isinstance(model, PipelineSteps) else []
    with nullcontext() if to is None else Spool(to) as spool:
        recorder = _Recorder(model, targets, address, reducers, seen, spool)
        recorder.dtype, recorder.device, recorder.grad = dtype, torch.device(device), grad
        recorder.budget, recorder.stop = bytes_of(budget), stop
        recorder.forecast.dtype = dtype
        try:
            with listening(planners, recorder.plan), hooked(model, targets, recorder.handle, recorder.began):
                yield seen
        except _Stopped as stopped:
            if stopped.by is not recorder:
                raise
        if spool is not None:
            spool.save(seen)


class _Stopped(BaseException):
    """Raised after the last requested point. It is no Exception, so that no `except Exception` catches it."""

    def __init__(self, by: object) -> None:
        super().__init__("stopped after the last wanted point")
        self.by = by


class _Recorder:
    """Keeps values while models run."""

    dtype: torch.dtype | None
    device: torch.device
    budget: int | None
    stop: bool
    grad: bool

    def __init__(
        self,
        model: Inspected,
        targets: Sequence[Target],
        address: Address,
        reducers: Mapping[str, Reducer],
        seen: Captured,
        spool: Spool | None,
    ) -> None:
        self.targets, self.address, self.reducers = targets, address, reducers
        self.seen, self.spool = seen, spool
        self.forecast = Forecast(address, lambda target: reducers.get(target.name), None)
        self.transformer = model.transformer if isinstance(model, PipelineSteps) else None
        self.final = max(targets, key=_rank)  # the last entry that runs
        self.last_step: int | None = None  # the last requested step of the present drawing
        self.branches_left: set[str | None] = set()
        self.kept = 0  # bytes

    def plan(self, drawing: Drawing) -> None:
        """At the beginning of a drawing, check its size against the budget."""
        some = [target for target in self.targets if target.model is self.transformer]
        if not some:
            return
        wanted = self.address.meant(drawing)
        steps = sorted({label.step for label, _ in wanted})
        self.last_step, self.branches_left = steps[-1], {label.branch for label, _ in wanted if label.step == steps[-1]}
        if self.budget is None and not self.stop:
            assert self.transformer is not None
            config, reducer_of = self.transformer.config, self.forecast.reducer_of
            check_parts(some, config, drawing, wanted, self.address, reducer_of)
            return
        needed = self.forecast.of_drawing(some, drawing, wanted)
        running = all(name in self.reducers and self.reducers[name].running for name in needed)
        check_drawing(needed, steps, self.kept, self.budget, running=running)

    def began(self, entry: nn.Module, given: tuple[object, ...], tracker: Tracker) -> None:
        """Before a call of a model, check the size that it adds against the budget."""
        if is_repeated():
            return
        wanted = [rows for rows in tracker.rows if self.address.meets(rows.label, rows.steps)]
        some = [target for target in self.targets if target.model.get_submodule(target.entry) is entry]
        if not wanted:
            return
        if self.grad and not torch.is_grad_enabled():
            raise ValueError(
                "grad=True, but the model runs without gradients: use pipe.predict or pipe.sample, not pipe(...)"
            )
        if self.budget is None and not self.stop:
            return
        sizes = _sizes(some[0].model, some[0].entry, given)
        needed = sum(self._added(self.forecast.of_call(some, sizes, rows), rows) for rows in wanted)
        if self.budget is not None and self.kept + needed > self.budget:
            raise BudgetError(
                f"the next call, of step {wanted[0].label.step}, would add {size(needed)} to the {size(self.kept)} "
                f"that are kept, and the budget is {size(self.budget)}; keep less or give a larger budget="
            )

    def handle(self, target: Target, passing: Passing, tracker: Tracker) -> None:
        """Keep the value at a point."""
        if is_repeated():
            return
        for rows in tracker.rows:
            if not self.address.meets(rows.label, rows.steps):
                continue
            if self.grad:
                self._keep_in_graph(target, passing, rows)
            else:
                reducer = self.reducers.get(target.name)
                kept = kept_value(target.point, passing, rows, tracker.text_tokens, self.address, reducer)
                self._keep(target, rows, kept, reducer)
        if self.stop:
            self._end(target, tracker)

    def _keep(self, target: Target, rows: Rows, kept: Kept, reducer: Reducer | None) -> None:
        value = kept.value.detach()
        dtype = value.dtype if self.dtype is None or (reducer is not None and reducer.exact) else self.dtype
        running = reducer is not None and reducer.running
        before = self._running(target, rows) if running else None
        if before is not None:
            assert reducer is not None
            assert reducer.merge is not None
            entries = self.seen.series[target.name].entries
            merged = reducer.merge(before.read(), value.to(self.device, before.value.dtype))
            entries[entries.index(before)] = before._replace(value=merged)
            return
        self._fit(prod(value.shape) * dtype.itemsize, target)
        copy = torch.empty(value.shape, dtype=dtype, device=self.device).copy_(value)
        samples = kept.samples if not running else (-1,)
        entry = Entry(rows.label, samples, copy if self.spool is None or running else self.spool.put(copy))

        def like() -> Series:
            labels = {axis: of for axis, of in kept.labels.items() if axis in kept.axes}
            made = {} if reducer is None else {axis: of for axis, of in reducer.labels.items() if axis in kept.axes}
            return Series(kept.axes, labels | made, running, reducer is not None)

        self.seen.add(target.name, like, entry)

    def _keep_in_graph(self, target: Target, passing: Passing, rows: Rows) -> None:
        value = shown(target.point, passing)
        picked = self.address.pick(target.point, value.shape, rows)
        part = picked.read(value)
        self._fit(part.nbytes, target)
        part = part.clone() if part.requires_grad else part.detach().clone().requires_grad_()
        put_back(target.point, passing, picked.write(value, part))
        labels = picked.labels
        self.seen.add(target.name, lambda: Series(target.point.axes, labels), Entry(rows.label, picked.samples, part))

    def _running(self, target: Target, rows: Rows) -> Entry | None:
        entries = self.seen.series[target.name].entries if target.name in self.seen.series else []
        return next((entry for entry in entries if entry.label.branch == rows.label.branch), None)

    def _fit(self, more: int, target: Target) -> None:
        """Count a value before it is kept; the earlier forecasts should prevent an error here."""
        self.kept += more
        if self.budget is not None and self.kept > self.budget:
            raise BudgetError(f"{target.name!r} would take the capture to {size(self.kept)}, above {size(self.budget)}")

    def _added(self, needed: Mapping[str, int], rows: Rows) -> int:
        """The forecast without the results that running reducers already have."""
        by_name = {target.name: target for target in self.targets}
        there = [name for name in needed if name in self.reducers and self.reducers[name].running]
        return sum(of for name, of in needed.items() if name not in there or not self._running(by_name[name], rows))

    def _end(self, target: Target, tracker: Tracker) -> None:
        """Raise `_Stopped` if no requested point follows."""
        model, entry = self.final.model, self.final.entry
        if (target.model, target.entry, target.name) != (model, entry, self.forecast.last[id(model), entry]):
            return
        wanted = [rows for rows in tracker.rows if self.address.meets(rows.label, rows.steps)]
        if any(self._is_last(rows) for rows in wanted):
            raise _Stopped(self)

    def _is_last(self, rows: Rows) -> bool:
        """Whether no later call of the model is requested."""
        steps, step = self.address.steps, rows.label.step
        if rows.steps is not None:
            self.branches_left -= {rows.label.branch} if step == self.last_step else set()
            return not self.branches_left
        if isinstance(steps, slice) and steps.stop is not None:
            return step >= steps.stop - 1
        return step >= (0 if steps is None else max(wanted_steps(steps, None, step), default=0))


def _reducers(targets: Sequence[Target], reduce: Reduce | Wrong | Mapping[str, Wrong]) -> dict[str, Reducer]:
    """The reducers by name of the point.

    Raises:
        TypeError: a value is not a reducer; the message tells what to write.
        ValueError: a glob matches none of the points.
    """
    if reduce is None:
        return {}
    if not isinstance(reduce, Mapping):
        return dict.fromkeys((target.name for target in targets), _reducer(reduce))
    given = {glob: _reducer(one) for glob, one in reduce.items()}
    found: dict[str, Reducer] = {}
    for target in targets:
        fitting = [reducer for glob, reducer in given.items() if fnmatchcase(target.name, plain(glob))]
        found |= {target.name: fitting[0]} if fitting else {}
    for glob in given:
        if not any(fnmatchcase(target.name, plain(glob)) for target in targets):
            raise ValueError(f"reduce={{{glob!r}: ...}} names none of the {len(targets)} points that are captured")
    return found


def _reducer(given: object) -> Reducer:
    if isinstance(given, Reducer):
        return given
    made = [name for name, one in vars(reducers).items() if _makes_reducers(one)]
    name = given if isinstance(given, str) else getattr(given, "__name__", "")
    near = get_close_matches(name, made, n=1, cutoff=0.7)
    if near:
        hint = f"write mmdit.reducers.{near[0]}(...), with its parentheses, which makes one"
    else:
        hint = f"mmdit.reducers has {', '.join(made)}; a function of your own goes into its Reducer(name, apply)"
    raise TypeError(f"reduce= takes a reducer, got {given!r}; {hint}")


def _makes_reducers(one: object) -> bool:
    return getattr(one, "__annotations__", {}).get("return") in ("Reducer", Reducer)


def _rank(target: Target) -> int:
    """The order in which a pipeline runs its models."""
    if isinstance(target.model, MMDiT | ControlNet):
        return 2
    return 3 if target.entry == "decoder" else 1


def _sizes(model: nn.Module, entry: str, given: tuple[Any, ...]) -> Sizes:
    """The sizes of the inputs of a model's call."""
    shape = given[0].shape
    if isinstance(model, MMDiT | ControlNet):
        return Sizes(shape[0], shape[2], shape[3], given[2].shape[1])
    if isinstance(model, CLIPText | T5Encoder):
        return Sizes(shape[0], clip_tokens=shape[1], t5_tokens=shape[1])
    assert isinstance(model, VAE)
    cell = model.config.downscale if entry == "encoder" else 1
    return Sizes(shape[0], shape[2] // cell, shape[3] // cell)
