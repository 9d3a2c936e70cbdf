"""Pictures and masks as arguments: what is taken, what is refused, and what the parts of a drawing do with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config
from PIL import Image

import tiny
from mmdit import PROFILES, Hires, Pipeline, Settings, images
from mmdit.pipeline.image_inputs import image_inputs
from mmdit.pipeline.masks import Blend, Source, repeated
from recorded_runs import embeddings, image, pipeline, runs, text
from samplers import sigmas

COND, UNCOND = text("two cats on a blue sofa"), text("")
FEW = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 5, "output_type": "latent"}


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """A part of the recorded picture, [1, 32, 48, 3]."""
    return images.load_image(image("photo")).picture[:, :32, :48]


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    """The left half is drawn anew, with a gray column in between."""
    found = torch.zeros(1, 32, 48)
    found[..., :16], found[..., 16:24] = 1, 0.5
    return found


@pytest.fixture
def comfyui() -> Pipeline:
    return pipeline("large", "comfyui")


def drawn(pipe, **how) -> torch.Tensor:
    return pipe(COND, UNCOND, **FEW | how).images


def test_every_kind_of_picture_is_the_same(comfyui, photo):
    levels = (photo[0] * 255).round().to(torch.uint8)
    wanted = drawn(comfyui, image=photo, strength=0.5)
    kinds = [Image.fromarray(levels.numpy()), levels.numpy(), photo[0].movedim(-1, 0), [photo[0]], photo[0].double()]
    for kind in kinds:
        assert torch.equal(drawn(comfyui, image=kind, strength=0.5), wanted)
    encoded = comfyui.encode_image(photo)
    assert torch.equal(drawn(comfyui, image=encoded, strength=0.5), wanted)
    assert torch.equal(comfyui.encode_image(encoded), encoded)


def test_several_pictures(comfyui, photo):
    """One prompt and several pictures; each is drawn as it is alone with its seed."""
    other = photo.flip(2)
    how = {"strength": 0.5, "output_type": "pt"}
    both = drawn(comfyui, image=[photo, other], seed=[5, 6], **how)
    assert tiny.error(both[:1], drawn(comfyui, image=photo, seed=5, **how)) <= 1e-5
    assert tiny.error(both[1:], drawn(comfyui, image=other, seed=6, **how)) <= 1e-5
    one_picture = drawn(comfyui, image=photo, num_images_per_prompt=2, **how)
    assert one_picture.shape == both.shape
    assert not torch.equal(one_picture[0], one_picture[1])


def test_the_size_is_the_pictures_or_the_models(comfyui, photo):
    assert drawn(comfyui, image=photo[:, 3:, 1:]).shape[2:] == (3, 5)  # 29 x 47 pixels are cut to 24 x 40
    assert drawn(comfyui, image=photo, height=16, width=64).shape[2:] == (2, 8)
    diffusers = pipeline("large", "diffusers")
    config = diffusers.transformer.config
    diffusers.transformer.config = replace(config, sample_size=6)
    assert diffusers.encode_image(photo).shape[2:] == (6, 6)  # the model's own size
    diffusers.transformer.config = config


def test_the_cut_is_around_the_centre(comfyui, photo):
    cut = images.center_crop(photo[:, 3:, 1:])
    assert torch.equal(drawn(comfyui, image=photo[:, 3:, 1:]), drawn(comfyui, image=cut))


def test_settings_say_which_picture(photo, mask, tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray((photo[0] * 255).round().to(torch.uint8).numpy()).save(path)
    given = image_inputs(path, mask, channels=16, keep_outside=True, differential=0.5)
    (found,) = given.settings(1, 0.5)
    assert found["image"] == "in.png"
    assert found["image_digest"] == image_inputs(photo, None, channels=16).pictures[0].digest
    assert found["image_digest"] != image_inputs(photo.flip(1), None, channels=16).pictures[0].digest
    assert (found["strength"], found["keep_outside"], found["differential"]) == (0.5, True, 0.5)
    settings = Settings(**SETTINGS, **found, hires=Hires(scale=2.0, filter="bislerp").to_text())
    assert Settings.from_json(settings.to_json()) == settings
    assert Hires.from_text(settings.hires) == Hires(scale=2.0, filter="bislerp")


SETTINGS = {"prompt": "a", "negative_prompt": "", "seed": 1, "height": 32, "width": 48, "num_inference_steps": 2}
SETTINGS |= {"guidance_scale": 1.0, "sampler": "euler", "schedule": "normal", "shift": 3.0, "profile": "comfyui"}
SETTINGS |= {"max_sequence_length": None, "model": "a", "dtype": "float32", "quant": None, "device": "cpu"}


def test_outside_of_the_mask_the_latent_is_the_pictures(comfyui, photo, mask):
    encoded = comfyui.encode_image(photo)
    for sampler in ("euler", "dpmpp_2m", "euler_ancestral", "heun", "dpm_2"):
        found = drawn(comfyui, image=photo, mask_image=mask, sampler=sampler)
        torch.testing.assert_close(found[..., 3:], encoded[..., 3:], rtol=0, atol=1e-6)
        assert not torch.equal(found[..., :2], encoded[..., :2])


def test_grays_count_or_not(photo, mask):
    soft, binary = (
        pipeline("large", name).encode_mask(mask, torch.zeros(1, 16, 4, 6)) for name in ("comfyui", "diffusers")
    )
    assert soft[0, 0, 0].tolist() == [1, 1, 0.5, 0, 0, 0]
    assert binary[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_ddim_has_the_noise_of_the_next_seed(comfyui, photo, mask):
    """ComfyUI's ddim is euler with other noise over the picture: alone in the mask's inside is a difference seen."""
    euler, ddim = (drawn(comfyui, image=photo, mask_image=mask, sampler=name) for name in ("euler", "ddim"))
    assert tiny.error(ddim, euler) > 1e-4
    as_euler = Pipeline.__new__(Pipeline)
    as_euler.__dict__ = vars(comfyui) | {"profile": replace(comfyui.profile, ddim_mask_noise="of_the_start")}
    assert torch.equal(drawn(as_euler, image=photo, mask_image=mask, sampler="ddim"), euler)
    seen = []

    def predict(x, sigma, cond, uncond):
        seen.append(x)
        return cond

    how = {"image": photo, "mask_image": mask, "guidance": predict, "guidance_scale": None}
    drawn(comfyui, sampler="ddim", num_inference_steps=1, **how)
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(seen[0][..., 3:], noise[..., 3:], rtol=0, atol=1e-6)


def test_differential_diffusion():
    """A cell may change where the mask is at least (sigma - last) / (first - last)."""
    levels = sigmas("normal", 4)
    lowest = float(levels[-2])
    mask = torch.tensor([0.0, 0.3, 0.6, 1.0]).view(1, 1, 1, 4)
    source = Source(torch.zeros(1, 16, 1, 4), mask, 1.0)
    blend = Blend.of(source, torch.zeros(1, 16, 1, 4), levels, 3.0)
    for sigma in levels[:-1].tolist():
        threshold = (sigma - 3e-3 / 1.002) / (1 - 3e-3 / 1.002)
        assert blend.mask_at(sigma).flatten().tolist() == [float(m >= threshold) for m in mask.flatten().tolist()]
    assert lowest > 3e-3 / 1.002
    half = replace(blend, differential=0.5)
    torch.testing.assert_close(half.mask_at(1.0).flatten(), torch.tensor([0, 0.15, 0.3, 1.0]))


def test_keep_outside_keeps_pixels(comfyui, photo, mask):
    found = drawn(comfyui, image=photo, mask_image=mask, keep_outside=True, output_type="np")
    assert np.array_equal(found[:, :, 24:], photo.numpy()[:, :, 24:])
    assert not np.array_equal(found[:, :, :16], photo.numpy()[:, :, :16])


@pytest.mark.parametrize("profile", PROFILES)
def test_padding_mask_crop_in_every_profile(profile, photo):
    pipe = pipeline("large", profile)
    mask = torch.zeros(1, 32, 48)
    mask[:, 8:16, 8:20] = 1
    how = {**embeddings(), **FEW, "output_type": "np", "height": 32, "width": 32}
    found = pipe(image=photo, mask_image=mask, padding_mask_crop=4, **how).images
    assert found.shape == (1, 32, 48, 3)
    changed = np.abs(found[0] - photo[0].numpy()).max(-1) > 1e-6
    assert changed[8:16, 8:20].any()
    assert not changed[mask[0].numpy() == 0].any()


@pytest.mark.parametrize(
    ("profile", "steps", "strength", "left"),
    [
        ("diffusers", 7, 0.5, 4),
        ("diffusers", 10, 0.6, 6),
        ("diffusers", 10, 0.8, 8),
        ("reference", 10, 0.8, 9),
        ("reference", 7, 0.3, 3),
        ("comfyui", 6, 0.3, 6),
        ("comfyui", 7, 0.6, 7),
    ],
)
def test_steps_of_a_strength(profile, steps, strength, left):
    pipe = pipeline("large", profile)
    levels = pipe.sigmas(steps, strength=strength)
    assert len(levels) - 1 == left
    of = pipe.sigmas(int(steps / strength)) if profile == "comfyui" else pipe.sigmas(steps)
    assert torch.equal(levels, of[-(left + 1) :])


def test_samplers_that_leave_out_a_level_ask_for_one_more():
    pipe = pipeline("large", "comfyui")
    every = sigmas("normal", int(5 / 0.5) + 1)
    assert torch.equal(pipe.sigmas(5, sampler="uni_pc", strength=0.5), torch.cat([every[-7:-2], every[-1:]]))


def test_sigmas_of_the_caller(photo):
    levels = [1.0, 0.7, 0.4, 0.0]
    pipe = pipeline("large", "diffusers")
    how = {**embeddings(), "seed": 1, "guidance_scale": 1.0, "output_type": "latent", "height": 32, "width": 48}
    given = pipe(image=photo, sigmas=levels, strength=0.5, **how).images
    assert torch.equal(given, pipe(image=photo, sigmas=levels[1:], strength=1.0, **how).images)
    comfyui = pipeline("large", "comfyui")
    assert drawn(comfyui, image=photo, sigmas=[0.5, 0.0], num_inference_steps=None).shape == (1, 16, 4, 6)


REFUSED = {
    "strength above 1": ({"strength": 1.5}, "strength"),
    "strength below 0": ({"strength": -0.1}, "strength"),
    "strength 0": ({"strength": 0.0}, "strength 0"),
    "strength of each picture": ({"strength": [0.5, 0.6]}, "one number"),
    "no picture": ({"image": None, "strength": 0.5}, "without image"),
    "mask alone": ({"image": None, "mask_image": torch.ones(32, 48)}, "mask_image is given without image"),
    "no mask": ({"keep_outside": True}, "keep_outside is given without mask_image"),
    "crop without mask": ({"padding_mask_crop": 8}, "padding_mask_crop is given without mask_image"),
    "another size": ({"mask_image": torch.ones(32, 40)}, "32 x 40 and image 32 x 48"),
    "empty mask": ({"mask_image": torch.zeros(32, 48)}, "0 everywhere"),
    "no multiple": ({"height": 33}, "multiple of 8"),
    "too small": ({"image": torch.rand(3, 7, 40)}, "at least 8"),
    "empty list": ({"image": []}, "empty list"),
    "out of range": ({"image": torch.rand(3, 32, 48) * 2 - 1}, r"expected values in \[0, 1\]"),
    "latents too": ({"latents": torch.randn(1, 16, 4, 6), "seed": None}, "latents and image"),
    "two pictures for three": ({"image": [torch.rand(3, 32, 48)] * 2, "num_images_per_prompt": 3}, "2 drawings"),
    "sigmas and strength": (
        {"sigmas": [0.5, 0.0], "strength": 0.5, "num_inference_steps": None},
        "leave strength out",
    ),
    "differential": ({"mask_image": torch.ones(32, 48), "differential": 2.0}, "differential"),
    "a second pass with a mask": ({"mask_image": torch.ones(32, 48), "hires": Hires()}, "hires and mask_image"),
    "a second pass beyond the table": ({"hires": Hires(scale=8.0), "height": 96, "width": 128}, "second pass"),
}


@pytest.fixture
def as_users_run_it():
    """Signatures are checked only in tests; errors must come without that too."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(comfyui, photo, name, monkeypatch):
    """Before any model runs."""
    how, said = REFUSED[name]
    monkeypatch.setattr(comfyui.vae, "encode", None)
    with pytest.raises((ValueError, TypeError), match=said):
        drawn(comfyui, **{"image": photo} | how)


