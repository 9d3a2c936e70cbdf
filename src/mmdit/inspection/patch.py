"""`patch`: change activations of models while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmdit.inspection.addresses import Address, Label, Numbers, Picked, Rows, Tokens
from mmdit.inspection.captured import Captured
from mmdit.inspection.hooks import Inspected, Target, Tracker, check_address, hooked, plain, selected, targets_of
from mmdit.inspection.points import Stream
from mmdit.inspection.views import Passing, put_back, shown
from mmdit.models.attention import Attended
from mmdit.pipeline.passes import Drawing
from mmdit.pipeline.steps import PipelineSteps
from mmdit.runtime.hooks import listening
from mmdit.utils import checks_names, shortened, taken
from samplers import pick

Ablation = Literal["zero", "mean", "resample"]


class At(NamedTuple):
    """The place of a change."""

    name: str  # name of the point
    label: Label
    axes: tuple[str, ...]  # names of the dimensions after the samples
    picked: Picked  # the part of `whole` that is changed
    whole: Tensor  # [samples, axes]: the value of the branch, not narrowed
    before: Tensor | None  # the block's input in the same rows, for `resid_post` points


# (the addressed part [samples, axes], its place) -> the new part; None leaves the part unchanged
Change = Callable[[Tensor, At], Any]


@checks_names
@contextmanager
def patch(
    model: Inspected,
    patterns: str | Sequence[str],
    *,
    replace: Tensor | Captured | None = None,
    ablate: Ablation | None = None,
    source: Captured | None = None,
    scale: int | float | Tensor | None = None,
    add: Tensor | int | float | None = None,
    swap: tuple[int, int] | None = None,
    skip: bool = False,
    apply: Callable[[Tensor], Any] | None = None,
    steps: Numbers | None = None,
    sigmas: tuple[float, float] | None = None,
    branch: str | Sequence[str] | None = None,
    samples: Numbers | None = None,
    heads: Numbers | None = None,
    tokens: Tokens | None = None,
    queries: Tokens | None = None,
    channels: Numbers | None = None,
    stream: Stream | None = None,
) -> Iterator[None]:
    """Change the values at the named points, within the context and in this thread only.

        with mmdit.patch(pipe, "joint_blocks.1.x_block.attn.z", ablate="zero", heads=[2], steps=slice(0, 5)):
            pipe("a red circle", seed=1)

    Values that are not addressed stay bit-equal. Several patches and captures of one point act in the order in which
    they were entered. A patched attention pattern (`attend.pattern`) is not normalised again.

    Args:
        model, patterns, stream: see `mmdit.capture`; with `skip`, patterns name blocks ("joint_blocks.3").
        replace: values that broadcast to [samples, axes]; or a capture of another run, at the same points, steps and
            branches (a capture of one call is used in every step, one of one sample for every sample).
        ablate: "zero"; "mean" over samples and tokens; or "resample", the value of the previous sample in the batch.
        source: a capture of other runs, which `ablate` takes the mean of or resamples from.
        scale: a factor: a number or a tensor that broadcasts to [samples, axes].
        add: values to add that broadcast to [samples, axes], such as a direction [channels] times a strength.
        swap: the numbers of two samples of the batch, whose values are exchanged.
        skip: whether blocks return their input. They still compute; `skip_layers` of the transformer is faster.
        apply: a function of the value [samples, axes] that returns a tensor or an array. If it returns None, as a torch
            hook may, the value stays as the function left it.
        steps, sigmas, branch, samples, heads, tokens, queries, channels: see `mmdit.inspection.addresses.Address`.

    Raises:
        ValueError: there is not exactly one operation; a glob matches nothing; a model is compiled; the address does
            not fit or is never met; or values have a wrong shape.
    """
    change = _change(replace, ablate, source, scale, add, swap, skip, apply)
    address = Address(steps, sigmas, branch, samples, heads, tokens, queries, channels)
    targets = selected(model, _blocks(model, patterns) if skip else patterns, stream)
    for target in targets:
        check_address(model, target, address)
        if target.point.layout == "by_head":
            raise ValueError(
                f"{target.name!r} is computed from z: patch {target.name.replace('out_by_head', 'z')!r} instead"
            )
    patcher = _Patcher(model, targets, address, change)
    planners = model.planners if isinstance(model, PipelineSteps) else []
    with listening(planners, patcher.plan), hooked(model, targets, patcher.handle, patcher.began):
        yield
    if patcher.ran and not patcher.applied:
        raise ValueError(f"the model ran, but the patch was never applied: its address was not met: {address}")


class _Patcher:
    """Changes values while models run."""

    def __init__(self, model: Inspected, targets: Sequence[Target], address: Address, change: Change) -> None:
        self.targets, self.address, self.change = targets, address, change
        self.transformer = model.transformer if isinstance(model, PipelineSteps) else None
        self.ran, self.applied = False, False

    def plan(self, drawing: Drawing) -> None:
        """At the beginning of a drawing, raise ValueError if no part of it is addressed."""
        if all(target.model is self.transformer for target in self.targets):
            self.address.meant(drawing)

    def began(self, *_: object) -> None:
        """Note that a model runs."""
        self.ran = True

    def handle(self, target: Target, passing: Passing, tracker: Tracker) -> None:
        """Change the value at a point."""
        for rows in tracker.rows:
            if self.address.meets(rows.label, rows.steps):
                self.applied = True
                change = _patch_pattern if target.point.layout == "pattern" else _patch_value
                change(target, passing, rows, self.address, self.change)


def _patch_value(target: Target, passing: Passing, rows: Rows, address: Address, change: Change) -> None:
    point = target.point
    value = shown(point, passing)
    picked = address.pick(point, value.shape, rows)
    within = slice(rows.first, rows.first + rows.samples)
    before = passing.args[point.argument][within] if point.name.endswith("resid_post") else None
    at = At(target.name, rows.label, point.axes, picked.within(rows), value[within], before)
    put_back(point, passing, picked.write(value, _checked(change, picked.read(value), at)))


def _patch_pattern(target: Target, passing: Passing, rows: Rows, address: Address, change: Change) -> None:
    """Another pattern, and z = pattern x v anew for the heads and queries that are meant."""
    found = passing.attention
    assert found is not None
    branch = range(rows.first, rows.first + rows.samples)
    whole = found.part(branch).pattern()
    picked = address.pick(target.point, torch.Size((len(found.q), *whole.shape[1:])), rows)
    local = picked.within(rows)
    at = At(target.name, rows.label, target.point.axes, local, whole, None)
    pattern = local.write(whole, _checked(change, local.read(whole), at))
    z = pattern @ found.v[rows.first : rows.first + rows.samples].to(whole.dtype)
    of_z = picked._replace(axes=("head", "token", "channel"), places=(*picked.places[:2], None))
    output = of_z.write(found.output, of_z.within(rows).read(z))
    passing.attention = Repatterned(found, branch, pattern, output)
    passing.output = output


class Repatterned(Attended):
    """Attention whose pattern was replaced in some rows of the batch.

    Args:
        before: the original attention.
        rows: rows of the batch whose pattern was replaced.
        changed: the new pattern of these rows, [rows, n, l, m].
        output: the output, [b, n, l, d].
    """

    def __init__(self, before: Attended, rows: Sequence[int], changed: Tensor, output: Tensor) -> None:
        super().__init__(before.how, before.q, before.k, before.v, output)
        self.before, self.rows, self.changed = before, rows, changed

    def giving(self, output: Tensor) -> Attended:
        return Repatterned(self.before, self.rows, self.changed, output)

    def part(self, rows: Sequence[int], heads: Tensor | None = None) -> Attended:
        own = [i for i, row in enumerate(rows) if row in self.rows]
        changed = self.changed[[self.rows.index(rows[i]) for i in own]]
        output = taken(self.output[list(rows)], 1, heads)
        return Repatterned(self.before.part(rows, heads), own, taken(changed, 1, heads), output)

    def pattern(self, queries: Tensor | None = None) -> Tensor:
        found = self.before.pattern(queries)
        each = None if queries is None else queries if queries.ndim == 1 else queries[list(self.rows)]
        found[list(self.rows)] = taken(self.changed, 2, each)
        return found


def _checked(change: Change, part: Tensor, at: At) -> Tensor:
    """The new part, in the shape of the old one."""
    found = change(part, at)
    if found is None:  # as in a torch hook: unchanged, or changed in place
        return part
    try:
        found = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{at.name!r} is replaced by a tensor or an array, got {type(found).__name__}") from error
    return _broadcast("the new value", found.to(part.device), part, at)


def _change(
    replace: Tensor | Captured | None,
    ablate: Ablation | None,
    source: Captured | None,
    scale: int | float | Tensor | None,
    add: Tensor | int | float | None,
    swap: tuple[int, int] | None,
    skip: bool,
    apply: Callable[[Tensor], Any] | None,
) -> Change:
    """The change of the one operation that is given."""
    given = {"replace": replace, "ablate": ablate, "scale": scale, "add": add, "swap": swap, "apply": apply}
    names = [name for name, value in given.items() if value is not None] + ["skip"] * skip
    if len(names) != 1:
        raise ValueError(
            f"a patch does one thing: give one of {', '.join(given)}, skip; got {', '.join(names) or 'none'}"
        )
    if source is not None and ablate not in ("mean", "resample"):
        raise ValueError(
            "source= is for ablate='mean' and ablate='resample'; to put in a capture's values give replace="
        )
    if ablate is not None:
        return _ablation(ablate, source)
    if isinstance(replace, Captured):
        return _from_capture(replace)
    if swap is not None:
        return _swapped(*swap)
    operations: dict[str, Change] = {
        "replace": lambda part, at: _fitting("replace", replace, part, at),
        "scale": lambda part, at: part * _fitting("scale", scale, part, at),
        "add": lambda part, at: part + _fitting("add", add, part, at),
        "skip": _skipped,
        "apply": lambda part, _: apply(part),  # type: ignore[misc] # it is given
    }
    return operations[names[0]]


def _ablation(how: Ablation, source: Captured | None) -> Change:
    if how == "resample" and source is not None:
        return _from_capture(source)
    means: Change = lambda _, at: at.picked.read(_mean(at, source))  # noqa: E731
    table: dict[str, Change] = {"zero": lambda part, _: torch.zeros_like(part), "mean": means, "resample": _resampled}
    return pick(table, how, "ablation")


def _mean(at: At, source: Captured | None) -> Tensor:
    """The mean over samples and tokens, in the shape of the whole value."""
    value = at.whole if source is None else _of_source(source, at).to(at.whole)
    dims = [0] + [i + 1 for i, axis in enumerate(at.axes) if axis in ("token", "query", "row", "column")]
    if value.shape[1:] != at.whole.shape[1:]:
        raise ValueError(
            f"the capture has {list(value.shape[1:])} for {at.name!r}, which is {list(at.whole.shape[1:])}"
        )
    return value.mean(dims, keepdim=True).expand_as(at.whole)


def _resampled(_: Tensor, at: At) -> Tensor:
    if len(at.whole) < 2:
        raise ValueError(
            "ablate='resample' takes another sample of the batch, which has one: draw several, or give source="
        )
    return at.picked.read(at.whole.roll(1, dims=0))


def _swapped(one: int, other: int) -> Change:
    def change(part: Tensor, at: At) -> Tensor:
        if not max(one, other) < len(at.whole):
            raise ValueError(f"swap={one, other}, but there are {len(at.whole)} samples")
        order = list(range(len(at.whole)))
        order[one], order[other] = other, one
        return at.picked.read(at.whole[order])

    return change


def _skipped(part: Tensor, at: At) -> Tensor:
    if at.before is None or at.before.shape != at.whole.shape:
        raise ValueError(f"{at.name!r} cannot be skipped: what goes in has another shape than what comes out")
    return at.picked.read(at.before)


def _from_capture(source: Captured) -> Change:
    def change(part: Tensor, at: At) -> Tensor:
        value = _of_source(source, at).to(part)
        if value.shape[1:] == at.whole.shape[1:]:
            return at.picked._replace(rows=tuple(range(len(at.picked.rows)))).read(value)
        return value

    return change


def _of_source(source: Captured, at: At) -> Tensor:
    """The captured value of the same call, for the addressed samples."""
    if source.of(at.name).reduced:
        raise ValueError(f"{at.name!r} was captured with a reducer: its values cannot be put back")
    entry = source.at(at.name, at.label)
    value = entry.read()
    if len(entry.samples) == 1:
        return value.expand(len(at.picked.samples), *value.shape[1:])
    if missing := [sample for sample in at.picked.samples if sample not in entry.samples]:
        raise ValueError(f"the capture of {at.name!r} has samples {list(entry.samples)}, not {missing[0]}")
    return value[[entry.samples.index(sample) for sample in at.picked.samples]]


def _fitting(argument: str, value: object, part: Tensor, at: At) -> Tensor:
    """The values of an argument, which broadcast to the part."""
    try:
        found = torch.as_tensor(value, dtype=part.dtype, device=part.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}= takes numbers or a tensor, got {shortened(value)}") from error
    return _broadcast(f"{argument}=", found, part, at)


def _broadcast(what: str, found: Tensor, part: Tensor, at: At) -> Tensor:
    try:
        return found.expand_as(part)
    except RuntimeError as error:
        raise ValueError(
            f"{what} is {list(found.shape)}, which does not broadcast to the part of {at.name!r} at step "
            f"{at.label.step}, {list(part.shape)} [sample, {', '.join(at.axes)}]"
        ) from error


def _blocks(model: Inspected, patterns: str | Sequence[str]) -> list[str]:
    """The points at the outputs of the blocks that the patterns name."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    ends = [name for name in targets_of(model) if name.endswith(".resid_post")]
    found = []
    for one in map(plain, given):
        block = one.removesuffix(".resid_post")
        found.append(matching := [end for end in ends if any(fnmatchcase(b, block) for b in _names(end))])
        if not matching:
            blocks = ", ".join(dict.fromkeys(_names(end)[-1] for end in ends[:6]))
            raise ValueError(f"{one!r} matches no block; blocks are {blocks}, ...")
    return [name for some in found for name in some]


def _names(end: str) -> list[str]:
    """The names of the block that ends at a point: that of its stream, and that of the whole block."""
    part = end.removesuffix(".resid_post")
    return [part, part.removesuffix(".context_block").removesuffix(".x_block")]
