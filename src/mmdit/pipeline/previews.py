"""Previews of latents without a VAE: a linear map turns the channels of each latent cell into the colour of a pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from encoders.vae import VAE
from mmdit.pipeline.images import to_unit

RGB = tuple[float, float, float]
_AT_ONCE = 4  # number of latents decoded at once, because a picture of 1024 x 1024 pixels takes gigabytes


@dataclass(frozen=True)
class Factors:
    """A linear map from latents in model space to RGB in [-1, 1]: `latent[c] @ weight[c, 3] + bias[3]` for each cell.

    The map belongs to one VAE; for latents of another VAE the colours are wrong.
    """

    weight: tuple[RGB, ...]
    bias: RGB = (0.0, 0.0, 0.0)


# Source: Stability-AI/sd3.5, sd3_impls.SD3LatentFormat.decode_latent_to_preview, which has no bias.
STABILITY = Factors(
    (
        (-0.0645, 0.0177, 0.1052),
        (0.0028, 0.0312, 0.0650),
        (0.1848, 0.0762, 0.0360),
        (0.0944, 0.0360, 0.0889),
        (0.0897, 0.0506, -0.0364),
        (-0.0020, 0.1203, 0.0284),
        (0.0855, 0.0118, 0.0283),
        (-0.0539, 0.0658, 0.1047),
        (-0.0057, 0.0116, 0.0700),
        (-0.0412, 0.0281, -0.0039),
        (0.1106, 0.1171, 0.1220),
        (-0.0248, 0.0682, -0.0481),
        (0.0815, 0.0846, 0.1207),
        (-0.0120, -0.0055, -0.0867),
        (-0.0749, -0.0634, -0.0456),
        (-0.1418, -0.1457, -0.1259),
    )
)
# Source: ComfyUI, comfy.latent_formats.SD3, latent_rgb_factors and latent_rgb_factors_bias.
COMFYUI = Factors(
    (
        (-0.0922, -0.0175, 0.0749),
        (0.0311, 0.0633, 0.0954),
        (0.1994, 0.0927, 0.0458),
        (0.0856, 0.0339, 0.0902),
        (0.0587, 0.0272, -0.0496),
        (-0.0006, 0.1104, 0.0309),
        (0.0978, 0.0306, 0.0427),
        (-0.0042, 0.1038, 0.1358),
        (-0.0194, 0.0020, 0.0669),
        (-0.0488, 0.0130, -0.0268),
        (0.0922, 0.0988, 0.0951),
        (-0.0278, 0.0524, -0.0542),
        (0.0332, 0.0456, 0.0895),
        (-0.0069, -0.0030, -0.0810),
        (-0.0596, -0.0465, -0.0293),
        (-0.1448, -0.1463, -0.1189),
    ),
    (0.2394, 0.2135, 0.1925),
)


def preview(latent: Tensor, factors: Factors = COMFYUI) -> Float[Tensor, "b 3 h w"]:
    """Small pictures of latents, [b, 3, h, w] in [0, 1], one pixel per latent cell, on the latent's device.

    `mmdit.pipeline.images.to_pil` converts them.

    Args:
        latent: latents of shape [b, c, h, w], in model space. The predicted picture of a step (`step.denoised`) shows
            more than its noisy latent.
        factors: the linear map. `COMFYUI` and `STABILITY` are for the VAE of SD3 and SD3.5; `fit_factors` computes the
            map of another VAE.

    Raises:
        ValueError: the latent has another number of channels than the factors.
    """
    _check_channels(latent, len(factors.weight), "the factors are for")
    x = latent.to(torch.promote_types(latent.dtype, torch.float32))
    weight, bias = (torch.tensor(figures, dtype=x.dtype, device=x.device) for figures in (factors.weight, factors.bias))
    return to_unit(torch.einsum("bchw,cr->brhw", x, weight) + bias[:, None, None])


@torch.no_grad()
def fit_factors(vae: VAE, latents: Tensor) -> Factors:
    """The factors of a VAE: a least-squares fit from latents to the decoded pictures, averaged over each latent cell.

    The fit is reproducible, because it is solved in float64 on the CPU.

    Args:
        vae: the VAE, of which only the decoder is used.
        latents: latents of shape [b, c, h, w], in model space, of pictures similar to those that will be shown
            (`vae.encode(pictures).mode()`).

    Raises:
        ValueError: the latents have another number of channels than the VAE, or are too few or too similar to determine
            the factors; or the decoded pictures are not finite.
    """
    _check_channels(latents, vae.config.latent_channels, "the VAE has")
    first = next(vae.parameters())
    colours = [
        F.avg_pool2d(to_unit(vae.decode(part.to(first.device, first.dtype))), vae.config.downscale)
        for part in latents.split(_AT_ONCE)
    ]
    given = F.pad(_cells(latents), (0, 1), value=1.0)  # the last column of ones is for the bias
    wanted = 2 * _cells(torch.cat(colours)) - 1
    if not (given.isfinite().all() and wanted.isfinite().all()):
        raise ValueError("latents or the pictures of them are not finite; use a wider dtype")
    solved = torch.linalg.lstsq(given, wanted, driver="gelsd")
    cells, unknowns = given.shape
    if solved.rank < unknowns:
        raise ValueError(
            f"{cells} latent cells of rank {int(solved.rank)} with a bias, expected rank {unknowns}; "
            "give more latents, of different pictures"
        )
    *weight, bias = map(_rgb, solved.solution.tolist())
    return Factors(tuple(weight), bias)


def _check_channels(latent: Tensor, channels: int, whose: str) -> None:
    if latent.ndim != 4 or latent.shape[1] != channels:
        found = f"{latent.shape[1]} channels" if latent.ndim == 4 else f"shape {list(latent.shape)}"
        raise ValueError(f"the latent has {found}, {whose} {channels}: give [b, {channels}, h, w] in model space")


def _cells(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "bhw c"]:
    return maps.permute(0, 2, 3, 1).flatten(0, 2).double().cpu()


def _rgb(row: list[float]) -> RGB:
    red, green, blue = row
    return red, green, blue
