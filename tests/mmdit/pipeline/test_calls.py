"""What a call takes and gives beside prompts: embeddings, levels, latents, callbacks, settings; against diffusers."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import tiny
from mmdit import PROFILES, Guidance, Pipeline, read_settings, save_png
from refusals import refuses

PROMPTS = ["a red circle above a blue square", "A small star, left of two rings."]
SMALL = {"num_inference_steps": 3, "height": 32, "width": 48, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(tiny_folders) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])


@pytest.fixture(scope="module")
def theirs(tiny_folders):
    return tiny.load(tiny_folders["sd3.5-medium"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_error_in_an_encoder_leaves_the_generator_as_it_was():
    pipe, settings = Pipeline.demo(), SMALL | {"num_inference_steps": 1, "height": 32, "width": 32}
    wanted, generator = pipe("a ring", seed=3, **settings).images, seeded(3)

    def fail(*_):
        raise OverflowError("in an encoder")

    hook = pipe.t5.register_forward_hook(fail)
    with pytest.raises(OverflowError, match="in an encoder"):
        pipe("a ring", generator=generator, **settings)
    hook.remove()
    assert torch.equal(pipe("a ring", generator=generator, **settings).images, wanted)


def embeds(pipe: Pipeline, prompts, negatives) -> dict[str, torch.Tensor]:
    cond, uncond = pipe.encode(prompts), pipe.encode(negatives)
    return {
        "prompt_embeds": cond.context,
        "pooled_prompt_embeds": cond.pooled,
        "negative_prompt_embeds": uncond.context,
        "negative_pooled_prompt_embeds": uncond.pooled,
    }


@torch.no_grad()
def test_embeddings_draw_what_their_prompts_draw_here_and_in_diffusers(pipe, theirs):
    given = embeds(pipe, PROMPTS, ["green", ""])
    drawn = pipe(seed=3, **given, **SMALL).images
    assert torch.equal(drawn, pipe(PROMPTS, ["green", ""], seed=3, **SMALL).images)
    wanted = theirs(generator=seeded(3), **given, **SMALL).images
    assert tiny.error(drawn, wanted) <= 1e-5
    positive = {name: value for name, value in given.items() if not name.startswith("negative")}
    assert torch.equal(pipe(seed=3, **positive, **SMALL).images, pipe(PROMPTS, seed=3, **SMALL).images)
    twice = pipe(seed=[1, 2, 3, 4], num_images_per_prompt=2, **positive, **SMALL).images
    torch.testing.assert_close(twice[3:], pipe(PROMPTS[1], seed=4, **SMALL).images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sampler": "heun", "schedule": "beta"},
        {"schedule": "linear_quadratic", "image": torch.full((1, 3, 32, 48), 0.5), "strength": 0.7},
        {"sampler": "dpmpp_2m", "schedule": "kl_optimal", "guidance": Guidance(kind="apg")},
    ],
    ids=["plain", "heun", "picture", "apg"],
)
def test_torchs_default_device_is_not_ours(pipe, how):
    """Without values on the meta device: whatever is made without a device of its own would end the drawing."""
    wanted = pipe(PROMPTS, seed=3, **how, **SMALL).images
    torch.set_default_device("meta")
    try:
        found = pipe(PROMPTS, seed=3, **how, **SMALL).images
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, wanted)


def test_wrong_embeddings(pipe):
    given = embeds(pipe, PROMPTS, ["green", ""])
    cond, pooled = given["prompt_embeds"], given["pooled_prompt_embeds"]
    refuses(lambda: pipe("a", **given), "prompt and prompt_embeds are both given; give one of them", error=ValueError)
    refuses(lambda: pipe(prompt_embeds=cond), "prompt_embeds are given without pooled_prompt_embeds", error=ValueError)
    refuses(
        lambda: pipe("a", negative_pooled_prompt_embeds=pooled),
        "negative_pooled_prompt_embeds are given without negative_prompt_embeds",
        error=ValueError,
    )
    refuses(
        lambda: pipe(prompt_embeds=cond[..., :-1], pooled_prompt_embeds=pooled),
        f"prompt_embeds have shape [2, {cond.shape[1]}, 255] and their pooled ones [2, 192], expected [b, tokens, 256]",
        error=ValueError,
    )
    refuses(
        lambda: pipe("a", negative_prompt_embeds=cond, negative_pooled_prompt_embeds=pooled),
        "2 negative prompts for 1 prompts",
        error=ValueError,
    )
    refuses(lambda: pipe("a", guidance_scale=float("nan")), "guidance_scale must be a finite number", error=ValueError)


@torch.no_grad()
def test_custom_sigmas(pipe, theirs):
    """As they are; diffusers shifts its user's list once more and appends the 0."""
    levels = [1.0, 0.6, 0.3]
    settings = {"height": 32, "width": 48, "output_type": "pt"}
    shifted = [3 * s / (1 + 2 * s) for s in levels]
    drawn = pipe(PROMPTS[0], seed=3, sigmas=[*shifted, 0.0], **settings).images
    wanted = theirs(PROMPTS[0], generator=seeded(3), sigmas=levels, num_inference_steps=3, **settings).images
    assert tiny.error(drawn, wanted) <= 1e-5
    refuses(
        lambda: pipe("a", sigmas=[1.0, 0.0], num_inference_steps=1),
        "sigmas and num_inference_steps are both given",
        error=ValueError,
    )


