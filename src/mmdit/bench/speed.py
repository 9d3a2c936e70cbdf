"""Every row of the speed table in one run: `mmdit bench speed`.

A model is built once and takes its steps at all sizes, so that the whole table fits into minutes. Rows that matter most
come first; a row that fails says so, and the others follow.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from mmdit.bench.floor import floor_of
from mmdit.bench.random_models import MODELS, Built, Inputs, check_names, check_peers, check_size, ours, theirs
from mmdit.bench.rows import FAILURES
from mmdit.bench.step import PEERS, Timed, own_compiler_settings, timed, work_of
from mmdit.runtime.compiled import ACCELERATED
from mmdit.utils import is_out_of_memory, markdown_table, whole, write_text

TEXT = 333  # tokens: CLIP's 77 and T5's 256


@dataclass(frozen=True)
class Case:
    """A model and the size of a step."""

    model: str
    size: int
    batch: int

    @classmethod
    def of(cls, text: str) -> Self:
        """Parse MODEL:SIZE:BATCH, such as large:1024:2.

        Raises:
            ValueError: the text has another form, the model is unknown, or it cannot draw this size.
        """
        parts = text.split(":")
        if len(parts) != 3 or not all(part.isdigit() for part in parts[1:]):
            raise ValueError(f"case {text!r} is not MODEL:SIZE:BATCH, such as large:1024:2")
        check_names(parts[:1], MODELS)
        return cls(parts[0], check_size(parts[0], int(parts[1])), whole(f"batch of case {text!r}", int(parts[2]), 1))

    def __str__(self) -> str:
        return f"{self.model}, {self.size} x {self.size}, batch {self.batch}"


CASES = (Case("large", 1024, 2), Case("large", 1024, 1), Case("large", 512, 2), Case("medium", 1024, 2))
_RECIPES: dict[str, tuple[str | None, ...]] = {"medium": ("fp8", None)}  # others: see `_groups`


@dataclass(frozen=True)
class Row:
    """A row of the table: what was measured, or why it was not."""

    case: Case
    name: str
    timed: Timed | None
    failed: str = ""
    attention: tuple[str, ...] = ()  # what the fast forward chose for this case, and how long the others took


@dataclass(frozen=True)
class _Group:
    """A model that is built once, and the cases that it runs."""

    name: str
    recipe: str | None  # of its products, for the floor
    build: Callable[[], Built]
    cases: Sequence[Case]


def speed(
    cases: Sequence[Case] = CASES,
    *,
    against: Sequence[str] = (),
    repeats: int = 20,
    seconds: float = float("inf"),
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    """Measure a step of the accelerated models at every size, and of the peers.

    Args:
        cases: models and sizes.
        against: of `mmdit.bench.step.PEERS`: "diffusers" is measured eager and compiled, "torchao" compiled.
        repeats: steps of which the median is taken.
        seconds: no row is started after so many seconds; the rows that are left say so.
        device, dtype: the device and dtype of the models.

    Raises:
        ValueError: a name is unknown.
        ImportError: a peer is not installed.
    """
    check_names((case.model for case in cases), MODELS)
    check_peers(against, PEERS)
    start, device = time.monotonic(), torch.device(device)
    floors = cache(partial(_floor, device=device, dtype=dtype))
    for group in _groups(cases, against, device, dtype):
        built = cache(group.build)
        for case in group.cases:
            if time.monotonic() - start > seconds:
                yield Row(case, group.name, None, "no time was left")
                continue
            yield _measured(group, case, built, floors, repeats, device, dtype)


def table(rows: Sequence[Row]) -> str:
    """One line per row, case by case; ratios are to the peers of the same case in the same run."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        peers = {
            title: next((row.timed for row in of_case if row.name.startswith(start) and row.timed), None)
            for title, start in (("compiled", "diffusers compiled"), ("torchao", "diffusers + torchao"))
        }
        lines += [(str(case), row.name, *_cells(row, list(peers.values()))) for row in of_case]
    chosen = dict.fromkeys(f"attention of {choice}" for row in rows for choice in row.attention)
    return "\n".join([*chosen, *([""] if chosen else []), *markdown_table(_TITLES, lines)])


