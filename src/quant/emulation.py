"""Products with float8 weights on a GPU's 16-bit matrix units: which ways there are, and which one is taken.

Activations in float8 come as float16 values of codes, and sums are in float32 (`emulated`); activations that are not
rounded are multiplied by the dequantized weight in their dtype (weight-only). The ways differ in the order of their
sums alone. The plain path always takes the same one, so that equal calls give equal bits; the fast path measures all
of them, once for each shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from quant.formats import Format
from quant.product import Product, Tile
from quant.scaling import values_of
from quant.timing import milliseconds

HAS_TRITON = find_spec("triton") is not None
_MANY = 2048  # rows of x from which "widened" is as quick as "library" (on an H200)
HALF = (torch.float16, torch.bfloat16)
# Products in a sum of the matrix units, whose adders cut off what rounding would keep: on an H200 results were off by
# 1.3e-7 after 2432 products and by 7.4e-7 after 9728, by our kernels and torch's alike. Only float32 results show it.
_SUMMANDS = 3072
_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError)  # of a way that cannot run here


Way = Callable[[Product, Tensor], None]  # writes the result, [m, out] with contiguous rows


class Measured(NamedTuple):
    """What was chosen for a shape, and how long all ways took."""

    name: str
    milliseconds: dict[str, float]
    refused: dict[str, str]  # error message of each way that cannot run here


_CHOICES: dict[tuple[object, ...], Measured] = {}
_LOCK = Lock()


def multiply(product: Product, out: Tensor, *, measured: bool = False) -> None:
    """Write the product into `out`, [m, out] with contiguous rows: float32, bfloat16 or float16.

    Args:
        product: what is multiplied, on a GPU.
        out: gets the result.
        measured: take the quickest way, which the first call with a shape finds out.
    """
    ways = ways_for(product)
    name = _quickest(product, out, ways) if measured else rule(product)
    by_parts(ways[name], product, out)


def rule(product: Product) -> str:
    """The way of the plain path, by the number of rows alone.

    On an H200 "library" was the quickest for the 666 rows of a text, and both were within 6 % of each other for the
    8192 rows of an image; there the float32 sums of "library" take 0.3 GB, and "widened" writes none.
    """
    return "widened" if HAS_TRITON and not product.dequantizes and len(product.x) >= _MANY else "library"


def by_parts(way: Way, product: Product, out: Tensor) -> None:
    """The product by one way; float32 results as sums of parts, so that each sum of the matrix units is short."""
    width = product.x.shape[1]
    if out.dtype != torch.float32 or width <= _SUMMANDS:
        way(product, out)
        return
    size = -(-width // -(-width // _SUMMANDS) // 64) * 64
    way(_part(product, slice(0, size)), out)
    for start in range(size, width, size):
        more = torch.empty_like(out, memory_format=torch.contiguous_format)
        way(_part(product, slice(start, start + size))._replace(bias=None), more)
        out.add_(more)


def _part(product: Product, columns: slice) -> Product:
    return product._replace(x=product.x[:, columns], codes=product.codes[:, columns].contiguous())


def choices() -> dict[tuple[object, ...], Measured]:
    """What was measured so far: by rows (the power of two above them), channels, summands, kind, dtype and device."""
    return dict(_CHOICES)


def ways_for(product: Product) -> dict[str, Way]:
    """The ways to compute a product, by name; see `by_parts`.

    "registers" reads bytes and decodes them in registers, in tiles of so many rows and channels; "widened" writes the
    weight in 16 bits first, for one product, and multiplies by our kernel; "library" does so by torch's.
    """
    library: dict[str, Way] = {"library": _dequantize_and_multiply if product.dequantizes else _multiply_and_finish}
    if not HAS_TRITON:
        return library
    return {**_by_kernels(dequantizes=product.dequantizes, large=_has_large_tiles(product.x.device)), **library}


def _has_large_tiles(device: torch.device) -> bool:
    """Whether a program has 227 KB of shared memory: Hopper and Blackwell of servers, not RTX 50 (12.0) with 99 KB."""
    return device.type == "cuda" and (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


def _by_kernels(*, dequantizes: bool, large: bool) -> dict[str, Way]:
    """Our kernels in tiles that fit the shared memory of a card: 227 KB on Hopper, 163 on A100, 99 on RTX 30 to 50."""
    if large:
        small, wide = Tile(128, 128, 64, 4, 8), Tile(256, 128, 64, 4, 8)
    else:
        small, wide = Tile(128, 128, 32, 4, 4), Tile(256, 128, 32, 3, 8)
    found: dict[str, Way] = {
        f"registers {tile.rows}x{tile.outs}": partial(_in_registers, tile=tile) for tile in (small, wide)
    }
    if not dequantizes:
        tile = Tile(128, 256, 64, 4, 8) if large else Tile(128, 128, 32, 4, 4)
        found["widened"] = partial(_widened_first, tile=tile)
    return found


def _in_registers(product: Product, out: Tensor, tile: Tile) -> None:
    from quant import emulation_kernels as kernels

    kernels.multiply(product, out, tile)


def _widened_first(product: Product, out: Tensor, tile: Tile) -> None:
    from quant import emulation_kernels as kernels

    kernels.multiply(product, out, tile, weight=_widened(product, scaled=False))


def _multiply_and_finish(product: Product, out: Tensor) -> None:
    """torch's 16-bit product with a float32 result, and scales and bias after it."""
    weight = _widened(product, scaled=False)
    with torch.autocast(out.device.type, enabled=False):
        sums = torch.mm(product.x, weight.t(), out_dtype=torch.float32)
    if HAS_TRITON:
        from quant import emulation_kernels as kernels

        kernels.finish(sums, product, out)
        return
    assert product.x_scale is not None
    sums.mul_(product.scale.reshape(-1 if product.scale.ndim else ())).mul_(product.x_scale)
    out.copy_(sums if product.bias is None else sums.add_(product.bias))


