"""LoRAs: ComfyUI's `nodes.py`, LoraLoader and LoraLoaderModelOnly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from mmdit.checkpoints.lora import Lora, load_lora
from mmdit.checkpoints.lora_merge import merge_lora
from mmdit.checkpoints.lora_names import Part
from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import decimal, file, node, wire
from mmdit.comfyui.values import Clip, Model

Module = TypeVar("Module", bound=nn.Module)
_LORA, _STRENGTH = file("lora_name", "loras"), (1.0, -100.0, 100.0)
_MODEL = wire("model", "MODEL")
_OF_MODEL, _OF_CLIP = (decimal(f"strength_{name}", *_STRENGTH) for name in ("model", "clip"))


@node("LoraLoader", [_MODEL, wire("clip", "CLIP"), _LORA, _OF_MODEL, _OF_CLIP], ["MODEL", "CLIP"])
def lora_loader(
    context: Context, model: Model, clip: Clip | None, lora_name: str, strength_model: float, strength_clip: float
) -> tuple[Model, Clip | None]:
    """Add a LoRA to the transformer and to the text encoders, each with a strength; 0 leaves them as they are."""
    if not strength_model and not strength_clip:
        return model, clip
    lora = load_lora(context.folders.model("loras", lora_name), "comfyui")
    changed = _of_model(model, lora, strength_model) if strength_model else model
    return changed, _of_clip(clip, lora, strength_clip) if clip is not None and strength_clip else clip


@node("LoraLoaderModelOnly", [_MODEL, _LORA, _OF_MODEL], ["MODEL"])
def lora_loader_model_only(context: Context, model: Model, lora_name: str, strength_model: float) -> Model:
    """Add a LoRA to the transformer alone."""
    return lora_loader(context, model, None, lora_name, strength_model, 0.0)[0]


def _of_model(model: Model, lora: Lora, strength: float) -> Model:
    base, loras = model.base or model.transformer, (*model.loras, (lora, strength))
    return replace(model, base=base, loras=loras, transformer=_merged(base, "transformer", loras))


def _of_clip(clip: Clip, lora: Lora, strength: float) -> Clip:
    base, loras = clip.base or clip, (*clip.loras, (lora, strength))
    return replace(
        clip,
        base=base,
        loras=loras,
        clip_l=None if base.clip_l is None else _merged(base.clip_l, "clip_l", loras),
        clip_g=None if base.clip_g is None else _merged(base.clip_g, "clip_g", loras),
        t5=None if base.t5 is None else _merged(base.t5, "t5", loras),
    )


def _merged(model: Module, part: Part, loras: Sequence[tuple[Lora, float]]) -> Module:
    """Merge the LoRAs that change a model; weights that no LoRA changes are shared with the original."""
    acting = [(lora, strength) for lora, strength in loras if lora.of(part)]
    if not acting:
        return model
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return merge_lora(twin, [lora for lora, _ in acting], [strength for _, strength in acting], part=part)
