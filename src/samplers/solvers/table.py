"""The table of solvers: each by its name, with the properties that a pipeline, a table or a benchmark needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from inspect import signature
from typing import Any, Literal

import numpy as np
from torch import Tensor

from samplers.checks import number, shown
from samplers.names import pick
from samplers.solvers import (
    adams,
    cfg_pp,
    dpm_solver,
    exponential,
    first_order,
    predictor_corrector,
    runge_kutta,
    stochastic,
)
from samplers.solvers.arguments import checked, name_of
from samplers.types import Step


@dataclass(frozen=True)
class Solver:
    """A solver and its properties; call it as `solver(denoise, x, sigmas)`. Its arguments are checked.

    `steps_in` is the variable in which its steps are taken:
        "sigma": sigma itself, in which a flow and the variance exploding form are one ODE;
        "log_snr": the half log-SNR of a flow, ln((1 - sigma) / sigma);
        "variance_exploding": -ln sigma, or a time made from it, as if sigma were noise added to an unscaled picture.
            Without fresh noise that is the same ODE with other steps; with fresh noise, or CFG++, the result is not
            distributed as the flow's.
    """

    run: Callable[..., Iterator[Step]]
    order: int  # observed order of convergence on a smooth flow, without fresh noise
    calls: int = 1  # model calls a step (NFE); a step to 0 takes one
    steps_in: Literal["sigma", "log_snr", "variance_exploding"] = "sigma"
    noise: Literal["none", "fresh", "path"] = "none"  # none, independent draws, or increments of a Brownian path
    eta: bool = False  # whether it takes eta, and is an ODE solver at eta=0
    guided: bool = False  # whether denoise must return `samplers.Guided`
    shift: bool = False  # whether it takes the schedule's shift
    drops_second_last: bool = False  # ComfyUI's KSampler asks for one step more and leaves out the second-last level
    own_steps: bool = False  # whether it uses only the ends of the levels, chooses its own steps, and ends above 0
    flow_form: str = ""  # the solver to use instead, where this one is wrong on flows
    origin: Literal["comfyui", "diffusers", "ours"] = "comfyui"  # the implementation whose numbers it reproduces

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", checked(self.run, guided=self.guided))

    @property
    def is_stochastic(self) -> bool:
        """Whether it adds fresh noise."""
        return self.noise != "none"

    @property
    def fits_flows(self) -> bool:
        """Whether its samples are distributed as the flow's."""
        return self.steps_in != "variance_exploding" or not (self.is_stochastic or self.guided)

    def __call__(
        self,
        denoise: Callable[[Tensor, float], Any],
        x: Tensor,
        sigmas: Sequence[float] | np.ndarray | Tensor,
        **options: object,
    ) -> Iterator[Step]:
        """Return an iterator of the steps; the arguments are checked before the first of them.

        Args:
            denoise: (latent, noise level) -> predicted x0, or `samplers.Guided` where `guided`.
            x: the noise to start from, any shape.
            sigmas: [steps + 1] falling noise levels; a tensor, an array or a list.
            options: the solver's own keyword arguments: eta, s_noise, noise, shift, order, gamma ...

        Raises:
            TypeError: the solver has no such option, `denoise` cannot be called, or x is no tensor of numbers.
            ValueError: the levels do not fall from at most 1 to at least 0, or a number is out of its bounds.
        """
        return self.run(denoise, x, sigmas, **options)


def _log_snr_sde(run: Callable[..., Iterator[Step]], order: int, calls: int, **more: Any) -> Solver:
    noise = more.pop("noise", "fresh")
    return Solver(run, order, calls, "log_snr", noise, **({"eta": True, "shift": True} | more))


