"""Addresses: the selected part of a point, by step, noise level, branch, sample, head and token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from encoders import Conditioning
from mmdit.inspection.points import Point
from mmdit.inspection.words import Encoder, token_positions
from mmdit.pipeline.passes import Branch, Drawing
from mmdit.utils import is_boolean, number, shortened, taken

Numbers = int | slice | Sequence[int]  # negative ones count from the end


class Word(NamedTuple):
    """The text tokens of a word of the prompt, as "clip", "t5" or "all" text encoders read it.

    The word is written as for `mmdit.attention_maps`.
    """

    text: str
    encoder: Encoder = "all"


# Numbers of tokens, words of the prompt, or a mask of the picture's patches, bool [rows, columns]
Tokens = Numbers | str | Word | Sequence[str | Word | int] | Tensor


class Label(NamedTuple):
    """The call of a model that a value comes from.

    `run` counts drawings from 0. `step` counts the steps that the solver has finished; outside of a drawing it counts
    calls. `call` counts the calls of one branch within a step, because some solvers make several.
    """

    run: int
    step: int
    call: int
    sigma: float | None  # None where the model has no noise level
    branch: str | None  # None where there are no branches


class Rows(NamedTuple):
    """The rows of a model's batch that belong together: the samples of one branch."""

    label: Label
    first: int  # row
    samples: int
    conditioning: Conditioning | None
    steps: int | None  # number of steps of the drawing, if it is known


class Picked(NamedTuple):
    """A part of a value [b, axes]: which rows, and which places along each axis."""

    rows: tuple[int, ...]
    samples: tuple[int, ...]
    axes: tuple[str, ...]
    places: tuple[Tensor | None, ...]  # [n], or [samples, n] where they differ; None: all

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """The numbers along each narrowed axis, where they are the same for all samples."""
        pairs = zip(self.axes, self.places, strict=True)
        return {axis: tuple(one.tolist()) for axis, one in pairs if one is not None and one.ndim == 1}

    def within(self, rows: Rows) -> Picked:
        """The same part, counted in a tensor that holds the rows of one branch alone."""
        return self._replace(rows=tuple(row - rows.first for row in self.rows))

    def read(self, value: Tensor) -> Tensor:
        """The part, [samples, axes]; a view where whole neighbouring rows are selected."""
        value = self.read_rows(value)
        for i, places in enumerate(self.places):
            value = taken(value, i + 1, places)
        return value

    def read_rows(self, value: Tensor) -> Tensor:
        """The rows alone."""
        first, count = self.rows[0], len(self.rows)
        if self.rows == tuple(range(first, first + count)):
            return value[first : first + count]
        return value[torch.tensor(self.rows, device=value.device)]

    def write(self, value: Tensor, part: Tensor) -> Tensor:
        """A copy of the whole value with another part; everything else keeps its bits."""
        last = max((i + 1 for i, one in enumerate(self.places) if one is not None), default=0)
        index = [_mesh(torch.tensor(self.rows), 0, last)]
        for i, one in enumerate(self.places[:last]):
            index.append(_mesh(torch.arange(value.shape[i + 1]) if one is None else one, i + 1, last))
        changed = value.clone()
        changed[tuple(one.to(value.device) for one in index)] = part.to(value.dtype)
        return changed


