"""Solvers against recorded numbers and against each other, and how they behave as generators."""

import math
from itertools import pairwise

import pytest
import torch

import golden
import samplers
from samplers.convergence import levels as levels_of

RECORDED = golden.recorded("samplers")["samplers"]
INDEX = torch.arange(1, 17, dtype=torch.float64).reshape(1, 1, 4, 4)
# What ComfyUI's KSampler offers, but for *_gpu, which draws the same tree on another device.
KSAMPLER = [
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2",
    "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "ddpm",
    "lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde",
    "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2",
]  # fmt: skip
STOCHASTIC = [name for name, one in samplers.SOLVERS.items() if one.is_stochastic]
GUIDED = [name for name, one in samplers.SOLVERS.items() if one.guided]
ODE = [name for name, one in samplers.SOLVERS.items() if one.eta or not one.is_stochastic]
# These use slopes of earlier steps, which a change of step.x does not change.
REMEMBERS_SLOPES = {"lms", "ipndm", "ipndm_v", "deis", "flow_deis", "gradient_estimation", "gradient_estimation_cfg_pp"}


def toy(x, sigma):
    """The closed-form model of the record."""
    return 0.6 * torch.tanh(x) + 0.25 * (1 - sigma) * torch.cos(2 * x)


def guided_toy(x, sigma):
    """The same, guided with scale 2."""
    uncond = 0.5 * torch.tanh(x) - 0.1 * sigma * torch.sin(x)
    return samplers.Guided(uncond + 2 * (toy(x, sigma) - uncond), uncond)


def recorded_noise(sigma, following):
    return torch.cos(0.9 * INDEX + 5 * sigma + 3 * following)


def both(x0):
    """A prediction without guidance, in the form that CFG++ solvers take."""
    return samplers.Guided(x0, x0)


def model_for(name, model=toy):
    return (lambda x, sigma: both(model(x, sigma))) if samplers.SOLVERS[name].guided else model


def without_noise(name):
    return {"eta": 0.0} if samplers.SOLVERS[name].eta else {}


def run(name, denoise, x, levels, **options):
    *_, last = samplers.SOLVERS[name](denoise, x, levels, **options)
    return last


def run_record(key, levels=None, noise=recorded_noise):
    """The last step, and the levels that the model was asked for."""
    name, *more = key.split("|")
    solver, calls = samplers.SOLVERS[name], []
    levels = torch.tensor(RECORDED[name]["sigmas"], dtype=torch.float64) if levels is None else levels
    denoise, options = guided_toy if solver.guided else toy, {"eta": 0.0} if more else {}
    if solver.is_stochastic:
        options["noise"] = noise
    start = levels[0] * 1.3 * torch.sin(1.7 * INDEX)
    return run(name, lambda x, sigma: calls.append(sigma) or denoise(x, sigma), start, levels, **options), calls


