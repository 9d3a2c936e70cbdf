"""Pictures as input, masks, parts of a drawing and second passes against recorded runs of the three references."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from mmdit import PROFILES, Hires, Pipeline, images
from mmdit.pipeline.images import to_pil
from recorded_runs import BLURRY, BOWL, CATS, FOX, HOUSE, LATENTS, MARKS, embeddings, image, pipeline, runs, text

# prompt, negative prompt, picture, mask, seed, steps, strength; sampler and schedule are in the name of the run
COMFYUI = {
    "img2img.sd35l_tiny.euler.normal.d0.6.photo.0": (FOX, BLURRY, "photo", None, 120, 6, 0.6),
    "img2img.sd35l_tiny.euler.normal.d0.3.photo.1": (HOUSE, "", "photo", None, 121, 6, 0.3),
    "img2img.sd35l_tiny.dpmpp_2m.sgm_uniform.d0.6.photo.2": (CATS, MARKS, "photo", None, 122, 6, 0.6),
    "img2img.sd35l_tiny.dpmpp_2m.sgm_uniform.d0.3.photo.3": (BOWL, BLURRY, "photo", None, 123, 6, 0.3),
    "img2img.sd35m_tiny.dpmpp_2m.simple.d0.6.odd.4": (FOX, "", "odd", None, 124, 5, 0.6),
    "img2img.sd35l_tiny.euler.simple.d1.0.photo.5": (HOUSE, MARKS, "photo", None, 125, 4, 1.0),
    "inpaint.set_hard.sd35l_tiny.euler.normal.d1.0.0": (FOX, BLURRY, "photo", "mask", 140, 6, 1.0),
    "inpaint.set_soft.sd35l_tiny.dpmpp_2m.sgm_uniform.d0.7.1": (HOUSE, "", "photo", "softmask", 141, 6, 0.7),
    "inpaint.set_alpha.sd35m_tiny.euler.simple.d0.8.2": (CATS, MARKS, "alpha", "alpha", 142, 5, 0.8),
    "inpaint.modelcond.sd35l_tiny.euler.simple.d0.75.5": (HOUSE, MARKS, "photo", "softmask", 145, 5, 0.75),
    "inpaint.set_hard.sd35l_tiny.euler_ancestral.normal.d1.0.6": (CATS, BLURRY, "photo", "mask", 146, 5, 1.0),
}


def comfyui(model: str = "large") -> Pipeline:
    return pipeline(model, "comfyui")


def close(pipe: Pipeline, found: torch.Tensor, name: str) -> None:
    """ComfyUI's latents were recorded at the scale of the VAE."""
    assert tiny.error(pipe.vae.from_model(found), runs()[name]) <= LATENTS


