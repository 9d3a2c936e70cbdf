"""What watchers are told of the transformer's passes, and branches that leave out layers."""

import pytest
import torch

import mmdit
from mmdit import Pipeline
from mmdit.pipeline.passes import Branch

PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture(scope="module")
def demo():
    return Pipeline.demo()


def drawn(pipe, steps=2, **settings):
    cond, uncond = pipe.encode(PROMPTS), pipe.encode(["", ""])
    noise = pipe.noise(3, count=2)
    return list(pipe.sample(cond, uncond, noise, num_inference_steps=steps, **settings))


def test_a_pass_says_step_level_and_rows(demo):
    seen = []
    demo.watchers.append(seen.append)
    try:
        with torch.no_grad():
            drawn(demo, guidance_scale=5.0)
    finally:
        demo.watchers.clear()
    levels = demo.sigmas(2).tolist()
    assert [(one.step, one.sigma, one.samples) for one in seen] == [(0, levels[0], 2), (1, levels[1], 2)]
    assert [[branch.name for branch in one.branches] for one in seen] == [["uncond", "cond"]] * 2
    assert (seen[0].rows("uncond"), seen[0].rows("cond")) == (slice(0, 2), slice(2, 4))
    with pytest.raises(KeyError, match=r"no branch 'skip', but uncond, cond"):
        seen[0].rows("skip")


def test_branches_that_skip_layers_run_apart(demo):
    read, x = demo.encode(PROMPTS[0]), demo.noise(1)
    passes = []
    demo.watchers.append(passes.append)
    try:
        with torch.no_grad():
            plain, skipped = demo.predict(x, 0.7, [Branch(read), Branch(read, "skip", (1,))])
    finally:
        demo.watchers.clear()
    assert [one.branches[0].skip_layers for one in passes] == [(), (1,)]
    with torch.no_grad():
        velocity = demo.transformer(x, torch.tensor([700.0]), read.context, read.pooled, skip_layers=(1,))
        torch.testing.assert_close(skipped, x - 0.7 * velocity, rtol=0, atol=1e-6)
    assert (plain - skipped).abs().max() > 0.01


def test_what_looks_inside_does_not_see_the_search_for_the_layer(demo):
    """The step runs once more to find the layer: captures and maps pass by, and patches act as they did."""
    name, few = "joint_blocks.1.x_block.mlp.out", {"seed": 3, "num_inference_steps": 2, "height": 64, "width": 64}
    said = "first layer with such an output is joint_blocks.1.x_block.mlp"
    with (
        mmdit.attention_maps(demo, "circle") as maps,
        mmdit.patch(demo, name, scale=float("inf"), branch="cond", steps=[1]),
        mmdit.capture(demo, name, budget=None) as seen,
        pytest.raises(FloatingPointError, match=said),
    ):
        demo("a red circle", **few)
    assert [entry.label[1:3] for entry in seen.of(name).entries] == [(0, 0), (0, 0), (1, 0), (1, 0)]
    assert len(maps.passes) == 2
    with mmdit.capture(demo, name, budget=None) as again:
        demo("a red circle", **few)
    assert again[name].shape[0] == 2
