"""Quantization-aware fine-tuning: Linears that compute as a recipe does, over weights in 16 or 32 bits that train.

    fake_quantize_(model, "fp8-static", input_scales=scales)
    ...  # train the parameters of the model; the forward is that of float8
    quantize_trained_(model)

Rounding has no useful derivative. Gradients pass straight through it where a value is within reach of the largest
code, and are 0 beyond (Bengio et al. 2013, arXiv 1308.3432); scales get the gradient of Esser et al. 2020, "Learned
Step Size Quantization" (arXiv 1902.08153), with the codes of float8 in place of whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.formats import LARGEST, Format
from quant.quantize import (
    Report,
    _check_weight,
    _input_scales,
    _selected,
    check_module,
    check_ties,
    linears_of,
    report,
    snr,
)
from quant.recipe import Recipe, as_recipe
from quant.scaling import from_codes, scale_of, to_codes
from quant.tensor import Float8Tensor, amax_of

__all__ = ["FakeQuantizedLinear", "fake_codes", "fake_quantize_", "fake_quantized", "quantize_trained_"]

Trained = Literal["weights", "scales", "both"]


def fake_codes(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """The codes of x / scale as numbers in the dtype of x, with gradients for x and for the scale.

    Args:
        x: Finite values of any shape.
        scale: Positive, broadcasts to x.
        format: The format of the codes.
    """
    if torch.compiler.is_compiling():
        return _opaque_codes(x, scale, format)
    return _Codes.apply(x, scale, format)  # type: ignore[no-untyped-call]


class _Codes(torch.autograd.Function):
    """q = round(clamp(x / scale)); dq/dx = 1 / scale and dq/dscale = -x / scale^2 within reach, 0 beyond."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, format: Format) -> Tensor:
        return from_codes(to_codes(x, scale.to(_wide(x)), format), format, x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, format = inputs
        ctx.save_for_backward(x, scale)
        ctx.largest = LARGEST[format]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        of_x, of_scale = _gradients(grads[0], x, scale, ctx.largest, ctx.needs_input_grad[1])
        return of_x if ctx.needs_input_grad[0] else None, of_scale, None


def _gradients(grad: Tensor, x: Tensor, scale: Tensor, largest: float, of_scale: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and, where it is asked for, of the scale."""
    wide = _wide(x)
    quotient = x.to(wide) / scale.to(wide)
    passed = grad.to(wide) * (quotient.abs() <= largest) / scale.to(wide)
    total = (-passed * quotient).sum_to_size(scale.shape).to(scale.dtype) if of_scale else None
    return passed.to(x.dtype), total


# For torch.compile the rule is an operation that it does not look into: torch 2.11 loses the gradients of the function
# above where the codes pass through 32 bits, and 2.13 compiles their direct conversion to bfloat16 wrongly for CPUs.
@torch.library.custom_op("quant::fake_codes", mutates_args=(), schema="(Tensor x, Tensor scale, str format) -> Tensor")
def _opaque_codes(x: Tensor, scale: Tensor, format: Any) -> Tensor:
    return _Codes.forward(x, scale, format).contiguous()


@torch.library.custom_op(
    "quant::fake_codes_gradients",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor scale, float largest, bool of_scale) -> (Tensor, Tensor)",
)
def _opaque_gradients(grad: Tensor, x: Tensor, scale: Tensor, largest: float, of_scale: bool) -> tuple[Tensor, Tensor]:
    of_x, total = _gradients(grad, x, scale, largest, of_scale)
    return of_x.contiguous(), torch.zeros_like(scale) if total is None else total.clone()


@_opaque_codes.register_fake
def _(x: Tensor, scale: Tensor, format: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_opaque_gradients.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, largest: float, of_scale: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(scale)


def _opaque_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    of_scale = ctx.needs_input_grad[1]
    x, scale = ctx.saved_tensors
    made, total = _opaque_gradients(grad, x, scale, ctx.largest, of_scale)
    return made if ctx.needs_input_grad[0] else None, total if of_scale else None, None


_opaque_codes.register_autograd(_opaque_backward, setup_context=_Codes.setup_context)


class FakeQuantizedLinear(nn.Linear):
    """A Linear that computes what its float8 weight would compute, and trains its weight, its scales, or both.

    It shares the parameters of the Linear that it replaces. A scale is its value at the start times e to the power of a
    parameter that starts at 0, so that it stays positive and a learning rate is a relative change. That of the weight
    does not follow the weight's largest value, because all codes would move with it.
    """

    recipe: Recipe
    kind: type[nn.Linear]  # of the Linear that it replaces
    first_weight_scale: Tensor  # float32, () or [out, 1]
    first_input_scale: Tensor | None  # float32 (); None unless the recipe is static
    weight_growth: nn.Parameter  # of the shape of the scale
    input_growth: nn.Parameter | None

    @property
    def weight_scale(self) -> Tensor:
        """The scale of the weight, float32, () or [out, 1]."""
        return self.first_weight_scale * self.weight_growth.exp()

    @property
    def input_scale(self) -> Tensor | None:
        """The scale of static activations, float32 ()."""
        if self.first_input_scale is None or self.input_growth is None:
            return None
        return self.first_input_scale * self.input_growth.exp()

    def forward(self, x: Tensor) -> Tensor:
        """x times the rounded weight, plus the bias: [..., in] to [..., out]."""
        wide, recipe = _wide(x), self.recipe
        weight = fake_codes(self.weight, self.weight_scale, recipe.format)
        scale = self.weight_scale.to(wide)
        if recipe.activation == "none":
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, (weight.to(wide) * scale).to(x.dtype), bias)
        x_scale = self._scale_of(x).to(wide)
        factor = fake_codes(x, x_scale, recipe.activation_format)
        # Sums in 32 bits and the order of `quant.matmul`, so that both round alike; TF32 holds every code.
        y = F.linear(factor.to(wide), weight.to(wide)) * scale.reshape(-1 if scale.ndim else ()) * x_scale
        return (y if self.bias is None else y + self.bias.to(wide)).to(x.dtype)

    def _scale_of(self, x: Tensor) -> Tensor:
        if self.recipe.activation == "static":
            assert self.input_scale is not None, "static recipes come with an input scale"
            return self.input_scale
        size = x.detach().abs()
        amax = size.amax(dim=-1, keepdim=True) if self.recipe.activation == "token" else size.amax()
        return scale_of(amax, self.recipe.activation_format)


def fake_quantize_(
    module: nn.Module,
    recipe: Recipe | str = "fp8",
    select: str | Sequence[str] | None = None,
    *,
    input_scales: Mapping[str, Tensor | float] | None = None,
    train: Trained = "weights",
) -> dict[str, FakeQuantizedLinear]:
    """Replace Linears by ones that compute as `quantize_` with these arguments would make them, in place.

    Args:
        module: A model that contains the Linears.
        recipe, select, input_scales: As for `quantize_`. Linears that are float8 under this recipe already, as all or
            none of the chosen are, train on from their codes and scales, and take no input scales.
        train: What of these Linears requires gradients; nothing else of the module is changed.

    Returns:
        The new Linears by name.

    Raises:
        ValueError: As for `quantize_`; a Linear has a forward of its own, as those with LoRAs beside them do (but not
            those of the text encoders, which only upcast); or there is nothing of the name that `train` gives.
        TypeError: As for `quantize_`; or the module itself is a Linear, which cannot be replaced in place.
    """
    recipe = as_recipe(recipe)
    if train not in get_args(Trained):
        raise ValueError(f"train must be one of {', '.join(map(repr, get_args(Trained)))}; got {train!r}")
    linears = dict(linears_of(module))
    if "" in linears:
        raise TypeError("the module is a Linear itself; give a module that contains it")
    chosen = _selected(linears, select)
    if done := [name for name in chosen if isinstance(linears[name], FakeQuantizedLinear)]:
        raise ValueError(f"{done[0]!r} is fake-quantized already; call quantize_trained_ first")
    for name in chosen:
        kind = type(linears[name])
        if kind.forward is not nn.Linear.forward and not getattr(kind, "only_upcasts", False):
            raise ValueError(
                f"{name!r} is a {type(linears[name]).__name__}, whose own forward, such as that of a LoRA beside it, "
                "would be lost: merge or remove it first, or leave it out by select"
            )
    rounded = [name for name in chosen if _is_rounded(linears[name], recipe)]
    for name in chosen if len(rounded) < len(chosen) else ():
        _check_weight(name, linears[name])
    check_ties(module, chosen)
    if len(rounded) == len(chosen):
        if input_scales:
            raise ValueError(f"{rounded[0]!r} is in float8 with its scales already; give no input_scales")
        return {name: _replaced(module, name, recipe, None, train) for name in chosen}
    scales = _input_scales(linears, chosen, recipe, {} if input_scales is None else input_scales)
    return {name: _replaced(module, name, recipe, scales.get(name), train) for name in chosen}


def fake_quantized(module: nn.Module) -> dict[str, FakeQuantizedLinear]:
    """The fake-quantized Linears of a module, by name.

    Raises:
        TypeError: The module is no nn.Module.
    """
    check_module(module)
    return {name: part for name, part in module.named_modules() if isinstance(part, FakeQuantizedLinear)}


@torch.no_grad()
def quantize_trained_(module: nn.Module) -> Report:
    """Replace every fake-quantized Linear by one of its former class, with a float8 weight of its scales, in place.

    The products of the result on any device are those of the training's forward, up to the order of sums.

    Returns:
        A report on every Linear of the module.

    Raises:
        ValueError: The module has none; or a weight is shared with another layer, or a weight or scale is not finite
            (the error names it). The module is then unchanged.
        TypeError: The module is no nn.Module.
    """
    linears = fake_quantized(module)
    if not linears:
        raise ValueError("the module has no fake-quantized Linears; call fake_quantize_ and train it first")
    check_ties(module, linears)
    weights = {name: _trained_weight(name, linear) for name, linear in linears.items()}
    for name, linear in linears.items():
        plain = linear.kind.__new__(linear.kind)
        plain.__dict__.update(linear.__dict__)
        del plain.__dict__["kind"]
        plain.__dict__["_parameters"] = {
            "weight": weights[name].as_parameter(),
            "bias": linear.bias,
        }
        plain.__dict__["_buffers"] = {}
        _put(module, name, plain)
    return report(module)


def _trained_weight(name: str, linear: FakeQuantizedLinear) -> Float8Tensor:
    try:
        made = Float8Tensor.quantize(
            linear.weight, recipe=linear.recipe, scale=linear.weight_scale, input_scale=linear.input_scale
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    made.snr = snr(linear.weight, made.dequantize(torch.float32))
    return made


def _is_rounded(linear: nn.Linear, recipe: Recipe) -> bool:
    return isinstance(linear.weight, Float8Tensor) and linear.weight.recipe == recipe


def _replaced(
    module: nn.Module, name: str, recipe: Recipe, input_scale: Tensor | None, train: Trained
) -> FakeQuantizedLinear:
    linear = module.get_submodule(name)
    new = FakeQuantizedLinear.__new__(FakeQuantizedLinear)
    new.__dict__.update(linear.__dict__)
    weight = linear.weight
    assert isinstance(linear, nn.Linear), "checked before"
    assert isinstance(weight, nn.Parameter | Float8Tensor), "checked before"
    new.__dict__["_parameters"], new.__dict__["_buffers"] = dict(linear._parameters), dict(linear._buffers)
    if isinstance(weight, Float8Tensor):
        scale, input_scale = weight.scale, weight.input_scale
        weight = nn.Parameter(weight.dequantize())  # divided by the scale and rounded, it gives the codes again
        new.__dict__["_parameters"]["weight"] = weight
    else:
        scale = scale_of(amax_of(weight.detach(), recipe.granularity), recipe.format)
        input_scale = None if input_scale is None else input_scale.to(weight.device)
    new.recipe, new.kind = recipe, type(linear)
    for key, first in (("weight", scale), ("input", input_scale)):
        new.register_buffer(f"first_{key}_scale", first)
        growth = None if first is None else nn.Parameter(torch.zeros_like(first), requires_grad=train != "weights")
        new.register_parameter(f"{key}_growth", growth)
    weight.requires_grad_(train != "scales")
    _put(module, name, new)
    return new


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Put a part where the one of that name is, under all names that it has."""
    old = module.get_submodule(name)
    for owner in list(module.modules()):
        for key, child in owner._modules.items():
            if child is old:
                owner._modules[key] = part


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
