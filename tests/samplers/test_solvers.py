"""Solvers against recorded numbers, their order on a flow with a known solution, their manners as generators."""

import math
from itertools import pairwise

import pytest
import torch

import golden
import samplers

RECORDED = golden.recorded("samplers")["samplers"]
INDEX = torch.arange(1, 17, dtype=torch.float64).reshape(1, 1, 4, 4)


def toy(x, sigma):
    """The closed-form model of the record."""
    return 0.6 * torch.tanh(x) + 0.25 * (1 - sigma) * torch.cos(2 * x)


def run(denoise, x, levels, name="euler"):
    *_, last = samplers.SOLVERS[name](denoise, x, levels)
    return last


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_solvers_equal_comfyui(name):
    record, calls = RECORDED[name], []
    levels = torch.tensor(record["sigmas"], dtype=torch.float64)
    start = levels[0] * 1.3 * torch.sin(1.7 * INDEX)
    last = run(lambda x, sigma: calls.append(sigma) or toy(x, sigma), start, levels, name)
    wanted = torch.tensor(record["result"], dtype=torch.float64)
    torch.testing.assert_close(last.x.flatten(), wanted, rtol=0, atol=1e-9)
    assert len(calls) == record["model_calls"]
    assert calls == levels[:-1].tolist()


@pytest.mark.parametrize("name", samplers.SOLVERS)
@pytest.mark.parametrize("shift", [1e-3, -1e-3])
def test_a_shifted_sigma_fails_the_record(name, shift):
    record = RECORDED[name]
    levels = torch.tensor(record["sigmas"], dtype=torch.float64)
    levels[2] += shift
    last = run(toy, 1.3 * torch.sin(1.7 * INDEX), levels, name)
    wanted = torch.tensor(record["result"], dtype=torch.float64)
    assert float((last.x.flatten() - wanted).abs().max()) > 1e-6


def gaussian_flow(x, sigma, mean=0.3, variance=0.25):
    """Exact x0 prediction where pictures are normal: E[x0 | x] of x = sigma n + (1 - sigma) x0."""
    a = 1 - sigma
    return mean + a * variance / (a * a * variance + sigma * sigma) * (x - a * mean)


def gaussian_solution(x, start, end, mean=0.3, variance=0.25):
    """The flow moves a point so that its place within the marginal distribution stays."""
    spread = [math.sqrt((1 - s) ** 2 * variance + s * s) for s in (start, end)]
    return (1 - end) * mean + spread[1] / spread[0] * (x - (1 - start) * mean)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    x, errors = torch.linspace(-1, 1, 7, dtype=torch.float64), []
    for steps in (40, 80, 160):
        levels = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        errors.append(float((run(gaussian_flow, x, levels, name).x - gaussian_solution(x, 0.9, 0.1)).abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(order - 0.1 < found < order + 0.2 for found in orders), orders


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_the_last_step_gives_the_prediction(name):
    last = run(toy, INDEX.clone(), samplers.sigmas("normal", 5), name)
    torch.testing.assert_close(last.x, last.denoised, rtol=0, atol=1e-12)
    assert last.sigma == 0
    assert last.i == 4


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_changing_a_step_changes_what_follows(name):
    levels = samplers.sigmas("normal", 3)
    seen = []
    for step in samplers.SOLVERS[name](lambda x, sigma: seen.append(x.clone()) or toy(x, sigma), INDEX.clone(), levels):
        step.x = torch.zeros_like(step.x)
    assert torch.equal(seen[1], torch.zeros_like(INDEX))


def test_gradients_are_the_callers_business():
    """Iterating neither switches gradients off for the caller nor cuts the graph that the caller asked for."""
    x = INDEX.clone().requires_grad_()
    steps = []
    for step in samplers.euler(toy, x, samplers.sigmas("normal", 2)):
        assert torch.is_grad_enabled()
        steps.append(step)
    (gradient,) = torch.autograd.grad(steps[-1].x.sum(), x)
    assert float(gradient.abs().min()) > 0
    with torch.no_grad():
        assert not run(toy, x, samplers.sigmas("normal", 2)).x.requires_grad


def test_guidance_combines_and_skips():
    calls = []

    def predict(x, sigma, conditionings):
        calls.append(len(conditionings))
        return [x * conditioning for conditioning in conditionings]

    x = torch.ones(1, 2)
    guided = samplers.cfg(predict, 2.0, 0.5, 4.0)(x, 0.7)
    assert torch.equal(guided.x0, x * (0.5 + 4.0 * 1.5))
    assert torch.equal(guided.uncond, x * 0.5)
    alone = samplers.cfg(predict, 2.0, None, 1.0)(x, 0.7)
    assert torch.equal(alone.x0, x * 2.0)
    assert alone.uncond is None
    assert calls == [2, 1]


def test_noise_of_each_picture_is_that_of_its_seed_alone():
    def generator(seed):
        return torch.Generator().manual_seed(seed)

    batch = samplers.gaussian((3, 4, 2, 2), [generator(seed) for seed in (5, 6, 7)], torch.float32)
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(batch[row : row + 1], samplers.gaussian((1, 4, 2, 2), generator(seed), torch.float32))
    half = samplers.gaussian((1, 4, 2, 2), generator(5), torch.bfloat16)
    assert torch.equal(half, batch[:1].bfloat16())
