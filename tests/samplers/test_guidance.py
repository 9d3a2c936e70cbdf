"""Guidance: formulas against diffusers' guiders, and windows against the steps that they cover."""

import math

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg

import samplers
from samplers import Weaker, Window, Within

SHAPE = (3, 4, 6, 5)
SIGMA = 0.7


def drawn(*seeds: int) -> list[torch.Tensor]:
    """Latents of different sizes in a batch, in float64."""
    sizes = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)[:, None, None, None]
    return [
        0.3 + sizes * torch.randn(SHAPE, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds
    ]


X, COND, UNCOND, WORSE = drawn(0, 1, 2, 3)  # a latent and velocities
PICTURES = {name: X - SIGMA * v for name, v in (("cond", COND), ("uncond", UNCOND), ("worse", WORSE))}


def predict(x, sigma, names):
    return [PICTURES[name] for name in names]


def velocity(guided: samplers.Guide) -> torch.Tensor:
    """The guided velocity, which is what diffusers' guiders return."""
    return (X - guided(X, SIGMA).x0) / SIGMA


def at(guider, step: int = 1, steps: int = 10):
    """The guider's function of velocities, set to a step of a drawing."""
    guider.set_state(step, steps, torch.tensor(0))
    return guider.forward


def close(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_cfg_equals_diffusers(share):
    wanted = at(ClassifierFreeGuidance(5.0, share))(COND, UNCOND).pred
    close(velocity(samplers.guide(predict, "cond", "uncond", samplers.plain(5.0), rescale=share)), wanted)
    close(samplers.rescaled(COND, UNCOND, share), rescale_noise_cfg(COND, UNCOND, share))
    if share:
        on_x0 = samplers.guide(predict, "cond", "uncond", samplers.plain(5.0))(X, SIGMA).x0
        assert float((samplers.rescaled(on_x0, PICTURES["cond"], share) - (X - SIGMA * wanted)).abs().max()) > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 10.0])  # shortens some of the batch
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_projected_guidance_equals_diffusers(eta, threshold, momentum):
    """Several calls, because of the momentum; diffusers' scale is the paper's minus 1."""
    mix, buffer = samplers.projected(4.0, eta=eta, threshold=threshold, momentum=momentum), MomentumBuffer(momentum)
    for cond, uncond in (drawn(1, 2), drawn(3, 4), drawn(5, 6)):
        wanted = normalized_guidance(cond, uncond, 3.0, buffer, eta, threshold, use_original_formulation=True)
        close(mix(X, cond, uncond), wanted)


def test_projected_guidance_is_plain_guidance_at_eta_1():
    mix = samplers.projected(4.0, eta=1.0)
    close(mix(X, COND, UNCOND), samplers.plain(4.0)(X, COND, UNCOND))
    guider = at(AdaptiveProjectedGuidance(3.0, None, 2.0, eta=0.0, use_original_formulation=True))
    close(samplers.projected(4.0, threshold=2.0)(X, COND, UNCOND), guider(COND, UNCOND).pred)


def test_a_new_drawing_remembers_nothing():
    """Guidance is built once per drawing; one mix for two drawings would carry the first into the second."""
    first, second = (samplers.projected(4.0, momentum=-0.5) for _ in range(2))
    assert torch.equal(first(X, COND, UNCOND), second(X, COND, UNCOND))
    assert not torch.equal(first(X, COND, UNCOND), second(X, UNCOND, COND))


