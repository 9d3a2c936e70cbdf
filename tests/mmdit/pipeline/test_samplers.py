"""Samplers, schedules and their noise in the pipeline, under every profile."""

import sys
from copy import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

import samplers
import tiny
from mmdit import PROFILES, Pipeline, compare
from mmdit.pipeline.seeds import solver_options
from samplers import SCHEDULES, SOLVERS, resolution_shift, sigmas

PROMPT, OTHER = "a red circle above a blue square", "A small star"
SMALL = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent", "max_sequence_length": 32}
STOCHASTIC = [name for name, one in SOLVERS.items() if one.is_stochastic]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipes(tiny_folders):
    """The same models under every profile."""
    first = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])
    pipes = {}
    for name, profile in PROFILES.items():
        pipes[name] = copy(first)
        pipes[name].profile = profile
    return pipes


@pytest.fixture
def pipe(pipes):
    return pipes["diffusers"]


# ---- pictures and their seeds


def drawn(pipe, read, seeds, name):
    """The latents of two steps."""
    cond, uncond = (one.repeat(len(seeds)) for one in read)
    drawn_by = [seeded(seed) for seed in seeds]
    noise = pipe.noise(count=len(seeds), height=32, width=32, generator=drawn_by)
    asked = {"num_inference_steps": 2, "schedule": "simple", "guidance_scale": 2.0, "sampler": name}
    with torch.no_grad():
        *_, last = pipe.sample(cond, uncond, noise, generator=drawn_by, **asked)
    return last.x


@pytest.fixture(scope="module")
def read(pipes):
    return [pipes["diffusers"].encode(text, max_sequence_length=32) for text in (PROMPT, "")]


ALONE = [("diffusers", name) for name in SOLVERS if name != "dpm_adaptive"]
ALONE += [("comfyui", name) for name in (*STOCHASTIC, "uni_pc")] + [("reference", "euler_ancestral")]


@pytest.mark.parametrize(("profile", "name"), ALONE)
def test_a_picture_of_a_batch_is_that_of_its_seed_alone(pipes, read, profile, name):
    """dpm_adaptive is left out: the pictures of a batch share its steps."""
    both, alone = drawn(pipes[profile], read, [5, 6], name), drawn(pipes[profile], read, [6], name)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=2e-4)
    assert float((both[:1] - both[1:]).abs().max()) > 0.1


