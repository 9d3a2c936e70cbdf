"""Combine the predictions of several prompts, each with its area, mask and window, as ComfyUI's `calc_cond_batch` does.

The prediction of a CONDITIONING in a cell is sum(weight x0) / sum(weight) over its entries. The weight of an entry is
its strength times its mask, or times a ramp at the edges of its area. The model runs on each area as a separate image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders import Conditioning
from mmdit.comfyui.values import Area, Hint, Model, Prompt, Prompts
from mmdit.pipeline.control import Control
from mmdit.pipeline.control_inputs import ControlInput, check_net, make_control
from mmdit.pipeline.image_inputs import Picture, PictureSize
from mmdit.pipeline.passes import Branch
from mmdit.pipeline.predict import predict_branches
from mmdit.pipeline.profiles import PROFILES
from samplers import Window, percents

_CELL = 8  # pixels per side of a latent cell
_LEAST = 8  # minimum side, in cells, of an area that is cut around a mask
_RAMP = 8  # maximum width of the ramp at the edges of an area, in cells
_EPSILON = 1e-37  # ComfyUI's initial sum of weights: the prediction is 0 where no entry has a weight


@dataclass(frozen=True, eq=False)
class Entry:
    """A `Prompt` for latents of one shape, with everything resolved."""

    conditioning: Conditioning  # one prompt per latent, on the model's device
    window: Window
    strength: float
    area: tuple[int, int, int, int] | None  # height, width, y, x in cells
    mask: Tensor | None  # [b, h, w] at the latent's size, multiplied by its strength
    control: tuple[Control, ...] = ()  # ControlNets that are applied to this entry

    def cut(self, x: Tensor) -> Tensor:
        """Return a view of latents [b, c, h, w], or of a mask [b, h, w], cut to the entry's area."""
        if self.area is None:
            return x
        height, width, top, left = self.area
        return x[..., top : top + height, left : left + width]

    def weight(self, x: Tensor) -> Tensor:
        """Return the entry's weight in each cell of its area, [b or 1, 1, h, w]."""
        part = self.cut(x)
        if self.mask is not None:
            return self.strength * self.cut(self.mask).unsqueeze(1)
        weight = torch.full((1, 1, *part.shape[2:]), self.strength, device=x.device, dtype=x.dtype)
        if self.area is None:
            return weight
        height, width, top, left = self.area
        down = _ramp(height, top != 0, top + height < x.shape[2]).to(weight)
        across = _ramp(width, left != 0, left + width < x.shape[3]).to(weight)
        return weight * down[:, None] * across


def resolved(several: Sequence[Prompts], model: Model, shape: Sequence[int]) -> list[list[Entry]]:
    """Resolve the CONDITIONINGs of a drawing for latents of shape [b, c, h, w].

    For each entry with an area, every other CONDITIONING gets an entry with the same area, mask and window. Its text
    is that of the smallest entry that contains the area, so each area is guided against a matching negative prompt.
    """
    hints = dict.fromkeys(hint for prompts in several for one in prompts for hint in one.hints)
    controls = {hint: _encoded(hint, model, shape) for hint in hints}  # shared, so that their entries share a batch
    found = [[_entry(one, model, shape, controls) for one in prompts] for prompts in several]
    for k, entries in enumerate(found):
        for entry in entries:
            for j, others in enumerate(found):
                if j != k:
                    others.extend(_opposite(others, entry))
    return found


def predicted(
    model: Model, x: Tensor, sigma: float, several: Sequence[Sequence[Entry]], skip_layers: Sequence[int] = ()
) -> list[Tensor]:
    """Predict x0 under each CONDITIONING, [b, c, h, w]; it is 0 in cells where no entry has a weight.

    Args:
        model: the transformer and its patches.
        x: latents [b, c, h, w], in model space.
        sigma: the noise level of `x`.
        several: the result of `resolved`. Entries with equal areas share a batch.
        skip_layers: numbers of the blocks to skip.
    """
    counting = [(i, entry) for i, entries in enumerate(several) for entry in entries if sigma in entry.window]
    sums = [torch.zeros_like(x) for _ in several]
    weights = [torch.full_like(x, _EPSILON) for _ in several]
    for area in dict.fromkeys(entry.area for _, entry in counting):
        group = [(i, entry) for i, entry in counting if entry.area == area]
        skipped = tuple(skip_layers)
        branches = [Branch(entry.conditioning, None, skipped, control=entry.control) for _, entry in group]
        part = group[0][1].cut(x)
        outs = predict_branches(model.transformer, PROFILES["comfyui"], part, sigma, branches, lambda _: None)
        for (i, entry), out in zip(group, outs, strict=True):
            weight = entry.weight(x)
            entry.cut(sums[i]).add_(weight * out)
            entry.cut(weights[i]).add_(weight)
    return [total / weight for total, weight in zip(sums, weights, strict=True)]


def _entry(prompt: Prompt, model: Model, shape: Sequence[int], controls: Mapping[Hint, Control]) -> Entry:
    device = model.transformer.pos_embed.device
    mask, area = prompt.mask, _cells(prompt.area, shape)
    if mask is not None:
        mask = _to_size(mask.to(device, torch.float32), shape)
        area = _around(mask) if prompt.mask_bounds else area
        mask = _for_each(mask, shape[0]) * prompt.mask_strength
    if area is not None and prompt.hints:
        raise ValueError(
            "a conditioning has an area and a ControlNet; hints are for whole pictures: use a mask instead"
        )
    return Entry(
        _fitted(prompt.conditioning, model, shape[0]),
        percents(prompt.start, prompt.end, model.shift),
        prompt.strength,
        _inside(area, shape),
        mask,
        tuple(controls[hint] for hint in prompt.hints),
    )


