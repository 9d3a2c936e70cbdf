"""Flow-matching samplers: schedules, solvers, guidance, noise. A leaf: imports torch and numpy and nothing of ours."""

from samplers.guidance import Guided, cfg, only_x0
from samplers.names import pick
from samplers.noise import BrownianTree, Fresh, Noise, gaussian
from samplers.schedules import SCHEDULES, checked_sigmas, resolution_shift, shifted, sigmas
from samplers.solvers import SOLVERS, Denoise, Solver, Step, solvers_markdown
from samplers.solvers.exponential import dpmpp_2m
from samplers.solvers.first_order import euler

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "BrownianTree",
    "Denoise",
    "Fresh",
    "Guided",
    "Noise",
    "Solver",
    "Step",
    "cfg",
    "checked_sigmas",
    "dpmpp_2m",
    "euler",
    "gaussian",
    "only_x0",
    "pick",
    "resolution_shift",
    "shifted",
    "sigmas",
    "solvers_markdown",
]
