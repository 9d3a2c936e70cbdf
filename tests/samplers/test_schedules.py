"""Schedules and names, against recorded numbers."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import golden
import samplers
from full import in_full

RECORDED = golden.recorded("schedules")


def settings(key: str) -> tuple[int, float]:
    found = dict(part.split("=") for part in key.split("|") if "=" in part)
    return int(found["steps"]), float(found["shift"])


def cases(group: str, prefix: str = "") -> list[str]:
    return [key for key in RECORDED[group] if key.startswith(prefix)]


def recorded(key: str) -> torch.Tensor:
    return torch.tensor(RECORDED["comfy"][key], dtype=torch.float64)


@pytest.mark.parametrize("key", cases("comfy"))
def test_schedules_equal_comfyui(key):
    steps, shift = settings(key)
    found = samplers.sigmas(key.split("|")[0], steps, shift=shift)
    torch.testing.assert_close(found, recorded(key), rtol=0, atol=2e-7)


def test_every_recorded_schedule_differs_from_every_other():
    """Two schedules differ by far more than the tolerance of the test before."""
    names = {key.split("|")[0] for key in RECORDED["comfy"]}
    assert names < set(samplers.SCHEDULES)
    found = [samplers.sigmas(name, 8)[:8] for name in sorted(names)]
    assert all(float((a - b).abs().max()) > 1e-3 for i, a in enumerate(found) for b in found[:i])
    for name in names - {"linear_quadratic"}:  # which shift does not touch
        other = samplers.sigmas(name, 8, shift=3.001)
        assert float((samplers.sigmas(name, 8) - other).abs().max()) > 2e-7, name


@pytest.mark.parametrize("key", cases("reference_cli"))
def test_normal_equals_stability(key):
    steps, shift = settings(key)
    found = samplers.sigmas("normal", steps, shift=shift)
    wanted = torch.tensor(RECORDED["reference_cli"][key], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_normal_equals_installed_diffusers_to_the_bit(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    found = samplers.sigmas("normal", steps, shift=shift).float()
    assert torch.equal(found, scheduler.sigmas)
    assert torch.equal(found[:-1] * 1000, scheduler.timesteps)


def test_a_shifted_sigma_is_noticed():
    """The nearest mistake, shifting once instead of twice, is far above the tolerance of these tests."""
    once = samplers.shifted(torch.linspace(1, 0.001, 28, dtype=torch.float64), 3.0)
    assert float((samplers.sigmas("normal", 28, shift=3.0)[:-1] - once).abs().max()) > 1e-3


@pytest.mark.parametrize("name", samplers.SCHEDULES)
def test_ends_and_order(name):
    """Every schedule, for many numbers of steps; only two may have another number of steps than asked for."""
    for steps in in_full((*range(1, 40), 100, 250), (*range(1, 8), 13, 20, 28, 39, 100, 250)):
        levels = samplers.sigmas(name, steps)
        assert levels.dtype == torch.float64
        assert len(levels) == steps + 1 or name in ("ddim_uniform", "beta")
        first = {
            "ddim_uniform": ((1000 - 2) // max(1000 // steps, 1)) * max(1000 // steps, 1) + 2,
            "diffusers_dpm": 999,
        }
        t = first.get(name, 1000) / 1000
        assert float(levels[0]) == pytest.approx(3 * t / (1 + 2 * t), rel=1e-15)
        assert levels[-1] == 0
        assert all(a > b for a, b in pairwise(levels.tolist()))
    assert len(samplers.sigmas("ddim_uniform", 28)) == 30
    assert len(samplers.sigmas("beta", 250)) < 251


def test_more_steps_than_levels_are_refused():
    with pytest.raises(ValueError, match="sigmas must fall"):
        samplers.sigmas("simple", 1001)
    with pytest.raises(ValueError, match=r"shift .* got inf"):
        samplers.sigmas("simple", 4, shift=float("inf"))


def test_the_beta_distribution_is_scipys():
    from scipy.stats import beta

    shares = torch.cat([torch.linspace(0, 1, 101, dtype=torch.float64), torch.tensor([1e-9, 1 - 1e-9]).double()])
    wanted = torch.from_numpy(beta.ppf(np.asarray(shares), 0.6, 0.6))
    torch.testing.assert_close(samplers.schedules.beta_quantile(shares), wanted, rtol=0, atol=1e-12)


def test_levels_of_ones_own_are_used_as_they_are():
    levels = [1.0, 0.75, 0.1, 0.0]
    found = samplers.checked_sigmas(levels)
    assert found.dtype == torch.float64
    assert found.tolist() == levels
    assert samplers.checked_sigmas(samplers.sigmas("normal", 4)).tolist() == samplers.sigmas("normal", 4).tolist()


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ([0.0], r"sigmas have shape \[1\], expected \[steps \+ 1\] with at least one step"),
        (torch.ones(1, 2), r"sigmas have shape \[1, 2\]"),
        ([1.0, float("nan"), 0.0], "1 values that are not finite"),
        ([1.0, 0.5], "from 1.0 to 0.5, expected from at most 1 to 0: append 0.0"),
        ([1000.0, 500.0, 0.0], "divide timesteps by 1000"),
        ([1.0, 0.3, 0.4, 0.0], r"must fall, but sigmas\[2\] = 0.4 after 0.3"),
        ([1.0, 0.3, 0.3, 0.0], "must fall"),
    ],
)
def test_levels_that_are_no_schedule(levels, said):
    with pytest.raises(ValueError, match=said):
        samplers.checked_sigmas(levels)


SHIFTS = (1e-6, 1e-3, 0.01, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.999, 1.0, 1.1, 1.5, 3.0, 3.3, 5.7, 10.0, 123.0, 1e3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shifted_ends_at_1_exactly(dtype):
    """The formula alone gives 1.0000000000000002 for 0.1 in float64, and 1.0000002 in float32."""
    one, near = torch.ones((), dtype=dtype), torch.linspace(0.9, 1, 99, dtype=torch.float64).to(dtype)
    for shift in (*SHIFTS, *np.random.default_rng(0).uniform(0.01, 20, 2000).tolist()):
        for function in (samplers.shifted, samplers.training.shifted):
            assert function(one, shift) == 1, shift
            assert float(function(near, shift).max()) <= 1, shift
            assert function(0 * one, shift) == 0, shift


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", samplers.SCHEDULES)
def test_every_schedule_with_every_shift(name, shift):
    for steps in (1, 2, 7, 28):
        levels = samplers.sigmas(name, steps, shift=shift).tolist()
        assert levels[0] <= 1
        assert levels[-1] == 0
        assert all(a > b for a, b in pairwise(levels))
        if name not in ("ddim_uniform", "diffusers_dpm"):
            assert levels[0] == 1, "it starts with noise alone"


@pytest.mark.parametrize("name", [*samplers.schedules.WITH_TERMINAL])
def test_the_terminal_level_is_the_last_above_0(name):
    levels = samplers.sigmas(name, 8, shift=3.0, terminal=0.07)
    assert levels[0] == 1
    assert float(levels[-2]) == pytest.approx(0.07, abs=1e-12)
    with pytest.raises(ValueError, match="terminal"):
        samplers.sigmas(name, 1, shift=3.0, terminal=0.07)


def test_other_schedules_take_no_terminal():
    with pytest.raises(ValueError, match="terminal"):
        samplers.sigmas("karras", 8, terminal=0.07)
