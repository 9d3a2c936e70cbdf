"""The points of a model with their shapes, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from encoders import VAE
from mmdit.inspection.dry_run import Sizes, rehearse
from mmdit.inspection.hooks import TRANSFORMER, Inspected, Target, Tracker, models_of, selected
from mmdit.inspection.points import Stream
from mmdit.inspection.views import Passing, shown
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.steps import PipelineSteps
from mmdit.utils import checks_names, whole


class Row(NamedTuple):
    """One point in a listing."""

    name: str
    axes: tuple[str, ...]  # names of the dimensions after the batch
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int  # bytes of the value in one call of the model


class PointList(list[Row]):
    """The points of a model, which print as a table."""

    def __repr__(self) -> str:
        header = ("point", "axes", "shape", "dtype", "MB a call")
        rows = [header, *map(_cells, self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self)} points: {sum(row.bytes for row in self) / 1e6:.1f} MB a call"])

    @property
    def names(self) -> list[str]:
        """The names of all points."""
        return [row.name for row in self]


@checks_names
def points(
    model: Inspected,
    patterns: str | Sequence[str] = "*",
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    batch: int = 1,
    stream: Stream | None = None,
) -> PointList:
    """The points of a model with their shapes and bytes, for a given picture size; the model does not run.

    The bytes of an attention pattern are those of all its rows in float32.

    Args:
        model: a pipeline (names then begin with "transformer.", "clip_l.", "t5.", "vae.", ...) or one of its models.
        patterns: globs over names.
        height, width: size of the picture in pixels; None is the model's own size (1024 for a VAE alone).
        text_tokens: number of tokens that the transformer, or the listed text encoder, reads; None is the default.
        batch: rows of the model's batch. With guidance, each picture takes two rows of the transformer.
        stream: lists only points of the transformer's "text" or "image" stream, or of "joint", where both meet.

    Raises:
        ValueError: a glob matches nothing, or a size does not fit the model.
    """
    targets = selected(model, patterns, stream)
    sizes, found = _sizes(model, height, width, text_tokens, batch), {}

    def note(target: Target, passing: Passing, _: Tracker) -> None:
        point = target.point
        value = (
            passing.attention.pattern() if passing.attention and point.layout == "pattern" else shown(point, passing)
        )
        found[target.name] = Row(target.name, point.axes, tuple(value.shape), value.dtype, value.nbytes)

    for one in models_of(model).values():
        if some := [target for target in targets if target.model is one]:
            rehearse(one, some, sizes, note)
    transformer = model.transformer if isinstance(model, PipelineSteps) else None
    fronts = [TRANSFORMER if target.model is transformer else "" for target in targets]
    rows = [found[target.name] for target in targets]
    return PointList(row._replace(name=front + row.name) for front, row in zip(fronts, rows, strict=True))


def _sizes(model: Inspected, height: int | None, width: int | None, text_tokens: int | None, batch: int) -> Sizes:
    transformer = model.transformer if isinstance(model, PipelineSteps) else model
    cell = (
        model.vae.config.downscale
        if isinstance(model, PipelineSteps)
        else model.config.downscale
        if isinstance(model, VAE)
        else 8
    )
    default = (transformer.config.sample_size or 128) if isinstance(transformer, MMDiT) else 1024 // cell
    if isinstance(model, ControlNet) and model.config.pos_embed_size is not None:
        default = min(default, model.config.patch_size * model.config.pos_embed_size)
    sides = [
        default if side is None else _cells_of(side, name, cell)
        for name, side in (("height", height), ("width", width))
    ]
    clip, t5 = 77, 256
    if isinstance(model, PipelineSteps):
        clip, t5 = model.profile.text.clip_length, model.profile.text.t5_length
    texts = (clip + t5, clip, t5) if text_tokens is None else (text_tokens,) * 3
    if isinstance(model, PipelineSteps):
        texts = (texts[0], clip, t5)
    batch = whole("batch", batch, 1)
    return Sizes(batch, *sides, *(whole("text_tokens", one, 1) for one in texts))


def _cells_of(pixels: int, name: str, cell: int) -> int:
    if pixels % cell or pixels < cell:
        raise ValueError(f"{name} must be a multiple of {cell} pixels, got {pixels}")
    return pixels // cell


def _cells(row: Row) -> tuple[str, ...]:
    axes, shape = ", ".join(row.axes), "x".join(map(str, row.shape))
    return row.name, axes, shape, str(row.dtype).removeprefix("torch."), f"{row.bytes / 1e6:.3f}"