def _dequantize_and_multiply(product: Product, out: Tensor) -> None:
    weight = _widened(product, scaled=True)
    with torch.autocast(out.device.type, enabled=False):
        if product.bias is None:
            torch.mm(product.x, weight.t(), out=out)
        else:
            torch.addmm(product.bias, product.x, weight.t(), out=out)


def _widened(product: Product, *, scaled: bool) -> Tensor:
    """The weight in x's dtype, times its scale where `scaled`; lives for one product."""
    return dequantized(product.codes, product.scale if scaled else None, product.format, product.x.dtype)


def dequantized(codes: Tensor, scale: Tensor | None, format: Format, dtype: torch.dtype) -> Tensor:
    """`scaling.values_of` in one pass where there is Triton; without a scale, the values of the codes."""
    if HAS_TRITON and codes.is_contiguous() and codes.numel():
        from quant import emulation_kernels as kernels

        return kernels.widen(codes, scale, format, dtype)
    one = torch.ones((), device=codes.device) if scale is None else scale
    return values_of(codes, one, format, dtype)


def _quickest(product: Product, out: Tensor, ways: dict[str, Way]) -> str:
    key = _key(product, out)
    with _LOCK:
        if key not in _CHOICES:
            if out.is_cuda and torch.cuda.is_current_stream_capturing():
                return rule(product)
            _CHOICES[key] = _measure(product, out, ways)
        return _CHOICES[key].name


def _key(product: Product, out: Tensor) -> tuple[object, ...]:
    rows, outs, width = product.size
    kind = "weight-only" if product.dequantizes else "emulated"
    return 1 << (rows - 1).bit_length(), outs, width, kind, product.format, out.dtype, out.device


def _measure(product: Product, out: Tensor, ways: dict[str, Way]) -> Measured:
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    errors = errors_of_ways()
    for name, way in ways.items():
        try:
            times[name] = milliseconds(partial(by_parts, way, product, out))
        except errors as error:
            refused[name] = (str(error).splitlines() or [type(error).__name__])[0]
    if not times:
        raise RuntimeError(f"no product of {product.size} runs here: {refused}")
    return Measured(min(times, key=times.__getitem__), times, refused)


def errors_of_ways() -> tuple[type[Exception], ...]:
    """The error classes of a way that a card cannot run."""
    if not HAS_TRITON:
        return _ERRORS
    from triton.runtime import errors

    return (*_ERRORS, errors.TritonError)
