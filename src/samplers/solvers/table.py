"""Every solver by its name, with what a pipeline, a table or a bench must know of it."""

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

    `on_flows` says whether it takes sigma for what it is on a flow:
        "sigma": it steps in sigma itself, where a flow and noise added to a whole picture are one ODE;
        "ratio": it steps in the flow's half log signal-to-noise ratio;
        "as_added": it steps in the logarithm of sigma, or in a time made from it, as if sigma were noise added to a
            whole picture. Without fresh noise that is the same ODE, only with other steps; with fresh noise, or CFG++,
            the result is not a flow's.
    """

    run: Callable[..., Iterator[Step]]
    order: int  # observed on a smooth flow without fresh noise, started as it starts itself
    calls: int = 1  # of the model in a step; a step to 0 takes one
    on_flows: Literal["sigma", "ratio", "as_added"] = "sigma"
    noise: Literal["none", "fresh", "path"] = "none"  # what it asks for: nothing, independent draws, a Brownian path
    eta: bool = False  # whether eta=0 makes an ODE solver of it
    guided: bool = False  # whether denoise must return `samplers.Guided`
    shift: bool = False  # whether it takes the schedule's shift
    drops_second_last: bool = False  # ComfyUI's KSampler asks for a step more and leaves out the second-last level
    own_steps: bool = False  # whether it takes only the ends of the levels, and ends above 0
    flow_form: str = ""  # which solver does the same on flows
    origin: Literal["comfyui", "diffusers", "ours"] = "comfyui"  # whose numbers it gives

    @property
    def is_stochastic(self) -> bool:
        """Whether it adds fresh noise."""
        return self.noise != "none"

    @property
    def fits_flows(self) -> bool:
        """Whether its result is a flow's: False where fresh noise or CFG++ of a whole picture spoils it."""
        return self.on_flows != "as_added" or not (self.is_stochastic or self.guided)

    def __call__(
        self, denoise: Callable[[Tensor, float], Any], x: Tensor, sigmas: Tensor, **options: Any
    ) -> Iterator[Step]:
        """The steps; what is wrong with the levels is said before the first of them.

        Args:
            denoise: x0, or `samplers.Guided` where `guided`, of a latent at a level.
            x: where to start.
            sigmas: [steps + 1], falling.
            options: of the solver: eta, s_noise, noise, shift ...

        Raises:
            ValueError: the levels do not fall from at most 1 to at least 0.
        """
        check_falls(sigmas)
        if sigmas[0] > 1 or sigmas[-1] < 0:
            raise ValueError(f"sigmas go from {sigmas[0]} to {sigmas[-1]}, expected levels between 1 and 0")
        return self.run(denoise, x, sigmas, **options)


def _ratio_sde(run: Callable[..., Iterator[Step]], order: int, calls: int, **more: Any) -> Solver:
    noise = more.pop("noise", "fresh")
    return Solver(run, order, calls, "ratio", noise, **({"eta": True, "shift": True} | more))


