"""Pictures as input against diffusers' own pipelines on the same tiny random weights."""

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from PIL import Image

import tiny
from mmdit import Pipeline
from recorded_runs import image

SETTINGS = {"height": 32, "width": 48, "num_inference_steps": 5, "guidance_scale": 5.0, "max_sequence_length": 32}
PROMPTS = ["a red circle above a blue square", "A small star, left of two rings."]


def seeded(*seeds: int) -> torch.Generator | list[torch.Generator]:
    found = [torch.Generator().manual_seed(seed) for seed in seeds]
    return found if len(found) > 1 else found[0]


@pytest.fixture(scope="module")
def ours(tiny_folders) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])


@pytest.fixture(scope="module")
def theirs(tiny_folders):
    """The two pipelines, of the same models."""
    models = tiny.load(tiny_folders["sd3.5-medium"]).components
    models = {name: one for name, one in models.items() if name not in ("image_encoder", "feature_extractor")}
    found = [kind(**models) for kind in (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline)]
    for one in found:
        one.set_progress_bar_config(disable=True)
    return found


def picture() -> Image.Image:
    return image("large").convert("RGB")


def array() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(1, 3, 40, 56, generator=generator)


@pytest.mark.parametrize(
    ("given", "how"),
    [
        (picture, {"strength": 0.6}),
        (picture, {"strength": 0.3, "guidance_scale": 1.0}),
        (picture, {"strength": 0.7, "sigmas": [1.0, 0.7, 0.4, 0.2], "num_inference_steps": 4}),
        (array, {"strength": 1.0}),
        (picture, {"strength": 0.6, "num_images_per_prompt": 2}),
    ],
)
def test_img2img(ours, theirs, given, how):
    how = SETTINGS | {"prompt": PROMPTS[0], "image": given(), "output_type": "pt"} | how
    wanted = theirs[0](generator=seeded(3), **how).images
    found = ours(generator=seeded(3), **how).images
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 1e-4


def test_img2img_of_several_pictures_and_prompts(ours, theirs):
    """With a generator for each, which also samples the latent of its picture."""
    how = SETTINGS | {"prompt": PROMPTS, "image": [picture(), picture().transpose(0)], "output_type": "latent"}
    wanted = theirs[0](generator=seeded(3, 4), strength=0.5, **how).images
    assert tiny.error(ours(seed=[3, 4], strength=0.5, **how).images, wanted) <= 1e-5


def test_img2img_of_latents(ours, theirs):
    latents = torch.randn(1, 16, 4, 6, generator=seeded(8))
    how = SETTINGS | {"prompt": PROMPTS[0], "image": latents, "strength": 0.5, "output_type": "latent"}
    assert tiny.error(ours(seed=3, **how).images, theirs[0](generator=seeded(3), **how).images) <= 1e-5


def mask() -> Image.Image:
    return image("softmask").convert("L").resize(picture().size)


@pytest.mark.parametrize(
    ("strength", "how"),
    [(0.6, {}), (1.0, {}), (0.9, {"num_images_per_prompt": 2}), (0.8, {"guidance_scale": 1.0})],
)
def test_inpaint(ours, theirs, strength, how):
    """The pictures, which this pipeline decodes without the VAE's shift."""
    how = SETTINGS | {"prompt": PROMPTS[0], "image": picture(), "mask_image": mask(), "output_type": "pt"} | how
    wanted = theirs[1](generator=seeded(3), strength=strength, **how).images
    found = ours(generator=seeded(3), strength=strength, **how).images
    assert float((found - wanted).abs().max()) <= 1e-4


def test_inpaint_cropped(ours, theirs):
    how = SETTINGS | {"prompt": PROMPTS[0], "image": picture(), "mask_image": mask(), "padding_mask_crop": 8}
    wanted = theirs[1](generator=seeded(3), strength=0.8, **how).images[0]
    found = ours(generator=seeded(3), strength=0.8, **how).images[0]
    off = torch.tensor(list(found.tobytes())).sub(torch.tensor(list(wanted.tobytes()))).abs()
    assert found.size == wanted.size == picture().size
    assert int(off.max()) <= 1


def test_each_step_of_an_inpainting(ours, theirs):
    """What a callback sees after every step."""
    seen = {"ours": [], "theirs": []}
    how = SETTINGS | {"prompt": PROMPTS[0], "image": picture(), "mask_image": mask(), "strength": 0.8}

    def keep(name):
        return lambda pipe, i, t, tensors: seen[name].append((float(t), tensors["latents"].clone())) or tensors

    for name, pipe in (("ours", ours), ("theirs", theirs[1])):
        pipe(generator=seeded(3), output_type="latent", callback_on_step_end=keep(name), **how)
    assert len(seen["ours"]) == len(seen["theirs"]) == 4
    for (t, found), (wanted_t, wanted) in zip(seen["ours"], seen["theirs"], strict=True):
        assert t == pytest.approx(wanted_t, rel=1e-6)
        assert tiny.error(found, wanted) <= 1e-5
