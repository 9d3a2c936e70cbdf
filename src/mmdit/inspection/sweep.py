"""`sweep`: patch one place after the other and measure the effect, to find the block, head or step that matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mmdit.inspection.hooks import Inspected, plain, selected
from mmdit.inspection.labelled import Labelled
from mmdit.inspection.patch import patch
from mmdit.utils import bar


def sweep(
    model: Inspected,
    patterns: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    run: Callable[[], Any],
    *,
    over: Mapping[str, Sequence[Any]] | None = None,
    progress: bool | None = None,
    **operation: Any,
) -> Labelled:
    """Patch one place, run, and go on to the next place.

        def redness():
            return pipe("a red circle", seed=1, output_type="pt").images[0, 0].mean()

        mmdit.sweep(pipe, "joint_blocks.*.x_block.attn.z", redness, over={"heads": range(4)}, ablate="zero")

    Args:
        model: see `mmdit.capture`.
        patterns: globs whose points are patched one at a time; or label -> globs whose points are patched together.
            With `skip=True` the globs match blocks.
        run: a function that draws and returns a number, or a tensor that always has the same shape.
        over: argument of `mmdit.patch` -> its values; every combination is run, such as
            `{"steps": [slice(0, 5), slice(5, 10)], "heads": range(4)}`.
        progress: show a bar; None shows it in terminals and notebooks.
        operation: the other arguments of `mmdit.patch`.

    Returns:
        The results of `run`: [point, one dimension for each entry of `over`, dimensions of a result].

    Raises:
        ValueError: see `mmdit.patch`; an entry of `over` is empty; or the results have different shapes.
        TypeError: `run` returned neither a number nor a tensor.
    """
    places = _places(model, patterns, skip=bool(operation.get("skip")))
    over = {name: tuple(values) for name, values in (over or {}).items()}
    if empty := [name for name, values in over.items() if not values]:
        raise ValueError(f"over={{{empty[0]!r}: ...}} has no values to try; give some, or leave {empty[0]!r} out")
    combinations = [dict(zip(over, values, strict=True)) for values in product(*over.values())]
    jobs = [(globs, chosen) for globs in places.values() for chosen in combinations]
    found = []
    for globs, chosen in bar(iter(jobs), len(jobs), progress):
        with patch(model, globs, **operation, **chosen):
            found.append(_measured(run()))
    if len(shapes := {tuple(one.shape) for one in found}) > 1:
        raise ValueError(
            f"run() gave results of shapes {', '.join(str(list(shape)) for shape in sorted(shapes))}; they must be one"
        )
    values = torch.stack(found).reshape(len(places), *(len(values) for values in over.values()), *found[0].shape)
    axes: dict[str, tuple[Any, ...]] = {"point": tuple(places)} | {name: tuple(of) for name, of in over.items()}
    results = {f"result_{i}": tuple(range(length)) for i, length in enumerate(found[0].shape)}
    return Labelled(values, {**axes, **results})


def _places(
    model: Inspected, patterns: str | Sequence[str] | Mapping[str, str | Sequence[str]], *, skip: bool
) -> dict[str, list[str]]:
    """The globs that are patched together, by label."""
    if isinstance(patterns, Mapping):
        return {label: [globs] if isinstance(globs, str) else list(globs) for label, globs in patterns.items()}
    if skip:
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        return {plain(glob): [glob] for glob in given}
    return {target.name: [target.name] for target in selected(model, patterns)}


def _measured(result: object) -> Tensor:
    """The result of `run` as a tensor on the CPU."""
    try:
        return torch.as_tensor(result).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"run() gave {type(result).__name__}; a sweep keeps numbers: return a number or a tensor, such as of the "
            "pictures that output_type='pt' gives"
        ) from error
