"""Solvers of one's own: the contract of `samplers.as_solver`, and what is said where it is broken."""

from functools import partial

import pytest
import torch

import samplers

X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)
LEVELS = samplers.sigmas("normal", 4)


def denoise(x, sigma):
    return 0.5 * torch.tanh(x)


def own_euler(denoise, x, sigmas, *, noise=None, eta=1.0):
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, float(sigmas[i]))
        step = samplers.Step(i, float(sigmas[i + 1]), x + (x - denoised) / sigmas[i] * sigmas.diff()[i], denoised)
        yield step
        x = step.x


def test_an_own_solver_runs_as_ours():
    solver = samplers.as_solver(own_euler)
    assert (solver.noise, solver.eta, solver.shift, solver.guided) == ("fresh", True, False, False)
    ours = list(samplers.SOLVERS["euler"](denoise, X, LEVELS))
    for own, our in zip(solver(denoise, X, LEVELS, eta=0.0), ours, strict=True):
        torch.testing.assert_close(own.x, our.x, rtol=0, atol=1e-14)
    assert samplers.as_solver("euler") is samplers.SOLVERS["euler"]
    assert samplers.as_solver(solver) is solver


def with_positional_options(denoise, x, sigmas, noise=None, eta=1.0):
    return own_euler(denoise, x, sigmas, noise=noise, eta=eta)


class Sampling:
    def __call__(self, denoise, x, sigmas, *, noise=None):
        return own_euler(denoise, x, sigmas, noise=noise)


@pytest.mark.parametrize("own", [with_positional_options, Sampling(), Sampling().__call__, partial(own_euler, eta=0.0)])
def test_any_callable_is_a_solver_and_gets_its_options(own):
    solver = samplers.as_solver(own)
    assert solver.noise == "fresh"
    (*_, found), (*_, wanted) = solver(denoise, X, LEVELS, noise=None), own_euler(denoise, X, LEVELS)
    assert torch.equal(found.x, wanted.x)
    with pytest.raises(TypeError, match="to Sampling"):
        next(samplers.as_solver(partial(Sampling()))(lambda *_: 3.0, X, LEVELS))


def test_a_solver_of_the_table_with_other_options_keeps_its_properties():
    solver = samplers.as_solver(partial(samplers.dpmpp_2m_sde, eta=0.0))
    assert (solver.noise, solver.eta, solver.origin) == ("path", True, "comfyui")
    given = {"noise": lambda sigma, following: torch.ones_like(X)}
    (*_, found), (*_, wanted) = solver(denoise, X, LEVELS, **given), samplers.dpmpp_2m_sde(denoise, X, LEVELS, eta=0.0)
    assert torch.equal(found.x, wanted.x)
    assert samplers.as_solver(partial(samplers.euler_cfg_pp)).guided


def yielding(*steps):
    def own(denoise, x, sigmas):
        yield from steps

    return own


def returning(value):
    return lambda denoise, x, sigmas: value


WRONG = [
    (yielding(), ValueError, "no step"),
    (yielding(X), TypeError, "own yielded .*samplers.Step"),
    (yielding(samplers.Step(0, 0.5, X[:, :, :1], X)), ValueError, r"\[1, 1, 1, 4\].*\[1, 1, 2, 4\]"),
    (yielding(samplers.Step(0, 7.0, X, X)), ValueError, "sigma .* got 7.0"),
    (returning(None), TypeError, "generator"),
    (returning([samplers.Step(0, 0.5, X, X)]), TypeError, "generator"),
]


@pytest.mark.parametrize(("own", "error", "said"), WRONG, ids=range(len(WRONG)))
def test_what_breaks_the_contract_is_said(own, error, said):
    with pytest.raises(error, match=said):
        list(samplers.as_solver(own)(denoise, X, LEVELS))


def test_what_is_no_solver_is_refused():
    with pytest.raises(TypeError, match=r"must take \(denoise, x, sigmas\)"):
        samplers.as_solver(lambda x: x)
    with pytest.raises(ValueError, match="did you mean 'euler'"):
        samplers.as_solver("eulr")
    with pytest.raises(TypeError, match="no option 'gamma'; it takes noise, eta"):
        samplers.as_solver(own_euler)(denoise, X, LEVELS, gamma=2.0)
    with pytest.raises(TypeError, match="euler has no option 'eta'"):
        samplers.SOLVERS["euler"](denoise, X, LEVELS, eta=0.0)
