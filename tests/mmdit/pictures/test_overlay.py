"""Fitting, the part around a mask and pasting back, pixel by pixel as diffusers' VaeImageProcessor does it."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from mmdit import images
from refusals import refuses

PROCESSOR = VaeImageProcessor()
MODES = {"stretch": "default", "crop": "crop", "pad": "fill"}


@pytest.fixture(scope="module")
def noise():
    """A picture of 131 x 101 random pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (101, 131, 3), dtype=np.uint8))


def mask(box, size=(131, 101), value=255):
    drawn = Image.new("L", size)
    ImageDraw.Draw(drawn).rectangle(box, fill=value)
    return drawn


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (131, 101), (262, 202), (40, 200), (201, 33), (7, 50)])
def test_fit(noise, how, size):
    width, height = size
    found = images.fit(noise, height=height, width=width, how=how)
    wanted = PROCESSOR.resize(noise, height=height, width=width, resize_mode=MODES[how])
    assert found.size == size
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("how", MODES)
def test_fit_makes_pictures_where_a_side_would_vanish(how):
    assert images.fit(Image.new("RGB", (200, 1)), height=64, width=8, how=how).size == (8, 64)


BOXES = [(30, 20, 60, 50), (0, 0, 5, 90), (100, 80, 130, 100), (0, 50, 130, 55), (64, 3, 64, 3), (0, 0, 130, 100)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("pad", [0, 7, 200])
@pytest.mark.parametrize("size", [(96, 128), (128, 96), (64, 64), (32, 256)])
def test_crop_region(box, pad, size):
    height, width = size
    found = images.crop_region(mask(box), height=height, width=width, pad=pad)
    assert found == PROCESSOR.get_crop_region(mask(box), width, height, pad)
    assert (found.right - found.left, found.bottom - found.top) == (found.width, found.height)


def test_any_gray_counts_for_the_region():
    assert images.crop_region(mask((10, 20, 19, 29), value=1), height=64, width=64) == (10, 20, 20, 30)


def test_refuses_a_black_mask():
    black = Image.new("L", (64, 64))
    refuses(lambda: images.crop_region(black, height=64, width=64), "mask_image is black", error=ValueError)


@pytest.mark.parametrize("value", [255, 90])
def test_paste_back(noise, value):
    inside, drawn = mask((30, 20, 60, 50), value=value), Image.effect_noise((64, 48), 90).convert("RGB")
    region = images.crop_region(inside, height=48, width=64, pad=4)
    found = images.paste_back(noise, inside, drawn, region)
    assert found.tobytes() == PROCESSOR.apply_overlay(inside, noise, drawn, region).tobytes()
    kept = np.asarray(inside) == 0
    assert np.array_equal(np.asarray(found)[kept], np.asarray(noise)[kept])
    assert not np.array_equal(np.asarray(found)[~kept], np.asarray(noise)[~kept])


def test_paste_back_of_a_whole_picture(noise):
    inside, drawn = mask((30, 20, 60, 50), value=200), Image.effect_noise(noise.size, 90).convert("RGB")
    found = images.paste_back(noise, inside, drawn)
    assert found.tobytes() == PROCESSOR.apply_overlay(inside, noise, drawn).tobytes()


def test_refuses_a_mask_of_another_size(noise):
    small = mask((1, 1, 5, 5), size=(64, 64))
    refuses(lambda: images.paste_back(noise, small, noise), "mask_image", "(64, 64)", "(131, 101)", error=ValueError)


def test_nearest_as_diffusers_resizes_tensors(noise):
    picture = images.load_image(noise).picture
    found = images.resize_nearest(picture, height=64, width=200)
    assert torch.equal(found.movedim(-1, 1), PROCESSOR.resize(picture.movedim(-1, 1), 64, 200))


def test_binary_mask_as_diffusers_makes_it():
    values = torch.arange(256).view(1, 16, 16) / 255
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    wanted = processor.preprocess(Image.fromarray((values[0] * 255).round().byte().numpy()), 16, 16)
    assert torch.equal(images.binary_mask(values), wanted[:, 0])
