"""Scales and codes: the arithmetic of float8 quantization, in the order that fixes every bit of it.

scale = max(amax / largest of the format, 2**-126) in float32, and 1 where everything is zero;
code = round to nearest even of clamp(x / scale), by division. value = code * scale.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quant.codec import decode, encode
from quant.recipe import Format

DTYPES: Final[dict[Format, torch.dtype]] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST: Final[dict[Format, float]] = {"e4m3": 448.0, "e5m2": 57344.0}
SMALLEST_SCALE: Final = 2.0**-126  # the smallest normal float32: below it division and GPUs' flushing disagree


def scale_of(amax: Tensor, format: Format) -> Tensor:
    """The scale, float32 of the shape of `amax`, that maps the largest absolute value to the largest code.

    NaN stays NaN and an infinity gives infinity: what is quantized with it then is NaN, or has that scale.
    """
    # By a tensor: GPUs divide by a number through its reciprocal, which rounds once more.
    largest = torch.full((), LARGEST[format], dtype=torch.float32, device=amax.device)
    scale = (amax.float() / largest).clamp(min=SMALLEST_SCALE)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def to_codes(x: Tensor, scale: Tensor, format: Format, *, as_bytes: bool = False) -> Tensor:
    """The codes of x / scale; NaN stays NaN, what is beyond the largest code, an infinity too, becomes it.

    Args:
        x: any shape and floating dtype.
        scale: float32, broadcasts to x.
        format: of the codes.
        as_bytes: uint8 by our own codec, for devices without float8 dtypes.
    """
    # In float64 for float64, so that there is one rounding; torch's own cast goes through float32.
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
    if as_bytes or wide.dtype == torch.float64:
        codes = encode(wide, format)
        return codes if as_bytes else codes.view(DTYPES[format])
    # The clamp is explicit: what a cast makes of overflow depends on the version of torch.
    return wide.clamp(-LARGEST[format], LARGEST[format]).to(DTYPES[format])


def from_codes(codes: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of codes without their scale: exact in float16, bfloat16, float32 and float64."""
    return decode(codes, format, dtype) if codes.dtype == torch.uint8 else codes.to(dtype)


def values_of(codes: Tensor, scale: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """codes * scale, multiplied in float32 (float64 for float64) and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (from_codes(codes, format, wide) * scale.to(wide)).to(dtype)


def has_float8(device: torch.device) -> bool:
    """Whether torch has float8 dtypes there; elsewhere codes are kept as uint8."""
    return device.type in ("cpu", "cuda", "meta")
