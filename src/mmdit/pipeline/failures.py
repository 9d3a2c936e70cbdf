"""Explanations of failed drawings: no memory was left, or a step gave values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdit.checkpoints.components import Component, title
from mmdit.pipeline.passes import Branch
from mmdit.runtime.hooks import After, Hook, hooks, repeating
from mmdit.utils import is_out_of_memory, weight_bytes
from samplers import Step


@contextmanager
def explained_memory_errors(models: Mapping[Component, nn.Module], what: str) -> Iterator[None]:
    """Turn a failed allocation into a MemoryError that tells what is in memory, what was requested and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        what_failed = (str(error) or type(error).__name__).splitlines()[0]
        weights = ", ".join(f"{title(name)} {weight_bytes(model) / 1e9:.2f} GB" for name, model in models.items())
        raise MemoryError(
            f"out of memory while drawing {what}. Weights: {weights}. What failed: {what_failed}. "
            "What helps: a smaller height and width, fewer pictures at once (num_images_per_prompt), "
            "weights in 16 bits (dtype=torch.bfloat16), models that take turns on the device (offload='stages'), "
            "or decoding in tiles (vae_tile=512)"
        ) from error


class Call(NamedTuple):
    """One call of the model by a solver."""

    x: Tensor
    sigma: float
    branches: Sequence[Branch]


def check_all_finite(values: Tensor, what: str) -> None:
    """Raise FloatingPointError, with their number, where values are NaN or infinite."""
    if bad := int((~torch.isfinite(values)).sum()):
        raise FloatingPointError(
            f"{bad} of {values.numel()} values of {what} are not finite; use a wider dtype, such as torch.float32"
        )


PredictAgain = Callable[[Tensor, float, Sequence[Branch]], Sequence[Tensor]]


def check_finite(step: Step, calls: Sequence[Call], predict: PredictAgain, transformer: nn.Module) -> None:
    """Raise FloatingPointError where the latent after a step is not finite, with the step, its level and the layer.

    Args:
        step: the step that was just made.
        calls: the calls of the model in this step.
        predict: repeats the predictions of a call; captures and attention maps ignore these.
        transformer: the model, whose layers are checked while the predictions are repeated.
    """
    if bool(torch.isfinite(step.x).all()):
        return
    bad = f"{int((~torch.isfinite(step.x)).sum())} of {step.x.numel()} values that are not finite"
    level = f"from sigma {calls[0].sigma:g} to" if calls else "to sigma"
    raise FloatingPointError(f"step {step.i} {level} {step.sigma:g} gave {bad}: {_reason(calls, predict, transformer)}")


def _reason(calls: Sequence[Call], predict: PredictAgain, transformer: nn.Module) -> str:
    for call in calls:
        if not torch.isfinite(call.x).all():
            return f"the input of the model at sigma {call.sigma:g} was not finite"
        with _first_bad(transformer) as names, repeating(), torch.no_grad():
            predictions = predict(*call)
        if names:
            return (
                f"at sigma {call.sigma:g} the first layer with such an output is {names[0]}; "
                "look at its weights and its inputs, or use a wider dtype (float16 ends at 65504)"
            )
        if any(not torch.isfinite(one).all() for one in predictions):
            return f"at sigma {call.sigma:g} all layers are finite, and the prediction made from them is not"
    return "all predictions of the step are finite, so the values come from the sampler, its noise or the guidance"


@contextmanager
def _first_bad(model: nn.Module) -> Iterator[list[str]]:
    """The names of the layers whose output is not finite, in the order in which they finish."""
    found: list[str] = []

    def watch(name: str) -> After:
        def hook(module: nn.Module, _: tuple[object, ...], __: dict[str, Any], output: object) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                found.append(name or type(module).__name__)

        return hook

    with hooks([Hook(module, "output", watch(name)) for name, module in model.named_modules()]):
        yield found