def save(path: Path, rows: Sequence[Row]) -> None:
    """All numbers, with the kernels that take longest, as JSON."""
    write_text(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


_TITLES = (
    *("step", "", "ms", "quartiles", "host ms", "floor", "to diffusers compiled", "to torchao", "peak GB", "first s"),
    "attention, matmul, rest",
)


def _cells(row: Row, peers: Sequence[Timed | None]) -> tuple[str, ...]:
    one = row.timed
    if one is None:
        return (row.failed, *[""] * (len(_TITLES) - 3))
    ratios = ("-" if peer is None else f"{one.milliseconds / peer.milliseconds:.3f}" for peer in peers)
    return (
        f"{one.milliseconds:.2f}",
        f"{one.spread:.2f}",
        f"{one.host:.2f}",
        f"{one.floor:.1f}" if one.floor else "-",
        *ratios,
        f"{one.peak_gb:.2f}" if one.peak_gb else "-",
        f"{one.first_seconds:.1f}",
        ", ".join(f"{value:.1f}" for value in one.parts.values()) or "-",
    )


def _groups(
    cases: Sequence[Case], against: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Iterator[_Group]:
    word = str(dtype).removeprefix("torch.")
    of_models = {
        model: [case for case in cases if case.model == model] for model in {case.model: None for case in cases}
    }
    same: dict[str, Any] = {"device": device, "dtype": dtype}
    for model, own in of_models.items():
        for recipe in _RECIPES.get(model, ("fp8", None, "fp8-static")):
            build = partial(ours, MODELS[model], recipe=recipe, compiled=False, fast=True, **same)
            yield _Group(f"mmdit {recipe or word} fast", recipe, build, own)
    for model, own in of_models.items():
        build = partial(theirs, MODELS[model], **same)
        if "diffusers" in against:
            eager, compiled = (partial(build, float8=False, compiled=one) for one in (False, True))
            yield _Group(f"diffusers eager {word}", None, eager, own)
            yield _Group(f"diffusers compiled {word}", None, compiled, own)
        if "torchao" in against:
            yield _Group("diffusers + torchao float8 compiled", "fp8", partial(build, float8=True, compiled=True), own)


def _attention(model: nn.Module, case: Case) -> tuple[str, ...]:
    """The choices of attention for the shapes of a case; none for a model that is not accelerated."""
    config = MODELS[case.model]
    tokens = (case.size // 8 // config.patch_size) ** 2
    choices = {key: choice for one in ACCELERATED.get(model, ()) for key, choice in one.attention.choices.items()}
    wanted = [torch.Size((case.batch, count, config.heads, config.head_dim)) for count in (TEXT + tokens, tokens)]
    return tuple(f"{list(key[0])}: {choice}" for key, choice in choices.items() if key[0] in wanted)


def _floor(case: Case, recipe: str | None, *, device: torch.device, dtype: torch.dtype) -> float:
    return floor_of(case.model, recipe, size=case.size, text=TEXT, batch=case.batch, device=device, dtype=dtype)


def _measured(
    group: _Group,
    case: Case,
    built: Callable[[], Built],
    floors: Callable[[Case, str | None], float],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Row:
    """The row of a group's case; an error becomes the row's text."""
    inputs = Inputs.random(MODELS[case.model], case.size, TEXT, case.batch, device, dtype)
    work = work_of(case.model, size=case.size, text=TEXT, batch=case.batch)
    try:
        with own_compiler_settings():
            found = timed(group.name, built, inputs, work, repeats, device)
        found = replace(found, floor=floors(case, group.recipe))
        return Row(case, group.name, found, attention=_attention(built()[0], case))
    except FAILURES as error:
        what = "out of memory" if is_out_of_memory(error) else (str(error).splitlines() or [""])[0]
        return Row(case, group.name, None, f"failed: {type(error).__name__}: {what}"[:120])
