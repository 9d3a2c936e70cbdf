"""Handlers of points: points are found by name, and a tracker knows which rows of a batch belong to which branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from encoders import VAE, CLIPText, T5Encoder
from mmdit.checkpoints.components import Component
from mmdit.inspection.addresses import Address, Label, Rows
from mmdit.inspection.points import (
    Point,
    Side,
    Stream,
    clip_points,
    control_points,
    point_table,
    t5_points,
    vae_points,
)
from mmdit.inspection.views import Passing
from mmdit.models.attention import Attend, Attended, Below, Rank, Strategy, attending
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.passes import Branch, Drawing, Pass
from mmdit.pipeline.steps import PipelineSteps
from mmdit.runtime.compiled import refuse_compiled
from mmdit.runtime.hooks import Hook, hooks, listening

Inspected = nn.Module | PipelineSteps  # one of our models, or a pipeline
TRANSFORMER = "transformer."  # a prefix that names of a pipeline's points may omit


class Target(NamedTuple):
    """A point of a model that is captured or changed."""

    name: str  # in a pipeline, it begins with the component, except for the transformer
    point: Point
    model: nn.Module
    entry: str  # the part of the model in whose call it passes; "" for the whole model


class Tracker:
    """Tracks which rows of a model's batch belong to which branch while the model runs."""

    def __init__(self) -> None:
        self.rows: tuple[Rows, ...] = ()
        self.text_tokens = 0
        self.drawing: Drawing | None = None
        self._run = 0
        self._prediction: int | None = None  # the number of the last `pipe.predict` that gave no step
        self._predictions = 0
        self._told: Pass | None = None
        self._calls: Counter[tuple[object, ...]] = Counter()

    def plan(self, drawing: Drawing) -> None:
        """Note that a drawing begins."""
        self._run += self.drawing is not None
        self.drawing = drawing

    def watch(self, one: Pass) -> None:
        """Note the next pass of a pipeline's transformer."""
        self._told = one

    def enter(self, batch: int, text_tokens: int) -> None:
        """Note that the entry runs on this number of rows."""
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
        """Note that the entry has run."""
        self.rows = ()

    def _of_branch(self, told: Pass, first: int, branch: Branch) -> Rows:
        if told.step is None:
            step, steps = self._predictions_until(told.prediction), None
            call = self._count(None, told.prediction, branch.name)
        else:
            step, call = told.step, self._count(self._run, told.step, branch.name)
            steps = None if self.drawing is None else len(self.drawing.sigmas) - 1
        label = Label(self._run, step, call, told.sigma, branch.name)
        return Rows(label, first, told.samples, branch.conditioning, steps)

    def _predictions_until(self, prediction: int) -> int:
        """The number of earlier calls of `pipe.predict`; all passes of a call share its number."""
        if prediction != self._prediction:
            self._prediction, self._predictions = prediction, self._predictions + 1
        return self._predictions - 1

    def _count(self, *what: object) -> int:
        """The number of earlier calls with this key."""
        self._calls[what] += 1
        return self._calls[what] - 1


# (entry module, what goes into it, whose rows) -> nothing; it may raise to keep the model from running
Began = Callable[[nn.Module, tuple[Any, ...], Tracker], None]
# (target, the call of its module, who is at work) -> nothing; it may change the passing
Handler = Callable[[Target, Passing, Tracker], None]


def points_of(model: nn.Module) -> dict[str, Point]:
    """The points of one of our models, by name.

    Raises:
        TypeError: the model is not one of ours.
    """
    if isinstance(model, MMDiT):
        return point_table(model.config)
    if isinstance(model, ControlNet):
        return control_points(model.config)
    if isinstance(model, CLIPText):
        return clip_points(model.config)
    if isinstance(model, T5Encoder):
        return t5_points(model.config)
    if isinstance(model, VAE):
        return vae_points(model.config)
    if isinstance(model, nn.Module):
        refuse_compiled(model, "the model")
    raise TypeError(
        f"a {type(model).__name__} has no table of points; give an MMDiT, ControlNet, CLIP, T5, VAE or pipeline of ours"
    )


def models_of(inspected: Inspected) -> dict[Component | None, nn.Module]:
    """The models by component; the key is None for a model that is given alone."""
    return dict(inspected.models.items()) if isinstance(inspected, PipelineSteps) else {None: inspected}


def targets_of(inspected: Inspected) -> dict[str, Target]:
    """All points of a model or a pipeline, by name."""
    found = {}
    for component, model in models_of(inspected).items():
        front = "" if component in (None, "transformer") else f"{component}."
        for point in points_of(model).values():
            entry = point.module.split(".")[0] if isinstance(model, VAE) else ""
            found[front + point.name] = Target(front + point.name, point, model, entry)
    return found


def plain(name: str) -> str:
    """A name or glob without an optional leading "transformer."."""
    return name.removeprefix(TRANSFORMER)


