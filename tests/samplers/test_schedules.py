"""Schedules and names, against recorded numbers."""

import pytest
import torch

import golden
import samplers

RECORDED = golden.recorded("schedules")


def settings(key: str) -> tuple[int, float]:
    found = dict(part.split("=") for part in key.split("|") if "=" in part)
    return int(found["steps"]), float(found["shift"])


def cases(group: str, prefix: str = "") -> list[str]:
    return [key for key in RECORDED[group] if key.startswith(prefix)]


@pytest.mark.parametrize("key", cases("comfy", "normal|"))
def test_normal_equals_comfyui(key):
    steps, shift = settings(key)
    found = samplers.sigmas("normal", steps, shift=shift)
    torch.testing.assert_close(found, torch.tensor(RECORDED["comfy"][key], dtype=torch.float64), rtol=0, atol=2e-7)


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
    """The bound of these tests against the nearest mistake: shifting once instead of twice."""
    once = samplers.shifted(torch.linspace(1, 0.001, 28, dtype=torch.float64), 3.0)
    assert float((samplers.sigmas("normal", 28, shift=3.0)[:-1] - once).abs().max()) > 1e-3


def test_ends_and_order():
    levels = samplers.sigmas("normal", 28)
    assert levels.dtype == torch.float64
    assert len(levels) == 29
    assert levels[0] == 1
    assert levels[-1] == 0
    assert bool((levels.diff() < 0).all())


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
