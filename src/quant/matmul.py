"""The float8 matmul behind `F.linear`, and which backend runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import emulation
from quant.emulation import HALF, HAS_TRITON
from quant.formats import DTYPES, Format
from quant.product import Product
from quant.recipe import Recipe
from quant.scaling import PIECE, from_codes, scale_of, to_codes, to_values, values_of

LONG = 4096  # values in a row; longer rows are quantized by one operation that a compiler does not split
# Values of a result; cuBLAS has no fast accumulation for smaller results of long sums under scales per row.
SMALL = 2**17
_CAPABILITIES: dict[int, tuple[int, int]] = {}  # of GPUs, by their number
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
    if scale.ndim and scale.shape != (qdata.shape[0], 1):
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


def arithmetic_of(runs: Runs, device: torch.device, dtype: torch.dtype) -> str:
    """The dtype in which a backend multiplies.

    Args:
        runs: The backend, of `backend_of`.
        device: The device of the matmul.
        dtype: The dtype of the input.
    """
    if runs in ("native", "refused"):
        return "float8" if runs == "native" else "-"
    if runs == "emulated":
        dtype = torch.float16 if multiplies_by_half(runs, device, dtype) else torch.promote_types(dtype, torch.float32)
    return str(dtype).removeprefix("torch.")


def multiplies_by_half(runs: Runs, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `quant.emulation` multiplies: in 16 bits, with sums in float32."""
    return device.type == "cuda" and ((runs == "emulated" and dtype != torch.float64) or _is_half(runs, dtype))


def _is_half(runs: Runs, dtype: torch.dtype) -> bool:
    return runs == "dequantized" and dtype in HALF


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
    """The compute capability of a GPU; torch is asked once for each, because asking takes the host microseconds."""
    index = device.index
    if index is None or torch.compiler.is_compiling():  # the compiler takes the answer for a constant
        return _asked_capability(device)
    if index not in _CAPABILITIES:
        _CAPABILITIES[index] = _asked_capability(device)
    return _CAPABILITIES[index]


def _asked_capability(device: torch.device) -> tuple[int, int]:
    gpu = torch.cuda.get_device_properties(device)
    return gpu.major, gpu.minor


def quantize_activation(
    x: Tensor, recipe: Recipe, input_scale: Tensor | None, *, as_bytes: bool
) -> tuple[Tensor, Tensor]:
    """Codes [m, in] of activations [m, in] and their scale: () for all of them, or [m, 1] per token."""
    if not as_bytes and _has_kernels(x) and _capability(x.device) >= (8, 9):  # below it Triton converts to no float8
        if type(x) in (Tensor, nn.Parameter):
            return _by_kernels(x.contiguous(), recipe, input_scale, DTYPES[recipe.activation_format])
        # Under the compiler, whose tensors have other types, rounding is fused with the operations that made x; but
        # for long rows it would compute these twice, once for the scale and once for the codes.
        if recipe.activation == "token" and x.shape[1] > LONG:
            return rows_as_one(x, recipe.activation_format)
    scale = _scale_of(x, recipe, input_scale)
    return to_codes(x, scale, recipe.activation_format, as_bytes=as_bytes), scale


