"""Whole drawings with ControlNets against recorded runs of diffusers, Stability's code and ComfyUI."""

from dataclasses import replace

import pytest
import torch

import mmdit
import recorded_models as recorded
import tiny
from mmdit import PROFILES, images
from recorded_runs import BLURRY, BOWL, CATS, FOLDER, FOX, HOUSE, LATENTS, MARKS, embeddings, text

HINTS = {name: FOLDER / f"pub_{name}.png" for name in ("blur", "edges", "depth", "photo", "mask")}
MEAN = replace(PROFILES["diffusers"], control_latent="mean")
CARD = replace(MEAN, control_canny="bytes")  # the image processor of the model card
STABILITY = replace(PROFILES["reference"], control_latent="mean", sigma_dtype="float32", noise_dtype="float32")
PART = {"controlnet_conditioning_scale": 0.5, "control_guidance_start": 0.2, "control_guidance_end": 0.8}
STACK = {"controlnet_conditioning_scale": [0.6, 0.4], "control_guidance_end": [1.0, 0.5]}


def drawn(profile, nets, hints, **how):
    """The last latent of a drawing; nets and hints by name, one or several."""
    several = isinstance(nets, list)
    names = nets if several else [nets]
    pipe = recorded.pipeline("sd3m4" if names[0] in ("instantx", "inpaint") else "sd35l4", "diffusers")
    pipe.profile = PROFILES[profile] if isinstance(profile, str) else profile
    net = [recorded.net(name) if isinstance(name, str) else name for name in names]
    hint = [HINTS[one] if isinstance(one, str) else one for one in (hints if several else [hints])]
    size = {"height": 96, "width": 128, "sampler": "euler", "num_inference_steps": 6}
    given = {"controlnet": net if several else net[0], "control_image": hint if several else hint[0]}
    return pipe(**{**size, **given, **how}, output_type="latent").images


def close(found, name):
    assert tiny.error(found, recorded.records()[f"{name}.latent"]) <= LATENTS


@pytest.mark.parametrize(
    ("name", "profile", "nets", "hints", "seed", "how"),
    [
        ("d.controlnet.blur.0.mean", MEAN, "blur", "blur", 340, {}),
        ("d.controlnet.canny.1.mean", CARD, "canny", "edges", 341, {}),
        ("d.controlnet.depth.2.mean", MEAN, "depth", "depth", 342, {}),
        ("d.controlnet.blur.3.mean", MEAN, "blur", "blur", 343, PART),
        ("d.controlnet.stack", MEAN, ["blur", "depth"], ["blur", "depth"], 350, STACK),
        ("d.instantx.0", MEAN, "instantx", "edges", 360, {}),
        ("d.instantx.1", MEAN, "instantx", "edges", 361, PART),
    ],
)
def test_diffusers(name, profile, nets, hints, seed, how):
    guidance = 5.0 if "instantx" in name else 3.5
    close(drawn(profile, nets, hints, seed=seed, guidance_scale=guidance, **how, **embeddings()), name)


def test_noise_of_the_hint():
    """diffusers draws it from torch's global state, the unconditional branch's first."""
    torch.manual_seed(5)
    close(
        drawn("diffusers", "blur", "blur", seed=340, guidance_scale=3.5, **embeddings()), "d.controlnet.blur.0.sample"
    )
    torch.manual_seed(7)
    how = {"num_inference_steps": 5, "controlnet_conditioning_scale": 0.7}
    close(
        drawn("diffusers", "instantx", "edges", seed=364, guidance_scale=5.0, **how, **embeddings()),
        "d.instantx.sample",
    )


@pytest.mark.parametrize("zeros", [False, True])
def test_diffusers_inpainting(zeros, monkeypatch):
    """The recorded net's config did not ask for zeros; that pipeline gives them all the same, and takes the shift."""
    monkeypatch.setattr(recorded.net("inpaint"), "config", replace(recorded.NETS["inpaint"], zero_pooled=zeros))
    how = {"num_inference_steps": 5, "controlnet_conditioning_scale": 0.95, "control_mask": HINTS["mask"]}
    close(drawn(MEAN, "inpaint", "photo", seed=365, guidance_scale=5.0, **how, **embeddings()), "d.instantx.inpaint")


