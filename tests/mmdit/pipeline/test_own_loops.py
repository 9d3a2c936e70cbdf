"""What looks inside gives the same through a call, through `sample`, in a loop of one's own and under a solver."""

from itertools import pairwise

import pytest
import torch
from jaxtyping import config as jaxtyping_config

import mmdit
import tiny
from samplers import SOLVERS

PROMPT, STEPS, SCALE, TOKENS = "a red circle", 3, 4.0, 16
POINT = "joint_blocks.1.x_block.resid_post"


@pytest.fixture(scope="module")
def demo():
    return mmdit.Pipeline.demo()


def by_call(pipe):
    how = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "max_sequence_length": TOKENS}
    return pipe(PROMPT, seed=1, output_type="latent", **how).images


def encoded(pipe):
    return [pipe.encode(text, max_sequence_length=TOKENS) for text in (PROMPT, "")]


def by_sample(pipe):
    cond, uncond = encoded(pipe)
    *_, last = pipe.sample(cond, uncond, pipe.noise(1), num_inference_steps=STEPS, guidance_scale=SCALE)
    return last.x


def by_predictor(pipe):
    cond, uncond = encoded(pipe)
    predict, x = pipe.predictor(uncond=uncond, cond=cond), pipe.noise(1)
    for sigma, following in pairwise(pipe.sigmas(STEPS).tolist()):
        without, given = predict(x, sigma)
        x0 = without + SCALE * (given - without)
        x = x + (x - x0) / sigma * (following - sigma)
    return x


def by_solver(pipe):
    cond, uncond = encoded(pipe)
    predict = pipe.predictor(uncond=uncond, cond=cond)

    def denoise(x, sigma):
        without, given = predict(x, sigma)
        return without + SCALE * (given - without)

    *_, last = SOLVERS["euler"](denoise, pipe.noise(1), pipe.sigmas(STEPS))
    return last.x


OWN = pytest.mark.parametrize("draw", [by_sample, by_predictor, by_solver])


@OWN
@torch.no_grad()
def test_captures_are_the_same(demo, draw):
    for branch, steps in (("cond", None), ("uncond", [0, 2])):
        found = []
        for way in (by_call, draw):
            with mmdit.capture(demo, POINT, branch=branch, steps=steps, budget=None) as seen:
                way(demo)
            found.append(seen)
        wanted, given = found
        assert given[POINT].shape == wanted[POINT].shape
        assert tiny.error(given[POINT], wanted[POINT]) <= 1e-5
        labels = [[(one.label.step, one.label.branch) for one in seen.of(POINT).entries] for seen in found]
        assert labels[0] == labels[1]
        assert [step for step, _ in labels[1]] == (steps or [0, 1, 2])


@OWN
@torch.no_grad()
def test_patches_are_the_same(demo, draw):
    how = {"ablate": "zero", "branch": "cond", "steps": [1]}
    with mmdit.patch(demo, "joint_blocks.1.x_block.attn.z", **how):
        wanted = by_call(demo)
    with mmdit.patch(demo, "joint_blocks.1.x_block.attn.z", **how):
        found = draw(demo)
    assert tiny.error(found, wanted) <= 1e-5
    assert tiny.error(found, by_call(demo)) > 1e-3


@OWN
@torch.no_grad()
def test_attention_maps_are_the_same(demo, draw):
    found = []
    for way in (by_call, draw):
        with mmdit.attention_maps(demo, ["red"], steps=[0, 1]) as maps:
            way(demo)
        found.append(maps.of("red"))
    assert tiny.error(found[1], found[0]) <= 1e-5


@torch.no_grad()
def test_a_solver_that_calls_twice_says_its_step(demo):
    cond, uncond = encoded(demo)
    predict, steps = demo.predictor(cond=cond, uncond=uncond), []
    demo.watchers.append(lambda one: steps.append(one.step))
    try:
        predict(demo.noise(1), 0.9)
        predict(demo.noise(1), 0.8, step=0)
        predict(demo.noise(1), 0.8)
    finally:
        demo.watchers.clear()
    assert steps == [0, 0, 1]


@torch.no_grad()
def test_a_branch_that_nobody_named_is_refused(demo):
    cond, uncond = encoded(demo)
    for inspected in (
        lambda: mmdit.capture(demo, POINT, branch="cond"),
        lambda: mmdit.patch(demo, POINT, scale=2.0, branch="cond"),
        lambda: mmdit.attention_maps(demo, ["red"]),
    ):
        with pytest.raises(ValueError, match="predictor"), inspected():
            demo.predict(demo.noise(1), 0.7, [cond, uncond])
    with mmdit.capture(demo, POINT, budget=None) as seen:  # without a name, each call is still one step
        for sigma in (0.9, 0.5):
            demo.predict(demo.noise(1), sigma, [cond, uncond])
    assert [(one.label.step, one.label.call) for one in seen.of(POINT).entries] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_predictor_takes_names(demo):
    with pytest.raises(TypeError, match="by name"):
        demo.predictor()
    jaxtyping_config.update("jaxtyping_disable", True)  # signatures are checked only in tests
    try:
        with pytest.raises(TypeError, match="cond is str"):
            demo.predictor(cond="a red ring")
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