def round_activation(x: Tensor, recipe: Recipe, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`quantize_activation`, with codes as their values in float16."""
    if _has_kernels(x) and type(x) in (Tensor, nn.Parameter):
        return _by_kernels(x.contiguous(), recipe, input_scale, torch.float16)
    scale = _scale_of(x, recipe, input_scale)
    return to_values(x, scale, recipe.activation_format), scale


def _scale_of(x: Tensor, recipe: Recipe, input_scale: Tensor | None) -> Tensor:
    if recipe.activation == "static":
        assert input_scale is not None
        return input_scale
    if not x.numel():
        return torch.ones((len(x), 1) if recipe.activation == "token" else (), device=x.device)
    amax = x.abs().amax(dim=-1, keepdim=True) if recipe.activation == "token" else x.abs().amax()
    return scale_of(amax, recipe.activation_format)


def _has_kernels(x: Tensor) -> bool:
    return bool(x.is_cuda and x.numel() and x.dtype != torch.float64 and HAS_TRITON)


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


def _by_kernels(x: Tensor, recipe: Recipe, input_scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute codes, or their values, and scales with our kernels, in one or two passes over x."""
    from quant import kernels

    if recipe.activation == "token":
        return kernels.quantize_rows(x, recipe.activation_format, dtype)
    if recipe.activation == "static":
        assert input_scale is not None
        return kernels.quantize_with(x, input_scale, recipe.activation_format, dtype), input_scale
    low, high = x.aminmax()
    scale = scale_of(torch.maximum(-low, high), recipe.activation_format)
    return kernels.quantize_with(x, scale, recipe.activation_format, dtype), scale


def _autocast(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """The operands as `torch.autocast` casts those of a plain `F.linear`; it leaves float64 alone."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # is_autocast_enabled raises for meta
        return x, bias, dtype
    if torch.float64 in (x.dtype, dtype):
        return x, bias, dtype
    lower = torch.get_autocast_dtype(device)
    return x.to(lower), None if bias is None else bias.to(lower), lower


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
    half = multiplies_by_half(runs, x.device, x.dtype) and x.numel() and qdata.numel()
    if runs == "dequantized" and not half:
        return _dequantized(x, qdata, scale, bias, recipe)
    is_matrix = x.ndim == 2  # what changes no shape takes the host time all the same
    rows = x if is_matrix else x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    if half:
        y = _by_half(rows, qdata, scale, input_scale, bias, recipe)
    else:
        multiply = _native if runs == "native" and x.numel() else _emulated
        as_bytes = qdata.dtype == torch.uint8 and multiply is _emulated
        codes, x_scale = quantize_activation(rows, recipe, input_scale, as_bytes=as_bytes)
        y = multiply(codes, x_scale, qdata, scale, bias, recipe, x.dtype)
    return y if is_matrix else y.reshape(*x.shape[:-1], qdata.shape[0])


def _dequantized(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """Weight-only: torch's own matmul by the dequantized weight."""
    if _at_once(qdata):
        return F.linear(x, values_of(qdata, scale, recipe.format, x.dtype), bias)
    pieces = _pieces(qdata, scale, recipe.format, x.dtype)
    products = [F.linear(x, weight, None if bias is None else bias[rows]) for rows, weight in pieces]
    return torch.cat(products, -1)


def _by_half(
    rows: Tensor, qdata: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, recipe: Recipe
) -> Tensor:
    """The product of `quant.emulation`, as one operation where a compiler traces."""
    values, x_scale = (rows, None) if recipe.activation == "none" else round_activation(rows, recipe, input_scale)
    run = _multiply_by_half if type(rows) in (Tensor, nn.Parameter) else multiply_as_one
    return run(values, x_scale, qdata, scale, bias, recipe.format, rows.dtype)


def _multiply_by_half(
    x: Tensor,
    x_scale: Tensor | None,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: Format,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((len(x), len(qdata)), dtype=dtype, device=x.device)
    emulation.multiply(_product(x, x_scale, qdata, scale, bias, format), out)
    return out


multiply_as_one = torch.library.custom_op(
    "mmdit_quant::multiply_by_half",
    _multiply_by_half,
    mutates_args=(),
    schema="(Tensor x, Tensor? x_scale, Tensor qdata, Tensor scale, Tensor? bias, str format, ScalarType dtype) "
    "-> Tensor",
)


@multiply_as_one.register_fake
def _multiplied_shape(
    x: Tensor, x_scale: object, qdata: Tensor, scale: object, bias: object, format: object, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((len(x), len(qdata)), dtype=dtype)


def _product(
    x: Tensor, x_scale: Tensor | None, qdata: Tensor, scale: Tensor, bias: Tensor | None, format: Format
) -> Product:
    """The product with rows in one piece, as kernels read them."""
    rows = x if x.stride(1) == 1 else x.contiguous()
    return Product(rows, x_scale, qdata.contiguous(), scale.contiguous(), bias, format)


def _backend(recipe: Recipe, device: torch.device, dtype: torch.dtype, qdata: Tensor) -> Runs:
    """The backend that multiplies by a weight; ValueError where `native` was asked for and cannot run here."""
    out, width = qdata.shape  # not `len`, which torch answers by a function of Python: three times the host's time
    runs, why = backend_of(recipe, device, dtype, (out, width))
    if runs == "refused":
        raise ValueError(f"backend='native' cannot run this matmul: {why}; use 'auto' or 'emulated'")
    return runs


def multiply_into(
    x: Tensor,
    x_scale: Tensor | None,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    *,
    out: Tensor,
) -> None:
    """The product of `linear`, written into `out`, of an activation that is rounded already or is not rounded.

    On a GPU without a float8 matmul, the first call with a shape measures which way to multiply is quickest.

    Args:
        x: [m, in]: float8 of the recipe's activation format or, for `emulated`, float16 values of its codes; for a
            weight-only recipe the activation itself.
        x_scale: float32, [m, 1] where the recipe scales per token, else (); None for a weight-only recipe.
        qdata, scale, bias, recipe: see `linear`.
        out: [m, out] with contiguous rows, of the dtype that the weight stands for.

    Raises:
        ValueError: `native` was asked for and cannot run here.
    """
    runs = _backend(recipe, x.device, out.dtype, qdata)
    if runs == "native" and len(x):
        assert x_scale is not None
        _native(x, x_scale, qdata, scale, bias, recipe, out.dtype, out=out)
    elif multiplies_by_half(runs, x.device, out.dtype) and out.numel() and x.numel():
        values = x if runs == "dequantized" else x.half()
        emulation.multiply(_product(values, x_scale, qdata, scale, bias, recipe.format), out, measured=True)
    elif runs == "dequantized":
        out.copy_(_dequantized(x, qdata, scale, bias, recipe))
    else:
        assert x_scale is not None
        out.copy_(_emulated(x, x_scale, qdata, scale, bias, recipe, out.dtype))


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
        x_scale = x_scale if x_scale.ndim else x_scale.expand(len(codes), 1)
        x_scale, scale = x_scale.contiguous(), scale.t().contiguous()
    float8 = DTYPES[recipe.format]
    weight = (qdata if qdata.dtype == float8 else qdata.view(float8)).contiguous().t()
    rest = bias if dtype == torch.float32 else None  # _scaled_mm takes no bias for float32 results
    fused = None if dtype == torch.float32 else bias
    fast = recipe.fast_accum and codes.shape[0] * qdata.shape[0] >= SMALL
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
    device = codes.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # float16 sums would overflow
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


# How a gradient is rounded, by the format of the weight.
_GRADIENT: dict[Format, Recipe] = {
    format: Recipe(format, "tensor", "tensor", "e5m2", fast_accum=True) for format in get_args(Format)
}


def _float8_gradient(grad: Tensor, qdata: Tensor, scale: Tensor, recipe: Recipe) -> Tensor:
    """grad [..., out] times the weight, [..., in], with the gradient in E5M2 and one scale.

    Scales per row of the weight run along this sum, so that they are multiplied into the gradient before it is rounded.
    """
    rows = grad.reshape(-1, len(qdata))
    if scale.ndim:
        wide = torch.float32 if rows.dtype == torch.float16 else rows.dtype
        rows, scale = rows.to(wide) * scale.t().to(wide), scale.new_ones(())
    how, weight = _GRADIENT[recipe.format], qdata.t()
    codes, grad_scale = quantize_activation(rows, how, None, as_bytes=qdata.dtype == torch.uint8)
    shape = (len(weight), len(qdata))
    native = recipe.backend != "emulated" and not why_not_native(how, grad.device, grad.dtype, shape)
    multiply = _native if native and rows.numel() else _emulated
    return multiply(codes, grad_scale, weight, scale, None, how, grad.dtype).reshape(*grad.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """Forward in float8, backward with the dequantized weight, or in float8 where the recipe says so."""

    @staticmethod
    def forward(
        x: Tensor, qdata: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, recipe: Recipe
    ) -> Tensor:
        return _forward(x, qdata, scale, input_scale, bias, recipe)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, qdata, scale, _, _, recipe = inputs
        ctx.save_for_backward(qdata, scale)
        ctx.recipe = recipe

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        qdata, scale = ctx.saved_tensors
        of_x, *_, of_bias, _ = ctx.needs_input_grad
        grad_x = None
        if of_x and ctx.recipe.gradient == "e5m2":
            grad_x = _float8_gradient(grad, qdata, scale, ctx.recipe)
        elif of_x and _at_once(qdata):
            grad_x = grad @ values_of(qdata, scale, ctx.recipe.format, grad.dtype)
        elif of_x:
            columns = _pieces(qdata, scale, ctx.recipe.format, grad.dtype, along=1)
            grad_x = torch.cat([grad @ weight for _, weight in columns], -1)
        grad_bias = grad.reshape(-1, len(qdata)).sum(0) if of_bias else None
        return grad_x, None, None, None, grad_bias, None
