"""Encode prompts into a CONDITIONING by ComfyUI's text rules (`comfy/text_encoders/sd3_clip.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from encoders import COMFYUI, Conditioner, Conditioning
from mmdit.comfyui.values import Clip

_POOLED = 2048  # pooled channels of both official CLIP encoders, which ComfyUI assumes where one is missing
_OFFICIAL_TOWERS, _OFFICIAL_CONTEXT = 2048, 4096


def encode(clip: Clip, prompt: str) -> Conditioning:
    """Encode one prompt with all encoders."""
    with _at_layer(clip):
        return _conditioner(clip)([prompt])


def encode_each(clip: Clip, clip_l: str, clip_g: str, t5: str, *, padded: bool) -> Conditioning:
    """Encode a separate prompt with each encoder (CLIPTextEncodeSD3).

    Args:
        clip: the encoders.
        clip_l, clip_g, t5: the prompt of each encoder.
        padded: whether an empty prompt is encoded as padding. If False, T5 gets only its end token for an empty prompt,
            an empty CLIP prompt has the length of the other CLIP prompt, and two empty CLIP prompts give no tokens and
            a pooled vector of zeros.
    """
    with _at_layer(clip):
        towers = _towers(clip, clip_l, clip_g) if padded or clip_l or clip_g else None
        tokens = None if clip.t5 is None else _t5(clip, t5, padded=padded)
    if towers is None and tokens is None:
        return _nothing(clip)
    if towers is None:
        assert tokens is not None
        return Conditioning(tokens, tokens.new_zeros(len(tokens), _pooled_dim(clip)))
    if tokens is None:
        return Conditioning(towers.context, towers.pooled)
    return Conditioning(torch.cat([towers.context, tokens.to(towers.context)], dim=1), towers.pooled)


def _conditioner(clip: Clip, **without: None) -> Conditioner:
    models: dict[str, Any] = {"clip_l": clip.clip_l, "clip_g": clip.clip_g, "t5": clip.t5} | without
    return Conditioner(
        models["clip_l"],
        models["clip_g"],
        models["t5"],
        clip.tokenizers,
        COMFYUI,
        context_dim=context_dim(clip),
        pooled_dim=_pooled_dim(clip),
    )


def context_dim(clip: Clip) -> int:
    """The context dimension: T5's width; without T5, the official width, or the sum of nonstandard CLIP widths."""
    if clip.t5 is not None:
        return clip.t5.config.width
    widths = sum(tower.config.width for tower in (clip.clip_l, clip.clip_g) if tower is not None)
    return _OFFICIAL_CONTEXT if widths in (768, 1280, _OFFICIAL_TOWERS, 0) else widths


def _pooled_dim(clip: Clip) -> int:
    both = [tower for tower in (clip.clip_l, clip.clip_g) if tower is not None]
    return sum(tower.config.projection_dim or tower.config.width for tower in both) if len(both) == 2 else _POOLED


def _towers(clip: Clip, clip_l: str, clip_g: str) -> Conditioning | None:
    """Encode a prompt with each CLIP encoder; the one with fewer chunks of 77 tokens is filled up with empty chunks."""
    given = {"clip_l": (clip.clip_l, clip_l), "clip_g": (clip.clip_g, clip_g)}
    found: dict[str, Conditioning] = {}
    for name, (tower, prompt) in given.items():
        if tower is not None:
            others: dict[str, None] = dict.fromkeys({"clip_l", "clip_g", "t5"} - {name})
            found[name] = _conditioner(clip, **others)([prompt])
    if not found:
        return None
    length = max(one.context.shape[1] for one in found.values())
    whole = [_lengthened(clip, name, one, length) for name, one in found.items()]
    context = torch.stack([one.context for one in whole]).sum(0)  # the channels of the two do not overlap
    return Conditioning(context, torch.stack([one.pooled for one in whole]).sum(0))


def _lengthened(clip: Clip, name: str, one: Conditioning, length: int) -> Conditioning:
    missing = (length - one.context.shape[1]) // COMFYUI.clip_length
    if not missing:
        return one
    others: dict[str, None] = dict.fromkeys({"clip_l", "clip_g", "t5"} - {name})
    empty = _conditioner(clip, **others)([""]).context
    return replace(one, context=torch.cat([one.context, *[empty] * missing], dim=1))


def _t5(clip: Clip, prompt: str, *, padded: bool) -> Tensor:
    """Encode a prompt with T5 only, [1, n, width]."""
    assert clip.t5 is not None
    if prompt or padded:
        return _conditioner(clip, clip_l=None, clip_g=None)([prompt]).context
    assert clip.tokenizers.t5 is not None
    ids = torch.tensor([[clip.tokenizers.t5.eos]], device=next(clip.t5.parameters()).device)
    return clip.t5(ids, torch.float32)


def _nothing(clip: Clip) -> Conditioning:
    """The conditioning where no encoder has any tokens: zeros."""
    return Conditioning(torch.zeros(1, COMFYUI.clip_length, context_dim(clip)), torch.zeros(1, _pooled_dim(clip)))


@contextmanager
def _at_layer(clip: Clip) -> Iterator[None]:
    """Within the context, the encoders return the output of layer `clip.layer`.

    It replaces the penultimate layer of CLIP and the last layer of T5. The output of CLIP has no final norm; that of T5
    has. An encoder with fewer layers returns its last output, with the norm (ComfyUI's
    `SDClipModel.set_clip_options`).
    """
    handles: list[Any] = []
    try:
        if clip.layer is not None:
            for tower in (clip.clip_l, clip.clip_g):
                if tower is not None:
                    handles += _hook_tower(tower, clip.layer)
            if clip.t5 is not None and -clip.layer <= len(clip.t5.encoder.block):
                handles += _hook_t5(clip.t5, clip.layer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_tower(tower: Any, layer: int) -> list[Any]:
    layers = tower.text_model.encoder.layers
    if -layer > len(layers):
        return [tower.register_forward_hook(lambda _, __, out: out._replace(penultimate=out.last))]
    seen: list[Tensor] = []
    note = layers[layer].register_forward_hook(lambda _, __, out: seen.append(out))
    return [note, tower.register_forward_hook(lambda _, __, out: out._replace(penultimate=seen.pop()))]


def _hook_t5(t5: Any, layer: int) -> list[Any]:
    seen: list[Tensor] = []
    note = t5.encoder.block[layer].register_forward_hook(lambda _, __, out: seen.append(out))

    def normed(_: Any, __: Any, out: Tensor) -> Tensor:
        return t5.encoder.final_layer_norm(seen.pop(), out.dtype)

    return [note, t5.encoder.register_forward_hook(normed)]
