"""ControlNets and edges: ComfyUI's `nodes.py`, `comfy_extras/nodes_controlnet.py` and `nodes_canny.py`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from encoders import VAE
from mmdit.checkpoints.load import load_controlnet
from mmdit.comfyui.context import Context
from mmdit.comfyui.declare import decimal, file, node, wire
from mmdit.comfyui.values import Hint, Prompts
from mmdit.models.controlnet import ControlNet
from mmdit.pictures import edges

_POSITIVE, _NEGATIVE = wire("positive", "CONDITIONING"), wire("negative", "CONDITIONING")
_NET, _IMAGE = wire("control_net", "CONTROL_NET"), wire("image", "IMAGE")
_STRENGTH = decimal("strength", 1.0, 0.0, 10.0)
_WINDOW = (decimal("start_percent", 0.0, 0.0, 1.0), decimal("end_percent", 1.0, 0.0, 1.0))
_BOTH = ("CONDITIONING", "CONDITIONING")


@node("ControlNetLoader", [file("control_net_name", "controlnet")], ["CONTROL_NET"])
def control_net_loader(context: Context, control_net_name: str) -> ControlNet:
    """Load a ControlNet."""
    path = context.folders.model("controlnet", control_net_name)
    return load_controlnet(path, device=context.device, dtype=context.load_dtype)


@node(
    "ControlNetApplyAdvanced",
    [_POSITIVE, _NEGATIVE, _NET, _IMAGE, _STRENGTH, *_WINDOW, wire("vae", "VAE", optional=True)],
    _BOTH,
)
def control_net_apply_advanced(
    positive: Prompts,
    negative: Prompts,
    control_net: ControlNet,
    image: Tensor,
    strength: float,
    start_percent: float,
    end_percent: float,
    vae: VAE | None = None,
) -> tuple[Prompts, Prompts]:
    """Add a ControlNet to both prompts, after those they already have; with strength 0 nothing is added.

    The net acts between `start_percent` and `end_percent` of sampling.
    """
    return _on_both(positive, negative, Hint(control_net, image, vae, strength, start_percent, end_percent))


@node("ControlNetApplySD3", [_POSITIVE, _NEGATIVE, _NET, wire("vae", "VAE"), _IMAGE, _STRENGTH, *_WINDOW], _BOTH)
def control_net_apply_sd3(
    positive: Prompts,
    negative: Prompts,
    control_net: ControlNet,
    vae: VAE,
    image: Tensor,
    strength: float,
    start_percent: float,
    end_percent: float,
) -> tuple[Prompts, Prompts]:
    """Do the same as `control_net_apply_advanced`; this is an older node."""
    return _on_both(positive, negative, Hint(control_net, image, vae, strength, start_percent, end_percent))


@node("ControlNetApply", [wire("conditioning", "CONDITIONING"), _NET, _IMAGE, _STRENGTH], ["CONDITIONING"])
def control_net_apply(conditioning: Prompts, control_net: ControlNet, image: Tensor, strength: float) -> Prompts:
    """Add a ControlNet without a VAE for its hint; SD3 nets then fail in the sampler, as in ComfyUI."""
    return _on_both(conditioning, (), Hint(control_net, image, None, strength))[0]


@node(
    "ControlNetInpaintingAliMamaApply",
    [_POSITIVE, _NEGATIVE, _NET, wire("vae", "VAE"), _IMAGE, wire("mask", "MASK"), _STRENGTH, *_WINDOW],
    _BOTH,
)
def control_net_inpainting_alimama_apply(
    positive: Prompts,
    negative: Prompts,
    control_net: ControlNet,
    vae: VAE,
    image: Tensor,
    mask: Tensor,
    strength: float,
    start_percent: float,
    end_percent: float,
) -> tuple[Prompts, Prompts]:
    """Add an inpainting net, whose hint is the picture without the masked region, and the mask.

    Other nets get no mask.
    """
    given = mask if control_net.config.inpaints else None
    return _on_both(positive, negative, Hint(control_net, image, vae, strength, start_percent, end_percent, given))


@node(
    "Canny",
    [_IMAGE, decimal("low_threshold", 0.4, 0.01, 0.99), decimal("high_threshold", 0.8, 0.01, 0.99)],
    ["IMAGE"],
)
def canny(image: Tensor, low_threshold: float, high_threshold: float) -> Tensor:
    """Detect edges with the Canny algorithm of kornia 0.9.0."""
    return edges.canny(image, low_threshold, high_threshold)


def _on_both(positive: Prompts, negative: Prompts, hint: Hint) -> tuple[Prompts, Prompts]:
    if hint.strength == 0:
        return positive, negative
    changed = (tuple(replace(one, hints=(*one.hints, hint)) for one in each) for each in (positive, negative))
    return next(changed), next(changed)
