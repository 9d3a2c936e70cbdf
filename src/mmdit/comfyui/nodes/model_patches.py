"""Model patches: ComfyUI's `comfy_extras/nodes_sd3.py`, `nodes_slg.py`, `nodes_cfg.py`, `nodes_apg.py` and others.

Formulas are ComfyUI's, which works on predicted pictures x0 where papers work on the model's output; `mmdit.Guidance`
has the papers' forms.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from mmdit.comfyui.declare import decimal, node, text, wire
from mmdit.comfyui.schedules import level_of_table
from mmdit.comfyui.values import Before, Model, Predicted
from samplers import percents

_MODEL = wire("model", "MODEL")
_SKIP = (
    decimal("scale", 3.0, 0.0, 10.0),
    decimal("start_percent", 0.01, 0.0, 1.0),
    decimal("end_percent", 0.15, 0.0, 1.0),
)


@node("ModelSamplingSD3", [_MODEL, decimal("shift", 3.0, 0.0, 100.0)], ["MODEL"])
def model_sampling_sd3(model: Model, shift: float) -> Model:
    """Set the shift of the model's schedules."""
    if not shift > 0:
        raise ValueError(f"shift must be above 0, got {shift:g}")
    return replace(model, shift=shift)


@node("SkipLayerGuidanceSD3", [_MODEL, text("layers", "7, 8, 9"), *_SKIP], ["MODEL"])
def skip_layer_guidance_sd3(model: Model, layers: str, scale: float, start_percent: float, end_percent: float) -> Model:
    """Guide away from the prediction made without some blocks (skip-layer guidance)."""
    return _skipping(model, layers, scale, start_percent, end_percent, 0.0)


@node(
    "SkipLayerGuidanceDiT",
    [
        _MODEL,
        text("double_layers", "7, 8, 9"),
        text("single_layers", "7, 8, 9"),
        *_SKIP,
        decimal("rescaling_scale", 0.0, 0.0, 10.0),
    ],
    ["MODEL"],
)
def skip_layer_guidance_dit(
    model: Model,
    double_layers: str,
    single_layers: str,
    scale: float,
    start_percent: float,
    end_percent: float,
    rescaling_scale: float,
) -> Model:
    """Apply skip-layer guidance and rescale the result towards the standard deviation of cond.

    SD3 has no single-stream layers.
    """
    return _skipping(model, double_layers, scale, start_percent, end_percent, rescaling_scale)


def _skipping(model: Model, layers: str, scale: float, start: float, end: float, rescale: float) -> Model:
    numbers = [int(digits) for digits in re.findall(r"\d+", layers[:1000])]
    depth = model.transformer.config.depth
    if outside := [i for i in numbers if i >= depth]:
        raise ValueError(f"layers {outside[:5]} do not exist; this model has layers 0 to {depth - 1}")
    window = percents(start, end, model.shift)  # computed with the shift that the model has at this node, as in ComfyUI
    if not numbers:
        return model

    def patch(found: Predicted, x0: Tensor) -> Tensor:
        if not scale > 0 or found.sigma not in window:
            return x0
        x0 = x0 + (found.cond - found.weaker(numbers)) * scale
        if not rescale:
            return x0
        return x0 * (rescale * found.cond.std() / x0.std() + (1 - rescale))

    return model.and_after(patch)


@node("RescaleCFG", [_MODEL, decimal("multiplier", 0.7, 0.0, 1.0)], ["MODEL"])
def rescale_cfg(model: Model, multiplier: float) -> Model:
    """Rescale the guided v-prediction, in variance exploding form, towards the standard deviation of cond.

    Lin et al. 2023, arXiv 2305.08891; ComfyUI uses that form for flows too, as if x were scaled by sqrt(sigma^2 + 1).
    """

    def mixing(found: Predicted) -> Tensor:
        sigma, grown = found.sigma, found.sigma**2 + 1
        scaled = found.x / grown
        cond, uncond = ((scaled - x0) * grown**0.5 / sigma for x0 in (found.cond, found.uncond))
        mixed = uncond + found.scale * (cond - uncond)
        deviation = [one.std(dim=(1, 2, 3), keepdim=True) for one in (cond, mixed)]
        final = multiplier * mixed * (deviation[0] / deviation[1]) + (1 - multiplier) * mixed
        return scaled - final * sigma / grown**0.5

    return replace(model, mixing=mixing)


