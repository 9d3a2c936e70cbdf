"""Hooks on the points of models: found by name, told whose rows a batch holds, and gone at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from encoders import VAE, CLIPText, T5Encoder
from mmdit.checkpoints.components import Component
from mmdit.inspection.addresses import Address, Label, Rows
from mmdit.inspection.encoder_points import clip_points, t5_points, vae_points
from mmdit.inspection.points import Point, Side, Stream, point_table
from mmdit.inspection.views import Passing
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.passes import Branch, Drawing, Pass
from mmdit.pipeline.steps import PipelineSteps
from mmdit.runtime.compiled import refuse_compiled

Inspected = nn.Module | PipelineSteps  # one of our models, or a pipeline
TRANSFORMER = "transformer."  # what names of a pipeline's points may leave out


class Target(NamedTuple):
    """A point of a model that is looked into."""

    name: str  # in a pipeline: with the component in front, except for the transformer
    point: Point
    model: nn.Module
    entry: str  # the part of the model whose call it is passed in: "" for the whole


class Tracker:
    """Whose rows the batch of a model's entry holds while it runs."""

    def __init__(self) -> None:
        self.rows: tuple[Rows, ...] = ()
        self.text_tokens = 0
        self.drawing: Drawing | None = None
        self._run = 0
        self._told: Pass | None = None
        self._calls: Counter[tuple[object, ...]] = Counter()

    def plan(self, drawing: Drawing) -> None:
        """A drawing begins."""
        self._run += self.drawing is not None
        self.drawing = drawing

    def watch(self, one: Pass) -> None:
        """A pass of a pipeline's transformer comes next."""
        self._told = one

    def enter(self, batch: int, text_tokens: int) -> None:
        """The entry runs, on that many rows."""
        told, self._told, self.text_tokens = self._told, None, text_tokens
        if told is not None and len(told.branches) * told.samples != batch:
            raise RuntimeError(
                f"{len(told.branches)} branches of {told.samples} samples were announced, but the transformer runs "
                f"on {batch} rows: whose they are is not known"
            )
        if told is None:
            step = self._count(None)
            self.rows = (Rows(Label(self._run, step, 0, None, None), 0, batch, None, None),)
        else:
            branches = enumerate(told.branches)
            self.rows = tuple(self._of_branch(told, i * told.samples, branch) for i, branch in branches)

    def leave(self) -> None:
        """It has run."""
        self.rows = ()

    def _of_branch(self, told: Pass, first: int, branch: Branch) -> Rows:
        if told.step is None:
            step, call, steps = self._count(branch.name), 0, None
        else:
            step, call = told.step, self._count(self._run, told.step, branch.name)
            steps = None if self.drawing is None else len(self.drawing.sigmas) - 1
        label = Label(self._run, step, call, told.sigma, branch.name)
        return Rows(label, first, told.samples, branch.conditioning, steps)

    def _count(self, *what: object) -> int:
        """How many of these there were before."""
        self._calls[what] += 1
        return self._calls[what] - 1


# (entry module, what goes into it, whose rows) -> nothing; it may raise to keep the model from running
Began = Callable[[nn.Module, tuple[Any, ...], Tracker], None]
# (target, the call of its module, who is at work) -> nothing; it may change the passing
Handler = Callable[[Target, Passing, Tracker], None]


def points_of(model: nn.Module) -> dict[str, Point]:
    """The points of one of our models, by name.

    Raises:
        TypeError: of another model.
    """
    if isinstance(model, MMDiT):
        return point_table(model.config)
    if isinstance(model, CLIPText):
        return clip_points(model.config)
    if isinstance(model, T5Encoder):
        return t5_points(model.config)
    if isinstance(model, VAE):
        return vae_points(model.config)
    refuse_compiled(model, "the model")
    raise TypeError(
        f"a {type(model).__name__} has no table of points; give an MMDiT, CLIP, T5, VAE or a pipeline of ours"
    )


def models_of(inspected: Inspected) -> dict[Component | None, nn.Module]:
    """By component; a model alone has no component's name."""
    return dict(inspected.models.items()) if isinstance(inspected, PipelineSteps) else {None: inspected}


def targets_of(inspected: Inspected) -> dict[str, Target]:
    """All points by name."""
    found = {}
    for component, model in models_of(inspected).items():
        front = "" if component in (None, "transformer") else f"{component}."
        for point in points_of(model).values():
            entry = point.module.split(".")[0] if isinstance(model, VAE) else ""
            found[front + point.name] = Target(front + point.name, point, model, entry)
    return found


