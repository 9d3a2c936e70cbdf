"""Callbacks are diffusers': its own classes draw the same here and there; what they read and set on the pipeline."""

from dataclasses import fields

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SD3CFGCutoffCallback

import samplers
import tiny
from mmdit import Guidance, Pipeline

PROMPT = "a red circle above a blue square"
SMALL = {"num_inference_steps": 4, "height": 32, "width": 48, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(tiny_folders):
    return Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])


@pytest.fixture(scope="module")
def theirs(tiny_folders):
    return tiny.load(tiny_folders["sd3.5-medium"])


def seeded():
    return torch.Generator().manual_seed(3)


@torch.no_grad()
@pytest.mark.parametrize("many", [False, True])
def test_diffusers_own_callback_draws_the_same(pipe, theirs, many):
    callback = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    callback = MultiPipelineCallbacks([callback]) if many else callback
    found = pipe(PROMPT, seed=3, callback_on_step_end=callback, **SMALL).images
    wanted = theirs(PROMPT, generator=seeded(), callback_on_step_end=callback, **SMALL).images
    assert tiny.error(found, wanted) <= 1e-5
    assert tiny.error(found, pipe(PROMPT, seed=3, **SMALL).images) > 1e-3


def test_the_cutoff_saves_the_unconditional_branch(pipe):
    passes = []
    pipe.watchers.append(lambda one: passes.append([branch.name for branch in one.branches]))
    try:
        callback = SD3CFGCutoffCallback(cutoff_step_ratio=0.25)
        pipe(PROMPT, seed=3, callback_on_step_end=callback, **SMALL)
    finally:
        pipe.watchers.clear()
    assert passes == [["uncond", "cond"]] * 2 + [["cond"]] * 2


@torch.no_grad()
def test_interrupting_ends_as_in_diffusers(pipe, theirs):
    seen = []

    def stop(which, i, timestep, tensors):
        seen.append(i)
        which._interrupt = i == 1
        return tensors

    found = pipe(PROMPT, seed=3, callback_on_step_end=stop, **SMALL).images
    assert seen == [0, 1]
    assert pipe.interrupt
    wanted = theirs(PROMPT, generator=seeded(), callback_on_step_end=stop, **SMALL).images
    assert tiny.error(found, wanted) <= 1e-5
    assert tiny.error(pipe(PROMPT, seed=3, **SMALL).images, found) > 1e-3
    assert not pipe.interrupt


def test_another_scale_changes_the_scale_alone(pipe):
    """The guidance is built again with the new scale, and all the rest of the plan is the same object."""
    noise = pipe.noise(3, height=32, width=48)
    cond, uncond = (pipe.encode(text).repeat(1) for text in (PROMPT, ""))
    plan = pipe._plan(noise.shape, num_inference_steps=4, guidance_scale=5.0, guidance=Guidance(rescale=0.5))
    run = pipe._run(plan, plan.ranges("cond", cond), plan.ranges("uncond", uncond))
    before, cond_before, uncond_before = run(noise, 0.7), run.cond, run.uncond
    run.scale(2.0)
    changed = [one.name for one in fields(plan) if getattr(run.plan, one.name) is not getattr(plan, one.name)]
    assert changed == ["guidance_scale"]
    assert (run.cond, run.uncond, run.step) == (cond_before, uncond_before, 0)
    with_prompt, without = pipe.predict(noise, 0.7, [cond, uncond])
    x0 = without + 2.0 * (with_prompt - without)
    wanted = noise - samplers.rescaled(noise - x0, noise - with_prompt, 0.5)
    torch.testing.assert_close(run(noise, 0.7).x0, wanted, rtol=0, atol=1e-5)
    assert float((before.x0 - wanted).abs().max()) > 1e-2
    run.scale(1.0)
    assert run(noise, 0.7).uncond is None
    run.scale(5.0)
    torch.testing.assert_close(run(noise, 0.7).x0, before.x0, rtol=0, atol=1e-6)


