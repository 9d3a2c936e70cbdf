"""Calibration: statistics of the inputs of the transformer's Linears while prompts are drawn, and their use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from encoders import checked_prompts
from mmdit.models.blocks import JointBlock
from mmdit.models.lora import all_beside
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.compiled import refuse_compiled
from quant.folds import Fold, Rows, corrected_bias, fold_mean, fold_scale, smoothing
from quant.observers import Observed, check_percentile, observe
from quant.quantize import Report, quantize_, refuse_quantized
from quant.recipe import Recipe, as_static_recipe
from quant.rounding import Moments
from quant.scaling import scale_of
from quant.tensor import Float8Tensor

_BEFORE = "calibrate and fold before quantizing"
_UNFOLDED = (
    "smooth and mean change what Linears read, and so what LoRAs do; write the merged weights by pipe.save_pretrained, "
    "and load them, or give neither"
)


@dataclass(frozen=True)
class Calibration:
    """Statistics of the inputs of the transformer's Linears, by name of the Linear; the prompts, and steps of each."""

    observed: Mapping[str, Observed] = field(repr=False)
    prompts: tuple[str, ...]
    steps: int

    def amax(self, percentile: float = 100.0) -> dict[str, Tensor]:
        """The largest absolute input of each Linear, or a percentile of the absolute inputs, float32 ().

        Raises:
            ValueError: a Linear had no input; or see `quant.Observed.percentile`.
        """
        _check_all_ran(self)
        return {name: seen.percentile(percentile) for name, seen in self.observed.items()}

    def moments(self) -> dict[str, Moments]:
        """Mean and second moments of the inputs of each Linear, for `quant.quantize_(moments=)`.

        Raises:
            ValueError: a Linear had no input, or the calibration was without `second=True`.
        """
        _check_all_ran(self)
        return {name: seen.moments for name, seen in self.observed.items()}


def calibrate(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    num_inference_steps: int | None = None,
    *,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch: int = 4,
    height: int | None = None,
    width: int | None = None,
    second: bool = False,
) -> Calibration:
    """Draw the prompts, and collect statistics of the inputs of the transformer's Linears over all guidance branches.

    Args:
        pipe: the pipeline, which does not change. Its transformer must be neither quantized nor compiled.
        prompts: some tens of prompts, similar to those that will be drawn.
        num_inference_steps, guidance_scale, height, width: the values that will be drawn with; None is the profile's.
        seed: the seed of the first picture; the other pictures have the seeds that follow it.
        batch: the number of pictures that are drawn at once.
        second: whether to collect second moments, for rounding; see `quant.observe`.

    Raises:
        ValueError: the transformer is quantized already or compiled, or the input of a Linear is not finite.
        TooLittleMemory: the budget of the pipeline (memory=) is too small for a drawing and the statistics.
    """
    prompts = checked_prompts(prompts)
    refuse_quantized(pipe.transformer, "the transformer", _BEFORE)
    refuse_compiled(pipe.transformer, "the transformer")
    with (
        observe(pipe.transformer, second=second) as observed,
        pipe._observing(sum(one.nbytes for one in observed.values())),
    ):
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            seeds = [seed + first + k for k in range(len(some))]
            pipe(
                some,
                seed=seeds,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                output_type="latent",
            )
    return Calibration(observed, tuple(prompts), len(pipe.sigmas(num_inference_steps)) - 1)


def folds_of(model: MMDiT) -> Iterator[Fold]:
    """All tensors between two Linears of the model from which a scale or a mean can be moved into the Linears.

    The inputs of qkv and of fc1 are computed by the shift and scale rows of adaLN. The input of attention's proj is a
    weighted mean of values, so the v rows of qkv compute it, in joint attention those of both streams. The input of fc2
    is the output of the GELU, from which nothing can be moved.
    """
    width = model.config.hidden_size
    for i, block in enumerate(model.joint_blocks):
        assert isinstance(block, JointBlock)
        streams = {"context_block": block.context_block, "x_block": block.x_block}
        values, projections = [], []
        for stream, part in streams.items():
            name = f"joint_blocks.{i}.{stream}"
            yield Fold(_adaln(name, 0, width), (f"{name}.attn.qkv",))
            values.append(Rows(f"{name}.attn.qkv", 2 * width, 3 * width))
            if part.chunks > 2:
                yield Fold(_adaln(name, 3, width), (f"{name}.mlp.fc1",))
                projections.append(f"{name}.attn.proj")
            if part.chunks > 6:
                yield Fold(_adaln(name, 6, width), (f"{name}.attn2.qkv",))
                yield Fold((Rows(f"{name}.attn2.qkv", 2 * width, 3 * width),), (f"{name}.attn2.proj",))
        yield Fold(tuple(values), tuple(projections))


def _adaln(stream: str, first: int, width: int) -> tuple[Rows, Rows]:
    linear = f"{stream}.adaLN_modulation.1"
    return (
        Rows(linear, first * width, (first + 1) * width),
        Rows(linear, (first + 1) * width, (first + 2) * width, "gain"),
    )


