"""Loaders of models: ComfyUI's `nodes.py` and `nodes_sd3.py`. As everywhere, no pickle is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from encoders import VAE
from mmdit.checkpoints.components import title
from mmdit.checkpoints.load import build, open_model
from mmdit.checkpoints.locate import Found, locate
from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import choice, file, node
from mmdit.comfyui.values import Clip, Model
from mmdit.models.mmdit import MMDiT

_ENCODERS = ("clip_l", "clip_g", "t5")
_FLOAT8 = {"fp8_e4m3fn": "float8_e4m3fn", "fp8_e4m3fn_fast": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_WEIGHT_DTYPES = ("default", *_FLOAT8)
_VAES = ("taesd", "taesdxl", "taesd3", "taef1", "pixel_space")  # names in ComfyUI that do not name a file
_TYPES: tuple[str, ...] = (
    *("stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart", "cosmos", "lumina2"),
    *("wan", "hidream", "chroma", "ace", "omnigen2", "qwen_image", "hunyuan_image"),
)
_DUAL_TYPES: tuple[str, ...] = ("sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image", "hunyuan_video_15")
_DEVICE = choice("device", ("default", "cpu"), optional=True)


@node("CheckpointLoaderSimple", [file("ckpt_name", "checkpoints")], ["MODEL", "CLIP", "VAE"])
def checkpoint_loader(context: Context, ckpt_name: str) -> tuple[Model, Clip | None, VAE | None]:
    """Load all models of a file; CLIP is None if the file has no text encoders."""
    found = locate(context.folders.model("checkpoints", ckpt_name))
    model = Model(_built(context, found, "transformer"))
    encoders = {name: _built(context, found, name) for name in _ENCODERS if name in found.weights}
    clip = _clip(context, encoders) if encoders else None
    return model, clip, _built(context, found, "vae") if "vae" in found.weights else None


@node(
    "UNETLoader",
    [file("unet_name", "diffusion_models"), choice("weight_dtype", _WEIGHT_DTYPES)],
    ["MODEL"],
)
def unet_loader(context: Context, unet_name: str, weight_dtype: str) -> Model:
    """Load a transformer. The float8 choices round every tensor, also norms and biases, to float8 without scales."""
    transformer = _built(context, locate(context.folders.model("diffusion_models", unet_name)), "transformer")
    if weight_dtype != "default":
        _round_to_float8(transformer, getattr(torch, _FLOAT8[weight_dtype]))
    return Model(transformer)


@node("VAELoader", [file("vae_name", "vae", _VAES)], ["VAE"])
def vae_loader(context: Context, vae_name: str) -> VAE:
    """Load a VAE."""
    if vae_name in _VAES:
        raise ValueError(f"the VAE {vae_name!r} is not built here; give the file of an SD3 VAE")
    return _built(context, locate(context.folders.model("vae", vae_name)), "vae")


@node("CLIPLoader", [file("clip_name", "text_encoders"), choice("type", _TYPES), _DEVICE], ["CLIP"])
def clip_loader(context: Context, clip_name: str, type: str, device: str = "default") -> Clip:
    """Load one text encoder; the others are missing."""
    return _from_files(context, [clip_name], type)


@node(
    "DualCLIPLoader",
    [
        file("clip_name1", "text_encoders"),
        file("clip_name2", "text_encoders"),
        choice("type", _DUAL_TYPES),
        _DEVICE,
    ],
    ["CLIP"],
)
def dual_clip_loader(
    context: Context,
    clip_name1: str,
    clip_name2: str,
    type: str,
    device: str = "default",
) -> Clip:
    """Load two text encoders, which are recognized by their tensors."""
    return _from_files(context, [clip_name1, clip_name2], type)


@node(
    "TripleCLIPLoader",
    [file("clip_name1", "text_encoders"), file("clip_name2", "text_encoders"), file("clip_name3", "text_encoders")],
    ["CLIP"],
)
def triple_clip_loader(context: Context, clip_name1: str, clip_name2: str, clip_name3: str) -> Clip:
    """Load all three text encoders, in any order."""
    return _from_files(context, [clip_name1, clip_name2, clip_name3], "sd3")


def _built(context: Context, found: Found, component: str) -> Any:
    return build(open_model(found, component), context.device, context.load_dtype)


def _from_files(context: Context, names: Sequence[str], type: str) -> Clip:
    if type != "sd3":
        raise ValueError(
            f"the type of the text encoders is {type!r}; this library runs those of Stable Diffusion 3: sd3"
        )
    encoders: dict[str, Any] = {}
    for path in (context.folders.model("text_encoders", name) for name in names):
        found = locate(path)
        held = [name for name in _ENCODERS if name in found.weights]
        if not held:
            open_model(found, "clip_l")  # says what is there instead
        for name in held:
            if name in encoders:
                raise ValueError(f"{path.name} is a {title(name)}, and another file is one too; give each once")
            encoders[name] = _built(context, found, name)
    return _clip(context, encoders)


def _clip(context: Context, encoders: dict[str, Any]) -> Clip:
    tokenizers = context.tokenizers_for(**{name: name in encoders for name in _ENCODERS})
    return Clip(encoders.get("clip_l"), encoders.get("clip_g"), encoders.get("t5"), tokenizers)


def _round_to_float8(transformer: MMDiT, dtype: torch.dtype) -> None:
    """Round every tensor to float8, as ComfyUI's cast without scales does, and keep it in the dtype to compute in."""
    largest = torch.finfo(dtype).max
    for tensor in nn.Module.state_dict(transformer).values():
        tensor.copy_(tensor.clamp(-largest, largest).to(dtype).to(tensor.dtype))
