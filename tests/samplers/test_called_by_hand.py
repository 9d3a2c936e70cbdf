"""Solvers and their neighbours called by hand: what they take for levels and latents, and what they say of the rest."""

from inspect import unwrap

import numpy as np
import pytest
import torch

import samplers
from samplers import training

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_a_solver_called_by_its_own_name_takes_lists_and_refuses_what_is_no_latent(name):
    solver, own = samplers.SOLVERS[name], getattr(samplers, name)
    levels = [0.9, 0.6, 0.3, 0.1]
    options = {"eta": 0.0} if solver.eta else {"noise": lambda *_: torch.ones_like(X)} if solver.is_stochastic else {}

    def answer(x, sigma):
        x0 = 0.5 * torch.tanh(x)
        return samplers.Guided(x0, 0.9 * x0) if solver.guided else x0

    given = (levels, tuple(levels), np.array(levels), torch.tensor(levels, dtype=torch.float64))
    first, *others = [[step.x for step in own(answer, X, one, **options)] for one in given]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for x in ([1.0], 1.0, torch.ones(2, dtype=torch.int64)):
        with pytest.raises(TypeError, match="x is"):
            own(answer, x, levels)
    for wrong, error in (([0.5, 0.7], ValueError), ([1.0, 0.999999999999, 0.0], ValueError), (0.5, ValueError)):
        with pytest.raises(error, match="sigmas"):
            own(answer, X, wrong)
    with pytest.raises(TypeError, match="no option 'colour'"):
        own(answer, X, levels, colour=1)
    with pytest.raises(TypeError, match="denoise is None"):
        own(None, X, levels)


@pytest.mark.parametrize(
    ("name", "answer", "error", "said"),
    [
        ("euler", [1.0], TypeError, r"\[1.0\] to euler"),
        ("euler", samplers.Guided(X, X), TypeError, "only_x0"),
        ("euler", X[..., :1], ValueError, "shape"),
        ("euler_cfg_pp", X, TypeError, "Guided"),
        ("euler_cfg_pp", samplers.Guided(X[..., :1], X), ValueError, "shape"),
    ],
)
def test_what_denoise_returns_is_checked(name, answer, error, said):
    for solver in (getattr(samplers, name), samplers.SOLVERS[name]):
        with pytest.raises(error, match=said):
            list(solver(lambda x, sigma: answer, X, [0.9, 0.5, 0.1]))


def test_a_function_of_ours_is_known_by_the_table():
    for name, solver in samplers.SOLVERS.items():
        assert samplers.as_solver(getattr(samplers, name)).run is solver.run


@pytest.mark.parametrize(
    ("call", "given", "said"),
    [
        (samplers.shifted, ([0.5], 3.0), "t is"),
        (samplers.rescaled, ([1.0], X, 0.5), "value is"),
        (training.noised, ([1.0], X, torch.ones(1)), "x0 is"),
        (training.noised, (X, X, [0.5]), "times"),
        (training.velocity, (X, np.ones(3)), "noise is"),
        (training.velocity_loss, ([1.0], X, X), "predicted is"),
    ],
)
def test_neighbours_of_solvers_name_what_is_no_tensor(monkeypatch, call, given, said):
    for name in ("_check_pair", "_per_sample"):  # without pytest's check of types, which users do not have
        monkeypatch.setattr(training, name, unwrap(getattr(training, name)))
    with pytest.raises(TypeError, match=f"{said}.*expected a tensor"):
        unwrap(call)(*given)


def test_windows_take_the_levels_as_a_list():
    levels = samplers.sigmas("normal", 10)
    assert samplers.steps_inside(levels.tolist(), 0.1, 0.5) == samplers.steps_inside(levels, 0.1, 0.5)
    assert samplers.first_steps(levels.tolist(), 2) == samplers.first_steps(levels, 2)
    with pytest.raises(ValueError, match="sigmas"):
        unwrap(samplers.first_steps)(0.5, 1)
