"""The two 8-bit floating point formats, bit by bit.

They are those of Micikevicius et al., "FP8 Formats for Deep Learning" (2022, arXiv 2209.05433, table 1), which OCP's
specification of 8-bit floating point took over. A code is sign S, exponent E, mantissa M:

    E4M3    S EEEE MMM    bias 7     no infinities; one NaN, all ones; the rest of exponent 15 are numbers, up to 448
    E5M2    S EEEEE MM    bias 15    as in IEEE 754, the upper byte of a float16; numbers up to 57344

    E > 0    (-1)^S * 2^(E - bias) * (1 + M / 2^mantissa_bits)    normal
    E = 0    (-1)^S * 2^(1 - bias) * (0 + M / 2^mantissa_bits)    subnormal, or zero

The formats say what codes mean, not what a number outside their range becomes. Here it saturates, OCP's SAT mode:
beyond the largest number, and at +-inf, stands the largest number of that sign, so E5M2's infinities are read but never
written. torch (by version) and ml_dtypes do otherwise, so whoever compares clamps first.

This is for devices whose torch has no float8; no float8 dtype is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Float8Format:
    """What the 128 codes without a sign bit mean; codes with it (+ 128) are their negatives."""

    exponent_bits: int
    mantissa_bits: int
    largest_code: int  # of a number
    infinity_code: int | None
    nan_codes: range  # the last of them is the one that is written

    def __post_init__(self) -> None:
        if self.exponent_bits + self.mantissa_bits != 7:
            raise ValueError(f"{self.exponent_bits} + {self.mantissa_bits} bits, expected 7 beside the sign")

    @property
    def bias(self) -> int:
        """What is added to the exponent before it is stored."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        """The largest number."""
        exponent, mantissa = divmod(self.largest_code, 2**self.mantissa_bits)
        return math.ldexp(1 + mantissa / 2**self.mantissa_bits, exponent - self.bias)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number of full precision."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)


FLOAT8_FORMATS = {
    "e4m3": Float8Format(4, 3, largest_code=0x7E, infinity_code=None, nan_codes=range(0x7F, 0x80)),
    "e5m2": Float8Format(5, 2, largest_code=0x7B, infinity_code=0x7C, nan_codes=range(0x7D, 0x80)),
}


class _Wide(NamedTuple):
    """A format of IEEE 754 that is encoded from."""

    integer: torch.dtype  # of its bits
    mantissa_bits: int
    bias: int


_WIDE = {torch.float32: _Wide(torch.int32, 23, 127), torch.float64: _Wide(torch.int64, 52, 1023)}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def decode(codes: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes stand for; exact in every dtype allowed.

    Args:
        codes: uint8, any shape.
        format: "e4m3" or "e5m2".
        dtype: of the result, float64, float32, bfloat16 or float16.

    Raises:
        ValueError: another format, codes that are not uint8, or another dtype.
    """
    spec = _format(format)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}, expected torch.uint8")
    _check_float(dtype)
    code = (codes & 0x7F).int()
    exponent, mantissa = code >> spec.mantissa_bits, code & (2**spec.mantissa_bits - 1)
    significand = torch.where(exponent > 0, mantissa + 2**spec.mantissa_bits, mantissa)
    unit = exponent.clamp(min=1) - spec.bias - spec.mantissa_bits  # value = significand * 2^unit
    value = significand * ((unit + 127) << 23).view(torch.float32)  # a power of two is a float32 with mantissa zero
    if spec.infinity_code is not None:
        value = value.masked_fill(code == spec.infinity_code, math.inf)
    value = value.masked_fill(code >= spec.nan_codes.start, math.nan)
    return torch.where(codes > 0x7F, -value, value).to(dtype)


def encode(values: Tensor, format: str) -> Tensor:
    """The code of the number nearest to each value, of two equally near the even one: RNE(clamp(value)).

    Rounded once, float64 too: ml_dtypes and torch take that through float32 and round twice. Zero keeps its sign, +-inf
    becomes the largest number. NaN of any payload becomes 0x7f and keeps its sign, as in torch (ml_dtypes: 0x7e in
    E5M2).

    Args:
        values: float64, float32, bfloat16 or float16, any shape.
        format: "e4m3" or "e5m2".

    Returns:
        uint8, the shape of `values`.

    Raises:
        ValueError: another format, or values of another dtype.
    """
    spec = _format(format)
    _check_float(values.dtype)
    values = values if values.dtype == torch.float64 else values.float()  # exact
    wide = _WIDE[values.dtype]
    bits = values.view(wide.integer)
    magnitude = bits & torch.iinfo(wide.integer).max
    infinity = (2 * wide.bias + 1) << wide.mantissa_bits
    code = _nearest(magnitude, wide, spec).clamp(max=spec.largest_code)
    code = code.masked_fill(magnitude > infinity, spec.nan_codes[-1])
    return torch.where(bits < 0, code + 0x80, code).to(torch.uint8)


def _nearest(magnitude: Tensor, wide: _Wide, spec: Float8Format) -> Tensor:
    """Codes of numbers >= 0 given by their bits, as if exponents went on beyond the largest code."""
    exponent = (magnitude >> wide.mantissa_bits) - wide.bias
    # Subnormals of float32 and float64 have no leading one, but with it they still round to zero.
    significand = (magnitude & (2**wide.mantissa_bits - 1)) + 2**wide.mantissa_bits
    shared = exponent.clamp(min=1 - spec.bias)  # subnormals have the exponent of the smallest normals
    dropped = wide.mantissa_bits - spec.mantissa_bits + shared - exponent
    rounded = _drop_bits(significand, dropped.clamp(max=wide.mantissa_bits + 2))  # so many leave nothing
    # The leading one of a normal adds one to the exponent, and so does a carry out of rounding.
    return ((shared + spec.bias - 1) << spec.mantissa_bits) + rounded


def _drop_bits(number: Tensor, count: Tensor) -> Tensor:
    """number / 2^count, to the nearest integer, halves to the even one; count >= 1."""
    half = torch.ones_like(number) << (count - 1)
    odd = (number >> count) & 1
    return (number + (half - 1) + odd) >> count


def _format(name: str) -> Float8Format:
    if name not in FLOAT8_FORMATS:
        raise ValueError(f"float8 format {name!r}, expected one of {', '.join(map(repr, FLOAT8_FORMATS))}")
    return FLOAT8_FORMATS[name]


def _check_float(dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise ValueError(f"{dtype} is not supported, expected one of {', '.join(map(str, _FLOATS))}")
