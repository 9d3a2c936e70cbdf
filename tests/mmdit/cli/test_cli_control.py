"""`mmdit generate --controlnet FILE --control FILE:KIND[:SCALE[:START[:END]]]`, and again with LoRAs by --settings."""

from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny
from mmdit import ControlNet, ControlNetConfig, SettingsError, read_settings
from mmdit.cli import main
from mmdit.cli.controls import KINDS, Hint, control_option
from mmdit.models.controlnet import CONTROL_KINDS
from mmdit.pipeline.used_files import UsedLora, UsedNet, loras_of, nets_of, to_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    net = tiny.randomize(ControlNet(ControlNetConfig(1, 256, 192)), 1)
    save_file(net.state_dict(), folder / "net.safetensors")
    Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).save(folder / "edges.png")
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


def picture_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_drawing_is_drawn_again_from_its_files(folder, capsys):
    """The picture names net, hint and LoRA; each that is missing, another one, or has another number is said."""
    lora = folder / "lora.safetensors"
    key = "diffusion_model.joint_blocks.1.x_block.mlp.fc1.lora_"
    tensors = {f"{key}A.weight": torch.randn(2, 256), f"{key}B.weight": torch.randn(1024, 2)}
    save_file(tensors, lora)
    how = ["--height", "32", "--width", "32", "--steps", "1", "-o"]
    control = ["--controlnet", str(folder / "net.safetensors"), "--control", f"{folder / 'edges.png'}:canny:0.5:0:1"]
    assert main(["generate", "a star", *control, "--lora", f"{lora}:0.5:0.25", *how, str(folder / "a.png")]) == 0
    said = read_settings(folder / "a.png")
    assert said["control"].startswith("canny:0.5:0:1:net=")
    (used,) = loras_of(said["loras"])
    assert (used.file, used.weight, used.text_encoder_weight) == (str(lora), 0.5, 0.25)
    again = ["generate", "--settings", str(folder / "a.png"), "-o", str(folder / "b.png")]

    def differs(*more):
        capsys.readouterr()
        assert main([*again, *more]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "differ" in line]

    torch.manual_seed(99)  # noise of the hint must not depend on what was drawn before
    assert differs() == []
    assert np.array_equal(picture_of(folder / "b.png"), picture_of(folder / "a.png"))
    assert read_settings(folder / "b.png") == said
    (scale, weight) = differs(*control[:3], f"{folder / 'edges.png'}:canny", "--lora", f"{lora}:0.5")
    assert "canny:0.5:0:1" in scale
    assert "0.25" in weight
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, lora)
    Image.new("RGB", (32, 32), "white").save(folder / "edges.png")
    (lora_said, weights_said, hint_said) = differs()
    assert str(lora) in lora_said
    assert used.digest in lora_said
    assert "weights" in weights_said
    assert "other hints" in hint_said
    for path, option in ((lora, "--lora"), (folder / "edges.png", "--control")):
        path.unlink()
        capsys.readouterr()
        assert main(again) == 1
        found = capsys.readouterr().err
        assert str(path) in found
        assert option in found
        path.write_bytes(b"")


def test_a_hint_is_not_overwritten(folder, tmp_path, capsys):
    hint = tmp_path / "hint.png"
    Image.new("L", (32, 32)).save(hint)
    before = hint.read_bytes()
    control = ["--controlnet", str(folder / "net.safetensors"), "--control", f"{hint}:canny"]
    assert main(["generate", "a star", *control, "-o", str(hint)]) == 2
    assert "hint.png is the picture that --control reads" in capsys.readouterr().err
    assert hint.read_bytes() == before


def test_half_of_what_a_net_needs(folder, capsys):
    assert main(["generate", "a star", "--controlnet", str(folder / "net.safetensors")]) == 2
    assert "1 nets" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "nan", '[{"file": 1, "digest": ""}]', '[{"file": "a", "digest": "b", "form": "c"}]',
             '[{"file": "a", "digest": "b", "weight": "1"}]', '[{"file": "a", "digest": "b", "more": 1}]', "[" * 10**5]
)  # fmt: skip
def test_records_that_cannot_be_read(text):
    with pytest.raises(SettingsError, match="loras"):
        loras_of(text)
    with pytest.raises(SettingsError, match="control_files"):
        nets_of(text.replace("file", "net"))


def test_records_come_back():
    loras = [
        UsedLora(file="a:b", digest="1", weight={"*": 0.5}, form="merged", scale=2.0),
        UsedLora(file="", digest=""),
    ]
    assert loras_of(to_text(loras)) == loras
    nets = [UsedNet(net="net", hint="ä")]
    assert nets_of(to_text(nets)) == nets
    assert to_text([]) == ""