def test_fewer_than_one_step(photo):
    how = {"height": 32, "width": 48, "num_inference_steps": 3, "strength": 0.3, **embeddings()}
    for profile in ("diffusers", "reference"):
        with pytest.raises(ValueError, match=r"strength 0\.3 leaves none of 3 steps|strength"):
            pipeline("large", profile)(image=photo, **how | {"strength": 0.0})


@torch.no_grad()
@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"image": torch.zeros(1, 16, 4, 4)}, "image has shape"),
        ({"image": torch.zeros(1, 16, 4, 6), "mask": torch.ones(1, 1, 32, 48)}, "mask has shape"),
        ({"mask": torch.ones(1, 1, 4, 6)}, "image is missing"),
        ({"noise": None}, "noise is missing"),
        ({"image": torch.zeros(1, 16, 4, 6), "add_noise": False}, "add_noise=False reads none"),
        ({"start": 2}, "leave none of 2 steps"),
        ({"start": 1, "stop": 1}, "leave none of 2 steps"),
        ({"strength": 0.5}, "without image"),
    ],
)
def test_what_sample_refuses(comfyui, how, said):
    given = {"noise": torch.randn(1, 16, 4, 6), "num_inference_steps": 2, "guidance_scale": 1.0} | how
    with pytest.raises(ValueError, match=said):
        comfyui.sample(COND, None, **given)