@torch.no_grad()
def test_a_loop_of_ones_own_takes_levels_as_they_are(pipe):
    """Euler by hand from `levels` and `predictor`, without a warning, is what `sample` does."""
    cond, uncond, levels = pipe.encode(PROMPTS[0]), pipe.encode(""), pipe.sigmas(3)
    predict, x = pipe.predictor(uncond=uncond, cond=cond), pipe.noise(3, height=32, width=48)
    for level, following in pairwise(levels):
        u, c = predict(x, level)
        x = x + (x - (u + 7.0 * (c - u))) / level * (following - level)
    *_, last = pipe.sample(cond, uncond, pipe.noise(3, height=32, width=48), num_inference_steps=3)
    assert tiny.error(x, last.x) <= 1e-5


@torch.no_grad()
def test_latents_in_and_out(pipe):
    """Stopping branch way and going on from the latents is the same as going through."""
    levels, whole = pipe.sigmas(4), pipe(PROMPTS[0], seed=3, **(SMALL | {"num_inference_steps": 4})).images
    cond, uncond = pipe.encode(PROMPTS[0]), pipe.encode("")
    first = torch.cat([levels[:3], torch.zeros(1, dtype=torch.float64)])
    *_, at_two, _ = pipe.sample(cond, uncond, pipe.noise(3, height=32, width=48), sigmas=first)
    drawn = pipe(PROMPTS[0], latents=at_two.x, sigmas=levels[2:], output_type="pt").images
    assert torch.equal(drawn, whole)


def test_callbacks_see_and_change_what_diffusers_shows(pipe, theirs):
    seen, reference = [], []

    def ours(which, i, timestep, tensors):
        assert which is pipe
        seen.append((i, float(timestep), tensors["latents"].clone()))
        return {"latents": tensors["latents"] * 0.9} if i == 0 else None

    def others(_, i, timestep, tensors):
        reference.append((i, float(timestep), tensors["latents"].clone()))
        return {"latents": tensors["latents"] * 0.9} if i == 0 else tensors

    a = pipe(PROMPTS[0], seed=3, callback_on_step_end=ours, **SMALL).images
    b = theirs(PROMPTS[0], generator=seeded(3), callback_on_step_end=others, **SMALL).images
    assert tiny.error(a, b) <= 1e-5
    for (i, timestep, x), (j, their_timestep, their_x) in zip(seen, reference, strict=True):
        assert i == j
        assert timestep == pytest.approx(their_timestep, abs=1e-3)
        assert tiny.error(x, their_x) <= 1e-5
    assert not torch.equal(a, pipe(PROMPTS[0], seed=3, **SMALL).images)


