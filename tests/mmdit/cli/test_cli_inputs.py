"""`mmdit generate` from a picture: files, masks, borders, a second pass, and drawing all of it again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit import Hires, Pipeline, images, read_settings
from mmdit.cli import inputs
from mmdit.cli.app import main

RNG = np.random.default_rng(0)
PHOTO, MASK = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8), np.zeros((32, 48), np.uint8)
MASK[8:24, 8:24] = 255


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a picture and a mask."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PHOTO).save("photo.png")
    Image.fromarray(MASK).save("mask.png")
    return tmp_path


@pytest.fixture
def tiny(tiny_folders, here):
    """Run `generate` with a tiny model, in one step on the CPU; later options win."""
    model = ["-m", str(tiny_folders["sd3.5-medium"]), "--device", "cpu", "--steps", "1"]
    return lambda *words: main(["generate", "a cat", *model, *words])


@pytest.fixture
def called(monkeypatch) -> list[dict]:
    """What the pipeline is called with, in place of drawing."""
    seen: list[dict] = []

    def call(self, prompts, negative, **arguments):
        seen.append(arguments)
        raise ValueError("enough")

    monkeypatch.setattr(Pipeline, "__call__", call)
    return seen


SMALL = ("--height", "32", "--width", "48")


def test_a_picture_is_drawn_again_from_the_same_files(tiny, here, capsys):
    about = ("--image", "photo.png", "--mask", "mask.png", "--strength", "0.9", "--keep-outside", "--hires", "1.5")
    assert tiny(*SMALL, *about[:-2], "-o", "a.png") == 0
    found = read_settings("a.png")
    kept = {"image": "photo.png", "mask_image": "mask.png", "strength": 0.9, "keep_outside": True, "fit": ""}
    assert {name: found[name] for name in kept} == kept
    drawn = np.asarray(Image.open("a.png"))
    assert np.array_equal(drawn[MASK == 0], PHOTO[MASK == 0])
    assert not np.array_equal(drawn, PHOTO)
    again = ["generate", "--settings", "a.png", "-o", "b.png"]
    assert main(again) == 1
    assert "--image FILE" in (said := capsys.readouterr().err)
    assert "photo.png" in said
    assert main([*again, "--image", "photo.png"]) == 1
    assert "--mask FILE" in capsys.readouterr().err
    Path("other").mkdir()
    Image.fromarray(PHOTO).save("other/renamed.tif")  # the same pixels
    assert main([*again, "--image", "other/renamed.tif", "--mask", "mask.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("b.png")), drawn)
    assert "another" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name", "option"),
    [
        (["-o", "photo.png"], "photo.png", "--image"),
        (["-o", "./mask.png"], "mask.png", "--mask"),
        (["-o", "p.png", "--seed", "1", "2", "--image", "p-1.png"], "p-1.png", "--image"),
        (["-o", "b.png", "--grid", "mask.png"], "mask.png", "--mask"),
    ],
)
def test_files_that_are_read_are_not_overwritten(tiny, here, called, capsys, words, name, option):
    Path("p-1.png").write_bytes(Path("photo.png").read_bytes())
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    assert tiny(*SMALL, "--image", "photo.png", "--mask", "mask.png", *words) == 2
    said = capsys.readouterr().err
    assert f"{name} is the picture that {option} reads" in said
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before
    assert not called


def test_another_file_is_told(tiny, here, capsys):
    assert tiny(*SMALL, "--image", "photo.png", "-o", "a.png") == 0
    Image.fromarray(PHOTO[::-1]).save("photo.png")
    capsys.readouterr()
    assert main(["generate", "--settings", "a.png", "--image", "photo.png", "-o", "b.png"]) == 0
    assert "another image than photo.png" in capsys.readouterr().err


def test_outpaint_and_fit(tiny, here, capsys):
    assert tiny("--image", "photo.png", "--outpaint", "16,0,0,16,4", "-o", "a.png") == 0
    found = read_settings("a.png")
    kept = {"width": 64, "height": 48, "outpaint": "16,0,0,16,4", "strength": 1.0, "mask_image": ""}
    assert {name: found[name] for name in kept} == kept
    assert main(["generate", "--settings", "a.png", "--image", "photo.png", "-o", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    more = ("--height", "64", "--width", "48", "--fit", "crop", "--mask", "mask.png")
    assert tiny("--image", "photo.png", *more, "-o", "c.png") == 0
    found = read_settings("c.png")
    assert (found["fit"], found["mask_image"], found["height"]) == ("crop", "mask.png", 64)
    assert main(["generate", "--settings", "c.png", "--image", "photo.png", "--mask", "mask.png", "-o", "d.png"]) == 0
    assert Path("c.png").read_bytes() == Path("d.png").read_bytes()


def test_what_the_pipeline_is_given(tiny, here, called):
    tiny("--image", "photo.png", "--strength", "0.3", "--padding-mask-crop", "4", "--mask", "mask.png", *SMALL)
    tiny("--image", "photo.png", "--outpaint", "8,0,8,0", "--mask", "mask.png", "--differential", "0.5")
    tiny("--image", "photo.png", "--fit", "pad", "--outpaint", "0,16,0,0", "--height", "64", "--width", "64")
    tiny("--hires", "2 filter=bislerp", *SMALL)
    plain, around, fitted, second = called
    assert (plain["image"], plain["mask_image"]) == (Path("photo.png"), Path("mask.png"))
    assert (plain["strength"], plain["padding_mask_crop"], plain["keep_outside"]) == (0.3, 4, False)
    canvas, outside = images.pad_for_outpaint("photo.png", left=8, right=8, feather=40)
    assert torch.equal(around["image"], canvas)
    outside[:, 8:24, 16:32] = 1  # what the mask says too
    assert torch.equal(around["mask_image"], outside)
    assert (around["height"], around["width"]) == (32, 64)
    assert (around["strength"], around["differential"]) == (1.0, 0.5)
    assert fitted["image"].shape == (1, 64, 64, 3)
    inner = images.fit(Image.open("photo.png"), height=48, width=64, how="pad")
    assert torch.equal(fitted["image"][:, 16:], images.load_image(inner).picture)
    assert second["hires"] == Hires(2.0, filter="bislerp")
    assert "image" not in second


USAGE = [
    (("--strength", "0.5"), ("--strength", "--image")),
    (("--mask", "mask.png"), ("--mask", "--image")),
    (("--fit", "crop"), ("--fit", "--image")),
    (("--image", "photo.png", "--keep-outside"), ("--keep-outside", "--mask")),
    (("--image", "photo.png", "--padding-mask-crop", "4"), ("--padding-mask-crop", "--mask")),
    (("--image", "photo.png", "--fit", "crop"), ("--fit", "--height")),
    (("--image", "photo.png", "--strength", "1.5"), ("--strength", "1.5")),
    (("--image", "photo.png", "--outpaint", "1,2,3"), ("--outpaint", "'1,2,3'", "LEFT,TOP,RIGHT,BOTTOM")),
    (("--image", "photo.png", "--outpaint", "0,0,0,0"), ("--outpaint", "'0,0,0,0'")),
    (("--image", "photo.png", "--outpaint=-8,0,0,0"), ("--outpaint", "'-8,0,0,0'")),
    (("--hires", "0.5"), ("Hires.scale", "0.5")),
    (("--hires", "1.5 filter=lanczos"), ("filter", "'lanczos'")),
]


@pytest.mark.parametrize(("words", "says"), USAGE)
def test_wrong_usage(here, monkeypatch, capsys, words, says):
    monkeypatch.setattr(Pipeline, "load", None)  # nothing is loaded
    assert main(["generate", "a cat", *words]) == 2
    said = capsys.readouterr().err
    assert all(one in said for one in says), said


def test_files_that_cannot_be_read(here, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "load", None)
    Path("broken.png").write_bytes(b"no picture")
    Image.fromarray(MASK[:16]).save("small.png")
    for words, says in (
        (("--image", "missing.png"), ("missing.png", "No such file")),
        (("--image", "broken.png"), ("--image", "broken.png", "PNG, JPEG")),
        (("--image", "photo.png", "--mask", "broken.png"), ("--mask", "broken.png")),
        (("--image", "photo.png", "--mask", "small.png", "--outpaint", "8,0,8,0"), ("small.png", "48 x 16", "48 x 32")),
        (
            ("--image", "photo.png", "--fit", "crop", "--height", "16", "--width", "16", "--outpaint", "8,0,8,0"),
            ("--outpaint", "0 x 16"),
        ),
    ):
        assert main(["generate", "a cat", *words]) == 1, words
        said = capsys.readouterr().err
        assert all(one in said for one in says), said


def test_a_drawing_from_a_picture_holds_no_graph_of_a_drawing_from_text(tiny, here):
    for name, words in (("text.png", SMALL), ("image.png", ("--image", "photo.png", "--strength", "0.9"))):
        assert tiny("--profile", "comfyui", *words, "-o", name) == 0
    with Image.open("text.png") as text, Image.open("image.png") as image:
        assert sorted(text.text) == ["mmdit", "prompt"]
        assert list(image.text) == ["mmdit"]
        assert image.size == (48, 32)


def test_borders():
    assert inputs.borders_of("1,2,3,4") == {"left": 1, "top": 2, "right": 3, "bottom": 4, "feather": 40}
    assert inputs.borders_of("0, 2, 0, 0, 5")["feather"] == 5
