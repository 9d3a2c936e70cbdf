"""What the profiles of ComfyUI and Stability's code mean, by formula; diffusers' is tested against diffusers itself."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdit import PROFILES, Pipeline
from mmdit.pipeline.profiles import PRESETS, Profile
from samplers import sigmas

PROMPT = "a (red:1.3) circle above a blue square!"
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipes(tiny_folders) -> dict[str, Pipeline]:
    return {name: Pipeline.from_pretrained(tiny_folders["sd3.5-medium"], profile=name) for name in PROFILES}


@pytest.fixture(scope="module")
def exact(tiny_folders) -> dict[str, Pipeline]:
    """Models in float64, so that rounding is that of the latent, which these profiles keep in float32."""
    folder = tiny_folders["sd3.5-medium"]
    return {name: Pipeline.from_pretrained(folder, profile=name, dtype=torch.float64) for name in PROFILES}


def velocity(pipe: Pipeline, x: torch.Tensor, timestep: float, text: str) -> torch.Tensor:
    """The model's answer with nothing of the pipeline between."""
    read = pipe.encode([text])
    return pipe.transformer(x.to(pipe.dtype), torch.full((1,), timestep), read.context, read.pooled).to(x.dtype)


@torch.no_grad()
def test_comfyui_by_formula(exact):
    """Euler in float32 from float32 noise of the CPU; u + (c - u) g; truncated to 8 bits."""
    pipe, levels = exact["comfyui"], sigmas("normal", 2).tolist()
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    for level, following in pairwise(levels):
        c, u = (x - level * velocity(pipe, x, 1000 * level, text) for text in (PROMPT, "green"))
        denoised = u + (c - u) * 8.0
        x = x + (x - denoised) / level * (following - level)
    wanted = ((pipe.vae.decode(x.double()) + 1) / 2).clamp(0, 1)
    drawn = pipe(PROMPT, "green", seed=5, output_type="pt", **SMALL).images
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=2e-6)
    eight = np.asarray(pipe(PROMPT, "green", seed=5, **SMALL).images[0])
    assert np.array_equal(eight, (drawn[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    rounded = np.asarray(replace_profile(pipe, to_uint8="round")(PROMPT, "green", seed=5, **SMALL).images[0])
    assert not np.array_equal(eight, rounded)


def replace_profile(pipe: Pipeline, **changes) -> Pipeline:
    """The same models under a changed profile."""
    other = object.__new__(Pipeline)
    other.__dict__ = dict(vars(pipe))
    other.profile = replace(pipe.profile, **changes)
    return other


@torch.no_grad()
def test_the_reference_by_formula(exact):
    """DPM-Solver++(2M) in -ln sigma from float16 noise; levels that the model sees are float16; both passes always."""
    pipe, levels = exact["reference"], sigmas("normal", 3).tolist()
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(5)).half().float()
    before = None
    for i, (level, following) in enumerate(pairwise(levels)):
        seen = torch.tensor(level).half()
        timestep = float((seen * 1000).float())
        c, u = (x - float(seen) * velocity(pipe, x, timestep, text) for text in (PROMPT, "green"))
        mixed = denoised = u + (c - u) * 5.0
        if before is not None and following > 0:
            r = np.log(levels[i - 1] / level) / np.log(level / following)
            mixed = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * before
        x, before = following / level * x + (1 - following / level) * mixed, denoised
    asked = SMALL | {"num_inference_steps": 3, "seed": 5, "output_type": "latent"}
    drawn = pipe(PROMPT, "green", **asked).images
    torch.testing.assert_close(drawn.float(), x, rtol=0, atol=2e-6)
    changes = ({"sigma_dtype": "float32"}, {"noise_dtype": "float32"}, {"sampler": "euler"}, {"guidance_scale": 5.1})
    for change in changes:
        other = replace_profile(pipe, **change)(PROMPT, "green", **asked).images
        assert float((other - drawn).abs().max()) > 1e-5, change


def test_a_level_of_the_reference_is_rounded_as_recorded(pipes, monkeypatch):
    """CONVENTIONS, section 3: sigma 0.987381 becomes timestep 987.5."""
    seen = []
    pipe = pipes["reference"]
    read = pipe.encode([""])
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer,
        "forward",
        lambda x, t, *rest, **more: seen.append(float(t[0])) or forward(x, t, *rest, **more),
    )
    pipe.predict(torch.zeros(1, 16, 4, 4), 0.987381, [read])
    replace_profile(pipe, sigma_dtype="float32").predict(torch.zeros(1, 16, 4, 4), 0.987381, [read])
    assert seen == [987.5, pytest.approx(987.381, abs=1e-3)]


@pytest.mark.parametrize(
    ("name", "scale", "passes"),
    [
        ("diffusers", 0.5, 1),
        ("diffusers", 1.0, 1),
        ("diffusers", 1.5, 2),
        ("comfyui", 0.5, 2),
        ("comfyui", 1.0, 1),
        ("comfyui", 1.5, 2),
        ("reference", 1.0, 2),
        ("reference", 0.5, 2),
    ],
)
def test_when_the_negative_prompt_is_read(pipes, monkeypatch, name, scale, passes):
    pipe, counts = pipes[name], []
    predict = pipe.predict
    monkeypatch.setattr(
        pipe, "predict", lambda x, s, texts, **rest: counts.append(len(texts)) or predict(x, s, texts, **rest)
    )
    pipe("a", guidance_scale=scale, output_type="latent", seed=0, **SMALL)
    assert counts == [passes] * 2


def test_one_seed_for_several_pictures(pipes):
    for name in ("diffusers", "comfyui"):
        one = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(7))
        assert torch.equal(pipes[name].noise(7, count=3, height=32, width=32), one)
    alone = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(7)).half()
    assert torch.equal(pipes["reference"].noise(7, count=3, height=32, width=32), alone.repeat(3, 1, 1, 1))