SOLVERS: dict[str, Solver] = {
    "euler": Solver(first_order.euler, 1),
    "euler_ancestral": Solver(first_order.euler_ancestral, 1, noise="fresh", eta=True),
    "ddim": Solver(first_order.ddim, 1),
    "heun": Solver(runge_kutta.heun, 2, 2),
    "heunpp2": Solver(runge_kutta.heunpp2, 1, 3),
    "dpm_2": Solver(runge_kutta.dpm_2, 2, 2, drops_second_last=True),
    "dpm_2_ancestral": Solver(runge_kutta.dpm_2_ancestral, 2, 2, noise="fresh", eta=True, drops_second_last=True),
    "lms": Solver(adams.lms, 2),
    "ipndm": Solver(adams.ipndm, 2),
    "ipndm_v": Solver(adams.ipndm_v, 2),
    "gradient_estimation": Solver(adams.gradient_estimation, 1),
    "dpmpp_2m": Solver(exponential.dpmpp_2m, 2, steps_in="variance_exploding", flow_form="flow_dpmpp_2m"),
    "res_multistep": Solver(exponential.res_multistep, 2, steps_in="variance_exploding", flow_form="flow_dpmpp_2m"),
    "deis": Solver(adams.deis, 2, steps_in="variance_exploding", flow_form="flow_deis"),
    "uni_pc": Solver(
        predictor_corrector.uni_pc, 2, steps_in="variance_exploding", drops_second_last=True, flow_form="flow_uni_pc"
    ),
    "uni_pc_bh2": Solver(
        predictor_corrector.uni_pc_bh2,
        2,
        steps_in="variance_exploding",
        drops_second_last=True,
        flow_form="flow_uni_pc",
    ),
    "dpm_fast": Solver(dpm_solver.dpm_fast, 2, 1, steps_in="variance_exploding", own_steps=True),
    "dpm_adaptive": Solver(dpm_solver.dpm_adaptive, 3, 3, steps_in="variance_exploding", own_steps=True),
    "dpmpp_2s_ancestral": Solver(runge_kutta.dpmpp_2s_ancestral, 2, 2, steps_in="log_snr", noise="fresh", eta=True),
    "dpmpp_sde": _log_snr_sde(exponential.dpmpp_sde, 2, 2, noise="path"),
    "dpmpp_2m_sde": _log_snr_sde(exponential.dpmpp_2m_sde, 2, 1, noise="path"),
    "dpmpp_2m_sde_heun": _log_snr_sde(exponential.dpmpp_2m_sde_heun, 2, 1, noise="path"),
    "dpmpp_3m_sde": _log_snr_sde(exponential.dpmpp_3m_sde, 2, 1, noise="path"),
    "er_sde": _log_snr_sde(stochastic.er_sde, 1, 1, eta=False),
    "seeds_2": _log_snr_sde(stochastic.seeds_2, 2, 2),
    "seeds_3": _log_snr_sde(stochastic.seeds_3, 3, 3),
    "sa_solver": _log_snr_sde(predictor_corrector.sa_solver, 3, 1),
    "sa_solver_pece": _log_snr_sde(predictor_corrector.sa_solver_pece, 3, 2),
    "lcm": Solver(first_order.lcm, 1, noise="fresh"),
    "ddpm": Solver(first_order.ddpm, 1, steps_in="variance_exploding", noise="fresh", flow_form="flow_ddpm"),
    "res_multistep_ancestral": Solver(
        exponential.res_multistep_ancestral,
        2,
        steps_in="variance_exploding",
        noise="fresh",
        eta=True,
        flow_form="dpmpp_2m_sde_heun",
    ),
    "euler_cfg_pp": Solver(cfg_pp.euler_cfg_pp, 1, guided=True),
    "euler_ancestral_cfg_pp": Solver(cfg_pp.euler_ancestral_cfg_pp, 1, noise="fresh", eta=True, guided=True),
    "dpmpp_2m_cfg_pp": Solver(
        cfg_pp.dpmpp_2m_cfg_pp, 2, steps_in="variance_exploding", guided=True, flow_form="euler_cfg_pp"
    ),
    "dpmpp_2s_ancestral_cfg_pp": Solver(
        cfg_pp.dpmpp_2s_ancestral_cfg_pp,
        2,
        2,
        "variance_exploding",
        "fresh",
        eta=True,
        guided=True,
        flow_form="euler_ancestral_cfg_pp",
    ),
    "res_multistep_cfg_pp": Solver(
        cfg_pp.res_multistep_cfg_pp, 2, steps_in="variance_exploding", guided=True, flow_form="euler_cfg_pp"
    ),
    "res_multistep_ancestral_cfg_pp": Solver(
        cfg_pp.res_multistep_ancestral_cfg_pp,
        2,
        1,
        "variance_exploding",
        "fresh",
        eta=True,
        guided=True,
        flow_form="euler_ancestral_cfg_pp",
    ),
    "gradient_estimation_cfg_pp": Solver(
        cfg_pp.gradient_estimation_cfg_pp, 1, steps_in="variance_exploding", guided=True, flow_form="euler_cfg_pp"
    ),
    "flow_heun": Solver(runge_kutta.flow_heun, 2, 2, origin="diffusers"),
    "flow_dpmpp_2m": Solver(exponential.flow_dpmpp_2m, 2, 1, "log_snr", origin="diffusers"),
    "flow_uni_pc": Solver(predictor_corrector.flow_uni_pc, 2, 1, "log_snr", origin="diffusers"),
    "flow_deis": Solver(adams.flow_deis, 2, 1, "log_snr", origin="diffusers"),
    "flow_ddpm": Solver(first_order.flow_ddpm, 1, 1, "log_snr", "fresh", eta=True, origin="ours"),
}


