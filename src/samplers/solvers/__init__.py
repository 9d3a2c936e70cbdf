"""Solvers of the flow ODE and SDE, each a generator that yields a `Step` after every step and continues from `step.x`.

A solver calls `denoise(x, sigma)`, which returns the predicted picture x0, and knows nothing of prompts or guidance. It
never switches gradients on or off: a graph is recorded only where weights or latents require gradients.
"""

from samplers.solvers.table import SOLVERS, Solver, as_solver, solvers_markdown

__all__ = ["SOLVERS", "Solver", "as_solver", "solvers_markdown"]
