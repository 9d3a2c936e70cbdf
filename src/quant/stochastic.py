"""Stochastic rounding to float8, bit for bit as ComfyUI does it when it patches float8 weights.

A value between two codes becomes the upper one with a probability of its distance from the lower one, so that the mean
error is zero where nearest rounding would lose a change that is smaller than half a step. The random numbers come from
a seed, so that the same patch gives the same codes.
Source: ComfyUI 0.3.64 `comfy/float.py`, whose arithmetic is in float16.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quant.formats import FLOAT8_FORMATS, LARGEST, Format

_AT_ONCE: Final = 4096 * 4096  # elements that are rounded at a time; the random numbers are drawn in this order


def stochastic_codes(values: Tensor, format: Format, seed: int) -> Tensor:
    """The codes of values, float8 of the format; values beyond its range become its largest number.

    Args:
        values: Numbers of at least one dimension, floating point.
        format: The format of the codes.
        seed: The seed of the generator, which runs on the device of the values.
    """
    generator = torch.Generator(device=values.device).manual_seed(seed)
    codes = torch.empty_like(values, dtype=FLOAT8_FORMATS[format].dtype)
    rows = max(1, round(len(values) / max(1.0, values.numel() / _AT_ONCE)))
    for first in range(0, len(values), rows):
        part = slice(first, first + rows)
        codes[part].copy_(_rounded(values[part].half(), format, generator))
    return codes


def _rounded(x: Tensor, format: Format, generator: torch.Generator) -> Tensor:
    """Values of the format, in float16."""
    spec = FLOAT8_FORMATS[format]
    bits, bias = spec.mantissa_bits, spec.bias
    size = x.abs()
    exponent = (size.log2().floor() + bias).clamp(0, 2**spec.exponent_bits - 1)
    is_normal = exponent != 0
    unit = 2.0 ** (exponent - bias)
    mantissa = torch.where(is_normal, (size / unit - 1.0) * 2**bits, size / 2.0 ** (1 - bias - bits))
    noise = torch.rand(mantissa.shape, dtype=mantissa.dtype, device=mantissa.device, generator=generator)
    fraction = (mantissa + noise).floor() / 2**bits
    found = torch.where(is_normal, unit * (1.0 + fraction), 2.0 ** (1 - bias) * fraction)
    return (x.sign() * found).clamp(-LARGEST[format], LARGEST[format])