@dataclass(frozen=True)
class Address:
    """The selected part of a point; an argument of None selects everything.

    Args:
        steps: numbers of steps. Outside of a drawing each call of the model, or of `predict`, counts as a step.
        sigmas: the lowest and the highest noise level, both included.
        branch: a name of guidance ("cond", "uncond", "skip", "perturbed"), or several.
        samples: numbers of pictures in the batch.
        heads: numbers of attention heads.
        tokens: see `Tokens`. In an attention pattern these are the tokens that are read: its columns.
        queries: tokens that read: the rows of an attention pattern; written like tokens.
        channels: numbers along the last dimension.
    """

    steps: Numbers | None = None
    sigmas: tuple[float, float] | None = None
    branch: str | Sequence[str] | None = None
    samples: Numbers | None = None
    heads: Numbers | None = None
    tokens: Tokens | None = None
    queries: Tokens | None = None
    channels: Numbers | None = None

    def __post_init__(self) -> None:
        """Check the arguments, and take numbers of NumPy and torch for Python's.

        Raises:
            ValueError: a range of noise levels is empty, or not of two numbers.
            TypeError: numbers are not whole, or a branch is no name.
        """
        for argument in ("steps", "samples", "heads", "channels"):
            object.__setattr__(self, argument, whole_numbers(argument, getattr(self, argument)))
        for argument in ("tokens", "queries"):
            object.__setattr__(self, argument, checked_tokens(argument, getattr(self, argument)))
        if self.sigmas is not None:
            low, high = _levels(self.sigmas)
            if not low <= high:
                raise ValueError(f"sigmas are the lowest and the highest level, got {self.sigmas}")
        branches = [self.branch] if isinstance(self.branch, str) else self.branch
        if branches is not None and not (isinstance(branches, Iterable) and all(isinstance(b, str) for b in branches)):
            raise TypeError(f"branch is {shortened(self.branch)}, expected a name such as 'cond', or a list of names")

    @property
    def has_words(self) -> bool:
        """Whether the address names words of the prompt."""
        return _has_words(self.tokens) or _has_words(self.queries)

    def check(self, point: Point, name: str, *, drawn: bool) -> None:
        """Raise ValueError where the point does not have what the address narrows.

        Args:
            point: the point, whose name is `name`.
            drawn: whether a pipeline says of each call which branches and noise level it has.
        """
        if not drawn and (self.branch is not None or self.sigmas is not None):
            what = "sigmas" if self.branch is None else "branch"
            raise ValueError(
                f"{what}= narrows passes of a pipeline's transformer; {name!r} is not of one: give the pipeline"
            )
        for argument in _AXES:
            if getattr(self, argument) is not None and _axis(point, argument) not in point.axes:
                raise ValueError(f"{argument}= is given, but {name!r} has none: it is [batch, {', '.join(point.axes)}]")
        for argument in ("tokens", "queries"):
            if _has_words(getattr(self, argument)) and point.stream not in ("text", "joint"):
                raise ValueError(
                    f"{argument}={getattr(self, argument)!r} names words; the tokens of {name!r} are not the prompt's"
                )

    def meets(self, label: Label, steps: int | None) -> bool:
        """Return whether a run of a model is selected.

        Raises:
            ValueError: the address names a branch, and the branches of the run have no names.
        """
        if self.branch is not None and label.branch is None:
            raise ValueError(
                f"branch={self.branch!r} is asked for, but the rows of this run have no branch; "
                "name them: pipe.predictor(cond=..., uncond=...), or mmdit.Branch(conditioning, name)"
            )
        if self.branch is not None and label.branch not in (
            [self.branch] if isinstance(self.branch, str) else self.branch
        ):
            return False
        if self.sigmas is not None and not (
            label.sigma is not None and self.sigmas[0] <= label.sigma <= self.sigmas[1]
        ):
            return False
        return self.steps is None or label.step in wanted_steps(self.steps, steps, label.step)

    def meant(self, drawing: Drawing) -> list[tuple[Label, Branch]]:
        """The selected steps and branches of a drawing.

        Raises:
            ValueError: there is none.
        """
        steps = len(drawing.sigmas) - 1
        every = [
            (Label(0, i, 0, drawing.sigmas[i], branch.name), branch)
            for i in range(steps)
            for branch in drawing.branches[i]
        ]
        found = [(label, branch) for label, branch in every if self.meets(label, steps)]
        if not found:
            branches = ", ".join(dict.fromkeys(repr(branch.name) for _, branch in every))
            raise ValueError(
                f"this drawing has {steps} steps from sigma {drawing.sigmas[0]:.3g} to {drawing.sigmas[-2]:.3g} and "
                f"branches {branches}; steps={self.steps}, sigmas={self.sigmas}, branch={self.branch!r} meet none"
            )
        return found

    def pick(self, point: Point, shape: torch.Size, rows: Rows) -> Picked:
        """The selected part of a value of this shape, [b, axes].

        Raises:
            ValueError: a number is out of range, or a word is not in a prompt or not of as many tokens in each.
        """
        samples = _numbers(self.samples, rows.samples, "samples")
        axes = zip(point.axes, shape[1:], strict=True)
        places = tuple(self._along(axis, size, point, rows, samples) for axis, size in axes)
        return Picked(tuple(rows.first + sample for sample in samples), tuple(samples), point.axes, places)

    def _along(self, axis: str, size: int, point: Point, rows: Rows, samples: list[int]) -> Tensor | None:
        """The places along an axis: [n], or [samples, n] where they differ."""
        argument = next((name for name in _AXES if _axis(point, name) == axis), None)
        wanted = None if argument is None else getattr(self, argument)
        if wanted is None:
            return None
        if argument in ("tokens", "queries"):
            return _tokens(wanted, size, rows, samples, argument)
        return torch.tensor(_numbers(wanted, size, f"{axis}s"))


_AXES = {"heads": "head", "tokens": "token", "queries": "query", "channels": "channel"}


def _axis(point: Point, argument: str) -> str:
    """The axis that an argument narrows."""
    return "key" if (argument, point.layout) == ("tokens", "pattern") else _AXES[argument]


def wanted_steps(steps: Numbers, total: int | None, step: int) -> Sequence[int]:
    """The numbers of steps; `total` is needed for negative ones and else only bounds a slice.

    Raises:
        ValueError: a number is negative and `total` is unknown.
    """
    if isinstance(steps, slice):
        ends = (steps.start or 0, steps.stop or 0)
        if total is None and min(ends) < 0:
            raise ValueError(f"steps={steps} counts from the end, which is known within a drawing only")
        return range(*steps.indices(step + 1 if total is None else total))
    given = [steps] if isinstance(steps, int) else list(steps)
    if total is None and min(given, default=0) < 0:
        raise ValueError(f"steps={steps} counts from the end, which is known within a drawing only")
    return [one + (total or 0) if one < 0 else one for one in given]


