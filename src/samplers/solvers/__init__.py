"""Solvers of the flow ODE and SDE. Each is a walk: it yields a `Step` after every step and goes on from `step.x`.

A solver calls `denoise(x, sigma)`, which gives the predicted picture x0, and knows nothing of prompts or guidance.
It leaves gradients as the caller has them: a graph grows only where weights or latents ask for one.
"""

from samplers.solvers.table import SOLVERS, Solver, solvers_markdown
from samplers.types import Denoise, Step

__all__ = ["SOLVERS", "Denoise", "Solver", "Step", "solvers_markdown"]