@pytest.mark.parametrize("name", PROFILES)
def test_a_picture_of_a_batch_is_that_of_its_seed_alone(pipes, name):
    pipe = pipes[name]
    noise = pipe.noise([4, 9], count=2, height=32, width=48)
    for k, seed in enumerate((4, 9)):
        assert torch.equal(noise[k : k + 1], pipe.noise(seed, height=32, width=48))
    both = pipe(["a circle", "a ring"], seed=[4, 9], output_type="pt", **SMALL).images
    alone = pipe("a ring", seed=9, output_type="pt", **SMALL).images
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_odd_latents_wrap_in_comfyui_and_are_refused_elsewhere(pipes):
    pipe = pipes["comfyui"]
    x, read = torch.randn(1, 16, 5, 7), pipe.encode(["a"])
    wanted = x - 0.5 * velocity(pipe, F.pad(x, (0, 1, 0, 1), mode="circular"), 500.0, "a")[..., :5, :7]
    torch.testing.assert_close(pipe.predict(x, 0.5, [read])[0], wanted, rtol=0, atol=1e-6)
    assert pipe("a", height=40, width=56, num_inference_steps=1, output_type="pt", seed=0).images.shape[2:] == (40, 56)
    for name in ("diffusers", "reference"):
        with pytest.raises(ValueError, match="height must be a multiple of 16"):
            pipes[name]("a", height=40, width=56)


def test_conditionings_have_the_lengths_of_their_references(pipes):
    lengths = {name: pipe.encode([PROMPT]).context.shape[1] for name, pipe in pipes.items()}
    assert lengths == {"diffusers": 77 + 256, "comfyui": 77 + 77, "reference": 77 + 77}


def test_defaults(pipes):
    assert len(pipes["diffusers"].sigmas()) == 28 + 1
    assert len(pipes["comfyui"].sigmas()) == 20 + 1
    assert len(pipes["reference"].sigmas()) == 50 + 1


