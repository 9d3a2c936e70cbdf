"""Flow-matching samplers: schedules, solvers, guidance, noise. A leaf: imports torch and numpy and nothing of ours."""

from samplers.guidance import (
    Weaker,
    Within,
    averaged,
    cfg,
    guide,
    one_by_one,
    only_x0,
    plain,
    projected,
    rescaled,
    zero_init,
    zero_star,
)
from samplers.names import pick
from samplers.noise import BrownianTree, Fresh, Noise, gaussian
from samplers.schedules import SCHEDULES, checked_sigmas, resolution_shift, shifted, sigmas
from samplers.solvers import SOLVERS, Solver, solvers_markdown
from samplers.solvers.exponential import dpmpp_2m
from samplers.solvers.first_order import euler
from samplers.types import Denoise, Guide, Guided, Mix, Predict, Step
from samplers.windows import Window, first_steps, gap, level_at, percents, steps_inside

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "BrownianTree",
    "Denoise",
    "Fresh",
    "Guide",
    "Guided",
    "Mix",
    "Noise",
    "Predict",
    "Solver",
    "Step",
    "Weaker",
    "Window",
    "Within",
    "averaged",
    "cfg",
    "checked_sigmas",
    "dpmpp_2m",
    "euler",
    "first_steps",
    "gap",
    "gaussian",
    "guide",
    "level_at",
    "one_by_one",
    "only_x0",
    "percents",
    "pick",
    "plain",
    "projected",
    "rescaled",
    "resolution_shift",
    "shifted",
    "sigmas",
    "solvers_markdown",
    "steps_inside",
    "zero_init",
    "zero_star",
]
