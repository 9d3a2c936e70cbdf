"""What a call does between two steps for its caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from samplers import Step

# (pipeline, step index, timestep, {"latents": [b, c, h, w], "denoised": [b, c, h, w]}) -> None, or {"latents": others}
OnStepEnd = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]


def after_step(callback: OnStepEnd, pipe: object, step: Step, sigma: float) -> None:
    """Call `callback` as diffusers does; latents that it returns are what the solver goes on from.

    Args:
        callback: see `OnStepEnd`; diffusers passes the latents alone, here the predicted picture is there too.
        pipe: the pipeline.
        step: just made.
        sigma: the level that it started from; the timestep is 1000 times that.

    Raises:
        TypeError: the callback returned something else than a dict or None.
        ValueError: it returned another key than latents, or latents of another shape.
    """
    given = {"latents": step.x, "denoised": step.denoised}
    found = callback(pipe, step.i, 1000 * sigma, dict(given))
    if found is None:
        return
    if not isinstance(found, dict):
        raise TypeError(f"callback_on_step_end returned {type(found).__name__}, expected a dict or None")
    if odd := sorted(set(found) - set(given)):
        raise ValueError(f"callback_on_step_end returned {odd[0]!r}; what it can change is 'latents'")
    latents = found.get("latents", step.x)
    if latents.shape != step.x.shape:
        raise ValueError(f"callback_on_step_end returned latents {list(latents.shape)}, expected {list(step.x.shape)}")
    step.x = latents.to(step.x)