def test_a_batch_that_cannot_be_repeated_evenly():
    two = torch.arange(2.0).reshape(2, 1)
    assert repeated(two, 4).flatten().tolist() == [0, 0, 1, 1]
    for batch, count in ((two, 3), (two, 1), (two[:0], 2)):
        with pytest.raises(ValueError, match=f"batch of {len(batch)} .* {count}"):
            repeated(batch, count)


@torch.no_grad()
def test_inversion_is_comfyuis():
    """FlipSigmas of the lower half of the levels, by euler."""
    pipe = pipeline("large", "comfyui")
    how = {"num_inference_steps": 8, "schedule": "simple", "strength": 0.5, "sampler": "euler"}
    found = pipe.invert(image("photo"), text("a photo of a red fox in the snow, sharp focus"), **how)
    at_vae_scale = pipe.vae.from_model(found.latents / (1 - float(found.sigmas[-1])))
    assert tiny.error(at_vae_scale, runs()["custom.flipsigmas_unsample.latent"]) <= 5e-4


@torch.no_grad()
def test_an_inversion_leads_back(comfyui, photo):
    """More steps, less error; heun, of second order, has less than euler."""
    errors = {}
    for sampler in ("euler", "heun"):
        for steps in (4, 8):
            levels = torch.linspace(0.9, 0, steps + 1, dtype=torch.float64)
            found = comfyui.invert(photo, COND, sigmas=levels, sampler=sampler)
            assert len(found.trajectory) == len(found.sigmas) == steps + 1
            how = {"sigmas": found.falling, "sampler": sampler, "guidance_scale": 1.0, "add_noise": False}
            *_, last = comfyui.sample(COND, None, found.latents, **how)
            errors[sampler, steps] = tiny.error(last.x, found.image)
    assert errors["heun", 8] < errors["euler", 8]
    for sampler in ("euler", "heun"):
        assert errors[sampler, 8] < 0.75 * errors[sampler, 4]
    with pytest.raises(ValueError, match="leaves none"):
        comfyui.invert(photo, COND, num_inference_steps=4, strength=0.1)
