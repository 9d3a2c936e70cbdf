"""`mmdit.Hires`: what it refuses, and the sizes and values of what it enlarges."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from safetensors.torch import load_file

from encoders import VAE, VAEConfig
from golden import DATA
from mmdit import Hires, images
from refusals import refuses


@pytest.fixture(scope="module")
def vae():
    return VAE(VAEConfig((4,), latent_channels=16, blocks_per_level=1, groups=1))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scale": 0.5}, ("Hires.scale", "0.5", "from 1 to 8")),
        ({"scale": 9}, ("Hires.scale", "9")),
        ({"scale": float("nan")}, ("Hires.scale", "nan")),
        ({"strength": 1.5}, ("Hires.strength", "1.5", "from 0 to 1")),
        ({"steps": 0}, ("Hires.steps", "0")),
        ({"filter": "lanczos"}, ("Hires.filter", "latent", "'lanczos'", "bislerp")),
        ({"filter": "bislerp", "space": "pixel"}, ("Hires.filter", "pixel", "'bislerp'", "lanczos")),
        ({"sampler": "eular"}, ("Hires.sampler", "'eular'", "'euler'")),
        ({"schedule": "norml"}, ("Hires.schedule", "'norml'", "'normal'")),
        ({"space": "pixels"}, ("Hires.space", "'pixels'", "'pixel'")),
    ],
)
def test_refuses(arguments, said):
    refuses(lambda: Hires(**arguments), *said, error=ValueError)


@pytest.mark.parametrize(
    "hires",
    [Hires(), Hires(2.0, 0.35, 14, "bislerp", seed=7, sampler="heun"), Hires(filter="lanczos", space="pixel")],
)
def test_as_text(hires):
    assert Hires.from_text(hires.to_text()) == hires


def test_from_text():
    assert Hires.from_text("1.25 strength=0.4 filter=area") == Hires(1.25, 0.4, filter="area")
    assert Hires.from_text("") == Hires()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.5 scale=2", ("'scale=2'", "twice")),
        ("big", ("'big'", "scale", "float")),
        ("steps=1.5", ("'steps=1.5'", "steps", "int")),
        ("strenght=1", ("'strenght'", "strength")),
        ("0.5", ("Hires.scale", "0.5")),
    ],
)
def test_refuses_text(text, said):
    refuses(lambda: Hires.from_text(text), *said, error=ValueError)


def test_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Hires().scale = 2


@pytest.mark.parametrize(
    ("scale", "size", "unit", "wanted"),
    [
        (1.5, (10, 14), 1, (15, 21)),
        (1.5, (10, 14), 2, (16, 20)),  # 7.5 and 10.5 pairs, half to even
        (1.5, (5, 7), 1, (8, 10)),
        (2, (12, 16), 2, (24, 32)),
        (1, (12, 16), 2, (12, 16)),
        (1.1, (96, 128), 8, (104, 144)),
    ],
)
def test_sizes(scale, size, unit, wanted):
    assert Hires(scale=scale).size(*size, unit) == wanted


@pytest.mark.parametrize("filter", ["nearest-exact", "bislerp", "bicubic"])
def test_latents_are_enlarged_at_the_scale_of_the_vae(vae, filter):
    """Recorded from ComfyUI's LatentUpscaleBy, whose latents are at that scale."""
    nodes = load_file(DATA / "images" / "nodes.safetensors")
    found = Hires(1.5, filter=filter).enlarged_latent(vae.to_model(nodes["in.latent"]), vae)
    wanted = nodes[f"latentupscaleby.{filter}.1.5.latent"]
    torch.testing.assert_close(vae.from_model(found), wanted, rtol=0, atol=1e-5)


def test_pictures_are_enlarged():
    picture = images.load_image(DATA / "images" / "pub_photo.png").picture
    found = Hires(1.25, filter="lanczos", space="pixel").enlarged_picture(picture, 16)
    assert torch.equal(found, images.resize(picture, height=128, width=160, filter="lanczos"))
