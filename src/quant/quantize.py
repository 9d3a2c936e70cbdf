"""Quantizing the Linears of a model in place, dequantizing them, and reporting on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quant.matmul import arithmetic_of, backend_of
from quant.recipe import Recipe, as_recipe, recipe_name
from quant.rounding import Moments, rounded_linear
from quant.scaling import checked_input_scale, slices, values_of
from quant.tensor import Float8Tensor, check_values

# Layers that FP8 files keep in 16 bits: they run once per picture or step, or are small and sensitive to rounding.
KEPT = ("*embed*", "*adaLN_modulation*", "*final_layer*", "*norm*", "*text_projection*", "*relative_attention_bias*")


@dataclass(frozen=True)
class Layer:
    """One Linear in a report."""

    name: str
    shape: tuple[int, int]  # [out, in]
    recipe: Recipe | None  # None: not quantized
    snr: float | None  # signal-to-noise ratio of the weight in dB; None where `quantize_` did not measure it
    runs: str  # the backend ("refused": the layer will raise), or the dtype of a weight that is not quantized
    why: str  # the reason for the backend, or for skipping the layer
    bytes: int  # of the weight with its scales
    arithmetic: str  # the dtype in which it multiplies; "-" where it refuses


class Report(list[Layer]):
    """The Linears of a module; prints as a table."""

    def __repr__(self) -> str:
        header = ("layer", "shape", "format", "scale", "activation", "SNR dB", "runs", "in", "why", "MB")
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
    input_scales: Mapping[str, Tensor | float] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Report:
    """Replace the weights of Linears by `Float8Tensor`s, in place.

    Args:
        module: Any model, such as `pipe.transformer`.
        recipe: A recipe, or the name of one in `RECIPES`.
        select: Globs over module names; each must match a Linear. None takes all Linears but those in `KEPT`.
        input_scales: The static scale of the activations by module name, for recipes with static activations.
        moments: Of the inputs of every chosen Linear by module name (`quant.observe(second=True)`). Codes are then
            chosen for the outputs, and biases take up the mean of what is left; see `quant.rounding`. None rounds each
            value to the nearest code, and changes no bias.

    Returns:
        A report on every Linear of the module.

    Raises:
        ValueError: A glob matches nothing; a weight is quantized already, not finite, not floating point, computed
            (`parametrizations`) or shared with another layer, or with moments its bias is; a layer has no input scale
            though the recipe is static, or no moments though others have; its moments are not those of inputs (see
            `quant.rounding`); or there are input scales or moments for no layer, or input scales for another recipe.
            The module is then unchanged.
        TypeError: The module is no nn.Module, the recipe neither a recipe nor a name, or moments no mapping.
    """
    recipe = as_recipe(recipe)
    linears = dict(linears_of(module))
    chosen = _selected(linears, select)
    for name in chosen:
        _check_weight(name, linears[name])
        if moments is not None:
            _check_stored(name, linears[name], "bias")
    check_ties(module, chosen, ("weight",) if moments is None else ("weight", "bias"))
    scales = _input_scales(linears, chosen, recipe, {} if input_scales is None else input_scales)
    if moments is not None:
        _round_({name: linears[name] for name in chosen}, _checked_moments(linears, chosen, moments), recipe, scales)
        return report(module)
    for name in chosen:  # one by one, so that only one weight is there twice
        weight = quantize_weight(linears[name].weight, recipe, input_scale=scales.get(name))
        linears[name].weight = weight.as_parameter()
    return report(module)


@torch.no_grad()
def _round_(
    linears: Mapping[str, nn.Linear], moments: Mapping[str, Moments], recipe: Recipe, scales: Mapping[str, Tensor]
) -> None:
    """Round weights for the outputs, in place; nothing is changed before all weights and biases are found."""
    found = {name: _rounded(name, linear, moments[name], recipe, scales.get(name)) for name, linear in linears.items()}
    for name, (weight, bias) in found.items():
        linears[name].weight = weight.as_parameter()
        if bias is not None:
            linears[name].bias.copy_(bias)


def _rounded(
    name: str, linear: nn.Linear, moments: Moments, recipe: Recipe, input_scale: Tensor | None
) -> tuple[Float8Tensor, Tensor | None]:
    """The weight with its signal-to-noise ratio, and the bias; see `rounded_linear`."""
    try:
        weight, bias = rounded_linear(linear.weight, linear.bias, moments, recipe, input_scale=input_scale)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    weight.snr = snr(linear.weight, weight.dequantize(torch.float32))
    return weight, bias


def quantize_weight(
    values: Tensor, recipe: Recipe | str = "fp8", *, input_scale: Tensor | float | None = None
) -> Float8Tensor:
    """The weight of one Linear as `quantize_` makes it, with its signal-to-noise ratio; see `Float8Tensor.quantize`.

    Beside the values and the result it takes about 100 MB.
    """
    weight = Float8Tensor.quantize(values, recipe=recipe, input_scale=input_scale)
    rows = slices(len(values), values.numel(), values.device)
    scale = weight.scale if weight.scale.ndim else weight.scale.expand(len(values), 1)
    weight.snr = _snr_of(
        (values[part], values_of(weight.qdata[part], scale[part], weight.recipe.format, torch.float32)) for part in rows
    )
    return weight


def dequantize_(module: nn.Module, select: str | Sequence[str] | None = None) -> None:
    """Replace float8 weights of Linears by plain ones with their values, in their logical dtype, in place.

    Args:
        module: A model with quantized Linears.
        select: Globs over module names; None takes all.

    Raises:
        ValueError: A glob matches no Linear, or a float8 weight is shared with another layer. The module is then
            unchanged.
        TypeError: The module is no nn.Module.
    """
    linears = dict(linears_of(module))
    names = linears if select is None else _selected(linears, select)
    found = {name: weight for name in names if isinstance(weight := linears[name].weight, Float8Tensor)}
    check_ties(module, found)
    for name, weight in found.items():
        linears[name].weight = nn.Parameter(weight.dequantize(), requires_grad=False)


def report(module: nn.Module) -> Report:
    """A report on the Linears of a module: their recipes, and the backends that multiply them.

    Raises:
        TypeError: The module is no nn.Module.
    """
    return Report(_layer(name, linear) for name, linear in linears_of(module))


def is_quantized(module: nn.Module) -> bool:
    """Whether any parameter of the module is a `Float8Tensor`.

    Raises:
        TypeError: The module is no nn.Module.
    """
    check_module(module)
    return any(isinstance(parameter, Float8Tensor) for parameter in module.parameters())


def refuse_quantized(
    module: nn.Module, name: str = "the module", instead: str = "take one that is not", *, unless: Recipe | None = None
) -> None:
    """Raise unless every parameter of the module is a plain tensor.

    Args:
        module: The module to check.
        name: The name of the module in the error.
        instead: What to do, for the error.
        unless: A recipe under which weights may be quantized.

    Raises:
        ValueError: Weights of the module are quantized already, under another recipe than `unless`.
    """
    check_module(module)
    recipes = [weight.recipe for weight in module.parameters() if isinstance(weight, Float8Tensor)]
    if other := [recipe for recipe in recipes if recipe != unless]:
        names = ", ".join(sorted({recipe_name(recipe) for recipe in other}))
        raise ValueError(f"{name} is quantized already ({len(other)} weights: {names}): {instead}")


def linears_of(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and Linears of a module.

    Raises:
        TypeError: The module is no nn.Module.
    """
    check_module(module)
    return ((name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear))