@node("PerturbedAttentionGuidance", [_MODEL, decimal("scale", 3.0, 0.0, 100.0)], ["MODEL"])
def perturbed_attention_guidance(model: Model, scale: float) -> Model:
    """Return the model unchanged, as in ComfyUI, whose node changes a block that only U-Nets have.

    `mmdit.Guidance` has perturbed attention guidance for SD3.
    """
    warnings.warn(
        "PerturbedAttentionGuidance changes nothing: ComfyUI's node perturbs the middle block of a U-Net, which SD3 "
        "does not have; mmdit.Guidance(perturbed_layers=...) does it for SD3",
        stacklevel=2,
    )
    return model


@node(
    "APG",
    [
        _MODEL,
        decimal("eta", 1.0, -10.0, 10.0),
        decimal("norm_threshold", 5.0, 0.0, 50.0),
        decimal("momentum", 0.0, -5.0, 1.0),
    ],
    ["MODEL"],
)
def apg(model: Model, eta: float, norm_threshold: float, momentum: float) -> Model:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416) in ComfyUI's form: cond + scale d.

    The paper and `samplers.projected` have scale - 1 in place of scale.
    """

    def make() -> Before:
        before: list[Tensor] = []
        last: list[float] = []

        def patch(found: Predicted) -> Tensor:
            if last and found.sigma > last[0]:
                before.clear()
            last[:] = [found.sigma]
            push = found.cond - found.uncond
            if momentum:
                push = momentum * before[0] + push if before else push
                before[:] = [push]
            if norm_threshold > 0:
                norm = push.norm(p=2, dim=(1, 2, 3), keepdim=True)
                push = push * torch.minimum(torch.ones_like(norm), norm_threshold / norm)
            unit = found.cond / found.cond.norm(p=2, dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
            along = (push * unit).sum(dim=(1, 2, 3), keepdim=True) * unit
            push = push - along + eta * along
            return found.uncond + push + (found.cond - found.uncond) / found.scale

        return patch

    return replace(model, before=(*model.before, make))


@node("CFGZeroStar", [_MODEL], ["MODEL"])
def cfg_zero_star(model: Model) -> Model:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886) in ComfyUI's form, which scales the unconditional x0."""

    def patch(found: Predicted, x0: Tensor) -> Tensor:
        cond, uncond = found.x - found.cond, found.x - found.uncond
        dims = tuple(range(1, x0.ndim))
        share = (cond * uncond).sum(dims, keepdim=True) / ((uncond**2).sum(dims, keepdim=True) + 1e-8)
        return x0 + found.uncond * (share - 1) + found.scale * found.uncond * (1 - share)

    return model.and_after(patch)


@node("CFGNorm", [_MODEL, decimal("strength", 1.0, 0.0, 100.0)], ["MODEL"])
def cfg_norm(model: Model, strength: float) -> Model:
    """Limit the channel norm of the guided x0 in each latent cell to that of cond, then multiply by the strength."""

    def patch(found: Predicted, x0: Tensor) -> Tensor:
        norms = [one.norm(dim=1, keepdim=True) for one in (found.cond, x0)]
        return x0 * (norms[0] / (norms[1] + 1e-8)).clamp(0, 1) * strength

    return model.and_after(patch)


@node("DifferentialDiffusion", [_MODEL, decimal("strength", 1.0, 0.0, 1.0, optional=True)], ["MODEL"])
def differential_diffusion(model: Model, strength: float = 1.0) -> Model:
    """Let a gray mask set the noise level from which each cell is repainted (Levin & Fried 2023, arXiv 2306.00950)."""

    def rule(mask: Tensor, sigma: float, sigmas: Tensor) -> Tensor:
        low = max(level_of_table(0, model.shift), float(sigmas[-1]))
        threshold = (sigma - low) / (float(sigmas[0]) - low)
        hard = (mask >= threshold).to(mask)
        return strength * hard + (1 - strength) * mask if 0 < strength < 1 else hard

    return replace(model, mask_rule=rule)
