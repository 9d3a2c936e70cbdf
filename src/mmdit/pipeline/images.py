"""Pictures as tensors in [0, 1], as arrays, and as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmdit.utils import replacing

OutputType = Literal["pil", "pt", "np", "latent"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "pt", "np", "latent")


def to_unit(decoded: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Map pictures from the VAE's range [-1, 1] to [0, 1] and clamp them, in float32 or wider."""
    return (decoded.to(torch.promote_types(decoded.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)


def to_array(pictures: Float[Tensor, "b 3 h w"]) -> np.ndarray:
    """Pictures as an array [b, h, w, 3] of float32."""
    return pictures.permute(0, 2, 3, 1).float().cpu().numpy()


def to_pil(pictures: Float[Tensor, "b 3 h w"], rounding: Literal["round", "truncate"]) -> list[Image.Image]:
    """8-bit pictures. diffusers rounds the values, ComfyUI and Stability's code truncate them.

    Raises:
        ValueError: a value is not finite.
    """
    if broken := int((~torch.isfinite(pictures)).sum()):
        raise ValueError(f"{broken} of {pictures.numel()} values of the picture are not finite; use a wider dtype")
    levels = to_array(pictures) * 255
    return [Image.fromarray((np.round(one) if rounding == "round" else one).astype(np.uint8)) for one in levels]


def png_path(path: str | Path) -> Path:
    """The path of a PNG.

    Raises:
        ValueError: the path does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"pictures are written as PNG: {path} must end in .png")
    return Path(path)


def save_png(picture: Image.Image, path: str | Path) -> Path:
    """Write a PNG that appears under its name only when it is complete; raises ValueError for other endings."""
    path = png_path(path)
    with replacing(path) as part:
        picture.save(part, format="png")
    return path


def convert_output(
    pictures: Float[Tensor, "b c h w"], output_type: OutputType, rounding: Literal["round", "truncate"]
) -> Tensor | np.ndarray | Sequence[Image.Image]:
    """Convert pictures [b, 3, h, w] in [0, 1] to the requested form; latents are returned unchanged."""
    match output_type:
        case "pt" | "latent":
            return pictures
        case "np":
            return to_array(pictures)
        case "pil":
            return to_pil(pictures, rounding)
