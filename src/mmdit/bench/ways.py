"""Ways to multiply by float8 weights on 16-bit matrix units, at every Linear shape of a step: `mmdit bench ways`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit.bench.layers import Shape, timed
from mmdit.utils import markdown_table
from quant import emulation
from quant.matmul import round_activation
from quant.product import Product
from quant.recipe import RECIPES
from quant.scaling import from_codes
from quant.tensor import Float8Tensor

_CHECKED = 512  # rows whose error is computed in float64


@dataclass(frozen=True)
class WayTime:
    """One way at one shape."""

    shape: Shape
    kind: str  # "emulated" or "weight-only"
    way: str  # "16 bits" is the plain product that it is measured against
    milliseconds: float  # without the rounding of the activations; 0 where it failed
    error: float  # relative to the float64 formula, in a float32 result where the way gives one
    rule: bool  # whether the plain path takes this way
    failed: str = ""


def ways(
    shapes: Sequence[Shape],
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = float("inf"),
) -> Iterator[WayTime]:
    """Measure every way on normal numbers; no further shape is started after so many seconds.

    Args:
        shapes: what `mmdit.bench.layers.shapes_of` gives.
        device: the device; other devices than GPUs run Triton's kernels under TRITON_INTERPRET=1 only.
        dtype: of activations and results.
        seconds: time limit.
    """
    start, generator = time.monotonic(), torch.Generator(device).manual_seed(0)
    for shape in shapes:
        if time.monotonic() - start > seconds:
            return
        x, weight, bias = (
            torch.randn(size, generator=generator, device=device, dtype=dtype)
            for size in ((shape.rows, shape.width), (shape.out, shape.width), (shape.out,))
        )
        x[:, ::100] *= 10
        out = torch.empty(shape.rows, shape.out, device=device, dtype=dtype)
        plain = timed(lambda: torch.addmm(bias, x, weight.t(), out=out), out.device)  # noqa: B023 - runs at once
        yield WayTime(shape, "plain", "16 bits", plain, 0.0, rule=False)
        for kind, recipe in (("emulated", "fp8"), ("weight-only", "fp8-weight-only")):
            float8 = Float8Tensor.quantize(0.02 * weight, recipe=RECIPES[recipe])
            yield from _ways_of(shape, kind, x, float8, bias, out)


def _ways_of(shape: Shape, kind: str, x: Tensor, weight: Float8Tensor, bias: Tensor, out: Tensor) -> Iterator[WayTime]:
    values, x_scale = (x, None) if kind == "weight-only" else round_activation(x, weight.recipe, None)
    product = Product(values, x_scale, weight.qdata, weight.scale, bias, "e4m3")
    exact = _formula(product, weight)
    errors = emulation.errors_of_ways()
    for name, way in emulation.ways_for(product).items():
        chosen = name == emulation.rule(product)
        try:
            wide = out[:_CHECKED].float() if kind == "emulated" else torch.empty_like(out[:_CHECKED])
            emulation.by_parts(way, _first(product, len(wide)), wide)
            error = float((wide.double() - exact).norm() / exact.norm())
            yield WayTime(shape, kind, name, timed(lambda: way(product, out), out.device), error, chosen)  # noqa: B023
        except errors as error:
            yield WayTime(shape, kind, name, 0.0, 0.0, chosen, (str(error).splitlines() or [""])[0][:120])


def _first(product: Product, rows: int) -> Product:
    scale = None if product.x_scale is None else product.x_scale[:rows]
    return product._replace(x=product.x[:rows], x_scale=scale)


def _formula(product: Product, weight: Float8Tensor) -> Tensor:
    """The product of the first rows in float64."""
    some = _first(product, min(_CHECKED, len(product.x)))
    assert some.bias is not None
    if some.x_scale is None:
        return some.x.double() @ weight.dequantize().double().t() + some.bias.double()
    codes = from_codes(some.codes, some.format, torch.float64)
    sums = some.x.double() @ codes.t()
    return sums * some.scale.double().t() * some.x_scale.double() + some.bias.double()


def table(found: Sequence[WayTime]) -> str:
    """A row per shape and way, and the sums over a step of the quickest ways and of the plain path's."""
    rows = [_row(one, found) for one in found]
    return "\n".join([*markdown_table(_TITLES, rows), "", *_sums(found)])


_TITLES = ("layer", "tokens x out x in", "times", "kind", "way", "ms", "to 16 bits", "TFLOP/s", "error", "plain path")


def _row(one: WayTime, found: Sequence[WayTime]) -> tuple[object, ...]:
    shape = one.shape
    size = f"{shape.rows} x {shape.out} x {shape.width}"
    start = (shape.name, size, shape.count, one.kind, one.way)
    if one.failed:
        return (*start, f"failed: {one.failed}", "", "", "", "yes" if one.rule else "")
    plain = next(row.milliseconds for row in found if row.shape == shape and row.kind == "plain")
    rate = 2e-9 * shape.rows * shape.out * shape.width / one.milliseconds
    numbers = (f"{one.milliseconds:.3f}", f"{one.milliseconds / plain:.2f}", f"{rate:.3g}", f"{one.error:.1e}")
    return (*start, *numbers, "yes" if one.rule else "")


def _sums(found: Sequence[WayTime]) -> list[str]:
    """Milliseconds of a step's products."""
    lines = []
    for kind in dict.fromkeys(one.kind for one in found):
        measured = [one for one in found if one.kind == kind and not one.failed]
        shapes = list(dict.fromkeys(one.shape for one in measured))
        best = sum(min(one.milliseconds for one in measured if one.shape == shape) * shape.count for shape in shapes)
        rule = sum(one.milliseconds * one.shape.count for one in measured if one.rule)
        said = f", {rule:.1f} by the plain path's ways" if rule else ""
        lines.append(f"{kind}: {best:.1f} ms a step by the quickest ways{said}")
    return lines