def whole_numbers(argument: str, given: Any) -> Any:
    """Numbers as they are: a whole number, a slice, or several whole numbers, those of an array or a tensor as a list.

    Args:
        argument: the name of the argument, for the error.
        given: `Numbers` or None, which are returned, or an array or a tensor of whole numbers.

    Raises:
        TypeError: it is something else, such as a mask, whose True and False would be read as the numbers 1 and 0.
    """
    if given is None or isinstance(given, slice):
        return given
    if isinstance(given, np.ndarray | Tensor):
        given = given.flatten().tolist()
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        return _whole(argument, given)
    return [_whole(argument, one) for one in given]


def _whole(argument: str, given: Any) -> int:
    if not is_boolean(given):
        with suppress(TypeError):
            return index(given)
    hint = ": of a mask give the numbers, mask.nonzero().flatten()" if is_boolean(given) else ""
    raise TypeError(f"{argument} takes whole numbers, a slice or a list of whole numbers; got {shortened(given)}{hint}")


def checked_tokens(argument: str, given: Any) -> Any:
    """The argument, an array as a tensor, once it is checked to be `Tokens` or None."""
    if given is None or isinstance(given, str | Word):
        return given
    if isinstance(given, np.ndarray):
        given = torch.as_tensor(given)
    if isinstance(given, Tensor):
        return given if given.dtype == torch.bool else whole_numbers(argument, given)
    if _has_words(given):
        return [one if isinstance(one, str | Word) else _whole(argument, one) for one in given]
    return whole_numbers(argument, given)


def _levels(sigmas: Any) -> tuple[float, float]:
    try:
        low, high = sigmas
    except (TypeError, ValueError) as error:
        raise ValueError(f"sigmas are the lowest and the highest level, got {shortened(sigmas)}") from error
    return number("sigmas", low), number("sigmas", high)


def _numbers(wanted: Numbers | None, size: int, what: str) -> list[int]:
    if wanted is None or isinstance(wanted, slice):
        found = list(range(size))[wanted or slice(None)]
    else:
        given = [wanted] if isinstance(wanted, int) else [int(one) for one in wanted]
        if outside := [one for one in given if not -size <= one < size]:
            raise ValueError(f"{what} {outside} do not exist; there are {size}")
        found = [one % size for one in given]
    if not found:
        raise ValueError(f"{what}={wanted} is none of the {size}")
    return found


def _has_words(tokens: object) -> bool:
    if isinstance(tokens, str | Word):
        return True
    return isinstance(tokens, Sequence) and any(isinstance(one, str | Word) for one in tokens)


def _tokens(wanted: Tokens, size: int, rows: Rows, samples: list[int], what: str) -> Tensor:
    if isinstance(wanted, Tensor):
        return _masked(wanted, size, what)
    if not _has_words(wanted):
        return torch.tensor(_numbers(wanted, size, what))  # type: ignore[arg-type] # no words in it
    if rows.conditioning is None:
        raise ValueError(
            f"{what}={wanted!r} names words, which takes the conditioning of a pipeline: give token numbers"
        )
    several = isinstance(wanted, Sequence) and not isinstance(wanted, str | Word)
    places = [_of_prompt(wanted if several else [wanted], size, rows, sample) for sample in samples]  # type: ignore[arg-type, list-item]
    if len({len(one) for one in places}) > 1:
        raise ValueError(
            f"{what}={wanted!r} are {', '.join(str(len(one)) for one in places)} tokens in samples {samples}; values "
            "of different sizes do not stack: narrow with samples=, or name an encoder with mmdit.Word"
        )
    return torch.tensor(places[0] if all(one == places[0] for one in places) else places)


def _of_prompt(wanted: Sequence[str | Word | int], size: int, rows: Rows, sample: int) -> list[int]:
    assert rows.conditioning is not None
    found: list[int] = []
    for one in wanted:
        if isinstance(one, int):
            found += _numbers(one, size, "tokens")
            continue
        word = Word(one) if isinstance(one, str) else one
        places = token_positions(rows.conditioning, sample, word.text, word.encoder)
        if not places:
            prompt = rows.conditioning.prompts[sample]
            raise ValueError(
                f"the prompt {prompt!r} (branch {rows.label.branch!r}, sample {sample}) has no token of {word.text!r} "
                f"for encoder {word.encoder!r}: narrow with branch= and samples="
            )
        found += places
    return list(dict.fromkeys(found))


def _masked(mask: Tensor, size: int, what: str) -> Tensor:
    if mask.dtype == torch.bool:
        if mask.numel() != size:
            raise ValueError(f"{what} is a mask of {list(mask.shape)}, but there are {size} tokens")
        return torch.tensor(_numbers(mask.flatten().nonzero().flatten().tolist(), size, what))
    return torch.tensor(_numbers(mask.flatten().tolist(), size, what))


def _mesh(places: Tensor, axis: int, last: int) -> Tensor:
    """Shaped to broadcast over the axes up to `last`; [samples, n] also along the first."""
    sizes = [1] * (last + 1)
    if places.ndim == 2:
        sizes[0] = len(places)
    sizes[axis] = places.shape[-1]
    return places.reshape(sizes)