def _encoded(hint: Hint, model: Model, shape: Sequence[int]) -> Control:
    """Encode the hint of a ControlNet for latents of this shape.

    Raises:
        ValueError: the hint has no VAE, or the net does not fit the transformer.
    """
    if hint.vae is None:
        raise ValueError(
            "a ControlNet of SD3 needs a VAE for its hint; connect the vae input of ControlNetApplyAdvanced"
        )
    check_net("the ControlNet", hint.net, model.transformer.config)
    count, rows, columns = shape[0], *shape[2:]
    pictures = tuple(_picture(one) for one in hint.image[..., :3].movedim(-1, 1))
    mask = torch.zeros(1, 8, 8) if hint.mask is None else hint.mask
    masks = tuple(_picture(one) for one in mask.unsqueeze(1)) if hint.net.config.inpaints else ()
    given = ControlInput(
        net=hint.net, pictures=pictures, masks=masks, scale=hint.strength, start=hint.start, stop=hint.end
    )
    size = PictureSize(_CELL * rows, _CELL * columns, cut=False)
    control = make_control(given, hint.vae, PROFILES["comfyui"], size, count, twice=False)
    return replace(control, window=percents(hint.start, hint.end, model.shift))


def _picture(pixels: Tensor) -> Picture:
    return Picture(pixels.unsqueeze(0).float().cpu(), from_pillow=False, name="", digest="")


def _fitted(conditioning: Conditioning, model: Model, count: int) -> Conditioning:
    """Move a conditioning to the model's device, fit its channels to the model, and repeat it for each latent."""
    table, config = model.transformer.pos_embed, model.transformer.config
    rest = config.context_dim - conditioning.context.shape[-1]
    if rest < 0 or conditioning.pooled.shape[-1] != config.pooled_dim:
        raise ValueError(
            f"the text encoders give {conditioning.context.shape[-1]} channels and {conditioning.pooled.shape[-1]} "
            f"pooled ones, but the model takes {config.context_dim} and {config.pooled_dim}; load the encoders of "
            "this model"
        )
    context = _for_each(F.pad(conditioning.context, (0, rest)), count)
    pooled = _for_each(conditioning.pooled, count)
    return Conditioning(context, pooled).to(table.device, table.dtype)


def _cells(area: Area | None, shape: Sequence[int]) -> tuple[int, int, int, int] | None:
    if area is None:
        return None
    if not area.in_shares:
        return int(area.height), int(area.width), int(area.y), int(area.x)
    rows, columns = shape[2:]
    sides = max(1, round(area.height * rows)), max(1, round(area.width * columns))
    return *sides, round(area.y * rows), round(area.x * columns)


def _inside(area: tuple[int, int, int, int] | None, shape: Sequence[int]) -> tuple[int, int, int, int] | None:
    if area is None:
        return None
    height, width, top, left = area
    rows, columns = shape[2:]
    if top >= rows or left >= columns:
        raise ValueError(
            f"the area of a conditioning begins at x {8 * left}, y {8 * top}, outside of the picture of "
            f"{8 * columns} x {8 * rows} pixels"
        )
    return min(rows - top, height), min(columns - left, width), top, left


def _to_size(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize a mask [b, h, w] to the size of latents, bilinearly."""
    if mask.shape[1:] == tuple(shape[2:]):
        return mask
    return F.interpolate(mask.unsqueeze(1), size=tuple(shape[2:]), mode="bilinear").squeeze(1)


def _around(mask: Tensor) -> tuple[int, int, int, int]:
    """Return the bounding rectangle of a mask [b, h, w], at least 8 cells per side."""
    places = mask.abs().amax(0).nonzero()
    if not len(places):
        return _LEAST, _LEAST, 0, 0
    (top, left), (bottom, right) = places.amin(0).tolist(), places.amax(0).tolist()
    return max(_LEAST, bottom - top + 1), max(_LEAST, right - left + 1), top, left


def _for_each(batch: Tensor, count: int) -> Tensor:
    """Repeat a batch from its start until it has `count` entries, or cut it (ComfyUI's repeat_to_batch_size)."""
    return batch.repeat(-(-count // len(batch)), *[1] * (batch.ndim - 1))[:count]


def _ramp(side: int, first: bool, last: bool) -> Tensor:
    """Return weights along one side of an area; they rise from each edge that is inside the picture."""
    weights, steps = torch.ones(side), min(_RAMP, side // 4)
    for i in range(steps):
        if first:
            weights[i] *= (i + 1) / steps
        if last:
            weights[side - 1 - i] *= (i + 1) / steps
    return weights


def _opposite(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """Return entries with this entry's area, where `entries` has none (`create_cond_with_same_area_if_none`)."""
    if entry.area is None:
        return []
    smallest: Entry | None = None
    for one in entries:
        if one.area is None:
            smallest = one if smallest is None else smallest
        elif _holds(one.area, entry.area) and (
            smallest is None or smallest.area is None or _size(smallest.area) > _size(one.area)
        ):
            smallest = one
    if smallest is None or smallest.area == entry.area:
        return []
    return [replace(entry, conditioning=smallest.conditioning)]


def _holds(outer: tuple[int, int, int, int], inner: tuple[int, int, int, int]) -> bool:
    larger = all(outer[i] >= inner[i] for i in (0, 1))
    return larger and all(inner[i] + inner[i + 2] <= outer[i] + outer[i + 2] for i in (0, 1))


def _size(area: tuple[int, int, int, int]) -> int:
    return area[0] * area[1]
