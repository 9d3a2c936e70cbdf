"""The pipeline against diffusers' StableDiffusion3Pipeline on the same tiny random weights."""

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline

from mmdit import Pipeline

PROMPTS = ["a red circle above a blue square", "green", "A small star, left of two rings."]


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_pictures_equal_diffusers(tiny_folders, variant):
    ours = Pipeline.from_pretrained(tiny_folders[variant])
    theirs = tiny.load(tiny_folders[variant])
    settings = {"num_inference_steps": 4, "height": 64, "width": 96, "output_type": "pt"}
    a = ours(PROMPTS[:2], ["blue", ""], seed=3, **settings).images
    b = theirs(PROMPTS[:2], negative_prompt=["blue", ""], generator=torch.Generator().manual_seed(3), **settings).images
    assert a.shape == b.shape == (2, 3, 64, 96)
    assert tiny.error(a, b) < 1e-5