@pytest.mark.parametrize("profile", PROFILES)
def test_a_picture_says_how_to_draw_it_again(pipes, profile):
    asked = SMALL | {"sampler": "dpmpp_2m_sde", "schedule": "beta", "shift": 2.0}
    both = pipes[profile]([PROMPT, OTHER], seed=[5, 6], **asked)
    said = both.settings[1]
    again = {name: getattr(said, name) for name in ("seed", "sampler", "schedule", "shift")}
    alone = pipes[profile](OTHER, **(SMALL | again)).images
    torch.testing.assert_close(both.images[1:], alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_without_a_seed_every_picture_is_another(pipes, name):
    for pipe in pipes.values():
        a, b = (pipe(PROMPT, sampler=name, **SMALL).images for _ in range(2))
        assert float((a - b).abs().max()) > 0.1


def test_latents_leave_the_noise_on_the_way_to_draw(pipe):
    latents = pipe.noise(3, height=32, width=32)
    asked = SMALL | {"latents": latents, "sampler": "euler_ancestral"}
    a, b, c = (pipe(PROMPT, seed=seed, **asked).images for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert float((a - c).abs().max()) > 0.1
    with pytest.raises(ValueError, match="latents and seed are given"):
        pipe(PROMPT, seed=1, **(asked | {"sampler": "euler"}))


# ---- whose noise


def test_noise_goes_on_as_in_diffusers(tiny_folders, pipe):
    """The whole of StableDiffusion3Pipeline with its stochastic scheduler, against our lcm."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = tiny.load(tiny_folders["sd3.5-medium"])
    asked = SMALL | {"guidance_scale": 3.0}

    def wanted(generator):
        """Its pipeline gives its scheduler no generator, so that the noise would be torch's global state's."""
        scheduler = theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
        scheduler.step = partial(scheduler.step, generator=generator)
        return theirs([PROMPT, OTHER], negative_prompt=["", ""], generator=generator, **asked).images

    for seed, generator in ((3, seeded(3)), ([3, 4], [seeded(3), seeded(4)])):
        found = pipe([PROMPT, OTHER], seed=seed, sampler="lcm", **asked).images
        torch.testing.assert_close(found, wanted(generator), rtol=0, atol=1e-3)
    assert float((pipe([PROMPT, OTHER], seed=[3, 5], sampler="lcm", **asked).images - found)[1].abs().max()) > 0.1


def test_heun_is_diffusers(tiny_folders, pipe):
    from diffusers import FlowMatchHeunDiscreteScheduler

    theirs = tiny.load(tiny_folders["sd3.5-medium"])
    theirs.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    wanted = theirs(PROMPT, generator=seeded(3), **SMALL).images
    torch.testing.assert_close(pipe(PROMPT, seed=3, sampler="flow_heun", **SMALL).images, wanted, rtol=0, atol=1e-3)


def options_of(name, generators, rule="same_seed"):
    x, levels = torch.zeros(2, 4, 6, 6), sigmas("normal", 4)
    return solver_options(SOLVERS[name], x, levels, 2.5, generators, rule), x


def test_comfyui_starts_from_the_same_seed_again():
    used = seeded(7)
    torch.randn(9, generator=used)  # the starting noise
    options, x = options_of("euler_ancestral", used)
    assert torch.equal(options["noise"](1.0, 0.5), torch.randn(x.shape, generator=seeded(7)))
    options, x = options_of("euler_ancestral", [seeded(7), seeded(8)])
    assert torch.equal(options["noise"](1.0, 0.5)[1:], torch.randn(1, 4, 6, 6, generator=seeded(8)))
    options, x = options_of("euler_ancestral", seeded(7), "continued")
    assert torch.equal(options["noise"](1.0, 0.5), torch.randn(x.shape, generator=seeded(7)))
    assert "shift" not in options


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"])
def test_comfyui_has_a_tree_for_sde_samplers(name):
    """From the lowest level above 0 to the highest of the list, before 1 is replaced in it."""
    options, x = options_of(name, seeded(7))
    levels = sigmas("normal", 4)
    tree = samplers.BrownianTree(x, float(levels[-2]), 1.0, 7)
    assert torch.equal(options["noise"](0.9, 0.3), tree(0.9, 0.3))
    assert options["shift"] == 2.5
    assert SOLVERS[name].noise == "path"


def test_a_missing_extra_is_named_before_anything_is_drawn(pipes, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    asked = SMALL | {"sampler": "dpmpp_2m_sde", "seed": 3}
    pipes["diffusers"](PROMPT, **asked)
    pipes["comfyui"](PROMPT, **(asked | {"sampler": "euler_ancestral"}))
    with monkeypatch.context() as patch:
        patch.setattr(pipes["comfyui"].transformer, "forward", lambda *_, **__: pytest.fail("it was computed"))
        with pytest.raises(ImportError, match=r"mmdit-lab\[comfy\]"):
            pipes["comfyui"](PROMPT, **asked)


def test_a_comparison_gives_both_sides_the_same_noise(pipe):
    found = compare(pipe, copy(pipe), PROMPT, num_inference_steps=2, sampler="euler_ancestral", height=32, width=32)
    assert found.first is None, str(found)


# ---- levels


@pytest.mark.parametrize("name", ["dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"])
def test_comfyui_leaves_out_the_second_last_level(pipes, name):
    wanted = sigmas("simple", 7)
    found = pipes["comfyui"].sigmas(6, "simple", sampler=name)
    assert torch.equal(found, torch.cat([wanted[:-2], wanted[-1:]]))
    assert torch.equal(pipes["diffusers"].sigmas(6, "simple", sampler=name), sigmas("simple", 6))
    assert torch.equal(pipes["comfyui"].sigmas(6, "simple", sampler="euler"), sigmas("simple", 6))


def started(pipe, monkeypatch, **asked):
    """What the first call of the model is given, and its level."""
    seen = []
    predict = Pipeline.predict
    monkeypatch.setattr(
        Pipeline, "predict", lambda self, x, s, *rest, **more: seen.append((x, s)) or predict(self, x, s, *rest, **more)
    )
    pipe(PROMPT, seed=3, **(SMALL | asked))
    monkeypatch.undo()
    return seen[0]


def test_where_a_schedule_starts_that_starts_below_1(pipes, monkeypatch):
    noise = pipes["comfyui"].noise(3, height=32, width=32)
    for profile, factor in (("diffusers", 1.0), ("comfyui", None), ("reference", None)):
        x, sigma = started(pipes[profile], monkeypatch, schedule="ddim_uniform")
        assert sigma == float(sigmas("ddim_uniform", 3)[0]) < 1
        torch.testing.assert_close(x, noise * (factor or sigma), rtol=0, atol=2e-3 if profile == "reference" else 1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_draws(pipe, schedule):
    seen = []
    pipe(
        PROMPT,
        seed=3,
        schedule=schedule,
        callback_on_step_end=lambda _, i, t, tensors: seen.append(t),
        **(SMALL | {"guidance_scale": 1.0}),
    )
    assert seen == (1000 * sigmas(schedule, 3)[:-1]).tolist()


def test_shift_is_an_argument(pipe, monkeypatch):
    base, again = (pipe(PROMPT, seed=3, **SMALL, **more) for more in ({}, {"shift": 3.0}))
    assert torch.equal(base.images, again.images)
    other = pipe(PROMPT, seed=3, **SMALL, shift=1.5)
    assert torch.equal(
        other.images,
        pipe(PROMPT, seed=3, **(SMALL | {"num_inference_steps": None}), sigmas=sigmas("normal", 3, shift=1.5)).images,
    )
    assert (base.settings[0].shift, other.settings[0].shift) == (3.0, 1.5)
    sized = pipe(PROMPT, seed=3, **SMALL, shift="resolution")
    assert sized.settings[0].shift == resolution_shift(2 * 2)
    _, sigma = started(pipe, monkeypatch, sampler="dpmpp_2m_sde", shift=1.5)
    assert sigma == pytest.approx(1.5 * 0.9999 / (1 + 0.5 * 0.9999), rel=1e-12)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="shift"):
            pipe(PROMPT, seed=3, **SMALL, shift=wrong)


def test_steps_that_a_sampler_chooses_itself_are_told_as_they_are(pipe):
    seen = []
    few = {"num_inference_steps": None, "sigmas": [1.0, 0.6, 0.0]}  # from 1 to 0.6
    asked = SMALL | few | {"sampler": "dpm_adaptive", "seed": 3, "guidance_scale": 1.0}
    pipe(PROMPT, callback_on_step_end=lambda _, i, t, tensors: seen.append((i, t)), **asked)
    assert [i for i, _ in seen] == list(range(len(seen)))
    times = [t for _, t in seen]
    assert times[0] == 1000 and times == sorted(times, reverse=True) and len(times) > 2


# ---- guidance


@pytest.mark.parametrize("name", ["euler_cfg_pp", "dpmpp_2s_ancestral_cfg_pp"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cfg_pp_gets_both_predictions_at_every_scale(pipe, name, scale, monkeypatch):
    passes, predict = [], Pipeline.predict

    def counted(self, x, sigma, branches, **more):
        passes.append(len(branches))
        return predict(self, x, sigma, branches, **more)

    monkeypatch.setattr(Pipeline, "predict", counted)
    a = pipe(PROMPT, "green", seed=3, sampler=name, guidance_scale=scale, **SMALL).images
    assert set(passes) == {2}
    b = pipe(PROMPT, "blue", seed=3, sampler=name, guidance_scale=scale, **SMALL).images
    assert not torch.equal(a, b)


# ---- what is not finite


def fails(pipe, said, **asked):
    with pytest.raises(FloatingPointError, match=said):
        pipe(PROMPT, seed=3, **(SMALL | asked))
    assert pipe.watchers == []
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


def test_a_broken_layer_is_named(tiny_folders):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])
    weight = pipe.transformer.joint_blocks[1].x_block.attn.proj.weight
    keep = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    fails(
        pipe,
        r"step 0 from sigma 1 to 0\.\d+ gave \d+ of \d+ values that are not finite: at sigma 1 the first layer "
        r"with such an output is joint_blocks\.1\.x_block\.attn\.proj;",
    )
    fails(pipe, r"first layer with such an output is joint_blocks\.1\.x_block\.attn\.proj", sampler="heun")
    with torch.no_grad():
        weight.copy_(keep)

    def late(module, args, output):
        return output * float("inf") if args[0][0] < 500 else output

    handle = pipe.transformer.t_embedder.register_forward_hook(late)
    try:
        with pytest.raises(FloatingPointError, match=r"step 2 from sigma 0\.\d+ to 0 .* is t_embedder"):
            pipe(PROMPT, seed=3, **SMALL)
    finally:
        handle.remove()
    assert torch.isfinite(pipe(PROMPT, seed=3, **SMALL).images).all()


def test_what_the_layers_are_not_to_blame_for(pipe):
    def spoil(_, i, t, tensors):
        return {"latents": tensors["latents"] * float("nan")} if i == 0 else None

    fails(pipe, r"step 1 .* the input of the model at sigma 0\.\d+ was not finite", callback_on_step_end=spoil)
    said = "all predictions of the step are finite"
    fails(pipe, said, guidance_scale=1e39)


def test_profiles_say_what_differs():
    """The fields of noise and levels, as CONVENTIONS, sections 7, 8 and 15 (row 6), have them."""
    fields = ("step_noise", "first_level", "second_last")
    found = {name: tuple(getattr(profile, field) for field in fields) for name, profile in PROFILES.items()}
    assert found == {
        "diffusers": ("continued", "all_noise", "kept"),
        "comfyui": ("same_seed", "its_share", "left_out"),
        "reference": ("continued", "its_share", "kept"),
    }
    assert replace(PROFILES["comfyui"], step_noise="continued") != PROFILES["comfyui"]
