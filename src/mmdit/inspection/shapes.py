"""Shapes of a transformer's points, and a check of addresses and reducers against them, for which no model runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from mmdit.inspection.addresses import Address, Label, Rows
from mmdit.inspection.hooks import Target
from mmdit.inspection.points import Point
from mmdit.inspection.reducers import Reducer, View
from mmdit.models.config import MMDiTConfig
from mmdit.pipeline.passes import Branch, Drawing


def shape_of(point: Point, config: MMDiTConfig, text_tokens: int, image_tokens: int) -> tuple[int, ...]:
    """The sizes of the dimensions after the batch, in the order of `point.axes`."""
    width = config.hidden_size
    if point.layout == "vector":
        return (width,)
    tokens = (text_tokens if point.stream != "image" else 0) + (image_tokens if point.stream != "text" else 0)
    if point.layout == "pattern":
        return point.heads, tokens, tokens
    if point.layout == "by_head":
        return point.heads, tokens, width
    if point.layout in ("heads", "split", "joint"):
        return point.heads, tokens, width // point.heads
    if point.name.endswith((".mlp.pre", ".mlp.post")):
        return tokens, config.mlp_dim or 4 * width
    return tokens, config.patch_size**2 * config.out_channels if point.name == "final_layer" else width


def check_parts(
    targets: Sequence[Target],
    config: MMDiTConfig,
    drawing: Drawing,
    wanted: Sequence[tuple[Label, Branch]],
    address: Address,
    reducer_of: Callable[[Target], Reducer | None],
) -> None:
    """Raise what keeping the selected parts would raise, before a drawing's first pass.

    Args:
        targets: points of the transformer.
        config: the transformer's.
        drawing: the drawing that begins.
        wanted: its selected steps and branches.
        address: the part of each point that is kept.
        reducer_of: returns the reducer of a target, if it has one. It is called with tensors of no samples.

    Raises:
        ValueError: see `Address.pick` and the reducers.
    """
    samples, _, height, width = drawing.shape
    image_tokens = (height // config.patch_size) * (width // config.patch_size)
    checked = set()
    for label, branch in {id(branch.conditioning): (label, branch) for label, branch in wanted}.values():
        text = branch.conditioning.context.shape[1]
        rows = Rows(label, 0, samples, branch.conditioning, len(drawing.sigmas) - 1)
        words = branch.conditioning.prompts if address.has_words else ()
        for target in targets:
            shape, reducer = shape_of(target.point, config, text, image_tokens), reducer_of(target)
            key = (target.point.layout, shape, text, words, id(reducer))
            if key not in checked:
                _check_part(target.point, shape, rows, text, address, reducer)
            checked.add(key)


def _check_part(
    point: Point, shape: tuple[int, ...], rows: Rows, text_tokens: int, address: Address, reducer: Reducer | None
) -> None:
    picked = address.pick(point, torch.Size((rows.samples, *shape)), rows)
    if reducer is None:
        return
    sizes = [size if at is None else at.shape[-1] for size, at in zip(shape, picked.places, strict=True)]
    view = View(point.axes, text_tokens)
    if point.layout == "pattern":
        _, queries, keys = picked.places
        every = torch.arange(shape[1]) if queries is None else queries
        view = View(point.axes, text_tokens, every, every, keys)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # moments of no samples
            reducer(torch.empty(0, *sizes), view)
    except ValueError:
        raise
    except Exception:  # it needs values: what is wrong shows when it has them
        return