def selected(inspected: Inspected, patterns: str | Sequence[str], stream: Stream | None = None) -> list[Target]:
    """The points whose names match the globs, in the order of the tables.

    Raises:
        ValueError: a glob matches nothing (the message has the nearest names), or a model is compiled.
        TypeError: the model is not one of ours.
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
    """Raise ValueError where a point lacks a dimension that the address narrows."""
    drawn = isinstance(inspected, PipelineSteps) and target.model in (inspected.transformer, inspected.controlnet)
    address.check(target.point, target.name, drawn=drawn)


def _module_of(target: Target) -> nn.Module:
    try:
        return target.model.get_submodule(target.point.module)
    except AttributeError as error:
        raise ValueError(
            f"{target.name!r} is a point of the module {target.point.module!r}, which the model lacks: another module "
            "has taken its place, or that of a module around it. Name other points, or put back what was replaced"
        ) from error


@contextmanager
def hooked(
    inspected: Inspected, targets: Sequence[Target], handle: Handler, began: Began | None = None
) -> Iterator[None]:
    """Within the context and in this thread, call `handle` for every target that passes.

    Several handlers of one point run in the order in which they were entered.

    Args:
        inspected: a model or pipeline.
        targets: points of the model or pipeline.
        handle: called for each target that passes.
        began: called before each call of a model, or of the encoder or decoder of the VAE.

    Raises:
        ValueError, TypeError: see `mmdit.models.attention.attending`.
    """
    entries = {id(entry): entry for entry in (target.model.get_submodule(target.entry) for target in targets)}
    with tracking(inspected, list(entries.values()), began) as trackers:
        wanted, strategies = list[Hook](), list[tuple[nn.Module, Strategy]]()
        for (_, _, side), group in groupby(sorted(targets, key=_place), key=_place):
            some = list(group)
            module = _module_of(some[0])
            look = _Look(module, some, handle, trackers[id(some[0].model.get_submodule(some[0].entry))])
            if isinstance(module, Attend) or any(target.point.layout == "pattern" for target in some):
                strategies.append((module, _Inputs(look) if side == "input" else _Outputs(look)))
            else:
                wanted.append(Hook(module, side, look.before if side == "input" else look.after))
        with hooks(wanted), attending(strategies):
            yield


@contextmanager
def tracking(
    inspected: Inspected, entries: Sequence[nn.Module], began: Began | None = None
) -> Iterator[dict[int, Tracker]]:
    """Within the context and in this thread, track the calls of models; yields the trackers by id of the entry.

    Args:
        inspected: a model or pipeline.
        entries: its models, or the encoder or decoder of the VAE.
        began: see `hooked`.
    """
    trackers = {id(entry): Tracker() for entry in entries}
    follow = [hook for entry in entries for hook in _track(entry, trackers[id(entry)], began)]
    with hooks(follow), _told(inspected, trackers):
        yield trackers


@contextmanager
def _told(inspected: Inspected, trackers: Mapping[int, Tracker]) -> Iterator[None]:
    """Within the context, tell the trackers of a pipeline's transformer and ControlNet about drawings and passes."""
    with ExitStack() as stack:
        if isinstance(inspected, PipelineSteps):
            drawn = [trackers.get(id(model)) for model in (inspected.transformer, inspected.controlnet)]
            for tracker in drawn:
                if tracker is not None:
                    stack.enter_context(listening(inspected.planners, tracker.plan))
                    stack.enter_context(listening(inspected.watchers, tracker.watch))
        yield


def _place(target: Target) -> tuple[int, str, Side]:
    return id(target.model), target.point.module, target.point.side


def _track(entry: nn.Module, tracker: Tracker, began: Began | None) -> Iterator[Hook]:
    def before(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        context = given[2] if isinstance(entry, MMDiT | ControlNet) else None
        tracker.enter(given[0].shape[0], 0 if context is None else context.shape[1])
        if began is not None:
            began(entry, given, tracker)

    def after(*_: object) -> None:
        tracker.leave()

    yield Hook(entry, "input", before, first=True)
    yield Hook(entry, "output", after, always=True)


class _Look:
    """A hook that handles all targets on one side of a module."""

    def __init__(self, module: nn.Module, targets: Sequence[Target], handle: Handler, tracker: Tracker) -> None:
        self.module, self.targets, self.handle, self.tracker = module, targets, handle, tracker

    def see(self, passing: Passing) -> Passing:
        for target in self.targets if self.tracker.rows else ():
            self.handle(target, passing, self.tracker)
        return passing

    def before(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> Any:
        passing = self.see(Passing(self.module, args, kwargs))
        return (passing.args, dict(passing.kwargs)) if passing.changed else None

    def after(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any], output: object) -> Any:
        passing = self.see(Passing(self.module, args, kwargs, output))
        return passing.output if passing.changed else None


class _Inputs(Strategy):
    """A strategy that passes queries, keys and values to the handler."""

    rank = Rank.INPUTS

    def __init__(self, look: _Look) -> None:
        self.look = look

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, below: Below) -> Attended:
        return below(*self.look.see(Passing(self.look.module, (q, k, v), {})).args)


class _Outputs(Strategy):
    """A strategy that passes the pattern and the output of attention to the handler."""

    rank = Rank.OUTPUTS

    def __init__(self, look: _Look) -> None:
        self.look = look

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, below: Below) -> Attended:
        found = below(q, k, v)
        passing = self.look.see(Passing(self.look.module, (q, k, v), {}, found.output, attention=found))
        assert passing.attention is not None
        return passing.attention.giving(passing.output) if passing.changed else passing.attention
