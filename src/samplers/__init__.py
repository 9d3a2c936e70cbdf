"""Flow-matching samplers: schedules, solvers, guidance, noise. A leaf: imports torch and numpy and nothing of ours."""

from samplers.guidance import Guided, cfg, only_x0
from samplers.names import pick
from samplers.noise import gaussian
from samplers.schedules import SCHEDULES, checked_sigmas, shifted, sigmas
from samplers.solvers import SOLVERS, Denoise, Solver, Step, dpmpp_2m, euler

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Denoise",
    "Guided",
    "Solver",
    "Step",
    "cfg",
    "checked_sigmas",
    "dpmpp_2m",
    "euler",
    "gaussian",
    "only_x0",
    "pick",
    "shifted",
    "sigmas",
]