def test_presets_are_defaults_that_arguments_override(tiny_folders, monkeypatch):
    folder = tiny_folders["sd3.5-large"]
    pipe, plain = Pipeline.from_pretrained(folder, preset="turbo"), Pipeline.from_pretrained(folder)
    drawn = pipe("a", seed=1, height=32, width=32, output_type="latent").images
    wanted = plain(
        "a", seed=1, height=32, width=32, num_inference_steps=4, guidance_scale=1.0, output_type="latent"
    ).images
    assert torch.equal(drawn, wanted)
    assert len(pipe.sigmas(9)) == 10
    assert PRESETS["sd3_medium"].applied(PROFILES["reference"]).shift == 1.0
    with pytest.raises(ValueError, match="unknown preset 'turbos'; did you mean 'turbo'"):
        Pipeline.from_pretrained(folder, preset="turbos")


def test_a_preset_comes_before_the_schedulers_config_and_that_before_the_profile(tiny_folders):
    """The tiny folders say shift 3.0; SD3-Medium's preset says 1.0, and Turbo's says none."""
    folder = tiny_folders["sd3-medium"]
    other = replace(PROFILES["diffusers"], shift=2.0)
    assert Pipeline.from_pretrained(folder, preset="sd3_medium").shift == 1.0
    assert Pipeline.from_pretrained(folder, preset="turbo", profile=other).shift == 3.0
    assert Pipeline.from_pretrained(folder, profile=other).shift == 3.0


WRONG = [
    ("sigma_dtype", "float61"),
    ("noise_dtype", "bfloat16"),
    ("one_seed", "single"),
    ("step_noise", "same_seeds"),
    ("first_level", "all"),
    ("second_last", "left out"),
    ("open_sigmas", "shifted"),
    ("state_dtype", "float16"),
    ("uncond_pass", "above1"),
    ("skip_window", "step"),
    ("odd_latents", "crop"),
    ("to_uint8", "floor"),
    ("strength_levels", "last"),
    ("image_size", "pictures"),
    ("array_resize", "bilinear"),
    ("image_latent", "mode"),
    ("mask_values", "hard"),
    ("mask_acts", "before_step"),
    ("ddim_mask_noise", "other"),
    ("control_resize", "nearest"),
    ("control_canny", "byte"),
    ("control_depth", "inverse"),
    ("control_latent", "sampled"),
    ("control_positions", "made_up"),
    ("control_joint", "zero"),
    ("control_shift_of", "last"),
    ("control_spread", "even"),
    ("control_window", "step"),
    ("control_timestep", "float32"),
    ("control_after_last", 1),
    ("control_skip", 0),
    ("strength", 1.1),
    ("image_steps", 0),
    ("inpaint_shift", None),
    ("sampler", "eular"),
    ("schedule", "normall"),
    ("steps", 0),
    ("steps", True),
    ("guidance_scale", float("nan")),
    ("shift", 0),
    ("skip_alone", "no"),
    ("skip_stop", 1.5),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_profile_refuses_what_is_no_choice_of_its_field(field, value):
    with pytest.raises(ValueError, match=rf"Profile\.{field}"):
        replace(PROFILES["diffusers"], **{field: value})
    if field in ("sampler", "steps", "guidance_scale", "shift"):
        with pytest.raises(ValueError, match=rf"Preset\.{field}"):
            replace(PRESETS["turbo"], **{field: value})


@pytest.mark.usefixtures("as_users_run_it")
def test_every_word_of_a_profile_is_checked():
    words = {field.name for field in fields(Profile) if isinstance(field.default, str)} - {"name"}
    assert words == {field for field, value in WRONG if isinstance(value, str)} - {"skip_alone"}
    with pytest.raises(TypeError, match=r"Profile\.text is str"):
        replace(PROFILES["diffusers"], text="comfyui")