def as_solver(sampler: str | Solver | Callable[..., Iterator[Step]]) -> Solver:
    """Return the solver that a name, a `Solver` or a function of your own stands for.

    A function of your own is a generator `run(denoise, x, sigmas, *, ...)`:
        denoise: (latent, noise level as a float) -> predicted x0, of the latent's shape.
        x: the noise to start from, a tensor of any shape; the solver shall not change it in place.
        sigmas: float64 [steps + 1] on the CPU, falling, from at most 1, usually to 0.
        It yields a `Step(i, sigma, x, denoised)` after every step, i from 0, with the latent's new level, and continues
        from `step.x`, which the caller may have changed. A keyword argument `noise`, `eta` or `shift` makes it known as
        a solver that takes fresh noise, that is an ODE solver at eta 0, or that takes the schedule's shift. A solver
        that takes `samplers.Guided` is given as `Solver(run, order, guided=True)`. Any callable will do: a method, an
        object with `__call__`, a `functools.partial`. `partial(samplers.euler_ancestral, s_noise=0.5)` is a solver of
        the table with other options, and keeps its properties.

    Raises:
        TypeError: it is none of these, or the function does not take (denoise, x, sigmas).
        ValueError: the name is unknown; the nearest names are listed.

    What the function yields is checked in every step: a TypeError or ValueError says what is wrong with it.
    """
    if isinstance(sampler, Solver):
        return sampler
    if isinstance(sampler, str):
        return pick(SOLVERS, sampler, "sampler")
    for one in SOLVERS.values():
        if one.run is sampler:
            return one
        if isinstance(sampler, partial) and one.run is sampler.func and not sampler.args:
            return replace(one, run=sampler)
    name = name_of(sampler)
    if not callable(sampler) or isinstance(sampler, type):
        raise TypeError(f"sampler is {shown(sampler)}, expected a name, a samplers.Solver or a generator function")
    takes = signature(sampler).parameters
    try:
        signature(sampler).bind(None, None, None)
    except TypeError as error:
        raise TypeError(f"sampler {name} must take (denoise, x, sigmas), but it takes {signature(sampler)}") from error
    noise: Literal["none", "fresh"] = "fresh" if "noise" in takes else "none"
    return Solver(
        _checked_steps(sampler), order=0, noise=noise, eta="eta" in takes, shift="shift" in takes, origin="ours"
    )


def _checked_steps(run: Callable[..., Iterator[Step]]) -> Callable[..., Iterator[Step]]:
    """Return `run` with a check of what it yields."""

    @wraps(run)
    def checked(
        denoise: Callable[[Tensor, float], Any], x: Tensor, sigmas: Tensor, *rest: object, **options: object
    ) -> Iterator[Step]:
        name, steps = name_of(run), run(denoise, x, sigmas, *rest, **options)
        if not isinstance(steps, Iterator):
            raise TypeError(f"sampler {name} returned {shown(steps)}, expected a generator that yields samplers.Step")
        step = None
        for step in steps:
            if not isinstance(step, Step):
                raise TypeError(f"sampler {name} yielded {shown(step)}, expected a samplers.Step")
            if not isinstance(step.x, Tensor) or step.x.shape != x.shape:
                found = list(step.x.shape) if isinstance(step.x, Tensor) else shown(step.x)
                raise ValueError(f"sampler {name} yielded a latent {found}, expected the shape {list(x.shape)}")
            number(f"sampler {name}: step.sigma", step.sigma, 0, 1)
            yield step
        if step is None:
            raise ValueError(f"sampler {name} yielded no step for {len(sigmas) - 1} steps")

    checked.__name__ = name_of(run)
    return checked


def solvers_markdown() -> str:
    """Return a Markdown table of all solvers and their properties."""
    words = {
        "sigma": "sigma",
        "log_snr": "log-SNR",
        "variance_exploding": "-ln sigma (variance exploding)",
        "none": "",
        "fresh": "fresh",
        "path": "Brownian path",
    }
    head = ("sampler", "order", "NFE per step", "steps in", "noise", "right on flows", "instead use", "numbers of")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, one in SOLVERS.items():
        cells = (
            f"`{name}`",
            one.order,
            one.calls,
            words[one.steps_in],
            words[one.noise],
            "yes" if one.fits_flows else "no",
            f"`{one.flow_form}`" if one.flow_form else "",
            one.origin,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
