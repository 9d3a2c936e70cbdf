"""The float8 matmul behind `F.linear`, and which backend runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.formats import DTYPES, Format
from quant.recipe import Recipe
from quant.scaling import from_codes, scale_of, to_codes, values_of

_HAS_TRITON = find_spec("triton") is not None
LONG = 4096  # values in a row; longer rows are quantized by one operation that a compiler does not split
# Values of a result; cuBLAS has no fast accumulation for smaller results of long sums under scales per row.
_SMALL = 2**17
PIECE = 2**22  # values of a weight that are dequantized at a time where there is no native matmul: 16 MB of float32
Runs = Literal["native", "emulated", "dequantized", "refused"]


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
) -> Tensor:
    """x @ (qdata * scale).T + bias, [..., out], computed as the recipe says; gradients reach x and bias.

    Args:
        x: The input, [..., in]; under `torch.autocast` it is cast as for a plain weight.
        qdata: Codes of the weight, [out, in].
        scale: Scale of the weight, float32, () or [out, 1].
        input_scale: Scale of static activations, float32 ().
        bias: The bias, [out].
        recipe: How x is quantized, and which backend multiplies.
        dtype: The logical dtype of the weight; x and bias must have it.

    Raises:
        ValueError: Shapes or dtypes do not fit, the scales are not per output channel, a static recipe has no input
            scale, or the recipe asks for `native` and it cannot run here.
    """
    x, bias, dtype = _autocast(x, bias, dtype)
    _check_operands(x, qdata, bias, dtype)
    if scale.ndim and scale.shape != (len(qdata), 1):
        raise ValueError(
            f"scales of shape {list(scale.shape)} for a weight [out, in] of {list(qdata.shape)}: a product needs one "
            "scale, or one per output channel, and these run along its sum; use dequantize()"
        )
    if recipe.activation == "static" and input_scale is None:
        raise ValueError("a recipe with static activations needs input scales: run mmdit.calibrate, or load them")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, qdata, scale, input_scale, bias, recipe)  # type: ignore[no-untyped-call]
    return _forward(x, qdata, scale, input_scale, bias, recipe)


def backend_of(recipe: Recipe, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[Runs, str]:
    """The backend that multiplies by a weight, and the reason: a pure function of its arguments.

    "dequantized" is weight-only: torch's own matmul with the dequantized weight. "refused" is an explicit `native` on a
    device that cannot run it.

    Args:
        recipe: The recipe of the weight.
        device: The device of the matmul.
        dtype: The dtype of the input, which is the logical dtype of the weight.
        shape: The shape of the weight, [out, in].
    """
    if recipe.activation == "none":
        return "dequantized", "weight-only"
    if recipe.backend == "emulated":
        return "emulated", "asked for"
    if why_not := why_not_native(recipe, device, dtype, shape):
        return ("refused" if recipe.backend == "native" else "emulated"), why_not
    return "native", "float8 matmul of the device"


def why_not_native(recipe: Recipe, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str:
    """Why `torch._scaled_mm` cannot multiply by a weight of shape [out, in]; empty where it can.

    Source: the checks in torch 2.11 to 2.13, aten/src/ATen/native/cuda/{ScaledBlas.cpp, RowwiseScaledMM.cu}.
    """
    if device.type != "cuda":
        return f"no float8 matmul on {device.type}"
    if (capability := _capability(device)) < (8, 9):
        return f"compute capability {capability} is below 8.9"
    if 0 in shape or shape[0] % 16 or shape[1] % 16:
        return f"{list(shape)} is not in multiples of 16"
    if recipe.format == "e5m2" and (recipe.granularity == "row" or recipe.activation_format == "e5m2"):
        return f"no float8 matmul of E5M2 weights, scale per {recipe.granularity}, and {recipe.activation_format} input"
    if dtype != torch.bfloat16 and (recipe.granularity == "row" or dtype == torch.float64):
        return f"scales per {recipe.granularity} do not give {dtype}"
    return ""


def _capability(device: torch.device) -> tuple[int, int]:
    gpu = torch.cuda.get_device_properties(device)  # torch.compile takes it for a constant
    return gpu.major, gpu.minor


def quantize_activation(
    x: Tensor, recipe: Recipe, input_scale: Tensor | None, *, as_bytes: bool
) -> tuple[Tensor, Tensor]:
    """Codes [m, in] of activations [m, in] and their scale: () for all of them, or [m, 1] per token."""
    if not as_bytes and x.numel() and _has_kernels(x):
        if type(x) in (Tensor, nn.Parameter):
            return _by_kernels(x.contiguous(), recipe, input_scale)
        # Under the compiler, whose tensors have other types, rounding is fused with the operations that made x; but
        # for long rows it would compute these twice, once for the scale and once for the codes.
        if recipe.activation == "token" and x.shape[1] > LONG:
            return rows_as_one(x, recipe.activation_format)
    if recipe.activation == "static":
        assert input_scale is not None
        scale = input_scale
    elif not x.numel():
        scale = torch.ones((len(x), 1) if recipe.activation == "token" else (), device=x.device)
    else:
        amax = x.abs().amax(dim=-1, keepdim=True) if recipe.activation == "token" else x.abs().amax()
        scale = scale_of(amax, recipe.activation_format)
    return to_codes(x, scale, recipe.activation_format, as_bytes=as_bytes), scale


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and _HAS_TRITON


@torch.library.custom_op(
    "mmdit_quant::quantize_rows", mutates_args=(), schema="(Tensor x, str format) -> (Tensor, Tensor)"
)
def rows_as_one(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """`kernels.quantize_rows` as an operation that a compiler does not split."""
    from quant import kernels

    return kernels.quantize_rows(x.contiguous(), format)


@rows_as_one.register_fake
def _rows_shapes(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=DTYPES[format]), x.new_empty((len(x), 1), dtype=torch.float32)


def _by_kernels(x: Tensor, recipe: Recipe, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the codes and scales of `quantize_activation` with our kernels, in one or two passes over x."""
    from quant import kernels

    if recipe.activation == "token":
        return kernels.quantize_rows(x, recipe.activation_format)
    if recipe.activation == "static":
        assert input_scale is not None
        return kernels.quantize_with(x, input_scale, recipe.activation_format), input_scale
    low, high = x.aminmax()
    scale = scale_of(torch.maximum(-low, high), recipe.activation_format)
    return kernels.quantize_with(x, scale, recipe.activation_format), scale


