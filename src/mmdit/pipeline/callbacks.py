"""Callbacks after each step, as in diffusers: the tensors that they are given, and the changes that they can make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from encoders import Conditioning
from mmdit.pipeline.plan import Run
from mmdit.pipeline.prompts import Ranged
from mmdit.utils import shortened
from samplers import Step, pick

# (pipeline, step index, timestep, tensors by name) -> None, or changed tensors by name
OnStepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
TENSOR_INPUTS = ("latents", "denoised", "prompt_embeds", "pooled_prompt_embeds")
_BY_DEFAULT = ("latents", "denoised")


def tensor_inputs_of(callback: OnStepEnd, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the tensors that a callback is given: its own `tensor_inputs`, those asked for, or the default.

    Raises:
        ValueError: there is no tensor of that name.
        TypeError: the callback is not a function, or the names are not a list.
    """
    if not callable(callback):
        raise TypeError(f"callback_on_step_end is {type(callback).__name__}, expected a function")
    found = getattr(callback, "tensor_inputs", names)
    if found is None:
        return _BY_DEFAULT
    if isinstance(found, str | bytes) or not isinstance(found, Sequence):
        raise TypeError(f"callback_on_step_end_tensor_inputs is {type(found).__name__}, expected a list of names")
    for name in found:
        pick(dict.fromkeys(TENSOR_INPUTS), name, "tensor of callback_on_step_end_tensor_inputs")
    return tuple(dict.fromkeys(found))


def after_step(
    callback: OnStepEnd, names: Sequence[str], pipe: object, run: Run, step: Step, sigma: float, dtype: torch.dtype
) -> None:
    """Call `callback` as diffusers does, and continue with the tensors that it returns.

    Args:
        callback: see `OnStepEnd`.
        names: names of the tensors that it is given.
        pipe: the pipeline.
        run: the drawing.
        step: the step that was just made.
        sigma: the noise level at the beginning of the step; the timestep is 1000 times that.
        dtype: the dtype of the tensors that it is given.

    Raises:
        TypeError: the callback did not return None or a dict of tensors.
        ValueError: it returned a tensor with a wrong name or shape.
    """
    given = {name: _tensor(name, run, step, dtype) for name in names}
    timestep = torch.full((), 1000 * sigma, dtype=torch.float32, device=step.x.device)
    found = callback(pipe, step.i, timestep, dict(given))
    if found is None:
        return
    if not isinstance(found, dict):
        raise TypeError(f"callback_on_step_end returned {type(found).__name__}, expected a dict or None")
    changed = {name: value for name, value in found.items() if name not in given or value is not given[name]}
    for name, value in changed.items():
        if name not in TENSOR_INPUTS or name == "denoised":
            raise ValueError(
                f"callback_on_step_end returned {name!r}; it can change 'latents', 'prompt_embeds' and "
                "'pooled_prompt_embeds'"
            )
        if not isinstance(value, Tensor):
            raise TypeError(f"callback_on_step_end returned {type(value).__name__} for {name!r}, expected a tensor")
    if "latents" in changed:
        step.x = _latents(changed["latents"], step.x)
    if "prompt_embeds" in changed or "pooled_prompt_embeds" in changed:
        now = {name: found.get(name, _tensor(name, run, step, dtype)) for name in TENSOR_INPUTS[2:]}
        _change_conditionings(run, now["prompt_embeds"], now["pooled_prompt_embeds"])


def _latents(latents: Tensor, x: Tensor) -> Tensor:
    if latents.shape != x.shape:
        raise ValueError(f"callback_on_step_end returned latents {list(latents.shape)}, expected {list(x.shape)}")
    return latents.to(x)


def _tensor(name: str, run: Run, step: Step, dtype: torch.dtype) -> Tensor:
    match name:
        case "latents":
            return step.x.to(dtype)
        case "denoised":
            return step.denoised.to(dtype)
        case "prompt_embeds":
            return torch.cat([one.context for one in _conditionings(run)])
        case _:
            return torch.cat([one.pooled for one in _conditionings(run)])


def _conditionings(run: Run) -> list[Conditioning]:
    """The conditionings in diffusers' order: negative prompts, where they are used, then prompts."""
    ranged = [*(run.uncond or ()), *run.cond] if run.plan.uses_uncond else list(run.cond)
    found = [one.conditioning for one in ranged]
    if len(found) > 2 or len({one.context.shape for one in found}) > 1:
        raise ValueError(
            "callback_on_step_end asks for prompt_embeds, which are one tensor, but this drawing has "
            f"{len(found)} conditionings of {sorted({one.context.shape[1] for one in found})} tokens"
        )
    return found


def _change_conditionings(run: Run, context: Tensor, pooled: Tensor) -> None:
    """Continue with other embeddings, either of the prompts alone or of negative prompts and prompts."""
    pictures = run.plan.shape[0]
    if context.ndim != 3 or len(context) != len(pooled) or len(context) not in (1, pictures, 2 * pictures):
        raise ValueError(
            f"callback_on_step_end returned prompt_embeds {list(context.shape)} and pooled_prompt_embeds "
            f"{list(pooled.shape)}, expected {pictures} or {2 * pictures} rows in both"
        )
    if len(context) == 2 * pictures and run.plan.uses_uncond:
        control = run.uncond[0].control if run.uncond else ()
        run.uncond = (Ranged(Conditioning(context[:pictures], pooled[:pictures]), control=control),)
    context, pooled = (part[-pictures:].expand(pictures, *part.shape[1:]) for part in (context, pooled))
    run.cond = (Ranged(Conditioning(context, pooled), control=run.cond[0].control),)
    run.rebuild()


class CallState:
    """The values that diffusers' callbacks read and write on the pipeline while it draws."""

    def __init__(self, guidance_scale: float) -> None:
        self.guidance_scale = guidance_scale
        self.num_timesteps = 0
        self.interrupt = False
        self.run: Run | None = None

    def begin(self, run: Run) -> None:
        """Start a drawing."""
        self.guidance_scale, self.num_timesteps = run.plan.guidance_scale, len(run.plan.sigmas) - 1
        self.interrupt, self.run = False, run

    def end(self) -> None:
        """End the drawing; its values can still be read."""
        self.run = None

    def scale(self, guidance_scale: float) -> None:
        """Continue with another guidance scale."""
        if self.run is None:
            raise AttributeError(
                f"guidance_scale is an argument of the call: pipe(..., guidance_scale={shortened(guidance_scale)})"
            )
        self.guidance_scale = guidance_scale
        self.run.scale(guidance_scale)
