"""Float8 codes to numbers and back by bit arithmetic, for devices whose torch has no float8 dtypes.

`quant.formats` says what each code means, but not what a number outside a format's range becomes. Here it saturates,
OCP's SAT mode: numbers beyond the largest one, and +-inf, become the largest number of their sign, so E5M2's infinities
are read but never written. torch (by version) and ml_dtypes do otherwise, so clamp before comparing with them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quant.formats import FLOAT8_FORMATS, Float8Format


class _Wide(NamedTuple):
    """The layout of an IEEE 754 format whose values are encoded."""

    integer: torch.dtype  # as which the bits are read
    mantissa_bits: int
    bias: int


_WIDE = {torch.float32: _Wide(torch.int32, 23, 127), torch.float64: _Wide(torch.int64, 52, 1023)}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def decode(codes: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes stand for; exact in every dtype allowed.

    Args:
        codes: Codes of any shape, uint8.
        format: "e4m3" or "e5m2".
        dtype: The dtype of the result: float64, float32, bfloat16 or float16.

    Raises:
        ValueError: The format is unknown, the codes are not uint8, or the dtype is none of these.
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
    """The codes of the numbers nearest to the values, ties to even: RNE(clamp(value)).

    Values are rounded once, float64 too: ml_dtypes and torch take float64 through float32 and round twice. Zero keeps
    its sign, and +-inf becomes the largest number. NaN of any payload becomes 0x7f and keeps its sign, as in torch
    (ml_dtypes: 0x7e in E5M2).

    Args:
        values: float64, float32, bfloat16 or float16 of any shape.
        format: "e4m3" or "e5m2".

    Returns:
        Codes, uint8 of the shape of `values`.

    Raises:
        ValueError: The format is unknown, or the values have another dtype.
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
    """The codes of numbers >= 0, given by their bits, as if exponents went on beyond the largest code."""
    exponent = (magnitude >> wide.mantissa_bits) - wide.bias
    # Subnormals of float32 and float64 have no leading one, but with it they still round to zero.
    significand = (magnitude & (2**wide.mantissa_bits - 1)) + 2**wide.mantissa_bits
    shared = exponent.clamp(min=1 - spec.bias)  # subnormals have the exponent of the smallest normals
    dropped = wide.mantissa_bits - spec.mantissa_bits + shared - exponent
    rounded = _drop_bits(significand, dropped.clamp(max=wide.mantissa_bits + 2))  # dropping that many leaves zero
    # The leading one of a normal adds one to the exponent, and so does a carry out of rounding.
    return ((shared + spec.bias - 1) << spec.mantissa_bits) + rounded


def _drop_bits(number: Tensor, count: Tensor) -> Tensor:
    """number / 2^count rounded to the nearest integer, ties to even; count >= 1."""
    half = torch.ones_like(number) << (count - 1)
    odd = (number >> count) & 1
    return (number + (half - 1) + odd) >> count


def _format(name: str) -> Float8Format:
    for known, format in FLOAT8_FORMATS.items():
        if known == name:
            return format
    raise ValueError(f"float8 format {name!r}, expected one of {', '.join(map(repr, FLOAT8_FORMATS))}")


def _check_float(dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise ValueError(f"{dtype} is not supported, expected one of {', '.join(map(str, _FLOATS))}")