def fold(model: MMDiT, seen: Calibration, *, smooth: float | None = None, mean: bool = False) -> int:
    """Move means, then scales, out of the inputs of Linears; the model's function stays the same up to rounding.

    Args:
        model: the transformer, which is changed in place.
        seen: a calibration of the model in its present state; it does not apply to the model afterwards.
        smooth: the strength of `quant.folds.smoothing`, usually 0.5; None moves no scales.
        mean: whether to move the calibrated mean of each channel.

    Returns:
        The number of tensors that were changed.

    Raises:
        ValueError: the model is quantized already, a Linear had no input in the calibration, or LoRAs are attached,
            whose inputs would change. The model is then unchanged.
    """
    refuse_quantized(model, "the transformer", _BEFORE)
    _check_all_ran(seen)
    if there := list(all_beside(model)):
        raise ValueError(f"LoRAs or adapters are beside {len(there)} Linears, such as {there[0]}: {_UNFOLDED}")
    count = 0
    model.folded = model.folded or mean or smooth is not None
    for place in folds_of(model):
        readers = [seen.observed[name] for name in place.consumers]
        rows = sum(reader.rows for reader in readers)
        average = sum(reader.mean * (reader.rows / rows) for reader in readers)
        assert isinstance(average, Tensor)
        state = dict(model.state_dict())
        if mean:
            _load(model, fold_mean(state, place, average))
            state = dict(model.state_dict())
        if smooth is not None:
            # An estimate of the range after the mean is subtracted, which is precise enough for a factor.
            amax = torch.stack([reader.channel_amax for reader in readers]).amax(0)
            amax = (amax - average.abs()).clamp(min=0) if mean else amax
            weights = [state[f"{name}.weight"] for name in place.consumers]
            _load(model, fold_scale(state, place, smoothing(amax, weights, smooth)))
        count += 1
    return count


def quantize_static(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    num_inference_steps: int | None = None,
    *,
    recipe: Recipe | str = "fp8-static",
    smooth: float | None = None,
    mean: bool = False,
    bias: bool = False,
    percentile: float = 100.0,
    **settings: Any,
) -> Report:
    """Calibrate the transformer and quantize it with static scales; each option works alone.

    Args:
        pipe: the pipeline, whose transformer is changed in place.
        prompts, num_inference_steps, settings: see `calibrate`.
        recipe: a recipe with static activations.
        smooth, mean: see `fold`; the scales are then calibrated once more. They exclude LoRAs, before and afterwards.
        bias: whether to correct the biases for the mean error that rounding the weights causes.
        percentile: the percentile of the absolute inputs that the scales cover; 100 covers all of them.

    Raises:
        ValueError: the recipe is unknown or not static, or the percentile is out of range; see `calibrate` and
            `quant.quantize_`.
    """
    recipe = as_static_recipe(recipe)
    check_percentile(percentile)
    if (smooth is not None or mean) and pipe.get_list_adapters().get("transformer"):
        raise ValueError(f"the pipeline has LoRAs: {_UNFOLDED}")
    seen = calibrate(pipe, prompts, num_inference_steps, **settings)
    if smooth is not None or mean:
        fold(pipe.transformer, seen, smooth=smooth, mean=mean)
        seen = calibrate(pipe, prompts, num_inference_steps, **settings)
    return quantize_calibrated(pipe.transformer, seen, recipe, bias=bias, percentile=percentile)


def quantize_calibrated(
    model: MMDiT,
    seen: Calibration,
    recipe: Recipe | str = "fp8-static",
    *,
    bias: bool = False,
    percentile: float = 100.0,
) -> Report:
    """Quantize with the scales of a calibration of the model in its present state; see `quantize_static`.

    Raises:
        ValueError: the recipe is unknown or not static, or a Linear had no input; see `quant.quantize_`.
    """
    recipe = as_static_recipe(recipe)
    before = dict(model.state_dict())
    scales = {name: scale_of(amax, recipe.activation_format) for name, amax in seen.amax(percentile).items()}
    report = quantize_(model, recipe, input_scales=scales)
    if bias:
        correct_biases(model, before, seen)
    return report


@torch.no_grad()
def correct_biases(model: MMDiT, before: Mapping[str, Tensor], seen: Calibration) -> None:
    """Change the biases of quantized Linears so that their output keeps its mean; see `quant.folds.corrected_bias`.

    Args:
        model: the quantized model.
        before: its state dict before quantization.
        seen: a calibration of the model before quantization.
    """
    for name, observed in seen.observed.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight: Tensor = linear.weight
        if isinstance(weight, Float8Tensor) and linear.bias is not None:
            linear.bias.copy_(corrected_bias(linear.bias, before[f"{name}.weight"], weight.dequantize(), observed.mean))


def _load(model: MMDiT, changed: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in changed.items():
            model.get_parameter(key).copy_(value)


def _check_all_ran(seen: Calibration) -> None:
    if idle := [name for name, observed in seen.observed.items() if not observed.rows]:
        first = ", ".join(idle[:3]) + (f", and {len(idle) - 3} more" if len(idle) > 3 else "")
        raise ValueError(
            f"{len(idle)} of {len(seen.observed)} Linears read nothing in the calibration and have no range: {first}. "
            "Calibrate again with every block running: none of them skipped, replaced or compiled"
        )