def test_zero_star_equals_diffusers(monkeypatch):
    """Diffusers computes the share in float32 and adds 1e-8 to its denominator."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    wanted = at(ClassifierFreeZeroStarGuidance(5.0))(COND, UNCOND).pred
    found = velocity(samplers.guide(predict, "cond", "uncond", samplers.zero_star(5.0)))
    close(found, wanted, 1e-8)
    assert float((found - velocity(samplers.cfg(predict, "cond", "uncond", 5.0))).abs().max()) > 0.1


def test_zero_init_equals_diffusers_and_runs_no_model():
    levels = samplers.sigmas("normal", 5)
    guided = samplers.zero_init(samplers.cfg(predict, "cond", "uncond", 5.0), samplers.first_steps(levels, 2))
    for i, sigma in enumerate(levels[:-1].tolist()):
        zero = not at(ClassifierFreeZeroStarGuidance(5.0, 2), i, 5)(COND, UNCOND).pred.any()
        assert zero == (i < 2)
        assert torch.equal(guided(X, sigma).x0, X) == zero
    assert 1.0 not in samplers.first_steps(levels, 0)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_guidance_by_a_weakened_model_equals_diffusers(share):
    weaker = [Weaker("worse", 2.8, Window(0.8, 0.6))]
    found = velocity(samplers.guide(predict, "cond", "uncond", samplers.plain(5.0), weaker=weaker, rescale=share))
    skip = SkipLayerGuidance(5.0, 2.8, 0.01, 0.5, [1], guidance_rescale=share)
    perturbed = PerturbedAttentionGuidance(5.0, 2.8, 0.01, 0.5, [1], guidance_rescale=share)
    for guider in (skip, perturbed):
        close(found, at(guider)(COND, UNCOND, WORSE).pred)
    outside = [Weaker("worse", 2.8, Window(0.69, 0.6))]
    close(
        samplers.guide(predict, "cond", "uncond", samplers.plain(5.0), weaker=outside)(X, SIGMA).x0,
        samplers.cfg(predict, "cond", "uncond", 5.0)(X, SIGMA).x0,
    )


def test_without_an_unconditional_pass_the_weakened_model_alone_guides():
    """As in ComfyUI and diffusers' PAG pipeline; the scale of diffusers' guiders is larger by 1 there."""
    found = samplers.guide(predict, "cond", None, samplers.plain(5.0), weaker=[Weaker("worse", 2.0)])(X, SIGMA)
    close(found.x0, PICTURES["cond"] + 2.0 * (PICTURES["cond"] - PICTURES["worse"]))
    assert found.uncond is None
    shifted = at(SkipLayerGuidance(1.0, 3.0, 0.01, 0.5, [1]))(COND, None, WORSE).pred
    close(found.x0, X - SIGMA * shifted)  # scale 3 from the worse is 2 beyond cond


def test_rescaling_of_the_picture_is_comfyuis():
    """SkipLayerGuidanceDiT for one picture: std(cond) / std(result), on x0, after the push."""
    x, cond, worse = (tensor[:1] for tensor in (X, PICTURES["cond"], PICTURES["worse"]))
    weaker = [Weaker("worse", 3.0, rescale=0.6)]
    found = samplers.guide(lambda *_: [cond, worse], "cond", None, samplers.plain(1.0), weaker=weaker)(x, SIGMA).x0
    pushed = cond + (cond - worse) * 3.0
    close(found, pushed * (0.6 * (cond.std() / pushed.std()) + (1 - 0.6)))


def test_an_interval_equals_the_steps_of_diffusers():
    """Outside of the interval only the conditional pass runs."""
    levels = samplers.sigmas("normal", 10).tolist()
    calls = []
    window = Window(levels[2], levels[7])
    noted = lambda x, sigma, names: calls.append(names) or predict(x, sigma, names)  # noqa: E731
    guided = samplers.guide(noted, "cond", "uncond", samplers.plain(5.0), window=window)
    for i, sigma in enumerate(levels[:-1]):
        wanted = at(ClassifierFreeGuidance(5.0, start=0.2, stop=0.7), i, 10)(COND, UNCOND).pred
        found = guided(X, sigma)
        close(found.x0, X - SIGMA * wanted)
        assert (found.uncond is None) == (not 2 <= i < 7)
        assert calls[-1] == (["uncond", "cond"] if 2 <= i < 7 else ["cond"])


def test_read_uncond_runs_the_unconditional_pass_outside_of_the_window():
    guided = samplers.guide(predict, "cond", "uncond", samplers.plain(5.0), window=Window(0.5, 0.1), read_uncond=True)
    found = guided(X, SIGMA)
    assert torch.equal(found.x0, PICTURES["cond"])
    assert torch.equal(found.uncond, PICTURES["uncond"])


def test_conditionings_are_averaged_where_they_overlap():
    calls = []
    mean = samplers.averaged(lambda x, s, names: calls.append(names) or predict(x, s, names))
    both = [Within("cond", Window(1.0, 0.6)), Within("uncond", Window(0.8, 0.2))]
    for sigma, names in ((0.9, ["cond"]), (0.7, ["cond", "uncond"]), (0.5, ["uncond"])):
        found = mean(X, sigma, [[Within("worse")], both])
        assert calls[-1] == ["worse", *names]
        assert torch.equal(found[0], PICTURES["worse"])
        close(found[1], sum(PICTURES[name] for name in names) / len(names))


def test_one_by_one_is_the_same_in_more_calls():
    calls = []
    alone = samplers.one_by_one(lambda x, s, names: calls.append(names) or predict(x, s, names))
    found = samplers.cfg(alone, "cond", "uncond", 5.0)(X, SIGMA)
    assert torch.equal(found.x0, samplers.cfg(predict, "cond", "uncond", 5.0)(X, SIGMA).x0)
    assert calls == [["uncond"], ["cond"]]


@pytest.mark.parametrize(("start", "stop"), [(0.01, 0.2), (0.0, 1.0), (0.3, 0.3), (0.5, 0.52), (0.1, 0.7)])
def test_windows_of_steps_are_those_of_the_pipelines(start, stop):
    """Calls at the level of a step and between it and the next one belong to the step."""
    for steps in range(1, 60):
        levels = samplers.sigmas("normal", steps)
        window = samplers.steps_inside(levels, start, stop)
        for i, (sigma, following) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)):
            inside = i > steps * start and i < steps * stop
            assert (sigma in window) == inside
            assert (0.5 * (sigma + following) in window) == inside


def test_windows_of_percents_are_levels():
    """CONVENTIONS, section 7; both ends inside, as in ComfyUI."""
    for percent, level in (
        (0.01, 0.996644),
        (0.1, 0.964286),
        (0.15, 0.944444),
        (0.2, 0.923077),
        (0.0, 1.0),
        (1.0, 0.0),
    ):
        assert samplers.level_at(percent, 3.0) == pytest.approx(level, abs=5e-7)
    window = samplers.percents(0.01, 0.15, 3.0)
    assert all(sigma in window for sigma in (samplers.level_at(0.01, 3.0), 0.95, samplers.level_at(0.15, 3.0)))
    assert not any(sigma in window for sigma in (0.9967, 0.9444, 0.5))
    assert 0.5 in samplers.percents(0.4, 0.6, 1.0)


def test_gaps_between_windows():
    def found(*ranges: tuple[float, float], low: float = 0.01) -> tuple[float, float] | None:
        return samplers.gap([samplers.percents(start, stop, 1.0) for start, stop in ranges], 1.0, low)

    assert found((0.0, 1.0)) is None
    assert found((0.1, 1.0), (0.0, 0.1)) is None
    assert found((0.0, 0.6), (0.3, 1.0)) is None
    assert found((0.0, 0.995)) is None
    assert found() == (1.0, 0.01)
    assert found((0.1, 1.0)) == (1.0, 0.9)
    assert found((0.0, 0.5), (0.75, 1.0)) == (0.5, 0.25)
    assert found((0.0, 0.5)) == (0.5, 0.01)
    assert found((0.0, 0.75), (0.25, 0.5)) == (0.25, 0.01)
    assert samplers.gap([Window(1.0, 0.5)], 1.0, 0.5) == (0.5, 0.5)
    assert math.isinf(Window().high)