SOLVERS: dict[str, Solver] = {
    "euler": Solver(first_order.euler, 1),
    "euler_ancestral": Solver(first_order.euler_ancestral, 1, noise="fresh", eta=True),
    "ddim": Solver(first_order.euler, 1),  # Euler's method is DDIM in sigma; ComfyUI's only seeds inpainting otherwise
    "heun": Solver(runge_kutta.heun, 2, 2),
    "heunpp2": Solver(runge_kutta.heunpp2, 1, 3),
    "dpm_2": Solver(runge_kutta.dpm_2, 2, 2, drops_second_last=True),
    "dpm_2_ancestral": Solver(runge_kutta.dpm_2_ancestral, 2, 2, noise="fresh", eta=True, drops_second_last=True),
    "lms": Solver(adams.lms, 2),
    "ipndm": Solver(adams.ipndm, 2),
    "ipndm_v": Solver(adams.ipndm_v, 2),
    "gradient_estimation": Solver(adams.gradient_estimation, 1),
    "dpmpp_2m": Solver(exponential.dpmpp_2m, 2, on_flows="as_added", flow_form="flow_dpmpp_2m"),
    "res_multistep": Solver(exponential.res_multistep, 2, on_flows="as_added", flow_form="flow_dpmpp_2m"),
    "deis": Solver(adams.deis, 2, on_flows="as_added", flow_form="flow_deis"),
    "uni_pc": Solver(
        predictor_corrector.uni_pc, 2, on_flows="as_added", drops_second_last=True, flow_form="flow_uni_pc"
    ),
    "uni_pc_bh2": Solver(
        predictor_corrector.uni_pc_bh2, 2, on_flows="as_added", drops_second_last=True, flow_form="flow_uni_pc"
    ),
    "dpm_fast": Solver(dpm_solver.dpm_fast, 2, 1, on_flows="as_added", own_steps=True),
    "dpm_adaptive": Solver(dpm_solver.dpm_adaptive, 3, 3, on_flows="as_added", own_steps=True),
    "dpmpp_2s_ancestral": Solver(runge_kutta.dpmpp_2s_ancestral, 2, 2, on_flows="ratio", noise="fresh", eta=True),
    "dpmpp_sde": _ratio_sde(exponential.dpmpp_sde, 2, 2, noise="path"),
    "dpmpp_2m_sde": _ratio_sde(exponential.dpmpp_2m_sde, 2, 1, noise="path"),
    "dpmpp_2m_sde_heun": _ratio_sde(exponential.dpmpp_2m_sde_heun, 2, 1, noise="path"),
    "dpmpp_3m_sde": _ratio_sde(exponential.dpmpp_3m_sde, 2, 1, noise="path"),
    "er_sde": _ratio_sde(stochastic.er_sde, 1, 1, eta=False),
    "seeds_2": _ratio_sde(stochastic.seeds_2, 2, 2),
    "seeds_3": _ratio_sde(stochastic.seeds_3, 3, 3),
    "sa_solver": _ratio_sde(predictor_corrector.sa_solver, 3, 1),
    "sa_solver_pece": _ratio_sde(predictor_corrector.sa_solver_pece, 3, 2),
    "lcm": Solver(first_order.lcm, 1, noise="fresh"),
    "ddpm": Solver(first_order.ddpm, 1, on_flows="as_added", noise="fresh", flow_form="flow_ddpm"),
    "res_multistep_ancestral": Solver(
        exponential.res_multistep_ancestral,
        2,
        on_flows="as_added",
        noise="fresh",
        eta=True,
        flow_form="dpmpp_2m_sde_heun",
    ),
    "euler_cfg_pp": Solver(cfg_pp.euler_cfg_pp, 1, guided=True),
    "euler_ancestral_cfg_pp": Solver(cfg_pp.euler_ancestral_cfg_pp, 1, noise="fresh", eta=True, guided=True),
    "dpmpp_2m_cfg_pp": Solver(cfg_pp.dpmpp_2m_cfg_pp, 2, on_flows="as_added", guided=True, flow_form="euler_cfg_pp"),
    "dpmpp_2s_ancestral_cfg_pp": Solver(
        cfg_pp.dpmpp_2s_ancestral_cfg_pp,
        2,
        2,
        "as_added",
        "fresh",
        eta=True,
        guided=True,
        flow_form="euler_ancestral_cfg_pp",
    ),
    "res_multistep_cfg_pp": Solver(
        cfg_pp.res_multistep_cfg_pp, 2, on_flows="as_added", guided=True, flow_form="euler_cfg_pp"
    ),
    "res_multistep_ancestral_cfg_pp": Solver(
        cfg_pp.res_multistep_ancestral_cfg_pp,
        2,
        1,
        "as_added",
        "fresh",
        eta=True,
        guided=True,
        flow_form="euler_ancestral_cfg_pp",
    ),
    "gradient_estimation_cfg_pp": Solver(
        cfg_pp.gradient_estimation_cfg_pp, 1, on_flows="as_added", guided=True, flow_form="euler_cfg_pp"
    ),
    "flow_heun": Solver(runge_kutta.heun, 2, 2, origin="diffusers"),
    "flow_dpmpp_2m": Solver(exponential.flow_dpmpp_2m, 2, 1, "ratio", origin="diffusers"),
    "flow_uni_pc": Solver(predictor_corrector.flow_uni_pc, 2, 1, "ratio", origin="diffusers"),
    "flow_deis": Solver(adams.flow_deis, 2, 1, "ratio", origin="diffusers"),
    "flow_ddpm": Solver(first_order.flow_ddpm, 1, 1, "ratio", "fresh", eta=True, origin="ours"),
}


def solvers_markdown() -> str:
    """All solvers as a table."""
    words = {
        "sigma": "sigma",
        "ratio": "ln((1 - sigma) / sigma)",
        "as_added": "-ln sigma or a time made from it",
        "none": "",
        "fresh": "fresh",
        "path": "Brownian path",
    }
    lines = ["| solver | order | calls a step | steps in | noise | a flow's result | on flows rather | numbers of |"]
    lines += ["| --- " * 8 + "|"]
    for name, one in SOLVERS.items():
        cells = (
            name,
            one.order,
            one.calls,
            words[one.on_flows],
            words[one.noise],
            "yes" if one.fits_flows else "no",
            one.flow_form,
            one.origin,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