def test_callbacks_that_return_something_else(pipe):
    for found, said, error in (
        ([1], "callback_on_step_end returned list, expected a dict or None", TypeError),
        ({"prompts": 1}, "returned 'prompts'; it can change 'latents'", ValueError),
        ({"prompt_embeds": 1}, "returned int for 'prompt_embeds', expected a tensor", TypeError),
        ({"latents": torch.zeros(1)}, "returned latents [1], expected [1, 16, 4, 6]", ValueError),
    ):
        refuses(
            lambda found=found: pipe("a", seed=0, callback_on_step_end=lambda *_: found, **SMALL), said, error=error
        )


def test_settings_draw_the_picture_again(tmp_path):
    """From the file alone: the same pixels to the bit, for one of a batch of seeds too."""
    pipe = Pipeline.demo(profile="comfyui")
    few = {"num_inference_steps": 2, "guidance_scale": 4.5, "max_sequence_length": 80}
    output = pipe(["a red star", "a ring"], "green", seed=[7, 2**63 + 1], **few)
    path = save_png(output.images[0], tmp_path / "a.png", output.settings[0].to_json())
    found = read_settings(path)
    assert found["model"] == "demo"
    assert found["seed"] == 7
    assert output.settings[1].seed == 2**63 + 1
    json.dumps(found, allow_nan=False)
    names = ("prompt", "negative_prompt", "seed", "height", "width", "num_inference_steps", "guidance_scale")
    names += ("sampler", "schedule", "max_sequence_length")
    again = Pipeline.demo(profile=found["profile"])(**{name: found[name] for name in names}).images[0]
    alone = pipe("a red star", "green", seed=7, **few).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(alone))
    # In a batch of two, sums run in another order.
    assert np.abs(np.asarray(again, np.int16) - np.asarray(output.images[0], np.int16)).max() <= 1


def test_settings_say_nothing_that_they_cannot_know(pipe):
    small = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt"}
    assert [s.seed for s in pipe(["a", "b"], seed=3, **small).settings] == [None, None]
    assert [s.seed for s in pipe("a", generator=seeded(3), **small).settings] == [None]
    assert [s.negative_prompt for s in pipe("a", "b", guidance_scale=1.0, seed=3, **small).settings] == [""]
    assert pipe("a", latents=pipe.noise(1, height=32, width=32), output_type="pt", num_inference_steps=1).settings == ()
    assert pipe("a", seed=1, sigmas=[1.0, 0.0], height=32, width=32, output_type="pt").settings == ()
    assert pipe("a", seed=1, callback_on_step_end=lambda *_: None, **small).settings == ()


def test_settings_do_not_pass_a_changed_profile_off_as_a_known_one(tiny_folders):
    small = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt", "seed": 1}
    for changes, name in (({"to_uint8": "truncate"}, "diffusers, changed"), ({"shift": 2.0, "steps": 3}, "diffusers")):
        profile = replace(PROFILES["diffusers"], **changes)
        pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-large"], profile=profile)
        assert pipe("a", **small).settings[0].profile == name


def test_tiled_decoding_of_a_call(pipe):
    settings = {"height": 96, "width": 64, "num_inference_steps": 1, "seed": 0, "output_type": "pt"}
    whole, tiled = pipe("a", **settings).images, pipe("a", vae_tile=32, **settings).images
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-4)


def test_missing_encoders_follow_the_profile(tiny_folders):
    folder = tiny_folders["sd3.5-large"]
    for profile, tokens in (("diffusers", 77 + 256), ("comfyui", 77)):
        pipe = Pipeline.from_pretrained(folder, profile=profile)
        pipe.t5 = None
        assert pipe.encode("a").context.shape[1] == tokens
    pipe.clip_l = None  # ComfyUI puts zeros there
    assert float(pipe.encode("a").pooled[:, :64].abs().max()) == 0
    with pytest.raises(ValueError, match="T5"):
        other = Pipeline.from_pretrained(folder, profile="reference")
        other.t5 = None
        other.encode("a")
