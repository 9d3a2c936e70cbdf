"""Quantizing the Linears of a model in place, taking that back, and saying what was done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quant.matmul import backend_of
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor, check_values, checked_input_scale

# What FP8 files keep in 16 bits: what runs once per picture or per step, and what is more sensitive than it is large.
KEPT = ("*embed*", "*adaLN_modulation*", "*final_layer*", "*norm*", "*text_projection*", "*relative_attention_bias*")


@dataclass(frozen=True)
class Layer:
    """One Linear in a report."""

    name: str
    shape: tuple[int, int]  # [out, in]
    recipe: Recipe | None  # None: not quantized
    snr: float | None  # of the weight in dB, where `quantize_` had the original
    runs: str  # backend ("refused": it will raise), or the dtype of what is not quantized
    why: str  # for the backend, or why it was skipped
    bytes: int


class Report(list[Layer]):
    """The Linears of a module; prints as a table."""

    def __repr__(self) -> str:
        header = ("layer", "shape", "format", "scale", "activation", "SNR dB", "runs", "why", "MB")
        rows = [header, *map(_row, self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        done = [layer for layer in self if layer.recipe is not None]
        size, whole = (sum(layer.bytes for layer in layers) / 1e6 for layers in (done, self))
        return "\n".join([*lines, f"{len(done)} of {len(self)} Linears in float8: {size:.1f} of {whole:.1f} MB"])


def quantize_(
    module: nn.Module,
    recipe: Recipe | str = "fp8",
    select: str | Sequence[str] | None = None,
    *,
    input_scales: Mapping[str, Tensor] | None = None,
) -> Report:
    """Replace the weights of Linears by `Float8Tensor`s, in place; the report says of each Linear what was done.

    Args:
        module: any model; its code stays as it is.
        recipe: or the name of one of `RECIPES`.
        select: globs over module names; each must match a Linear. None takes all but `KEPT`.
        input_scales: positive numbers by module name, for recipes with static activations.

    Raises:
        ValueError: a glob that matches nothing; a weight that is quantized already, not finite, no float, computed
            (`parametrizations`) or shared with another layer; a static recipe without an input scale for a layer; input
            scales of no layer or for another recipe. The module is then unchanged.
    """
    recipe = _recipe(recipe)
    linears = dict(linears_of(module))
    chosen = _selected(linears, select)
    for name in chosen:
        _check_weight(name, linears[name])
    _check_ties(module, {name: linears[name] for name in chosen})
    scales = _input_scales(linears, chosen, recipe, input_scales or {})
    for name in chosen:
        linear = linears[name]
        weight = Float8Tensor.quantize(linear.weight, recipe=recipe, input_scale=scales.get(name))
        weight.snr = snr(linear.weight, weight.dequantize(torch.float32))
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return report(module)


def dequantize_(module: nn.Module, select: str | Sequence[str] | None = None) -> None:
    """Replace float8 weights by plain ones of their values and logical dtype, in place.

    Args:
        module: a model with quantized Linears.
        select: globs over module names; None takes all.
    """
    linears = dict(linears_of(module))
    names = linears if select is None else _selected(linears, select)
    for name in names:
        weight = linears[name].weight
        if isinstance(weight, Float8Tensor):
            linears[name].weight = nn.Parameter(weight.dequantize(), requires_grad=False)


def report(module: nn.Module) -> Report:
    """What the Linears of a module are and on what they run."""
    return Report(_layer(name, linear) for name, linear in linears_of(module))


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight of the module is a `Float8Tensor`."""
    return any(isinstance(parameter, Float8Tensor) for parameter in module.parameters())


def linears_of(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The Linears of a module by name."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear))


def snr(signal: Tensor, approximation: Tensor) -> float:
    """Signal-to-noise ratio in dB; infinite where they are equal."""
    signal, approximation = signal.detach().double(), approximation.detach().double()
    noise = (signal - approximation).square().sum()
    return float(10 * torch.log10(signal.square().sum() / noise)) if noise else float("inf")


def _recipe(recipe: Recipe | str) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; known are {', '.join(RECIPES)}, or give a quant.Recipe")
    return RECIPES[recipe]


def _selected(linears: Mapping[str, nn.Linear], select: str | Sequence[str] | None) -> list[str]:
    """Names in the order of the module, each once."""
    if select is None:
        return [name for name in linears if not kept(name)]
    patterns = [select] if isinstance(select, str) else select
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            nearest = ", ".join(get_close_matches(pattern, linears, cutoff=0))
            raise ValueError(f"{pattern!r} matches none of {len(linears)} Linears; nearest are {nearest}")
    return [name for name in linears if any(fnmatchcase(name, pattern) for pattern in patterns)]


def kept(name: str) -> str | None:
    """The pattern of `KEPT` that a Linear of this name falls under, which `quantize_` leaves alone; None for none."""
    return next((pattern for pattern in KEPT if fnmatchcase(name, pattern)), None)


def _check_weight(name: str, linear: nn.Linear) -> None:
    if "weight" not in linear._parameters:
        raise ValueError(
            f"{name}.weight is no parameter, it is computed: remove the parametrization first, which leaves its value"
        )
    weight = linear.weight
    if isinstance(weight, Float8Tensor):
        raise ValueError(f"{name!r} is quantized already; dequantize_ first to change its recipe")
    try:
        check_values(weight)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from error


def _check_ties(module: nn.Module, chosen: Mapping[str, nn.Linear]) -> None:
    """Of a weight that two layers share, each would get its own."""
    names = {id(linear.weight): f"{name}.weight".lstrip(".") for name, linear in chosen.items()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = names.get(id(parameter), name)
        if first != name:
            raise ValueError(f"{name} and {first} are one parameter: leave both out by select=, or give each a copy")


def _input_scales(
    linears: Mapping[str, nn.Linear], chosen: Sequence[str], recipe: Recipe, scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those of the chosen Linears, checked."""
    if recipe.activation != "static":
        if scales:
            raise ValueError(f"input_scales are for static activations; the recipe has {recipe.activation!r}")
        return {}
    if unknown := [name for name in scales if name not in linears]:
        raise ValueError(f"input_scales name {len(unknown)} that are no Linears of the module, first {unknown[0]!r}")
    if without := [name for name in chosen if name not in scales]:
        raise ValueError(
            f"static activations need an input scale for every layer; {len(without)} have none, first {without[0]!r}: "
            "run mmdit.calibrate, or give input_scales"
        )
    return {name: checked_input_scale(scales[name], name) for name in chosen}


def _layer(name: str, linear: nn.Linear) -> Layer:
    weight, shape = linear.weight, (linear.out_features, linear.in_features)
    if not isinstance(weight, Float8Tensor):
        pattern = kept(name)
        why = f"kept: {pattern}" if pattern else "not selected"
        return Layer(name, shape, None, None, str(weight.dtype).removeprefix("torch."), why, weight.nbytes)
    runs, why = backend_of(weight.recipe, weight.device, weight.dtype, shape)
    if weight.recipe.activation == "static" and weight.input_scale is None:
        runs, why = "refused", "no input scale"
    return Layer(name, shape, weight.recipe, weight.snr, runs, why, weight.nbytes)


def _row(layer: Layer) -> tuple[str, ...]:
    recipe = layer.recipe
    words = ("-", "-", "-") if recipe is None else (recipe.format, recipe.granularity, recipe.activation)
    ratio = "-" if layer.snr is None else f"{layer.snr:.1f}"
    size = f"{layer.bytes / 1e6:.2f}"
    return (layer.name, "x".join(map(str, layer.shape)), *words, ratio, layer.runs, layer.why, size)
