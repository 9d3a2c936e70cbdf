"""The table of solvers: each by its name, with the properties that a pipeline, a table or a benchmark needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from samplers.schedules import check_falls
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
from samplers.types import Step


@dataclass(frozen=True)
class Solver:
    """A solver and its properties; call it as `solver(denoise, x, sigmas)`.

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
    origin: Literal["comfyui", "diffusers", "ours"] = "comfyui"  # whose numbers it reproduces

    @property
    def is_stochastic(self) -> bool:
        """Whether it adds fresh noise."""
        return self.noise != "none"

    @property
    def fits_flows(self) -> bool:
        """Whether its samples are distributed as the flow's."""
        return self.steps_in != "variance_exploding" or not (self.is_stochastic or self.guided)

    def __call__(
        self, denoise: Callable[[Tensor, float], Any], x: Tensor, sigmas: Tensor, **options: Any
    ) -> Iterator[Step]:
        """Return an iterator of the steps; the arguments are checked before the first of them.

        Args:
            denoise: (latent, noise level) -> predicted x0, or `samplers.Guided` where `guided`.
            x: the noise to start from, any shape.
            sigmas: [steps + 1] falling noise levels.
            options: the solver's own keyword arguments: eta, s_noise, noise, shift, order, gamma ...

        Raises:
            ValueError: the levels do not fall from at most 1 to at least 0.
        """
        check_falls(sigmas)
        if sigmas[0] > 1 or sigmas[-1] < 0:
            raise ValueError(f"sigmas go from {sigmas[0]} to {sigmas[-1]}, expected levels between 1 and 0")
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
