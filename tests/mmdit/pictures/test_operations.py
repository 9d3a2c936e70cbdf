"""The operations of `mmdit.images` that no recorded run shows: by hand, by formula, and what they refuse."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit import images
from refusals import refuses

HALVES = torch.tensor([[[0.0, 0.2, 0.5], [0.6, 0.8, 1.0]]])
OTHERS = torch.tensor([[[1.0, 0.9, 0.4], [0.6, 0.5, 0.0]]])


def random(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        ("multiply", HALVES * OTHERS),
        ("add", (HALVES + OTHERS).clamp(max=1)),
        ("subtract", (HALVES - OTHERS).clamp(min=0)),
        ("and", torch.tensor([[[0, 0, 0], [1, 0, 0]]])),  # .5 rounds to 0
        ("or", torch.tensor([[[1, 1, 0], [1, 1, 1]]])),
        ("xor", torch.tensor([[[1, 1, 0], [0, 1, 1]]])),
    ],
)
def test_combine_masks(operation, wanted):
    assert torch.equal(images.combine_masks(HALVES, OTHERS, operation=operation), wanted.float())


def test_a_mask_is_laid_on_at_its_place():
    found = images.combine_masks(torch.zeros(1, 3, 4), torch.ones(1, 2, 9), x=2, y=1, operation="add")
    assert torch.equal(found, torch.tensor([[[0.0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]]))


def test_masks_by_formula():
    assert torch.equal(images.invert_mask(HALVES), 1 - HALVES)
    assert torch.equal(images.threshold_mask(HALVES, 0.5), (HALVES > 0.5).float())
    assert torch.equal(images.crop_mask(HALVES, x=1, y=1, width=9, height=1), HALVES[:, 1:, 1:])
    assert torch.equal(images.solid_mask(0.25, height=2, width=3), torch.full((1, 2, 3), 0.25))
    assert torch.equal(images.mask_to_picture(HALVES), torch.stack([HALVES] * 3, -1))
    assert torch.equal(images.picture_to_mask(torch.stack([HALVES, OTHERS, 1 - HALVES], -1), "blue"), 1 - HALVES)


def test_color_to_mask():
    picture = torch.tensor([[[[255, 128, 0], [255, 128, 1], [254, 128, 0]]]]) / 255
    assert images.color_to_mask(picture, 0xFF8000).tolist() == [[[1, 0, 0]]]


def test_grown_by_a_plus_and_by_a_square():
    point = torch.zeros(1, 7, 7)
    point[0, 3, 3] = 0.5
    steps = (torch.arange(7) - 3).abs()
    plus, square = images.grow_mask(point, 2), images.grow_mask(point, 2, tapered_corners=False)
    assert torch.equal(plus[0] > 0, steps[:, None] + steps <= 2)
    assert torch.equal(square[0] > 0, torch.maximum(steps[:, None], steps) <= 2)
    assert torch.equal(images.grow_mask(square, -2, tapered_corners=False), point)
    assert torch.equal(images.grow_mask(point, 0), point)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_an_even_mask_grows_one_pixel_more_to_the_left(size):
    point = torch.zeros(1, 16, 16)
    point[0, 8, 8] = 1
    drawn = images.gray_inside(random(1, 16, 16, 3), point, size)[1]
    rows = drawn[0].any(1).nonzero().flatten().tolist()
    assert rows == list(range(8 - (size - 1) // 2, 8 + size // 2 + 1)), rows
    assert drawn.sum() == size**2


def test_composite():
    below, above, mask = random(2, 5, 6, 3), random(1, 3, 4, 3), random(1, 3, 4)
    given = below.clone()
    found = images.composite(below, above, x=4, y=1, mask=mask)
    wanted = below.clone()
    part = mask[:, :, :2, None]
    wanted[:, 1:4, 4:6] = part * above[:, :, :2] + (1 - part) * below[:, 1:4, 4:6]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    assert torch.equal(below, given)


def test_composite_of_another_size_and_with_alpha():
    above = torch.ones(1, 2, 2, 4)
    assert torch.equal(images.composite(torch.zeros(1, 4, 6, 3), above, resize_source=True), torch.ones(1, 4, 6, 3))
    transparent = images.composite(torch.zeros(1, 4, 6, 4), above[..., :3])
    assert torch.equal(transparent[0, :2, :2], torch.ones(2, 2, 4))


def test_a_composite_outside_changes_nothing():
    below = random(1, 4, 4, 3)
    assert torch.equal(images.composite(below, random(1, 2, 2, 3), x=9, mask=torch.ones(1, 2, 2)), below)
    latent = random(1, 16, 4, 4)
    assert torch.equal(images.paste_latent(latent, random(1, 16, 2, 2), y=9, feather=1), latent)


def test_cropping():
    picture = random(1, 21, 30, 3)
    assert torch.equal(images.center_crop(picture), picture[:, 2:18, 3:27])
    assert torch.equal(images.crop(picture, x=4, y=40, width=5, height=6), picture[:, 20:, 4:9])
    assert torch.equal(images.invert(picture), 1 - picture)


def test_batches_take_the_size_of_the_first():
    first, second = random(1, 8, 8, 3), random(2, 6, 10, 3)
    found = images.batch(first, second)
    assert torch.equal(found[:1], first)
    assert torch.equal(found[1:], images.resize(second, height=8, width=8, filter="bilinear", crop="center"))
    assert images.batch_latents(random(1, 16, 8, 8), random(2, 16, 6, 10)).shape == (3, 16, 8, 8)


def test_solid():
    found = images.solid(0xFF0080, height=2, width=3, count=2)
    assert found.shape == (2, 2, 3, 3)
    assert torch.equal(found[1, 1, 2], torch.tensor([1, 0, 128 / 255]))


def test_blur_by_its_formula():
    picture = random(1, 9, 11, 3).double()
    places = np.linspace(-1, 1, 5)
    kernel = np.array([[math.exp(-(y * y + x * x) / (2 * 0.6**2)) for x in places] for y in places])
    kernel /= kernel.sum()
    padded = np.pad(picture[0].numpy(), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    wanted = sum(kernel[y, x] * padded[y : y + 9, x : x + 11] for y in range(5) for x in range(5))
    np.testing.assert_allclose(images.blur(picture, 2, 0.6)[0].numpy(), wanted, atol=1e-7)
    assert torch.equal(images.blur(picture, 0), picture)


def test_lanczos_truncates_to_8_bits():
    """As ComfyUI does, but no level of 8 bits is changed by it."""
    levels = torch.arange(256).view(1, 16, 16, 1) / 255
    assert torch.equal(images.resize(levels, height=16, width=16), levels)
    assert torch.equal(images.resize(levels + 0.9 / 255, height=16, width=16), levels)


@pytest.mark.parametrize("filter", ["nearest-exact", "bilinear", "area", "bicubic", "bislerp"])
def test_an_equal_size_changes_nothing(filter):
    latent = random(2, 16, 5, 7) - 0.5
    found = images.resize_latent(latent, height=5, width=7, filter=filter)
    torch.testing.assert_close(found, latent, rtol=0, atol=1e-6)


def test_bislerp_keeps_norms_and_takes_edge_cases():
    """Of opposite cells the mean is 0; of equal ones, and beside a cell of zeros, there is no direction to turn to."""
    latent = torch.zeros(1, 16, 1, 4)
    latent[0, 0, 0] = torch.tensor([2.0, 0, 3, -3])
    latent[0, 1, 0, 1] = 2
    found = images.resize_latent(latent, height=1, width=7, filter="bislerp")
    assert torch.isfinite(found).all()
    between = images.resize_latent(latent[..., :2], height=1, width=3, filter="bislerp")[0, :2, 0, 1]
    torch.testing.assert_close(between, torch.full((2,), math.sqrt(2)))  # half way on the circle of radius 2
    opposite = images.resize_latent(latent[..., 2:], height=1, width=3, filter="bislerp")[0, 0, 0, 1]
    assert opposite == 0
    same = torch.tensor([1.0, 3]).view(1, 1, 1, 2).expand(1, 16, 1, 2)
    assert images.resize_latent(same, height=1, width=3, filter="bislerp")[0, 0, 0, 1] == 1  # not 2: the first cell
    assert images.resize_latent(torch.zeros(1, 16, 2, 2), height=3, width=3, filter="bislerp").eq(0).all()


def test_rotations_and_flips():
    latent = torch.arange(6.0).view(1, 1, 2, 3)
    assert images.rotate_latent(latent, "90 degrees")[0, 0].tolist() == [[3, 0], [4, 1], [5, 2]]
    assert images.rotate_latent(latent, "270 degrees")[0, 0].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert torch.equal(images.rotate_latent(latent, "none"), latent)
    assert images.flip_latent(latent, "y-axis: horizontally")[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]


def test_interpolation_of_latents_is_that_of_each_in_a_batch():
    """ComfyUI's node divides by norms [b, h, w], which only fit a batch of one."""
    first, second = random(3, 16, 4, 5) - 0.5, random(3, 16, 4, 5) - 0.5
    found = images.interpolate_latents(first, second, 0.3)
    alone = [images.interpolate_latents(first[i : i + 1], second[i : i + 1], 0.3) for i in range(3)]
    torch.testing.assert_close(found, torch.cat(alone))


