"""Solvers and schedules against the schedulers of the installed diffusers, which compute in float32."""

import math

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

import samplers

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # their schedulers' own
X = 1.3 * torch.sin(1.7 * torch.arange(1, 33, dtype=torch.float64)).reshape(1, 2, 4, 4)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def toy(x, sigma):
    return 0.6 * torch.tanh(x) + 0.25 * (1 - sigma) * torch.cos(2 * x)


def their_run(scheduler, steps, *, dtype=torch.float32, **options):
    """The latents after each call of `step`, fed with the velocity of the model."""
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.to(dtype)
    x, seen = X.to(dtype), []
    for t in scheduler.timesteps:
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        sigma = float(scheduler.sigmas[scheduler.step_index])
        x = scheduler.step((x - toy(x, sigma)) / sigma, t, x, return_dict=False, **options)[0]
        seen.append(x)
    return seen


def our_run(name, levels, **options):
    return [step.x for step in samplers.SOLVERS[name](toy, X.float(), levels.double(), **options)]


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("flow_dpmpp_2m", lambda: DPMSolverMultistepScheduler(**FLOW)),
        ("flow_uni_pc", lambda: UniPCMultistepScheduler(**FLOW)),
        ("euler", lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
)
def test_every_step_equals_diffusers(name, scheduler, steps):
    scheduler = scheduler()
    wanted = their_run(scheduler, steps)
    found = our_run(name, scheduler.sigmas)
    assert len(found) == len(wanted) == steps
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    other = our_run("flow_dpmpp_2m" if name != "flow_dpmpp_2m" else "dpmpp_2m", scheduler.sigmas)
    assert steps < 4 or float((other[-2] - wanted[-2]).abs().max()) > 1e-4


@pytest.mark.parametrize("steps", [3, 20])
def test_deis_equals_diffusers(steps):
    """Its scheduler stays at the last level instead of going to 0."""
    scheduler = DEISMultistepScheduler(**FLOW, lower_order_final=False)
    wanted = their_run(scheduler, steps, dtype=torch.float64)
    found = [step.x for step in samplers.SOLVERS["flow_deis"](toy, X, scheduler.sigmas[:-1])]
    for ours, theirs in zip(found, wanted[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_heun_equals_diffusers(steps):
    """Its scheduler takes two calls for a step, the last but one."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    wanted = their_run(scheduler, steps)
    found = our_run("flow_heun", samplers.sigmas("normal", steps))
    assert len(wanted) == 2 * steps - 1
    for ours, theirs in zip(found, [*wanted[1::2], wanted[-1]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_stochastic_sampling_is_lcm():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    wanted = their_run(scheduler, 5, generator=torch.Generator().manual_seed(4))
    noise = samplers.Fresh(X.float(), torch.Generator().manual_seed(4))
    for ours, theirs in zip(our_run("lcm", scheduler.sigmas, noise=noise), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_its_sde_solver_is_dpmpp_2m_sde():
    scheduler = DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++")
    wanted = their_run(scheduler, 6, generator=torch.Generator().manual_seed(4))
    noise = samplers.Fresh(X.float(), torch.Generator().manual_seed(4))
    for ours, theirs in zip(our_run("dpmpp_2m_sde", scheduler.sigmas, noise=noise), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_schedules_equal_diffusers(kind, shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **{f"use_{kind}_sigmas": True})
    scheduler.set_timesteps(steps)
    found = samplers.sigmas(f"diffusers_{kind}", steps, shift=shift)
    torch.testing.assert_close(found.float(), scheduler.sigmas, rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_levels_of_its_multistep_solvers(steps):
    for scheduler, end in ((DPMSolverMultistepScheduler(**FLOW), None), (DEISMultistepScheduler(**FLOW), -1)):
        scheduler.set_timesteps(steps)
        found = samplers.sigmas("diffusers_dpm", steps, shift=3.0).float()
        torch.testing.assert_close(found[:end], scheduler.sigmas[:end], rtol=0, atol=2e-7)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 16384])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_resolution_dependent_shift(tokens, kind):
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)  # the default of its SD3 pipeline
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    scheduler.set_timesteps(10, mu=mu)
    shift = samplers.resolution_shift(tokens, kind=kind)
    found = samplers.sigmas("diffusers_dynamic", 10, shift=shift)
    torch.testing.assert_close(found.float(), scheduler.sigmas, rtol=0, atol=2e-7)
    if kind == "exponential":
        assert shift == pytest.approx(math.exp(calculate_shift(tokens, max_shift=1.15)), rel=1e-12)
