"""Encode and edit prompts: ComfyUI's `nodes.py` and `comfy_extras/nodes_sd3.py`, `nodes_cond.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders import Conditioning
from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import MAX_SIDE, choice, decimal, integer, node, side, text, wire
from mmdit.comfyui.text import encode, encode_each
from mmdit.comfyui.values import Area, Clip, Prompt, Prompts

_CONDITIONING = wire("conditioning", "CONDITIONING")
_STRENGTH = decimal("strength", 1.0, 0.0, 10.0)
_TO_FROM = (wire("conditioning_to", "CONDITIONING"), wire("conditioning_from", "CONDITIONING"))


def _checked(clip: Clip | None) -> Clip:
    """Return the text encoders.

    Raises:
        RuntimeError: there are none, for example because the checkpoint has no text encoders.
    """
    if clip is None:
        raise RuntimeError(
            "the CLIP input is None, because the checkpoint holds no text encoders; load them with TripleCLIPLoader"
        )
    return clip


@node("CLIPTextEncode", [text("text"), wire("clip", "CLIP")], ["CONDITIONING"])
def clip_text_encode(context: Context, text: str, clip: Clip | None) -> Prompts:
    """Encode one prompt with all text encoders."""
    context.limits.check("characters", len(text))
    return (Prompt(encode(_checked(clip), text)),)


@node(
    "CLIPTextEncodeSD3",
    [
        wire("clip", "CLIP"),
        text("clip_l"),
        text("clip_g"),
        text("t5xxl"),
        choice("empty_padding", ("none", "empty_prompt")),
    ],
    ["CONDITIONING"],
)
def clip_text_encode_sd3(
    context: Context, clip: Clip | None, clip_l: str, clip_g: str, t5xxl: str, empty_padding: str
) -> Prompts:
    """Encode a separate prompt for each text encoder."""
    for one in (clip_l, clip_g, t5xxl):
        context.limits.check("characters", len(one))
    return (Prompt(encode_each(_checked(clip), clip_l, clip_g, t5xxl, padded=empty_padding != "none")),)


@node("CLIPSetLastLayer", [wire("clip", "CLIP"), integer("stop_at_clip_layer", -1, -24, -1)], ["CLIP"])
def clip_set_last_layer(clip: Clip | None, stop_at_clip_layer: int) -> Clip:
    """Choose the layer, counted from the end, whose output is used."""
    return replace(_checked(clip), layer=stop_at_clip_layer)


@node("ConditioningZeroOut", [_CONDITIONING], ["CONDITIONING"])
def conditioning_zero_out(conditioning: Prompts) -> Prompts:
    """Replace the context tokens and the pooled vector by zeros."""
    return _each(conditioning, lambda one: replace(one, conditioning=one.conditioning.zeroed()))


@node(
    "ConditioningCombine",
    [wire("conditioning_1", "CONDITIONING"), wire("conditioning_2", "CONDITIONING")],
    ["CONDITIONING"],
)
def conditioning_combine(context: Context, conditioning_1: Prompts, conditioning_2: Prompts) -> Prompts:
    """Put the prompts of both inputs in one list; the sampler averages their predictions."""
    context.limits.check("prompts", len(conditioning_1) + len(conditioning_2))
    return conditioning_1 + conditioning_2


@node("ConditioningConcat", _TO_FROM, ["CONDITIONING"])
def conditioning_concat(context: Context, conditioning_to: Prompts, conditioning_from: Prompts) -> Prompts:
    """Append the tokens of `conditioning_from` to those of `conditioning_to`, whose pooled vector is kept."""
    more = _first(conditioning_from).conditioning.context

    def joined(one: Prompt) -> Prompt:
        found = one.conditioning
        context.limits.check("tokens", found.context.shape[1] + more.shape[1])
        return replace(one, conditioning=Conditioning(torch.cat([found.context, more], dim=1), found.pooled))

    return _each(conditioning_to, joined)


@node(
    "ConditioningAverage",
    [*_TO_FROM, decimal("conditioning_to_strength", 1.0, 0.0, 1.0)],
    ["CONDITIONING"],
)
def conditioning_average(
    conditioning_to: Prompts, conditioning_from: Prompts, conditioning_to_strength: float
) -> Prompts:
    """Compute strength * to + (1 - strength) * from for tokens and pooled vectors.

    The tokens of `from` are cut, or padded with zeros, to the length of `to`.
    """
    weight, other = conditioning_to_strength, _first(conditioning_from).conditioning

    def mixed(one: Prompt) -> Prompt:
        found = one.conditioning
        length = found.context.shape[1]
        cut = other.context[:, :length]
        filled = F.pad(cut, (0, 0, 0, length - cut.shape[1]))
        context = weight * found.context + (1 - weight) * filled
        return replace(one, conditioning=Conditioning(context, weight * found.pooled + (1 - weight) * other.pooled))

    return _each(conditioning_to, mixed)


@node(
    "ConditioningSetTimestepRange",
    [_CONDITIONING, decimal("start", 0.0, 0.0, 1.0), decimal("end", 1.0, 0.0, 1.0)],
    ["CONDITIONING"],
)
def conditioning_set_timestep_range(conditioning: Prompts, start: float, end: float) -> Prompts:
    """Limit the prompts to a part of sampling; `start` and `end` are fractions from 0 to 1."""
    return _each(conditioning, lambda one: replace(one, start=start, end=end))


@node(
    "ConditioningSetMask",
    [_CONDITIONING, wire("mask", "MASK"), _STRENGTH, choice("set_cond_area", ("default", "mask bounds"))],
    ["CONDITIONING"],
)
def conditioning_set_mask(conditioning: Prompts, mask: Tensor, strength: float, set_cond_area: str) -> Prompts:
    """Limit the prompts to the region of a mask."""
    mask = mask.reshape(-1, *mask.shape[-2:])
    bounds = set_cond_area != "default"
    return _each(conditioning, lambda one: replace(one, mask=mask, mask_strength=strength, mask_bounds=bounds))


@node(
    "ConditioningSetArea",
    [
        _CONDITIONING,
        side("width", 64, 64),
        side("height", 64, 64),
        integer("x", 0, 0, MAX_SIDE),
        integer("y", 0, 0, MAX_SIDE),
        _STRENGTH,
    ],
    ["CONDITIONING"],
)
def conditioning_set_area(conditioning: Prompts, width: int, height: int, x: int, y: int, strength: float) -> Prompts:
    """Limit the prompts to a rectangle given in pixels."""
    area = Area(height // 8, width // 8, y // 8, x // 8)
    return _each(conditioning, lambda one: replace(one, area=area, strength=strength, mask_bounds=False))


@node(
    "ConditioningSetAreaPercentage",
    [
        _CONDITIONING,
        *(decimal(name, 1.0, 0.0, 1.0) for name in ("width", "height")),
        *(decimal(name, 0.0, 0.0, 1.0) for name in ("x", "y")),
        _STRENGTH,
    ],
    ["CONDITIONING"],
)
def conditioning_set_area_percentage(
    conditioning: Prompts, width: float, height: float, x: float, y: float, strength: float
) -> Prompts:
    """Limit the prompts to a rectangle given in fractions of the height and width."""
    area = Area(height, width, y, x, in_shares=True)
    return _each(conditioning, lambda one: replace(one, area=area, strength=strength, mask_bounds=False))


@node("ConditioningSetAreaStrength", [_CONDITIONING, _STRENGTH], ["CONDITIONING"])
def conditioning_set_area_strength(conditioning: Prompts, strength: float) -> Prompts:
    """Set the weight of the prompts relative to others."""
    return _each(conditioning, lambda one: replace(one, strength=strength))


def _each(prompts: Prompts, change: Callable[[Prompt], Prompt]) -> Prompts:
    return tuple(change(one) for one in prompts)


def _first(prompts: Prompts) -> Prompt:
    """Return the first prompt, the only one that is concatenated or averaged; ComfyUI does the same, with a warning."""
    return prompts[0]