def test_the_scale_of_the_vae():
    latent = random(1, 16, 3, 3)
    torch.testing.assert_close(images.to_vae_scale(latent), latent / 1.5305 + 0.0609)
    torch.testing.assert_close(images.from_vae_scale(images.to_vae_scale(latent)), latent)


@pytest.mark.parametrize(
    ("size", "asked", "least", "wanted"),
    [
        ((96, 128), (0, 64), 1, (48, 64)),
        ((96, 128), (48, 0), 1, (48, 64)),
        ((96, 128), (0, 0), 1, (96, 128)),
        ((10, 14), (120, 0), 64, (120, 168)),
        ((10, 14), (8, 9), 64, (64, 64)),
        ((100, 1), (0, 3), 1, (300, 3)),
        ((1, 100), (0, 3), 1, (1, 3)),
    ],
)
def test_a_side_of_0_keeps_the_aspect_ratio(size, asked, least, wanted):
    assert images.size_or_aspect(size, *asked, least=least) == wanted


def test_total_pixels():
    assert images.size_of_megapixels(96, 128, 1.0) == (887, 1182)
    assert images.size_of_megapixels(1024, 1024, 0.25) == (512, 512)


def test_pad_for_outpaint_takes_what_load_image_takes():
    picture, mask = images.pad_for_outpaint(Image.new("RGB", (20, 10), (255, 0, 0)), left=4, feather=3)
    assert picture.shape == (1, 10, 24, 3)
    assert picture[0, 0, 3].tolist() == [0.5, 0.5, 0.5]
    assert picture[0, 0, 4].tolist() == [1, 0, 0]
    torch.testing.assert_close(mask[0, 5, 3:9], torch.tensor([1, 1, (2 / 3) ** 2, (1 / 3) ** 2, 0, 0]))


