"""The matrix products of the fast path: a Linear of each stream, on activations that are rounded already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.lora import LoraLinear
from mmdit.runtime.rows import Activation, Part, Rounding, Rows
from quant.matmul import backend_of, multiply_codes
from quant.scaling import has_float8
from quant.tensor import Float8Tensor

Kind = Literal["none", "token", "static"]


class Product:
    """A Linear that reads 16 bits, or codes where its weight is in float8.

    Args:
        linear: its weight is read where it lies, so that the product is that of the Linear.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        weight = linear.weight
        self.kind: Kind = "none"
        self.runs = str(weight.dtype).removeprefix("torch.")
        if isinstance(weight, Float8Tensor):
            recipe = weight.recipe
            self.runs, _ = backend_of(recipe, weight.device, weight.dtype, (linear.out_features, linear.in_features))
            reads_codes = self.runs in ("native", "emulated") and has_float8(weight.device)
            # What stands beside a Linear reads 16 bits, so that the Linear does too.
            reads_codes = reads_codes and not isinstance(linear, LoraLinear)
            if reads_codes and recipe.activation in ("token", "static") and recipe.activation_format == "e4m3":
                self.kind = "token" if recipe.activation == "token" else "static"
            self._as_rows = self.kind == "static" and self.runs == "native" and weight.dtype == torch.bfloat16
            self._scales: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def static(self) -> Tensor | None:
        """The scale of its activations, where that is static."""
        weight = self.linear.weight
        return weight.input_scale if isinstance(weight, Float8Tensor) else None

    def __call__(self, x: Part, out: Tensor) -> None:
        """Write the product into `out`, [rows, out_features]."""
        weight, bias = self.linear.weight, self.linear.bias
        if x.scale is not None:
            assert isinstance(weight, Float8Tensor), "codes are for float8 weights"
            x_scale, scale, recipe = x.scale, weight.scale, weight.recipe
            if self._as_rows:
                x_scale, scale = self._repeated(x_scale, scale, len(out))
                recipe = replace(recipe, granularity="row")
            multiply_codes(x.data, x_scale, weight.qdata, scale, bias, recipe, out=out)
        elif isinstance(weight, Float8Tensor) or bias is None:
            out.copy_(F.linear(x.data, weight, bias))
        else:
            torch.addmm(bias, x.data, weight.t(), out=out)
        if isinstance(self.linear, LoraLinear):
            out += self.linear.added(x.data)

    def _repeated(self, x_scale: Tensor, scale: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Both scales once per row: cuBLAS multiplies an eighth faster under them than under single ones (on H200)."""
        if rows not in self._scales:
            outs = self.linear.out_features
            self._scales[rows] = x_scale.expand(rows, 1).contiguous(), scale.expand(outs, 1).contiguous()
        return self._scales[rows]


class Pair:
    """The Linears of text and image at one place of a block; the text's is None where that stream has ended.

    Args:
        text, image: the Linear of each stream.
        kind: what both read; None is what they ask for, or 16 bits where they differ.
    """

    def __init__(self, text: Product | None, image: Product, kind: Kind | None = None) -> None:
        self.text, self.image = text, image
        kind = kind or common_kind(self.products)
        self.rounding = Rounding()
        if kind != "none":
            self.rounding = Rounding(kind, None if text is None else text.static, image.static)

    @property
    def products(self) -> list[Product]:
        """The Linears that exist."""
        return [one for one in (self.text, self.image) if one is not None]

    def __call__(self, x: Activation, rows: Rows) -> Tensor:
        """The products of both streams as rows of one matrix."""
        like = self.image.linear
        out = torch.empty((rows.total, like.out_features), dtype=like.weight.dtype, device=like.weight.device)
        if x.text is not None:
            assert self.text is not None, "the text stream has ended here"
            self.text(x.text, out[: rows.split])
        if x.image is not None:
            self.image(x.image, out[rows.split :])
        return out


def common_kind(products: Iterable[Product]) -> Kind:
    """What all of them read: 16 bits where they do not agree, which each then rounds by itself."""
    kinds = {one.kind for one in products}
    return kinds.pop() if len(kinds) == 1 else "none"