def snr(signal: Tensor, approximation: Tensor) -> float:
    """Signal-to-noise ratio in dB; infinite where they are equal."""
    return _snr_of([(signal, approximation)])


def _snr_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`snr` of all of these signals and approximations together."""
    sums = [_energies(*pair) for pair in pairs]
    if not sums:
        return float("inf")
    energy, noise = torch.stack(sums).sum(0)
    return float(10 * torch.log10(energy / noise)) if noise else float("inf")


def _energies(signal: Tensor, approximation: Tensor) -> Tensor:
    """Sums of squares of a signal and of what is missing from it, float64 [2]."""
    pair = (one.detach() for one in (signal, approximation))
    wide, other = ((one.cpu() if one.device.type == "mps" else one).double() for one in pair)  # MPS has no float64
    return torch.stack([wide.square().sum(), (wide - other).square().sum()])


def check_module(module: object) -> None:
    """Raise TypeError unless it is an nn.Module; the error names parts of the object that are modules."""
    if isinstance(module, nn.Module):
        return
    attributes = vars(module) if hasattr(module, "__dict__") else {}
    parts = [f".{name}" for name, part in attributes.items() if isinstance(part, nn.Module) and name.isidentifier()]
    hint = f"; give one of its modules: {', '.join(parts[:5])}" if parts else ""
    raise TypeError(f"expected an nn.Module, got {type(module).__name__}{hint}")


def _selected(linears: Mapping[str, nn.Linear], select: str | Sequence[str] | None) -> list[str]:
    """The names of the selected Linears, in the order of the module."""
    if select is None:
        return [name for name in linears if not kept(name)]
    patterns = [select] if isinstance(select, str) else list(select) if isinstance(select, Iterable) else [select]
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f"select takes globs over names of Linears, such as '*.mlp.*'; got {type(wrong[0]).__name__}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            nearest = ", ".join(get_close_matches(pattern, linears, cutoff=0))
            raise ValueError(f"{pattern!r} matches none of {len(linears)} Linears; nearest are {nearest}")
    return [name for name in linears if any(fnmatchcase(name, pattern) for pattern in patterns)]


def kept(name: str) -> str | None:
    """The pattern of `KEPT` that the name of a Linear matches, so that `quantize_` skips it; None where none does."""
    return next((pattern for pattern in KEPT if fnmatchcase(name, pattern)), None)


def _check_stored(name: str, linear: nn.Linear, key: str) -> None:
    if key not in linear._parameters:
        raise ValueError(
            f"{name}.{key} is no parameter but computed: remove the parametrization first, which keeps its value"
        )


def _check_weight(name: str, linear: nn.Linear) -> None:
    _check_stored(name, linear, "weight")
    weight = linear.weight
    refuse_quantized(linear, repr(name), "call dequantize_ first to change its recipe")
    try:
        check_values(weight)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from error


def check_ties(module: nn.Module, chosen: Iterable[str], keys: Sequence[str] = ("weight",)) -> None:
    """Refuse parameters of the chosen Linears, such as their weights, that another layer shares.

    A new weight would no longer be shared, and a bias would be changed for the other layer too. A module that has
    several names is one layer.

    Raises:
        ValueError: Two modules share a parameter, or one has it twice.
    """
    every = {
        f"{name}.{key}".lstrip("."): parameter
        for name, part in module.named_modules()
        for key, parameter in part._parameters.items()
        if parameter is not None
    }
    wanted = [f"{name}.{key}".lstrip(".") for name in chosen for key in keys]
    names = {id(every[key]): key for key in wanted if key in every}
    for name, parameter in every.items():
        first = names.get(id(parameter), name)
        if first != name:
            raise ValueError(f"{name} and {first} are one parameter: leave both out by select=, or give each a copy")


def _input_scales(
    linears: Mapping[str, nn.Linear], chosen: Sequence[str], recipe: Recipe, scales: Mapping[str, Tensor | float]
) -> dict[str, Tensor]:
    """The input scales of the chosen Linears, checked."""
    if not isinstance(scales, Mapping):
        raise TypeError(f"input_scales are {{name of a Linear: positive number}}; got {type(scales).__name__}")
    if recipe.activation != "static":
        if scales:
            raise ValueError(f"input_scales are for static activations; the recipe has {recipe.activation!r}")
        return {}
    if unknown := [name for name in scales if name not in linears]:
        raise ValueError(f"input_scales has {len(unknown)} names of no Linear of the module, first {unknown[0]!r}")
    if without := [name for name in chosen if name not in scales]:
        raise ValueError(
            f"static activations need an input scale for every layer; {len(without)} have none, first {without[0]!r}: "
            "run mmdit.calibrate, or give input_scales"
        )
    return {name: checked_input_scale(scales[name], name) for name in chosen}


def _checked_moments(
    linears: Mapping[str, nn.Linear], chosen: Sequence[str], moments: Mapping[str, Moments]
) -> Mapping[str, Moments]:
    """The moments, once it is checked that the chosen Linears have some, and that each name is that of a Linear."""
    if not isinstance(moments, Mapping):
        raise TypeError(f"moments are {{name of a Linear: quant.rounding.Moments}}; got {type(moments).__name__}")
    if unknown := [name for name in moments if name not in linears]:
        raise ValueError(f"moments has {len(unknown)} names of no Linear of the module, first {unknown[0]!r}")
    if without := [name for name in chosen if name not in moments]:
        raise ValueError(f"moments have {len(without)} of {len(chosen)} Linears missing, first {without[0]!r}")
    return moments


def _layer(name: str, linear: nn.Linear) -> Layer:
    weight, shape = linear.weight, (linear.out_features, linear.in_features)
    if not isinstance(weight, Float8Tensor):
        pattern = kept(name)
        why = f"kept: {pattern}" if pattern else "not selected"
        dtype = str(weight.dtype).removeprefix("torch.")
        return Layer(name, shape, None, None, dtype, why, weight.nbytes, dtype)
    runs, why = backend_of(weight.recipe, weight.device, weight.dtype, shape)
    if weight.recipe.activation == "static" and weight.input_scale is None:
        runs, why = "refused", "no input scale"
    arithmetic = arithmetic_of(runs, weight.device, weight.dtype)
    return Layer(name, shape, weight.recipe, weight.snr, runs, why, weight.nbytes, arithmetic)


def _row(layer: Layer) -> tuple[str, ...]:
    recipe = layer.recipe
    words = ("-", "-", "-") if recipe is None else (recipe.format, recipe.granularity, recipe.activation)
    ratio = "-" if layer.snr is None else f"{layer.snr:.1f}"
    size = f"{layer.bytes / 1e6:.2f}"
    return (layer.name, "x".join(map(str, layer.shape)), *words, ratio, layer.runs, layer.arithmetic, layer.why, size)
