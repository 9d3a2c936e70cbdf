"""What a pipeline hands to a sampler beside the model: its shift, and noise as the profile draws it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdit.pipeline.arguments import Generators
from mmdit.pipeline.profiles import StepNoise
from samplers import BrownianTree, Fresh, Noise, Solver


def solver_options(
    solver: Solver, x: Tensor, levels: Tensor, shift: float, generators: Generators, rule: StepNoise
) -> dict[str, Any]:
    """The options of a solver in a drawing.

    Args:
        solver: of `samplers.SOLVERS`.
        x: what it starts from.
        levels: its schedule.
        shift: of the schedule.
        generators: what the starting noise was drawn with; None is torch's global state.
        rule: of the profile.

    Raises:
        ImportError: the rule asks for a Brownian tree, and torchsde is not installed.
    """
    options: dict[str, Any] = {"shift": shift} if solver.shift else {}
    if solver.is_stochastic:
        options["noise"] = _continued(x, generators) if rule == "continued" else _again(solver, x, levels, generators)
    return options


def _continued(x: Tensor, generators: Generators) -> Noise:
    return Fresh(x, generators)


def _again(solver: Solver, x: Tensor, levels: Tensor, generators: Generators) -> Noise:
    """Noise from the seeds once more: of ComfyUI's two kinds."""
    seeds = _seeds(generators)
    if solver.noise == "path":
        if seeds is None:
            seeds = int(torch.randint(2**63 - 1, ()))
        return BrownianTree(x, float(levels[levels > 0].min()), float(levels.max()), seeds)
    if seeds is None:
        return Fresh(x)
    if isinstance(seeds, int):
        return Fresh(x, torch.Generator(x.device).manual_seed(seeds))
    return Fresh(x, [torch.Generator(x.device).manual_seed(seed) for seed in seeds])


def _seeds(generators: Generators) -> int | list[int] | None:
    """What generators were seeded with."""
    if generators is None or isinstance(generators, torch.Generator):
        return None if generators is None else generators.initial_seed()
    return [generator.initial_seed() for generator in generators]
