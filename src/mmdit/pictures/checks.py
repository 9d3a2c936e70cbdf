"""Checks of pictures, masks and latents; each error tells what was found, what is expected and what to give."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_picture(name: str, picture: object) -> None:
    """Raise TypeError or ValueError unless a value is a tensor of floats [b, h, w, c] with 1 to 4 channels."""
    tensor = _floats(name, picture)
    if tensor.ndim != 4 or tensor.shape[3] not in (1, 3, 4) or 0 in tensor.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected [b, h, w, channels] with 1, 3 or 4 channels and values "
            "in [0, 1]; `mmdit.images.load_image` makes such tensors"
        )


def check_mask(name: str, mask: object) -> None:
    """Raise TypeError or ValueError unless a value is a tensor of floats [b, h, w]."""
    tensor = _floats(name, mask)
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected a mask [b, h, w] with values in [0, 1]; "
            "`mmdit.images.load_mask` makes such tensors"
        )


def check_latent(name: str, latent: object) -> None:
    """Raise TypeError or ValueError unless a value is a tensor of floats [b, c, h, w]."""
    tensor = _floats(name, latent)
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected latents [b, c, h, w]")


def _floats(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a tensor of floating-point numbers")
    if value.dtype not in _FLOATS:
        raise ValueError(f"{name} is a tensor of {value.dtype}, expected floating-point numbers")
    return value
