"""The matrix products of the fast path: a Linear of each stream, on activations that are rounded already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from math import ceil
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.lora import LoraLinear
from mmdit.runtime.graphs import beside
from mmdit.runtime.rows import Activation, Added, Down, Part, Result, Rounding, Rows
from quant.matmul import arithmetic_of, backend_of, multiplies_by_half, multiply_into
from quant.quantize import linears_of
from quant.recipe import Recipe
from quant.scaling import has_float8
from quant.tensor import Float8Tensor

Kind = Literal["none", "token", "static"]
MOST_RANK = 64  # of the LoRAs that `Pair` takes; the ranks of several adapters add up
_TILE = 128  # rows and columns of a tile, as `saves_waves` assumes of cuBLAS's kernels


class Product:
    """A Linear that reads 16 bits, or codes (see `Rounding`) where its weight is in float8.

    A LoRA beside it that `factors` has is left to `Pair`, which adds those of both streams at once; any other one is
    added here.

    Args:
        linear: its weight is read where it lies, so that the product is that of the Linear.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.factors = _factors_beside(linear)
        self.own_lora = isinstance(linear, LoraLinear) and self.factors is None
        self._factors: Float8Factors | None = None
        weight = linear.weight
        self.kind: Kind = "none"
        self.codes = torch.float8_e4m3fn  # the dtype of what it reads where that is rounded
        self.runs = str(weight.dtype).removeprefix("torch.")
        if isinstance(weight, Float8Tensor):
            recipe = weight.recipe
            runs, _ = backend_of(recipe, weight.device, weight.dtype, (linear.out_features, linear.in_features))
            arithmetic = arithmetic_of(runs, weight.device, weight.dtype)
            self.runs = runs if runs == "native" else f"{runs} ({arithmetic})"
            if multiplies_by_half(runs, weight.device, weight.dtype):
                self.codes = torch.float16
            reads_codes = runs in ("native", "emulated") and has_float8(weight.device)
            if reads_codes and self.own_lora and isinstance(linear, LoraLinear):
                self._factors = Float8Factors.of(linear)
                # What cannot read codes beside a Linear reads 16 bits, so that the Linear does too.
                reads_codes = self._factors is not None and self._factors.runs == runs
            if reads_codes and recipe.activation in ("token", "static") and recipe.activation_format == "e4m3":
                self.kind = "token" if recipe.activation == "token" else "static"
            self._as_rows = self.kind == "static" and runs == "native" and weight.dtype == torch.bfloat16
            self._scales: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def static(self) -> Tensor | None:
        """The scale of its activations, where that is static."""
        weight = self.linear.weight
        return weight.input_scale if isinstance(weight, Float8Tensor) else None

    def __call__(self, x: Part, out: Tensor) -> None:
        """Write the product into `out`, [rows, out_features]."""
        if x.scale is not None:
            self._by_codes(x.data, x.scale, out)
            return
        linear, weight, bias = self.linear, self.linear.weight, self.linear.bias
        if not isinstance(weight, Float8Tensor) and bias is not None:
            factors = linear.factors if isinstance(linear, LoraLinear) and linear.delta is None else None
            if factors is not None and self.own_lora:
                # The small product comes first: the large one adds itself to it, which hides most of the reading.
                down, up = factors
                torch.addmm(bias, F.linear(x.data, down), up.t(), out=out).addmm_(x.data, weight.t())
                return
            torch.addmm(bias, x.data, weight.t(), out=out)
        elif isinstance(weight, Float8Tensor) and weight.recipe.activation == "none":
            multiply_into(x.data, None, weight.qdata, weight.scale, bias, weight.recipe, out=out)
        else:
            out.copy_(F.linear(x.data, weight, bias))
        if self.own_lora and isinstance(linear, LoraLinear):
            linear.add_to(out, x.data)

    def _by_codes(self, codes: Tensor, x_scale: Tensor, out: Tensor) -> None:
        """The product of activations that are rounded already; a LoRA reads the same codes."""
        weight, bias = self.linear.weight, self.linear.bias
        assert isinstance(weight, Float8Tensor), "codes are for float8 weights"
        scale, recipe = weight.scale, weight.recipe
        rows_scale = x_scale
        if self._as_rows:
            rows_scale, scale = self._repeated(x_scale, scale, len(out))
            recipe = replace(recipe, granularity="row")
        multiply_into(codes, rows_scale, weight.qdata, scale, bias, recipe, out=out)
        if self._factors is not None:
            self._factors.add_to(out, codes, x_scale)

    def _repeated(self, x_scale: Tensor, scale: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Both scales once per row: cuBLAS multiplies an eighth faster under them than under single ones (on H200)."""
        if rows not in self._scales:
            outs = self.linear.out_features
            self._scales[rows] = x_scale.expand(rows, 1).contiguous(), scale.expand(outs, 1).contiguous()
        return self._scales[rows]


class Float8Factors(NamedTuple):
    """The factors of a LoRA beside a float8 Linear, for activations that are in float8 already.

    The down projection is the sum of two E4M3 matrices with a scale per row, of which the second holds the rounding
    errors of the first, so that it is about as exact as in bfloat16. The up projection stays as it is and adds up the
    products of both.
    """

    down: Float8Tensor  # [2 r and zeros to a multiple of 16, in]
    up: Tensor  # [out, rows of down]
    runs: str  # backend of the down projection

    @classmethod
    def of(cls, linear: LoraLinear) -> Float8Factors | None:
        """The factors of what stands beside a Linear; None where a full matrix does."""
        if linear.factors is None or linear.delta is not None:
            return None
        down, up = linear.factors[0].float(), linear.factors[1]
        first = Float8Tensor.quantize(down).dequantize()
        missing = -2 * len(down) % 16
        rows = F.pad(torch.cat([first, down - first]), (0, 0, 0, missing))
        recipe = Recipe(activation="token")
        runs, _ = backend_of(recipe, down.device, up.dtype, (len(rows), rows.shape[1]))
        return cls(Float8Tensor.quantize(rows, recipe=recipe), F.pad(torch.cat([up, up], dim=1), (0, missing)), runs)

    def add_to(self, out: Tensor, codes: Tensor, x_scale: Tensor) -> None:
        """Add the LoRA's product to the Linear's.

        Args:
            out: [rows, out_features].
            codes, x_scale: the activation, [rows, in_features], and its scale, [rows, 1] or ().
        """
        down = self.down
        low = torch.empty((len(codes), len(down)), dtype=out.dtype, device=out.device)
        multiply_into(codes, x_scale, down.qdata, down.scale, None, down.recipe, out=low)
        out.addmm_(low, self.up.t())


class Pair:
    """The Linears of text and image at one place of a block; the text's is None where that stream has ended.

    Args:
        text, image: the Linear of each stream.
        kind: what both read; None is what they ask for, or 16 bits where they differ.
        leaves: whether what LoRAs add is left to the kernel that reads the products.
    """

    def __init__(self, text: Product | None, image: Product, kind: Kind | None = None, *, leaves: bool = False) -> None:
        self.text, self.image, self.leaves = text, image, leaves
        kind = kind or common_kind(self.products)
        self.rounding = Rounding()
        if kind != "none":
            self.rounding = Rounding(kind, None if text is None else text.static, image.static, image.codes)
        self.factors = _stacked([one.factors for one in self.products], codes=kind != "none")

    @property
    def products(self) -> list[Product]:
        """The Linears that exist."""
        return [one for one in (self.text, self.image) if one is not None]

    @property
    def down(self) -> Down | None:
        """The down projections of the LoRAs beside the Linears; None where there are none."""
        return None if self.factors is None else self.factors[0]

    def __call__(self, x: Activation, rows: Rows, kernels: ModuleType) -> Result:
        """The products of both streams as rows of one matrix, and what is left to be added to them."""
        like, added = self.image.linear, None
        dtype = like.weight.dtype
        if self.factors is not None:  # before the products, while the activations are in the cache
            down, up = self.factors
            added = Added(kernels.low(x, down, dtype) if x.low is None else x.low, up)
        out = torch.empty((rows.total, like.out_features), dtype=dtype, device=like.weight.device)
        joins = []
        if x.text is not None:
            assert self.text is not None, "the text stream has ended here"
            run = partial(self.text, x.text, out[: rows.split])
            if saves_waves(rows.split, rows.total - rows.split, like.out_features, multiprocessors(out.device)):
                joins.append(beside(run))
            else:
                run()
        if x.image is not None:
            self.image(x.image, out[rows.split :])
        for join in joins:
            join()
        if added is not None and not self.leaves:
            kernels.add_up(out, added, rows)
            added = None
        return Result(out, added)


def saves_waves(text: int, image: int, columns: int, units: int) -> bool:
    """Whether two products at once take fewer waves than one after the other.

    A product is cut into tiles. A wave is one tile on each multiprocessor; the last wave of a product may leave some of
    them idle, on which tiles of the other product can run. Where no wave was saved, products at once made steps slower
    (measured on H200).

    Args:
        text, image: rows of each product.
        columns: of both products.
        units: multiprocessors of the GPU.
    """
    first, second = (ceil(rows / _TILE) * ceil(columns / _TILE) for rows in (text, image))
    return ceil((first + second) / units) < ceil(first / units) + ceil(second / units)


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 for other devices, which run one product at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _factors_beside(linear: nn.Linear) -> tuple[Tensor, Tensor] | None:
    """The factors beside a Linear that `Pair` takes; None if there are none, or a full matrix is there too."""
    if not isinstance(linear, LoraLinear) or linear.delta is not None or linear.factors is None:
        return None
    down, up = linear.factors
    same = down.dtype == up.dtype == linear.weight.dtype
    return (down, up) if same and len(down) <= MOST_RANK else None


def stacked_bytes(model: nn.Module) -> int:
    """Bytes of the copies that the pairs of a model make of the factors beside its Linears."""
    pairs: dict[str, list[nn.Linear]] = {}
    for name, linear in linears_of(model):
        if name.startswith("joint_blocks.") and "adaLN" not in name:
            pairs.setdefault(name.replace(".context_block.", ".x_block."), []).append(linear)
    found = 0
    for both in pairs.values():
        ranks = [len(factors[0]) for factors in map(_factors_beside, both) if factors is not None]
        if ranks:
            weight, count = both[0].weight, len(both) * _padded(max(ranks))
            found += count * (both[0].in_features + both[0].out_features) * weight.itemsize
            if isinstance(weight, Float8Tensor):  # `Down` has halves and factors too
                found += count * (2 * both[0].in_features + 4)
    return found


def _padded(rank: int) -> int:
    return next(size for size in (16, 32, MOST_RANK) if size >= rank)


def _stacked(factors: list[tuple[Tensor, Tensor] | None], *, codes: bool) -> tuple[Down, Tensor] | None:
    """The factors of each stream, with zeros up to a rank of 16, 32 or 64; None where no stream has any."""
    found = [one for one in factors if one is not None]
    if not found:
        return None
    down, up = found[0]
    rank = _padded(max(len(down) for down, _ in found))
    downs, ups = down.new_zeros(len(factors), rank, down.shape[1]), up.new_zeros(len(factors), len(up), rank)
    for index, one in enumerate(factors):
        if one is not None:
            down, up = one
            downs[index, : len(down)] = down
            ups[index, :, : len(down)] = up
    return Down.of(downs, codes), ups


def common_kind(products: Iterable[Product]) -> Kind:
    """What all of them read: 16 bits where they do not agree, which each then rounds by itself."""
    kinds = {(one.kind, one.codes) for one in products}
    return kinds.pop()[0] if len(kinds) == 1 else "none"