PICTURE, MASK, LATENT = torch.rand(1, 9, 9, 3), torch.rand(1, 9, 9), torch.rand(1, 16, 9, 9)
REFUSED = [
    (lambda: images.resize(PICTURE, height=0, width=8), ("height", "0")),
    (lambda: images.resize(PICTURE, height=8, width=8, filter="bislerp"), ("filter", "'bislerp'", "lanczos")),
    (lambda: images.resize(PICTURE, height=8, width=8, crop="centre"), ("crop", "'centre'", "'center'")),
    (lambda: images.resize(PICTURE[0], height=8, width=8), ("picture", "[9, 9, 3]", "[b, h, w, channels]")),
    (lambda: images.resize(PICTURE * math.nan, height=8, width=8), ("243 of 243", "not finite")),
    (lambda: images.resize(PICTURE[:, :, :2], height=900, width=1, crop="center", filter="area"), ("nothing is left",)),
    (lambda: images.resize(torch.zeros(1, 9, 0, 3), height=8, width=8), ("[1, 9, 0, 3]",)),
    (lambda: images.resize(PICTURE.mul(255).byte(), height=8, width=8), ("picture", "uint8")),
    (lambda: images.resize_latent(LATENT, height=8, width=8, filter="lanczos"), ("filter", "'lanczos'", "bislerp")),
    (lambda: images.resize_latent(LATENT[0], height=8, width=8), ("latent", "[16, 9, 9]")),
    (lambda: images.center_crop(PICTURE[:, :7]), ("7 pixels", "8")),
    (lambda: images.grow_mask(PICTURE, 1), ("mask", "[1, 9, 9, 3]")),
    (lambda: images.grow_mask(MASK, 2**64), ("expand", "18446744073709551616")),
    (lambda: images.crop_mask(MASK, x=9, y=0, width=1, height=1), ("outside", "9 x 9")),
    (lambda: images.feather_mask(MASK, left=-1), ("left", "-1")),
    (lambda: images.combine_masks(MASK, MASK, operation="nor"), ("operation", "'nor'", "xor")),
    (lambda: images.solid_mask(1.5, height=1, width=1), ("value", "1.5")),
    (lambda: images.picture_to_mask(PICTURE, "alpha"), ("3 channels", "'alpha'")),
    (lambda: images.color_to_mask(PICTURE, 0x1000000), ("color", "0x1000000")),
    (lambda: images.color_to_mask(PICTURE[..., :1], 0), ("1 channel",)),
    (lambda: images.composite(PICTURE, LATENT), ("source", "[1, 16, 9, 9]")),
    (lambda: images.composite(PICTURE, PICTURE, mask=PICTURE), ("mask", "[1, 9, 9, 3]")),
    (lambda: images.batch(PICTURE, PICTURE[..., :1]), ("3 channels", "1")),
    (lambda: images.blur(PICTURE, 9), ("radius 9", "[9, 9]")),
    (lambda: images.blur(PICTURE, 1, 0.0), ("sigma",)),
    (lambda: images.add_latents(LATENT, LATENT[:, :4, :5]), ("16 and 4 channels",)),
    (lambda: images.blend_latents(LATENT, LATENT, 1.5), ("factor", "1.5")),
    (lambda: images.crop_latent(LATENT[..., :7], x=0, y=0, width=1, height=1), ("[9, 7]", "8")),
    (lambda: images.rotate_latent(LATENT, "90"), ("rotation", "'90'", "90 degrees")),
    (lambda: images.flip_latent(LATENT, "x"), ("axis", "'x'", "x-axis: vertically")),
    (lambda: images.pad_for_outpaint(PICTURE, left=-8), ("left", "-8")),
    (lambda: images.fit(Image.new("RGB", (8, 8)), height=8, width=8, how="cover"), ("fit", "'cover'", "crop")),
    (lambda: images.size_or_aspect((8, 8), -1, 0), ("height", "-1")),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_refuses(call, said):
    refuses(call, *said, error=ValueError)


def test_every_operation_is_in_the_readme():
    text = Path(inspect.getfile(images)).with_name("README.md").read_text()
    functions = [name for name in images.__all__ if inspect.isfunction(getattr(images, name))]
    assert len(functions) > 40
    assert [name for name in functions if f"`{name}" not in text or not inspect.getdoc(getattr(images, name))] == []
