"""The operations of `mmdit.images` against what ComfyUI's nodes gave (tests/data/images/nodes.safetensors).

Masks and lanczos pictures were stored times 255 (binary ones as 0 and 1), pictures as their first channel.
"""

import pytest
import torch
from safetensors.torch import load_file

from golden import DATA
from mmdit import images

FOLDER = DATA / "images"
NODES = load_file(FOLDER / "nodes.safetensors")
FLOATS = 1e-5  # what float32 may differ by between two right orders of the same sums


def picture(name):
    return images.load_image(FOLDER / f"pub_{name}.png").picture


def mask(name):
    return images.load_mask(FOLDER / f"pub_{name}.png", channel="red")


def node(name):
    return NODES[f"in.{name}"]


def scaled(scale, filter):
    latent = node("latent")
    return images.resize_latent(latent, **images.size_by(*latent.shape[2:], scale)._asdict(), filter=filter)


def asked(height, width, filter, crop):
    """LatentUpscale counts in pixels."""
    size = images.size_or_aspect(node("latent").shape[2:], height, width, least=64)
    return images.resize_latent(
        node("latent"), height=size.height // 8, width=size.width // 8, filter=filter, crop=crop
    )


LATENTS = {
    **{
        f"latentupscaleby.{filter}.1.5.latent": lambda filter=filter: scaled(1.5, filter)
        for filter in ("nearest-exact", "bilinear", "area", "bicubic", "bislerp")
    },
    "latentupscale.bicubic.176x96.center.latent": lambda: asked(96, 176, "bicubic", "center"),
    "latentupscale.bislerp.96x128.disabled.latent": lambda: asked(128, 96, "bislerp", "disabled"),
    "latentupscale.nearest-exact.0x120.disabled.latent": lambda: asked(120, 0, "nearest-exact", "disabled"),
    "latentcomposite.0.latent": lambda: images.paste_latent(node("latent"), node("small"), x=2, y=1, feather=2),
    "latentblend.latent": lambda: images.blend_latents(node("latent"), node("small"), 0.3),
    "latentrotate.latent": lambda: images.rotate_latent(node("latent"), "90 degrees"),
    "latentflip.latent": lambda: images.flip_latent(node("latent"), "x-axis: vertically"),
    "latentcrop.latent": lambda: images.crop_latent(node("latent"), x=2, y=1, width=9, height=8),
    "latentadd.latent": lambda: images.add_latents(node("latent"), node("small")),
    "latentsubtract.latent": lambda: images.subtract_latents(node("latent"), node("small")),
    "latentmultiply.latent": lambda: images.multiply_latent(node("latent"), 1.3),
    "latentinterpolate.latent": lambda: images.interpolate_latents(node("latent"), node("latent2"), 0.4),
    "latentcompositemasked.latent": lambda: images.composite_latents(
        node("latent"), node("small"), x=2, y=1, mask=mask("softmask")
    ),
}
EXACT = {"latentrotate", "latentflip", "latentcrop", "latentmultiply", "latentupscaleby.nearest-exact"}


@pytest.mark.parametrize("name", LATENTS)
def test_latents(name):
    given = {key: NODES[key].clone() for key in ("in.latent", "in.small")}
    found, wanted = LATENTS[name](), NODES[name]
    assert found.shape == wanted.shape
    exact = any(name.startswith(one) for one in EXACT)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0 if exact else FLOATS)
    assert all(torch.equal(NODES[key], value) for key, value in given.items())


def photo_small():
    return picture("photo")[:, ::2, ::2]


def padded(part):
    borders = {"left": 16, "right": 8, "bottom": 24, "feather": 12}
    return images.pad_for_outpaint(photo_small(), **borders)[part]


def for_inpaint(name, mask_name, grow):
    return images.gray_inside(picture(name), mask(mask_name), grow)[1].unsqueeze(1)


def scale(height, width, filter, crop):
    return images.resize(picture("odd"), height=height, width=width, filter=filter, crop=crop)[..., :1]