def eight_bits_close(found, name: str) -> None:
    assert np.abs(np.asarray(found, dtype=int) - runs()[name][0].numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui(name):
    prompt, negative, picture, mask, seed, steps, strength = COMFYUI[name]
    pipe = comfyui("medium" if "sd35m" in name else "large")
    sampler, schedule = name.split("_tiny.")[1].split(".")[:2]
    masked = None if mask is None else images.load_mask(image(mask), channel="alpha" if mask == "alpha" else "red")
    how = {"seed": seed, "num_inference_steps": steps, "guidance_scale": 4.5, "sampler": sampler, "schedule": schedule}
    how |= {"image": image(picture), "mask_image": masked, "strength": strength}
    found = pipe(text(prompt), text(negative), output_type="latent", **how).images
    close(pipe, found, f"{name}.latent")
    for recorded in (key for key in runs() if key.startswith(f"{name}.image")):
        eight_bits_close(to_pil(pipe.decode(found), pipe.profile.to_uint8)[0], recorded)


@pytest.mark.parametrize(("picture", "name"), [("photo", "dpmpp_2m.sgm_uniform.d0.3.photo.3"), ("odd", "odd.4")])
def test_comfyui_encodes(picture, name):
    pipe = comfyui("medium" if picture == "odd" else "large")
    recorded = next(key for key in runs() if key.startswith("img2img") and key.endswith(f"{name}.encoded"))
    close(pipe, pipe.encode_image(image(picture)), recorded)


@pytest.mark.parametrize("filter", ["lanczos", "bilinear"])
def test_comfyui_resized(filter):
    pipe, name = comfyui(), f"img2img.scaled_{filter}_{'center' if filter == 'lanczos' else 'disabled'}"
    height, width = (96, 128) if filter == "lanczos" else (128, 112)
    given = images.load_image(image("large")).picture
    given = images.resize(given, height=height, width=width, filter=filter, crop=name.rpartition("_")[2])
    how = {"seed": 130, "num_inference_steps": 5, "guidance_scale": 4.5, "schedule": "simple", "strength": 0.6}
    found = pipe(text(BOWL), text(BLURRY), image=given, output_type="latent", **how).images
    close(pipe, found, f"{name}.latent")


DIFFUSERS = {
    "d.img2img.0": ("photo", None, 300, 10, 0.6),
    "d.img2img.1": ("photo", None, 301, 10, 0.3),
    "d.img2img.2": ("large", None, 302, 7, 0.5),
    "d.img2img.3": ("photo", None, 303, 5, 1.0),
    "d.img2img.mean": ("photo", None, 308, 10, 0.6),
    "d.inpaint.0": ("photo", "mask", 320, 8, 1.0),
    "d.inpaint.1": ("photo", "mask", 321, 10, 0.6),
    "d.inpaint.2": ("photo", "softmask", 322, 10, 0.6),
    "d.inpaint.mean": ("photo", "mask", 328, 10, 0.6),
}


@pytest.fixture
def diffusers() -> Pipeline:
    """The profile of the pipeline may be changed by a test."""
    pipe = pipeline("large", "diffusers")
    pipe.profile = PROFILES["diffusers"]
    return pipe


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(diffusers, name):
    picture, mask, seed, steps, strength = DIFFUSERS[name]
    if name.endswith("mean"):
        diffusers.profile = replace(diffusers.profile, image_latent="mean")
    how = {"image": image(picture), "strength": strength, "seed": seed, "num_inference_steps": steps}
    how |= {"guidance_scale": 4.5, "height": 96, "width": 128, **embeddings()}
    how |= {"mask_image": None if mask is None else image(mask)}
    found = diffusers(output_type="latent", **how).images
    assert tiny.error(found, runs()[f"{name}.latent"]) <= LATENTS


def test_diffusers_leaves_the_shift_out_where_there_is_a_mask(diffusers):
    picture, mask, seed, steps, strength = DIFFUSERS["d.inpaint.0"]
    how = {"image": image(picture), "mask_image": image(mask), "strength": strength, "seed": seed}
    how |= {"guidance_scale": 4.5, "height": 96, "width": 128, "num_inference_steps": steps, **embeddings()}
    eight_bits_close(diffusers(**how).images[0], "d.inpaint.0.image")


REFERENCE = {"r.img2img.0": ("euler", 8, 500, 0.6), "r.img2img.1": ("dpmpp_2m", 10, 501, 0.8)}
REFERENCE |= {"r.img2img.2": ("dpmpp_2m", 7, 502, 0.3)}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference(name):
    """Stability's code was recorded in float32 throughout, with the mean of the picture's latent."""
    sampler, steps, seed, strength = REFERENCE[name]
    pipe = pipeline("large", "reference")
    pipe.profile = replace(PROFILES["reference"], image_latent="mean", sigma_dtype="float32", noise_dtype="float32")
    how = {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": 4.5, "seed": seed, "strength": strength}
    how |= {"height": 96, "width": 128, "output_type": "latent", **embeddings()}
    assert tiny.error(pipe(image=image("photo"), **how).images, runs()[f"{name}.latent"]) <= LATENTS


def masked(picture, mask, grow):
    """ComfyUI's VAEEncodeForInpaint without its VAE: a picture that is gray in the mask, and the grown mask."""
    gray, inside = images.gray_inside(picture, mask, grow)
    return {"image": gray, "mask_image": inside}


def outpainting(grow, **sides):
    picture, mask = images.pad_for_outpaint(images.load_image(image("photo")).picture, **sides)
    return masked(picture, mask, grow) if grow else {"image": picture, "mask_image": mask}


def photo():
    return images.load_image(image("photo")).picture


GRAY_OR_PADDED = {
    "inpaint.for_inpaint6.sd35l_tiny.euler.normal.d1.0.3": (BOWL, BLURRY, 143, 6, 1.0),
    "inpaint.for_inpaint0.sd35l_tiny.dpmpp_2m.normal.d1.0.4": (FOX, "", 144, 5, 1.0),
    "outpaint.forinpaint.32_0_16_24.f16": (FOX, BLURRY, 160, 5, 1.0),
    "outpaint.set.0_16_32_0.f24": (HOUSE, BLURRY, 161, 5, 0.85),
}


def given(name):
    match name.split("."):
        case ["inpaint", kind, *_]:
            mask = images.load_mask(image("softmask" if kind[-1] == "6" else "mask"))
            return masked(photo(), mask, int(kind[-1]))
        case ["outpaint", "forinpaint", *_]:
            return outpainting(6, left=32, right=16, bottom=24, feather=16)
        case _:
            return outpainting(0, top=16, right=32, feather=24)


@pytest.mark.parametrize("name", GRAY_OR_PADDED)
def test_gray_and_padded_pictures(name):
    prompt, negative, seed, steps, strength = GRAY_OR_PADDED[name]
    pipe, inputs = comfyui(), given(name)
    how = {"seed": seed, "num_inference_steps": steps, "guidance_scale": 4.5, "strength": strength}
    how |= {"sampler": "dpmpp_2m" if "dpmpp_2m" in name else "euler", "output_type": "latent"}
    close(pipe, pipe.encode_image(inputs["image"]), f"{name}.encoded")
    close(pipe, pipe(text(prompt), text(negative), **inputs, **how).images, f"{name}.latent")


def test_a_grown_mask_pasted_back():
    pipe, mask = comfyui(), images.grow_mask(images.load_mask(image("mask"), channel="red"), 5)
    mask = images.feather_mask(mask, left=8, top=4, right=8, bottom=12)
    how = {"seed": 155, "num_inference_steps": 5, "guidance_scale": 4.5, "keep_outside": True}
    drawn = pipe(text(FOX), text(BLURRY), image=photo(), mask_image=mask, **how).images[0]
    eight_bits_close(drawn, "inpaint.grow_feather_paste_back.image.15")
    untouched = (mask[0] == 0).numpy()
    assert untouched.any()
    assert np.array_equal(np.asarray(drawn)[untouched], np.asarray(image("photo").convert("RGB"))[untouched])


def test_diffusers_crops_around_the_mask(diffusers):
    mask = image("mask").convert("L").resize((176, 144), 0)
    how = {"seed": 329, "num_inference_steps": 6, "guidance_scale": 4.5, "strength": 0.8, "padding_mask_crop": 16}
    found = diffusers(image=image("large"), mask_image=mask, height=96, width=128, **how, **embeddings())
    eight_bits_close(found.images[0], "d.inpaint.crop.image")


def last(steps) -> torch.Tensor:
    for step in steps:
        x = step.x
    return x


@torch.no_grad()
def test_noise_of_a_picture_of_a_batch():
    """ComfyUI's LatentFromBatch: the noise is a later one of several draws."""
    pipe, generator = comfyui(), torch.Generator().manual_seed(131)
    noise = [torch.randn(1, 16, 12, 16, generator=generator) for _ in range(2)][1]
    how = {"num_inference_steps": 5, "guidance_scale": 4.5, "schedule": "simple", "strength": 0.6}
    encoded = pipe.encode_image(image("photo"))
    found = last(pipe.sample(text(BOWL), text(BLURRY), noise, image=encoded, **how))
    close(pipe, found, "img2img.batch_index.latent")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prompt", "seed", "how"),
    [
        ("euler.normal.3", FOX, 210, {"sampler": "euler", "schedule": "normal"}),
        ("dpmpp_2m.sgm_uniform.4", HOUSE, 211, {"sampler": "dpmpp_2m", "schedule": "sgm_uniform"}),
    ],
)
def test_two_stages(name, prompt, seed, how):
    """ComfyUI divides the latent that is left over by 1 - sigma, and multiplies it again."""
    pipe, half = comfyui(), int(name[-1])
    how |= {"num_inference_steps": 8, "guidance_scale": 4.5}
    pair, noise = (text(prompt), text(BLURRY)), pipe.noise(seed, height=96, width=128)
    left = last(pipe.sample(*pair, noise, stop=half, **how))
    sigma = float(pipe.sigmas(8, how["schedule"], shift=3.0)[half])
    close(pipe, left / (1 - sigma), f"advanced.two_stages.{name}.leftover")
    for going_on in ({"noise": left}, {"noise": None, "image": left / (1 - sigma)}):
        found = last(pipe.sample(*pair, start=half, add_noise=False, **going_on, **how))
        close(pipe, found, f"advanced.two_stages.{name}.latent")


@torch.no_grad()
def test_parts_of_a_drawing():
    pipe, how = comfyui(), {"num_inference_steps": 8, "guidance_scale": 4.5}
    pair = text(CATS), text(BLURRY)
    found = last(pipe.sample(*pair, pipe.noise(213, height=96, width=128), stop=4, leftover_noise=False, **how))
    close(pipe, found, "advanced.stopped_early_forced_to_zero.latent")
    noise, encoded = pipe.noise(214, height=96, width=128), pipe.encode_image(image("photo"))
    close(pipe, last(pipe.sample(*pair, noise, image=encoded, start=3, **how)), "advanced.start_step_img2img.latent")


SECOND = {
    "hires.latent_nearest-exact_1.5": (FOX, 170, 80, {"seed": 180, "sampler": "dpmpp_2m"}),
    "hires.latent_bislerp_1.5": (
        HOUSE,
        171,
        80,
        {"seed": 181, "sampler": "dpmpp_2m", "strength": 0.55, "filter": "bislerp"},
    ),
    "hires.image_lanczos": (CATS, 175, 96, {"seed": 185, "space": "pixel", "filter": "lanczos"}),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_pass(name):
    prompt, seed, height, second = SECOND[name]
    pipe = comfyui()
    how = {"height": height, "width": 96, "seed": seed, "num_inference_steps": 5, "guidance_scale": 4.5}
    how |= {"schedule": "simple", "output_type": "latent", "hires": Hires(steps=4, **second)}
    close(pipe, pipe(text(prompt), text(BLURRY), **how).images, f"{name}.latent")


def test_second_pass_by_hand():
    """ComfyUI's LatentUpscale to a size of another aspect ratio, bicubic."""
    pipe, name = comfyui(), "hires.latentupscale_bicubic"
    first = runs()[f"{name}.first"]
    larger = pipe.vae.to_model(images.resize_latent(first, height=16, width=18, filter="bicubic", crop="center"))
    close(pipe, larger, f"{name}.upscaled")
    how = {"seed": 186, "num_inference_steps": 4, "guidance_scale": 4.5, "schedule": "simple", "strength": 0.6}
    found = pipe(text(CATS), text(BLURRY), image=larger, output_type="latent", **how).images
    close(pipe, found, f"{name}.latent")