@pytest.mark.parametrize(
    ("kind", "hint", "seed"), [("blur", "blur", 520), ("canny", "edges", 521), ("depth", "depth", 522)]
)
def test_stability(kind, hint, seed):
    """The hint's latents and the drawing; Stability's code was recorded in float32 with the mean of the hint."""
    pipe = recorded.pipeline("sd35l4", "reference")
    pipe.profile = STABILITY
    (control,) = pipe.control(recorded.net(kind), HINTS[hint], height=96, width=128)
    assert tiny.error(control.hint, recorded.records()[f"r.controlnet.{kind}.hint"]) <= 1e-5
    close(drawn(STABILITY, kind, hint, seed=seed, guidance_scale=3.5, **embeddings()), f"r.controlnet.{kind}")


COMFYUI = {  # nets, hints, prompt, negative prompt, seed, the rest
    "blur.blur.s1.0.0_1.euler": ("blur", "blur", FOX, BLURRY, 190, {}),
    "canny.edges.s1.0.0_1.euler": ("canny", "edges", HOUSE, "", 191, {}),
    "depth.depth.s1.0.0_1.euler": ("depth", "depth", CATS, MARKS, 192, {}),
    "blur.blur.s0.5.0_1.dpmpp_2m": (
        *("blur", "blur", BOWL, BLURRY, 193),
        {"controlnet_conditioning_scale": 0.5, "sampler": "dpmpp_2m"},
    ),
    "canny.edges.s0.5.0.2_0.8.euler": ("canny", "edges", FOX, "", 194, PART),
    "depth.depth.s1.0.0.2_0.8.euler": (
        *("depth", "depth", HOUSE, MARKS, 195),
        {"control_guidance_start": 0.2, "control_guidance_end": 0.8},
    ),
    "stack_canny_depth": (["canny", "depth"], ["edges", "depth"], FOX, BLURRY, 200, STACK),
    "canny_node": ("canny", "canny", HOUSE, BLURRY, 201, {"schedule": "simple"}),
    "applysd3_img2img": (
        *("blur", "blur", CATS, BLURRY, 202),
        {"image": HINTS["photo"], "strength": 0.6, "num_inference_steps": 5, "schedule": "simple"},
    ),
    "batch2_other_aspect": (
        *("blur", "blur", CATS, BLURRY, 203),
        {"height": 64, "width": 96, "num_images_per_prompt": 2, "num_inference_steps": 5, "schedule": "simple"},
    ),
    "instantx.s1.0.0.0_1.0": ("instantx", "edges", FOX, BLURRY, 204, {}),
    "instantx.s0.5.0.2_0.8": ("instantx", "edges", HOUSE, BLURRY, 205, PART),
    "inpainting_alimama": (
        *("inpaint", "photo", BOWL, BLURRY, 207),
        {"num_inference_steps": 5, "controlnet_conditioning_scale": 0.95, "control_mask": "mask"},
    ),
}


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui(name):
    """Edges of `canny_node` are made here; latents were recorded at the scale of the VAE."""
    nets, hints, prompt, negative, seed, how = COMFYUI[name]
    guidance = 5.0 if nets in ("instantx", "inpaint") else 3.5
    hints = mmdit.canny(HINTS["photo"], 0.1, 0.3) if hints == "canny" else hints
    if "control_mask" in how:  # LoadImageMask's channel
        how = {**how, "control_mask": images.load_mask(HINTS["mask"], channel="red")}
    given = {"prompt": text(prompt), "negative_prompt": text(negative), "seed": seed, "guidance_scale": guidance}
    found = drawn("comfyui", nets, hints, **given, **how)
    close(recorded.vae().from_model(found), f"controlnet.{name}")