# How the tensor was stored: times 255, or as it was.
PICTURES = {
    "loadimage.alpha.mask": (255, lambda: images.load_image(FOLDER / "pub_alpha.png").mask),
    "imagescale.lanczos.center.image": (255, lambda: scale(64, 96, "lanczos", "center")),
    "imagescale.bicubic.disabled.image": (1, lambda: scale(80, 80, "bicubic", "disabled")),
    "imagescale.area.center.image": (1, lambda: scale(32, 48, "area", "center")),
    "padoutpaint.16_0_8_24.12.image": (1, lambda: padded(0)[..., :1]),
    "padoutpaint.16_0_8_24.12.mask": (1, lambda: padded(1)),
    "padoutpaint.0_8_0_0.40.mask": (1, lambda: images.pad_for_outpaint(photo_small(), top=8)[1]),
    "growmask.3.True.mask": (255, lambda: images.grow_mask(mask("softmask"), 3)),
    "growmask.-2.False.mask": (255, lambda: images.grow_mask(mask("softmask"), -2, tapered_corners=False)),
    "feathermask.(8, 4, 6, 10).mask": (
        1,
        lambda: images.feather_mask(torch.ones(1, 48, 64), left=8, top=4, right=6, bottom=10),
    ),
    "maskcomposite.mask": (
        255,
        lambda: images.combine_masks(mask("softmask"), mask("mask"), x=8, y=4, operation="subtract"),
    ),
    "thresholdmask.mask": (1, lambda: images.threshold_mask(mask("softmask"), 0.5)),
    "vaeencodeforinpaint.hard.photo.6.noise_mask": (1, lambda: for_inpaint("photo", "mask", 6)),
    "vaeencodeforinpaint.soft.photo.1.noise_mask": (1, lambda: for_inpaint("photo", "softmask", 1)),
    "vaeencodeforinpaint.soft.odd.6.noise_mask": (1, lambda: for_inpaint("odd", "softmask", 6)),
    "latentmask.hard.mask": (1, lambda: images.mask_to_size(mask("mask"), (12, 16))),
    "latentmask.soft.mask": (1, lambda: images.mask_to_size(mask("softmask"), (12, 16))),
    "latentmask.big.mask": (1, lambda: images.mask_to_size(mask("bigmask"), (12, 16))),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_and_masks(name):
    stored, make = PICTURES[name]
    found, wanted = make(), NODES[name]
    assert found.shape == wanted.shape
    if wanted.dtype == torch.uint8:
        assert torch.equal((found.double() * stored).round(), wanted.double())
    else:
        torch.testing.assert_close(found * stored, wanted, rtol=0, atol=FLOATS)


@pytest.mark.parametrize(
    ("name", "mask_name", "grow", "case"),
    [
        ("photo", "mask", 6, "hard.photo.6"),
        ("photo", "softmask", 1, "soft.photo.1"),
        ("odd", "softmask", 6, "soft.odd.6"),
    ],
)
def test_the_picture_for_inpainting_is_gray_inside(name, mask_name, grow, case):
    gray, drawn = images.gray_inside(picture(name), mask(mask_name), grow)
    sums = gray.double().sum((0, 1, 2))
    torch.testing.assert_close(sums, NODES[f"vaeencodeforinpaint.{case}.pixels_sum"].double(), rtol=1e-6, atol=0)
    seen = images.mask_to_size(drawn, (12, 16))
    torch.testing.assert_close(seen, NODES[f"vaeencodeforinpaint.{case}.latent_mask"], rtol=0, atol=FLOATS)


def test_every_record_is_compared():
    inputs = {"in.latent", "in.small", "in.latent2", "loadimage.nomask.mask"}
    sums = {name for name in NODES if name.startswith("vaeencodeforinpaint") and not name.endswith("noise_mask")}
    assert set(NODES) == set(LATENTS) | set(PICTURES) | inputs | sums


def test_a_picture_without_alpha_has_no_mask():
    """ComfyUI's LoadImage then gives zeros of 64 x 64."""
    assert images.load_image(FOLDER / "pub_photo.png").mask is None
    assert NODES["loadimage.nomask.mask"].shape == (1, 64, 64)
    assert not NODES["loadimage.nomask.mask"].any()
