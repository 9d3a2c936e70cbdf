"""Scales and qdata: the arithmetic of float8 quantization, in the order that fixes every bit of it.

scale = max(amax / largest of the format, 2**-126) in float32, and 1 where everything is zero;
qdata = round to nearest even of clamp(x / scale), by division. value = qdata * scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from quant.codec import decode, encode
from quant.formats import DTYPES, FLOAT8_FORMATS, LARGEST, Format

PIECE: Final = 2**22  # values that are widened at a time: 16 MB of float32
SMALLEST_SCALE: Final = 2.0**-126  # the smallest normal float32: below it division and GPUs' flushing disagree


def scale_of(amax: Tensor, format: Format) -> Tensor:
    """The scale, float32 of the shape of `amax`, that maps the largest absolute value to the largest code.

    A NaN in `amax` gives the scale NaN, an infinity gives infinity.
    """
    # By a tensor: GPUs divide by a number through its reciprocal, which rounds once more.
    largest = torch.full((), LARGEST[format], dtype=torch.float32, device=amax.device)
    scale = (amax.float() / largest).clamp(min=SMALLEST_SCALE)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def to_codes(x: Tensor, scale: Tensor, format: Format, *, as_bytes: bool = False) -> Tensor:
    """The codes of x / scale. NaN stays NaN; quotients beyond the largest code, and infinities, become that code.

    Args:
        x: Values of any shape and floating dtype.
        scale: float32, broadcasts to x.
        format: The format of the codes.
        as_bytes: Whether to give uint8 by our own codec, for devices without float8 dtypes.
    """
    # In float64 for float64, so that there is one rounding; torch's own cast goes through float32.
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
    if as_bytes or wide.dtype == torch.float64:
        codes = encode(wide, format)
        return codes if as_bytes else codes.view(DTYPES[format])
    # The clamp is explicit, because the result of a cast that overflows depends on the version of torch.
    return wide.clamp(-LARGEST[format], LARGEST[format]).to(DTYPES[format])


def to_values(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """The values of the codes of x / scale, float16: those of `to_codes`, but that -0 may be 0.

    A sum with a large power of two rounds to nearest even at its last bit, which here is that of the code. So no float8
    dtype is needed, which compilers of some GPUs do not convert.

    Args:
        x: Values of any shape and floating dtype but float64.
        scale: float32, broadcasts to x.
        format: The format of the codes.
    """
    spec = FLOAT8_FORMATS[format]
    value = (x.float() / scale).clamp(-spec.largest, spec.largest)
    power = (value.view(torch.int32) & 0x7F800000).view(torch.float32)  # the value, cut to its power of two
    large = power.clamp(min=spec.smallest_normal) * (1.5 * 2 ** (23 - spec.mantissa_bits))
    return ((value + large) - large).half()


def from_codes(codes: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of codes without their scale: exact in float16, bfloat16, float32 and float64."""
    return decode(codes, format, dtype) if codes.dtype == torch.uint8 else codes.to(dtype)


def values_of(codes: Tensor, scale: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """codes * scale, multiplied in float32 (float64 for float64) and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (from_codes(codes, format, wide) * scale.to(wide)).to(dtype)


def slices(length: int, values: int, device: torch.device) -> Iterator[slice]:
    """Cut a dimension of this length into parts of about PIECE values, of a tensor that has so many in all.

    On a CPU they are smaller: where pieces are as large as small weights, they leave holes in the heap.
    """
    piece = PIECE if device.type == "cuda" else PIECE // 16
    step = max(1, piece * length // max(values, 1))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def all_finite(values: Tensor) -> bool:
    """Whether no value is an infinity or NaN.

    A sum is finite only where all its terms are, and reads them once, where `isfinite` takes several passes (on a CPU
    it takes ten times as long). The sum of float32 may overflow; the values themselves decide then.
    """
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(total.isfinite()) or bool(values.isfinite().all())


def has_float8(device: torch.device) -> bool:
    """Whether torch has float8 dtypes on the device; elsewhere codes are kept as uint8."""
    return device.type in ("cpu", "cuda", "meta")


def printable(name: str, length: int = 200) -> str:
    """A name from a file for an error: cut to `length` characters, and with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name[:length])


def positive(scale: Tensor, name: str, what: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale in `dtype`, checked.

    Args:
        scale: One number or several.
        name: The weight or layer that the error names.
        what: What the scale is, for the error.
        dtype: The dtype of the result, in which the scale must be positive.

    Raises:
        ValueError: The scale is not floating point, or a number of it is zero, negative or not finite.
    """
    if not scale.dtype.is_floating_point:
        raise ValueError(f"{printable(name)}: {what} must be floating point, got {scale.dtype}")
    factor = scale.detach().to(dtype)
    bad = ~(factor.isfinite() & (factor > 0))
    if bad.any():
        raise ValueError(
            f"{printable(name)}: {what} must be finite and above zero; {int(bad.sum())} are not, "
            f"first {factor[bad][:3].tolist()} in {dtype}"
        )
    return factor


def checked_input_scale(scale: Tensor | float, name: str = "input_scale") -> Tensor:
    """The static scale of a layer's activations as float32 ().

    Args:
        scale: One number, as a tensor of any shape or as a Python number.
        name: The layer or argument that the error names.

    Raises:
        ValueError: The scale is not one number, not floating point, or zero, negative or not finite in float32.
        TypeError: The scale is neither a tensor nor a number.
    """
    if isinstance(scale, int | float) and not isinstance(scale, bool):
        scale = torch.tensor(float(scale), device="cpu")
    if not isinstance(scale, Tensor):
        raise TypeError(
            f"{printable(name)}: an input scale is one positive number or tensor; got {type(scale).__name__}"
        )
    if scale.numel() != 1:
        raise ValueError(
            f"{printable(name)}: an input scale is one positive number; got a tensor of shape {list(scale.shape)}"
        )
    return positive(scale, name, "an input scale").reshape(())
