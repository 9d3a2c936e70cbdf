"""The float8 matmul behind `F.linear`, and which backend runs it."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.recipe import Recipe
from quant.scaling import from_codes, scale_of, to_codes

Runs = Literal["native", "emulated", "widened"]


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
) -> Tensor:
    """x @ (qdata * scale).T + bias as the recipe says; gradients reach x and bias.

    Args:
        x: [..., in].
        qdata: codes, [out, in].
        scale: float32, () or [out, 1].
        input_scale: float32 (), for static activations.
        bias: [out].
        recipe: what to do with x, and which backend.
        dtype: of the weight that the codes stand for; x must have it.

    Raises:
        ValueError: x has another dtype, the scales are not of output channels, a static recipe has no input scale, or
            `native` cannot run here.
    """
    if x.dtype != dtype:
        raise ValueError(f"the input is {x.dtype}, but the float8 weight stands for {dtype}; cast one of them")
    if scale.ndim and scale.shape != (len(qdata), 1):
        raise ValueError(
            f"scales of shape {list(scale.shape)} run along the sum of this product with a weight [out, in] of "
            f"{list(qdata.shape)}; they can be taken out of it only one per output channel: use dequantize()"
        )
    if recipe.activation == "static" and input_scale is None:
        raise ValueError("a recipe with static activations needs input scales: run mmdit.calibrate, or load them")
    tensors = (x, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Linear.apply(x, qdata, scale, input_scale, bias, recipe)  # type: ignore[no-untyped-call]
    return _forward(x, qdata, scale, input_scale, bias, recipe)


def backend_of(recipe: Recipe, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[Runs, str]:
    """Which backend multiplies a weight [out, in] there, and why: a pure function of its arguments.

    `widened` is weight-only: the weight in x's dtype and torch's own matmul.
    """
    if recipe.activation == "none":
        return "widened", "weight-only"
    if recipe.backend == "emulated":
        return "emulated", "asked for"
    why_not = _why_not_native(recipe, device, dtype, shape)
    return ("emulated", why_not) if why_not else ("native", "float8 matmul of the device")


def _why_not_native(recipe: Recipe, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str:
    if device.type != "cuda":
        return f"no float8 matmul on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"compute capability {torch.cuda.get_device_capability(device)} is below 8.9"
    if shape[0] % 16 or shape[1] % 16:
        return f"{list(shape)} is not in multiples of 16"
    if recipe.format == recipe.activation_format == "e5m2":
        return "E5M2 times E5M2 is in no hardware"
    if dtype != torch.bfloat16 and (recipe.granularity == "row" or dtype == torch.float64):
        return f"scales per row give bfloat16 only, not {dtype}"
    return ""


def quantize_activation(
    x: Tensor, recipe: Recipe, input_scale: Tensor | None, *, as_bytes: bool
) -> tuple[Tensor, Tensor]:
    """Codes [m, in] and scale of activations [m, in]: () for the whole, [m, 1] per token."""
    if recipe.activation == "static":
        assert input_scale is not None
        scale = input_scale
    elif not x.numel():
        scale = torch.ones((len(x), 1) if recipe.activation == "token" else (), device=x.device)
    else:
        amax = x.abs().amax(dim=-1, keepdim=True) if recipe.activation == "token" else x.abs().amax()
        scale = scale_of(amax, recipe.activation_format)
    return to_codes(x, scale, recipe.activation_format, as_bytes=as_bytes), scale


def _forward(
    x: Tensor, qdata: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, recipe: Recipe
) -> Tensor:
    out, width = qdata.shape
    runs, why = backend_of(recipe, x.device, x.dtype, (out, width))
    if runs == "emulated" and recipe.backend == "native":
        raise ValueError(f"backend='native' cannot run this matmul: {why}; use 'auto' or 'emulated'")
    if runs == "widened":
        return F.linear(x, _widened(qdata, scale, recipe, x.dtype), bias)
    rows = x.reshape(-1, width)
    codes, x_scale = quantize_activation(rows, recipe, input_scale, as_bytes=qdata.dtype == torch.uint8)
    y = (_native if runs == "native" else _emulated)(codes, x_scale, qdata, scale, bias, recipe, x.dtype)
    return y.reshape(*x.shape[:-1], out)


def _native(
    codes: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
) -> Tensor:
    if recipe.granularity == "row":  # the matmul takes scales of both sides per row, or of neither
        x_scale, scale = x_scale.expand(len(codes), 1).contiguous(), scale.t()
    return torch._scaled_mm(codes, qdata.t(), x_scale, scale, bias, out_dtype=dtype, use_fast_accum=recipe.fast_accum)


def _emulated(
    codes: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
) -> Tensor:
    """The products of codes are exact in float32; only their sum and the scaled result are rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    sums = from_codes(codes, recipe.activation_format, wide) @ from_codes(qdata, recipe.format, wide).t()
    y = sums * x_scale.to(wide) * scale.to(wide).reshape(-1 if scale.ndim else ())
    return (y if bias is None else y + bias.to(wide)).to(dtype)


def _widened(qdata: Tensor, scale: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (from_codes(qdata, recipe.format, wide) * scale.to(wide)).to(dtype)


class _Linear(torch.autograd.Function):
    """Forward in float8, backward with the widened weight: gradients are not quantized."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qdata: Tensor, scale: Tensor, input_scale: Any, bias: Any, recipe: Recipe
    ) -> Tensor:
        ctx.save_for_backward(qdata, scale)
        ctx.recipe, ctx.has_bias = recipe, bias is not None
        return _forward(x, qdata, scale, input_scale, bias, recipe)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        qdata, scale = ctx.saved_tensors
        grad_x = grad @ _widened(qdata, scale, ctx.recipe, grad.dtype)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
        return grad_x, None, None, None, grad_bias, None
