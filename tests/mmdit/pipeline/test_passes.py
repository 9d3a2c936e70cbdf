"""What watchers are told of the transformer's passes, and branches that leave out layers."""

import pytest
import torch

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