def _autocast(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """The operands as `torch.autocast` casts those of a plain `F.linear`; it leaves float64 alone."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # is_autocast_enabled raises for meta
        return x, bias, dtype
    if torch.float64 in (x.dtype, dtype):
        return x, bias, dtype
    lower = torch.get_autocast_dtype(device)
    return x.to(lower), None if bias is None else bias.to(lower), lower


def _no_autocast(device: str) -> AbstractContextManager[object]:
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _check_operands(x: Tensor, qdata: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise ValueError(f"the input is {x.dtype}, but the float8 weight's logical dtype is {dtype}; cast one of them")
    if not x.ndim or x.shape[-1] != qdata.shape[1]:
        raise ValueError(f"an input of shape {list(x.shape)} times a float8 weight [out, in] of {list(qdata.shape)}")
    if bias is not None and (bias.dtype != dtype or bias.shape != qdata.shape[:1]):
        raise ValueError(f"the bias is {list(bias.shape)}, {bias.dtype}; expected {[len(qdata)]}, {dtype}")


def _forward(
    x: Tensor, qdata: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, recipe: Recipe
) -> Tensor:
    runs = _backend(recipe, x.device, x.dtype, qdata)
    if runs == "dequantized" and _at_once(qdata):
        return F.linear(x, values_of(qdata, scale, recipe.format, x.dtype), bias)
    if runs == "dequantized":
        pieces = _pieces(qdata, scale, recipe.format, x.dtype)
        products = [F.linear(x, weight, None if bias is None else bias[rows]) for rows, weight in pieces]
        return torch.cat(products, -1)
    multiply = _native if runs == "native" and x.numel() else _emulated
    as_bytes = qdata.dtype == torch.uint8 and multiply is _emulated
    rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    codes, x_scale = quantize_activation(rows, recipe, input_scale, as_bytes=as_bytes)
    return multiply(codes, x_scale, qdata, scale, bias, recipe, x.dtype).reshape(*x.shape[:-1], len(qdata))


def _backend(recipe: Recipe, device: torch.device, dtype: torch.dtype, qdata: Tensor) -> str:
    """The backend that multiplies by a weight; ValueError where `native` was asked for and cannot run here."""
    runs, why = backend_of(recipe, device, dtype, (len(qdata), qdata.shape[1]))
    if runs == "refused":
        raise ValueError(f"backend='native' cannot run this matmul: {why}; use 'auto' or 'emulated'")
    return runs


def multiply_codes(
    codes: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    *,
    out: Tensor,
) -> None:
    """The product of `linear` of an activation that is in float8 already, written into `out`.

    Args:
        codes: float8 of the recipe's activation format, [m, in].
        x_scale: float32, [m, 1] where the recipe scales per token, else ().
        qdata, scale, bias, recipe: see `linear`.
        out: [m, out], of the dtype that the weight stands for.

    Raises:
        ValueError: `native` was asked for and cannot run here.
    """
    if _backend(recipe, codes.device, out.dtype, qdata) == "native" and len(codes):
        _native(codes, x_scale, qdata, scale, bias, recipe, out.dtype, out=out)
    else:
        out.copy_(_emulated(codes, x_scale, qdata, scale, bias, recipe, out.dtype))


def _native(
    codes: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The device's own matmul: operands have contiguous rows, and scales are per row for both or for neither."""
    if recipe.granularity == "row":
        x_scale, scale = x_scale.expand(len(codes), 1).contiguous(), scale.t().contiguous()
    weight = qdata.view(DTYPES[recipe.format]).contiguous().t()
    rest = bias if dtype == torch.float32 else None  # _scaled_mm takes no bias for float32 results
    fused = None if dtype == torch.float32 else bias
    fast = recipe.fast_accum and len(codes) * len(qdata) >= _SMALL
    settings: dict[str, Any] = {"out_dtype": dtype, "use_fast_accum": fast} | ({} if out is None else {"out": out})
    y = torch._scaled_mm(codes.contiguous(), weight, x_scale, scale, fused, **settings)
    return y if rest is None else torch.add(y, rest, out=out)


def _emulated(
    codes: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
) -> Tensor:
    """The products of codes are exact in float32 (and in TF32); their sum and the scaled result are rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    with _no_autocast(codes.device.type):  # in float16 the sums would overflow
        factor = from_codes(codes, recipe.activation_format, wide)
        if _at_once(qdata):
            sums = factor @ from_codes(qdata, recipe.format, wide).t()
        else:
            sums = torch.cat([factor @ weight.t() for _, weight in _pieces(qdata, None, recipe.format, wide)], -1)
    # The weight's scale comes first: it is seldom extreme, so inputs near float32's limits do not over- or underflow.
    y = sums * scale.to(wide).reshape(-1 if scale.ndim else ()) * x_scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(dtype)


def _at_once(qdata: Tensor) -> bool:
    """Whether a weight is dequantized as a whole: it is small, or on a GPU, which pays for each launch."""
    return qdata.is_cuda or qdata.numel() <= PIECE


def _pieces(
    qdata: Tensor, scale: Tensor | None, format: Format, dtype: torch.dtype, along: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """A weight's rows (along 0) or columns (along 1), dequantized some at a time; without a scale, decoded only.

    All pieces, of about PIECE values, are in the same memory, and each is overwritten by the next: pieces with memory
    of their own would leave holes in the heap that together are as large as the weight.
    """
    length = qdata.shape[along]
    step = max(1, PIECE * length // qdata.numel())
    wide = torch.promote_types(dtype, torch.float32)
    memory = torch.empty_like(qdata.narrow(along, 0, step), dtype=wide)
    rounded = memory if dtype == wide else torch.empty_like(memory, dtype=dtype)
    for start in range(0, length, step):
        size = min(step, length - start)
        codes, into = qdata.narrow(along, start, size), memory.narrow(along, 0, size)
        into.copy_(from_codes(codes, format, wide) if codes.dtype == torch.uint8 else codes)
        if scale is not None:
            into.mul_(scale.narrow(0, start, size) if scale.ndim and not along else scale)
        piece = rounded.narrow(along, 0, size)
        yield slice(start, start + size), piece if rounded is memory else piece.copy_(into)


class _Linear(torch.autograd.Function):
    """Forward in float8, backward with the dequantized weight: gradients are not quantized."""

    @staticmethod
    def forward(
        x: Tensor, qdata: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, recipe: Recipe
    ) -> Tensor:
        return _forward(x, qdata, scale, input_scale, bias, recipe)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, qdata, scale, _, _, recipe = inputs
        ctx.save_for_backward(qdata, scale)
        ctx.format = recipe.format

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        qdata, scale = ctx.saved_tensors
        of_x, *_, of_bias, _ = ctx.needs_input_grad
        grad_x = None
        if of_x and _at_once(qdata):
            grad_x = grad @ values_of(qdata, scale, ctx.format, grad.dtype)
        elif of_x:
            columns = _pieces(qdata, scale, ctx.format, grad.dtype, along=1)
            grad_x = torch.cat([grad @ weight for _, weight in columns], -1)
        grad_bias = grad.reshape(-1, len(qdata)).sum(0) if of_bias else None
        return grad_x, None, None, None, grad_bias, None