def plain(name: str) -> str:
    """A name or glob without the "transformer." that it may have."""
    return name.removeprefix(TRANSFORMER)


def selected(inspected: Inspected, patterns: str | Sequence[str], stream: Stream | None = None) -> list[Target]:
    """The points that globs name, in the order of the tables.

    Raises:
        ValueError: a glob that matches nothing (with the nearest names), or a compiled model.
        TypeError: a model that is not ours.
    """
    every = targets_of(inspected)
    wanted = [plain(patterns)] if isinstance(patterns, str) else [plain(pattern) for pattern in patterns]
    for pattern in wanted:
        matching = [target for name, target in every.items() if fnmatchcase(name, pattern)]
        if not matching:
            nearest = ", ".join(get_close_matches(pattern, every, cutoff=0))
            raise ValueError(f"{pattern!r} matches none of {len(every)} points; nearest are {nearest}")
        if not any(stream in (None, target.point.stream) for target in matching):
            raise ValueError(f"{pattern!r} matches {len(matching)} points, but none in the stream {stream!r}")
    found = [target for name, target in every.items() if any(fnmatchcase(name, pattern) for pattern in wanted)]
    found = [target for target in found if stream in (None, target.point.stream)]
    for model in {id(target.model): target.model for target in found}.values():
        refuse_compiled(model, type(model).__name__)
    return found


def check_address(inspected: Inspected, target: Target, address: Address) -> None:
    """Raise ValueError where a point does not have what the address narrows."""
    drawn = isinstance(inspected, PipelineSteps) and target.model is inspected.transformer
    address.check(target.point, target.name, drawn=drawn)


@contextmanager
def hooked(
    inspected: Inspected, targets: Sequence[Target], handle: Handler, began: Began | None = None
) -> Iterator[None]:
    """Within it, every call that passes a target goes to `handle`; the hooks are gone afterwards, whatever happens.

    Several hooks on one point run in the order in which they were entered.

    Args:
        inspected: a model or pipeline.
        targets: of it.
        handle: told of each target that is passed.
        began: told of each call of a model, or of a half of the VAE, before it runs.
    """
    with ExitStack() as stack:
        trackers: dict[int, Tracker] = {}
        for target in targets:
            entry = target.model.get_submodule(target.entry)
            if id(entry) not in trackers:
                trackers[id(entry)] = tracker = Tracker()
                for removable in _track(entry, tracker, began):
                    stack.callback(removable.remove)
                if isinstance(inspected, PipelineSteps) and entry is inspected.transformer:
                    stack.enter_context(listening(inspected.watchers, tracker.watch))
                    stack.enter_context(listening(inspected.planners, tracker.plan))
        for (_, _, side), group in groupby(sorted(targets, key=_place), key=_place):
            some = list(group)
            tracker = trackers[id(some[0].model.get_submodule(some[0].entry))]
            stack.callback(_attach(some, side, handle, tracker).remove)
        yield


@contextmanager
def listening(ears: list[Any], ear: Callable[..., None]) -> Iterator[None]:
    """An entry in a list of those who are told, that is gone afterwards."""
    ears.append(ear)
    try:
        yield
    finally:
        ears[:] = [one for one in ears if one is not ear]


def _place(target: Target) -> tuple[int, str, Side]:
    return id(target.model), target.point.module, "output" if target.point.layout == "pattern" else target.point.side


def _track(entry: nn.Module, tracker: Tracker, began: Began | None) -> Iterator[RemovableHandle]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        context = given[2] if isinstance(entry, MMDiT) else None
        tracker.enter(given[0].shape[0], 0 if context is None else context.shape[1])
        if began is not None:
            began(entry, given, tracker)

    def after(*_: Any) -> None:
        tracker.leave()

    yield entry.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    yield entry.register_forward_hook(after, always_call=True)


def _attach(targets: Sequence[Target], side: Side, handle: Handler, tracker: Tracker) -> RemovableHandle:
    """One hook on a module, for all targets on that side of it."""
    module = targets[0].model.get_submodule(targets[0].point.module)

    def see(passing: Passing) -> Passing:
        for target in targets if tracker.rows else ():
            handle(target, passing, tracker)
        return passing

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passing = see(Passing(module, args, kwargs))
        return (passing.args, dict(passing.kwargs)) if passing.changed else None

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        passing = see(Passing(module, args, kwargs, output))
        return passing.output if passing.changed else None

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)