def error(last, key):
    return float((last.x.flatten() - torch.tensor(RECORDED[key]["result"], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("key", RECORDED)
def test_solvers_equal_comfyui(key):
    last, calls = run_record(key)
    assert error(last, key) <= 1e-9
    if "model_calls" in RECORDED[key]:
        assert len(calls) == RECORDED[key]["model_calls"]


@pytest.mark.parametrize("key", RECORDED)
@pytest.mark.parametrize("shift", [1e-3, -1e-3])
def test_a_shifted_sigma_fails_the_record(key, shift):
    name = key.split("|")[0]
    levels = torch.tensor(RECORDED[name]["sigmas"], dtype=torch.float64)
    levels[-2 if samplers.SOLVERS[name].own_steps else 2] += shift
    assert error(run_record(key, levels)[0], key) > 1e-7


@pytest.mark.parametrize("key", [key for key in RECORDED if key in STOCHASTIC])
def test_other_noise_fails_the_record(key):
    last, _ = run_record(key, noise=lambda sigma, following: 1.0001 * recorded_noise(sigma, following))
    assert error(last, key) > 1e-6
    swapped, _ = run_record(key, noise=lambda sigma, following: recorded_noise(following, sigma))
    assert error(swapped, key) > 1e-3


def test_everything_that_ksampler_offers_is_there():
    assert set(KSAMPLER) <= set(samplers.SOLVERS)
    assert {name for name, one in samplers.SOLVERS.items() if one.origin == "comfyui"} == set(KSAMPLER)
    assert set(KSAMPLER) - set(RECORDED) == {"ddim", *GUIDED} - {"euler_cfg_pp", "euler_ancestral_cfg_pp"}


def test_every_solver_is_importable_by_its_name():
    assert {name: getattr(samplers, name) for name in samplers.SOLVERS} == {
        name: solver.run for name, solver in samplers.SOLVERS.items()
    }
    assert set(samplers.SOLVERS) < set(samplers.__all__)


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_the_table_is_true(name):
    """Model calls are counted; a solver that is wrong on flows names one that is right."""
    solver, calls = samplers.SOLVERS[name], []
    model = model_for(name)
    steps = list(
        solver(lambda x, s: calls.append(s) or model(x, s), INDEX / 9, levels_of(solver, 12), **without_noise(name))
    )
    if solver.own_steps:
        assert steps[-1].sigma == pytest.approx(0.1)
    else:
        assert [step.sigma for step in steps] == pytest.approx(levels_of(solver, 12)[1:].tolist())
        assert (len(calls) - 1) // 12 + 1 == solver.calls
    assert solver.fits_flows or solver.flow_form
    assert not solver.flow_form or samplers.SOLVERS[solver.flow_form].fits_flows
    assert "arXiv" in solver.run.__doc__ or "`" in solver.run.__doc__
    assert f"| `{name}` |" in samplers.solvers_markdown()


@pytest.mark.parametrize("name", ODE)
def test_a_constant_prediction_is_followed_exactly(name):
    """The flow is then a straight line, also after a caller has changed a step."""
    solver, goal, x = samplers.SOLVERS[name], torch.full_like(INDEX, 0.4), INDEX / 9
    model = model_for(name, lambda x, sigma: goal)
    levels = levels_of(solver, 9)
    sigma, expected = float(levels[0]), x
    for step in solver(model, x, levels, **without_noise(name)):
        expected = goal + step.sigma / sigma * (expected - goal)
        tolerance = 1e-6 if name == "deis" else 1e-12  # its weights are sums over points
        torch.testing.assert_close(step.x, expected, rtol=0, atol=tolerance)
        sigma = step.sigma
        if step.i in (0, 3) and name not in REMEMBERS_SLOPES:
            expected = step.x = step.x + torch.cos(INDEX)


SAME = [
    ("ddim", "euler", {}),
    ("flow_heun", "heun", {}),
    ("euler_ancestral", "euler", {"eta": 0.0}),
    ("dpm_2_ancestral", "dpm_2", {"eta": 0.0}),
    ("flow_ddpm", "euler", {"eta": 0.0}),
    ("dpmpp_2m_sde", "flow_dpmpp_2m", {"eta": 0.0}),
    ("res_multistep_ancestral", "res_multistep", {"eta": 0.0}),
    ("seeds_2", "dpmpp_sde", {"eta": 0.0}),
    ("dpmpp_2s_ancestral", "dpmpp_sde", {"eta": 0.0}),
    ("euler_cfg_pp", "euler", {}),
    ("euler_ancestral_cfg_pp", "flow_ddpm", {}),
    ("dpmpp_2m_cfg_pp", "dpmpp_2m", {}),
    ("res_multistep_cfg_pp", "res_multistep", {}),
    ("res_multistep_ancestral_cfg_pp", "res_multistep_ancestral", {}),
    ("gradient_estimation_cfg_pp", "gradient_estimation", {}),
]


@pytest.mark.parametrize(("name", "other", "options"), SAME, ids=[f"{a}={b}" for a, b, _ in SAME])
def test_solvers_that_are_the_same_where_they_should_be(name, other, options):
    """Without noise, and CFG++ where both predictions agree; below level 1, which they treat differently."""
    levels = torch.cat([torch.linspace(0.95, 0.1, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    found, wanted = (
        run(one, model_for(one), INDEX / 9, levels, **more)
        for one, more in (
            (name, options or ({"noise": recorded_noise} if name in STOCHASTIC else {})),
            (other, {"noise": recorded_noise} if other in STOCHASTIC and not options else without_noise(other)),
        )
    )
    torch.testing.assert_close(found.x, wanted.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GUIDED)
def test_cfg_pp_takes_the_noise_from_the_unconditional_picture(name):
    levels, x = samplers.sigmas("normal", 4), INDEX / 9
    options = without_noise(name)
    a, b = (next(iter(samplers.SOLVERS[name](model, x, levels, **options))) for model in (guided_toy, model_for(name)))
    assert float((a.x - b.x).abs().max()) > 1e-3
    if "2s" not in name and samplers.SOLVERS[name].steps_in == "variance_exploding":  # the first step, from level 1
        guided, ratio = guided_toy(x, 1.0), float(levels[1])
        torch.testing.assert_close(a.x, guided.x0 + ratio * (x - guided.uncond), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"a \*_cfg_pp sampler needs the unconditional prediction"):
        run(name, lambda x, sigma: samplers.Guided(x, None), x, levels)


def test_dpmpp_2s_ancestral_cfg_pp_by_formula():
    """One step without noise: both halves start from x + x0 - u."""
    x, sigma, following = INDEX / 9, 0.8, 0.5
    middle = math.sqrt(sigma * following)
    here = guided_toy(x, sigma)
    moved = x + here.x0 - here.uncond
    ahead = guided_toy(middle / sigma * moved + (1 - middle / sigma) * here.x0, middle).x0
    wanted = following / sigma * moved + (1 - following / sigma) * ahead
    levels = torch.tensor([sigma, following], dtype=torch.float64)
    found = run("dpmpp_2s_ancestral_cfg_pp", guided_toy, x, levels, eta=0.0).x
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_multistep_cfg_pp_by_formula():
    """The second step, in -ln sigma: 2M from x0 and the last u; RES from x + x0 - u, with u for x0 at both levels."""
    levels = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    x, (h, width) = INDEX / 9, (math.log(2), math.log(1.5))
    first = guided_toy(x, 0.9)
    x = first.x0 + (x - first.uncond) * 0.6 / 0.9
    here, change = guided_toy(x, 0.6), (1 - math.exp(-h)) * h / (2 * width)
    wanted = here.x0 + 0.5 * (x - here.uncond) + change * (here.x0 - first.uncond)
    found = run("dpmpp_2m_cfg_pp", guided_toy, INDEX / 9, levels).x
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    phi_1 = (1 - math.exp(-h)) / h
    late = (1 - phi_1) / h / (width / h)  # -phi_2(-h) / c2, with c2 = -width / h
    wanted = 0.5 * (x + here.x0 - here.uncond) + h * ((phi_1 + late) * here.uncond - late * first.uncond)
    found = run("res_multistep_cfg_pp", guided_toy, INDEX / 9, levels).x
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_dpm_adaptive_takes_a_refused_step_again(monkeypatch):
    """Factors of the width 0.8 and 0.82: the first is refused, and costs its three calls."""
    factors, calls = iter([-0.2, -0.18] + [0.0] * 100), []
    monkeypatch.setattr(samplers.solvers.dpm_solver, "atan", lambda value: next(factors))
    levels = torch.tensor([0.9, 0.5], dtype=torch.float64)
    model = samplers.SOLVERS["dpm_adaptive"]
    steps = list(model(lambda x, s: calls.append(s) or toy(x, s), INDEX / 9, levels))
    assert [steps[0].sigma, steps[1].sigma] == pytest.approx([0.9 * math.exp(-w) for w in (0.04, 0.04 + 0.0328)])
    assert len(calls) == 3 * (len(steps) + 1)
    assert calls.count(calls[0]) == 2


ENDS_AT_0 = [name for name, one in samplers.SOLVERS.items() if not one.own_steps and not name.startswith("uni_pc")]


@pytest.mark.parametrize("name", ENDS_AT_0)
def test_the_last_step_gives_the_prediction(name):
    last = run(name, model_for(name), INDEX.clone(), samplers.sigmas("normal", 5))
    torch.testing.assert_close(last.x, last.denoised, rtol=0, atol=1e-12)
    assert (last.sigma, last.i) == (0, 4)


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_one_step_is_enough_for_all_that_take_the_given_levels(name):
    levels, x = samplers.sigmas("normal", 1), INDEX / 9
    if samplers.SOLVERS[name].own_steps:
        with pytest.raises(ValueError, match="at least 2 steps"):
            run(name, toy, x, levels)
    else:
        assert torch.isfinite(run(name, model_for(name), x, levels).x).all()


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_changing_a_step_changes_what_follows(name):
    seen, model = [], model_for(name)
    for step in samplers.SOLVERS[name](
        lambda x, s: seen.append((s, x.clone())) or model(x, s), INDEX.clone(), samplers.sigmas("normal", 12)
    ):
        step.x, known = torch.zeros_like(step.x), len(seen)
        if step.i:
            break
        first = known
    assert torch.equal(seen[first][1], torch.zeros_like(INDEX))


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_gradients_are_left_to_the_caller(name):
    """Iterating neither switches gradients off for the caller nor cuts the graph that the caller asked for."""
    x, model = (INDEX / 9).requires_grad_(), model_for(name)
    steps = []
    for step in samplers.SOLVERS[name](model, x, samplers.sigmas("normal", 4)):
        assert torch.is_grad_enabled()
        steps.append(step)
    (gradient,) = torch.autograd.grad(steps[-1].x.sum(), x)
    assert float(gradient.abs().max()) > 0 or name == "lcm"
    with torch.no_grad():
        assert not run(name, model, x, samplers.sigmas("normal", 4)).x.requires_grad


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ([1.0, float("nan"), 0.0], "1 values that are not finite"),
        ([1.0, 0.3, 0.4, 0.0], r"must fall, but sigmas\[2\] = 0.4"),
        ([1.0, 0.3, 0.3, 0.0], "must fall"),
        ([2.0, 0.3, 0.0], "from 2.0 to 0.0, expected levels between 1 and 0"),
        ([1.0, 0.3, -0.1], "expected levels between 1 and 0"),
        ([1.0], r"have shape \[1\]"),
    ],
)
def test_levels_are_refused_before_the_model_is_asked(levels, said):
    for name, solver in samplers.SOLVERS.items():
        with pytest.raises(ValueError, match=said):
            solver(lambda x, sigma: pytest.fail("asked"), INDEX, torch.tensor(levels, dtype=torch.float64))
        assert name


def test_the_levels_that_the_model_is_asked_for():
    """Solvers in sigma ask for the schedule's levels; those in log-SNR replace a first level of 1 by one just below."""
    levels = samplers.sigmas("simple", 4)
    for name, solver in samplers.SOLVERS.items():
        asked, model = [], model_for(name)
        list(solver(lambda x, s, asked=asked, model=model: asked.append(s) or model(x, s), INDEX / 9, levels))
        if solver.shift:
            assert asked[0] == pytest.approx(0.99996666, abs=1e-8), name
        elif name not in ("flow_uni_pc", "flow_deis"):
            assert asked[0] == 1, name
        assert all(a > b for a, b in pairwise(asked)) or solver.calls > 1 or name == "dpm_adaptive"


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
