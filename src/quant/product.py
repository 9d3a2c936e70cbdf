"""What a product with a float8 weight multiplies, and how a kernel cuts it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from quant.formats import Format


class Product(NamedTuple):
    """x @ weight.T * scale * x_scale + bias.

    Args:
        x: [m, in] with contiguous rows: float16 values of codes, or 16-bit activations that are not rounded.
        x_scale: float32, () or [m, 1]; None where x is not rounded (weight-only).
        codes: of the weight, [out, in], float8 or uint8.
        scale: of the weight, float32, () or [out, 1].
        bias: [out] or None.
        format: of the weight.
    """

    x: Tensor
    x_scale: Tensor | None
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    format: Format

    @property
    def dequantizes(self) -> bool:
        """Whether the weight is multiplied by its scale, and rounded, before the product: weight-only."""
        return self.x_scale is None

    @property
    def size(self) -> tuple[int, int, int]:
        """Rows, channels and summands."""
        return len(self.x), len(self.codes), self.x.shape[1]


class Tile(NamedTuple):
    """How a product is cut: rows of x, channels and summands of a program, and how it runs."""

    rows: int
    outs: int
    summands: int
    stages: int
    warps: int
