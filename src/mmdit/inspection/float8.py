"""Errors of FP8 by layer: the error of each layer at each step, and the effect of each layer on the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.pipeline.passes import Pass
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.compiled import refuse_compiled
from mmdit.runtime.hooks import Hook, hooks, listening
from quant.formats import FLOAT8_FORMATS
from quant.matmul import quantize_activation
from quant.quantize import kept, linears_of, quantize_, refuse_quantized, snr
from quant.scaling import from_codes
from quant.tensor import Float8Tensor


@dataclass(frozen=True)
class LayerError:
    """The error of one Linear in one step. Shares are of its input values; they are NaN for weight-only recipes."""

    layer: str
    step: int
    amax: float  # the largest absolute value of the input
    saturated: float  # share of values that the scale maps beyond the largest code
    underflown: float  # share of values that are not zero and become zero
    snr: float  # SNR of the output in dB; the signal is the output with the weight before quantization


class LayerErrors(list[LayerError]):
    """A row per layer and step; it prints as a table of the mean over steps of each layer, the worst layer first."""

    @property
    def layers(self) -> list[str]:
        """The names of the layers, in the order of the model."""
        return list(dict.fromkeys(one.layer for one in self))

    def grid(self, field: str = "snr") -> Tensor:
        """One field as float64 [layers, steps]."""
        if not self:
            return torch.zeros(0, 0, dtype=torch.float64)
        rows = [[float(getattr(one, field)) for one in self if one.layer == name] for name in self.layers]
        return torch.tensor(rows, dtype=torch.float64)

    def __repr__(self) -> str:
        means = {name: self.grid(name).mean(1) for name in ("snr", "amax", "saturated", "underflown")}
        lines = [f"{'layer':44} {'SNR dB':>7} {'amax':>9} {'saturated':>9} {'underflown':>10}"]
        for i in means["snr"].argsort().tolist():
            shares = f"{means['saturated'][i]:9.2%} {means['underflown'][i]:10.2%}"
            lines.append(f"{self.layers[i]:44} {means['snr'][i]:7.1f} {means['amax'][i]:9.3g} {shares}")
        return "\n".join(lines)


@torch.no_grad()
def float8_errors(pipe: Pipeline, prompt: str | Sequence[str], original: nn.Module, **settings: Any) -> LayerErrors:
    """Draw with a quantized transformer, and measure the error of each float8 Linear on its own input.

    Args:
        pipe: a pipeline whose transformer is quantized (`quant.quantize_`, `mmdit.quantize_static`) and not compiled.
        prompt: the prompt to draw.
        original: the transformer before it was quantized, such as a `copy.deepcopy` of it.
        settings: further arguments of the pipeline's call.

    Raises:
        ValueError: no Linear of the transformer is float8, or a part of it is compiled.
    """
    layers = {name: one for name, one in linears_of(pipe.transformer) if isinstance(one.weight, Float8Tensor)}
    if not layers:
        raise ValueError("no Linear of the transformer is float8: quantize it first, with quant.quantize_")
    refuse_compiled(pipe.transformer, "the transformer")
    before, seen = dict(linears_of(original)), dict[tuple[str, int], list[LayerError]]()
    step = [0]

    def watcher(one: Pass) -> None:
        step[0] = one.step or 0

    def measure(name: str, layer: nn.Module, args: tuple[Tensor, ...], _: dict[str, Any], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        found = _measured(name, step[0], args[0], output, layer, before[name])
        seen.setdefault((name, step[0]), []).append(found)

    wanted = [Hook(layer, "output", partial(measure, name)) for name, layer in layers.items()]
    with listening(pipe.watchers, watcher), hooks(wanted):
        pipe(prompt, **settings | {"output_type": "latent"})
    steps = sorted({number for _, number in seen})
    return LayerErrors(_mean(seen[name, number]) for name in layers for number in steps)


@torch.no_grad()
def float8_blame(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    recipe: Any = "fp8",
    *,
    layers: Sequence[str] | None = None,
    input_scales: dict[str, Tensor] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Quantize one Linear at a time and draw: PSNR in dB against the pictures without quantization, lowest first.

    Args:
        pipe: a pipeline whose transformer is not quantized; all weights are restored, also after an error.
        prompt: the prompt to draw.
        recipe: a recipe for `quant.quantize_`.
        layers: names of Linears; None takes those that `quantize_` would quantize.
        input_scales: scales by layer, for recipes with static activations.
        settings: further arguments of the pipeline's call; the seed is 0 unless it is given.

    Raises:
        ValueError: the transformer is quantized already, or a name is none of its Linears.
    """
    settings = {"seed": 0} | settings | {"output_type": "pt"}
    every = dict(linears_of(pipe.transformer))
    refuse_quantized(pipe.transformer, "the transformer")
    if unknown := [name for name in layers or () if name not in every]:
        raise ValueError(f"{unknown[0]!r} is no Linear of the transformer, such as {next(iter(every))!r}")
    scales = input_scales or {}
    truth = pipe(prompt, **settings).images
    found = {}
    for name in layers if layers is not None else [name for name in every if kept(name) is None]:
        with _restored(every[name]):
            quantize_(pipe.transformer, recipe, [name], input_scales={k: v for k, v in scales.items() if k == name})
            error = (pipe(prompt, **settings).images.double() - truth.double()).square().mean()
        found[name] = float(-10 * error.log10())
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _measured(name: str, step: int, x: Tensor, output: Tensor, layer: nn.Linear, before: nn.Linear) -> LayerError:
    weight = layer.weight
    assert isinstance(weight, Float8Tensor)
    wanted = F.linear(x, before.weight.to(x), None if before.bias is None else before.bias.to(x))
    saturated = underflown = float("nan")
    if weight.recipe.activation != "none":
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_activation(rows, weight.recipe, weight.input_scale, as_bytes=False)
        largest = FLOAT8_FORMATS[weight.recipe.activation_format].largest
        saturated = float(((rows.float() / scale).abs() > largest * (1 + 1e-6)).float().mean())
        zero = from_codes(codes, weight.recipe.activation_format) == 0
        underflown = float((zero & (rows != 0)).float().mean())
    return LayerError(name, step, float(x.abs().max()), saturated, underflown, snr(wanted, output))


def _mean(found: Sequence[LayerError]) -> LayerError:
    """Merge several calls of a step: the largest amax, and means of all other numbers."""
    first, count = found[0], len(found)
    shares = (sum(getattr(one, field) for one in found) / count for field in ("saturated", "underflown", "snr"))
    return LayerError(first.layer, first.step, max(one.amax for one in found), *shares)


@contextmanager
def _restored(layer: nn.Linear) -> Iterator[None]:
    weight = layer.weight
    try:
        yield
    finally:
        layer.weight = weight
