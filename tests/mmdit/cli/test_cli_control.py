"""`mmdit generate --controlnet FILE --control FILE:KIND[:SCALE[:START[:END]]]`."""

from argparse import ArgumentTypeError

import pytest
from PIL import Image
from safetensors.torch import save_file

import tiny
from mmdit import ControlNet, ControlNetConfig, read_settings
from mmdit.cli import main
from mmdit.cli.controls import KINDS, Hint, control_option
from mmdit.models.controlnet import CONTROL_KINDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    net = tiny.randomize(ControlNet(ControlNetConfig(1, 256, 192)), 1)
    save_file(net.state_dict(), folder / "net.safetensors")
    Image.new("RGB", (32, 32), "white").save(folder / "edges.png")
    return folder


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a.png:canny", Hint("a.png", "canny")),
        ("a.png:depth:0.5", Hint("a.png", "depth", 0.5)),
        ("C:/b c.png:tile:0.7:0.1:0.8", Hint("C:/b c.png", "tile", 0.7, 0.1, 0.8)),
    ],
)
def test_what_is_read(text, hint):
    assert control_option(text) == hint


@pytest.mark.parametrize("text", ["a.png", "a.png:edges", "a.png:canny:x", "a.png:canny:1:0:1:2", "canny"])
def test_what_is_not(text):
    with pytest.raises(ArgumentTypeError, match="canny"):
        control_option(text)


def test_kinds():
    assert set(KINDS) == set(CONTROL_KINDS) - {"inpaint"}


def test_a_drawing(folder, capsys):
    """The picture says the net and the hint, and is not drawn again without them."""
    how = ["--height", "32", "--width", "32", "--steps", "1", "-o"]
    control = ["--controlnet", str(folder / "net.safetensors"), "--control", f"{folder / 'edges.png'}:canny:0.5:0:1"]
    assert main(["generate", "a star", *control, *how, str(folder / "a.png")]) == 0
    assert read_settings(folder / "a.png")["control"].startswith("canny:0.5:0:1:net=")
    capsys.readouterr()
    assert main(["generate", "--settings", str(folder / "a.png"), "-o", str(folder / "b.png")]) != 0
    assert "--controlnet" in capsys.readouterr().err
    again = ["generate", "--settings", str(folder / "a.png"), "-o", str(folder / "d.png")]
    assert main([*again, *control]) == 0
    assert "canny:0.5:0:1" not in capsys.readouterr().err
    assert main([*again, *control[:3], f"{folder / 'edges.png'}:canny"]) == 0
    assert "canny:0.5:0:1" in capsys.readouterr().err  # another scale is said
    assert main(["generate", "a star", *control[:2], *how, str(folder / "c.png")]) != 0
    assert "1 nets" in capsys.readouterr().err