def test_what_a_callback_can_read(pipe):
    seen = {}

    def read(which, i, timestep, tensors):
        seen[i] = (which.num_timesteps, which.guidance_scale, which.do_classifier_free_guidance, timestep, tensors)

    names = ["latents", "denoised", "prompt_embeds", "pooled_prompt_embeds"]
    how = {"callback_on_step_end": read, "callback_on_step_end_tensor_inputs": names, "guidance_scale": 5.0}
    pipe(PROMPT, seed=3, **how, **SMALL)
    count, scale, guided, timestep, tensors = seen[0]
    assert (count, scale, guided) == (4, 5.0, True)
    assert isinstance(timestep, torch.Tensor)
    assert float(timestep) == 1000
    cond, uncond = pipe.encode(PROMPT), pipe.encode("")
    assert torch.equal(tensors["prompt_embeds"], torch.cat([uncond.context, cond.context]))
    assert torch.equal(tensors["pooled_prompt_embeds"], torch.cat([uncond.pooled, cond.pooled]))
    assert tensors["latents"].shape == tensors["denoised"].shape == (1, 16, 4, 6)
    pipe(PROMPT, seed=3, **(how | {"guidance_scale": 1.0}), **SMALL)
    assert torch.equal(seen[0][4]["prompt_embeds"], cond.context)


def test_latents_have_the_models_dtype(tiny_folders):
    with pytest.warns(UserWarning, match="bfloat16 is slow on a CPU"):
        pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"], dtype=torch.bfloat16)
    dtypes = []
    pipe("a", seed=1, callback_on_step_end=lambda *given: dtypes.append(given[3]["latents"].dtype), **SMALL)
    assert dtypes == [torch.bfloat16] * 4


@torch.no_grad()
def test_a_callback_changes_the_prompt(pipe):
    other = pipe.encode("green star")

    def change(which, i, timestep, tensors):
        return {"prompt_embeds": other.context, "pooled_prompt_embeds": other.pooled} if i == 1 else None

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    how = {"callback_on_step_end_tensor_inputs": names, "seed": 3, "guidance_scale": 1.0}
    found = pipe(PROMPT, callback_on_step_end=change, **how, **SMALL).images
    cond, sigmas, x = pipe.encode(PROMPT), pipe.sigmas(4).tolist(), pipe.noise(3, height=32, width=48)
    for i in range(4):
        [x0] = pipe.predict(x, sigmas[i], [cond if i < 2 else other])
        x = x + (x - x0) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    assert tiny.error(found, pipe.decode(x)) <= 1e-5


def test_tensors_that_there_are_not(pipe):
    with pytest.raises(ValueError, match=r"'latent'.*'latents'"):
        pipe("a", callback_on_step_end=print, callback_on_step_end_tensor_inputs=["latent"], **SMALL)
    with pytest.raises(AttributeError, match="argument of the call"):
        Pipeline._guidance_scale.fset(Pipeline.demo(), 3.0)


def test_a_callback_may_draw_and_still_speaks_to_its_own_drawing(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            pipe(PROMPT, seed=5, guidance_scale=2.0, **SMALL | {"num_inference_steps": 1})
            seen.append((pipe.num_timesteps, pipe.guidance_scale))
            pipe._interrupt = True
        seen.append(step)

    pipe(PROMPT, seed=3, guidance_scale=4.0, callback_on_step_end=callback, **SMALL)
    assert seen == [0, (4, 4.0), 1]


def test_a_callback_that_changes_nothing_keeps_the_momentum(pipe):
    """Embeddings or a scale from a callback began the momentum anew in every step."""
    how = {"seed": 3, "guidance": Guidance(kind="apg", momentum=-0.5), **SMALL}
    wanted = pipe(PROMPT, **how).images

    def embeddings(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].clone()}

    def scale(pipe, step, timestep, tensors):
        pipe._guidance_scale = pipe.guidance_scale

    names = ["prompt_embeds"]
    for callback in (embeddings, scale):
        found = pipe(PROMPT, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **how).images
        assert torch.equal(found, wanted)
