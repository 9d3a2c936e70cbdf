"""Settings come back from a PNG exactly as they went in, and whatever is wrong with them is said."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mmdit
from mmdit._version import __version__
from mmdit.pipeline.settings import FORMAT_VERSION, KEYWORD, Settings, SettingsError, grid, read_settings, save_png
from refusals import refuses

USED = Settings(
    quant=None,
    prompt="a cat\n“on” a red chair 🪑",
    negative_prompt="",
    seed=2**64 - 1,
    height=1024,
    width=768,
    num_inference_steps=28,
    guidance_scale=0.1 + 0.2,
    sampler="euler",
    schedule="normal",
    shift=3.0,
    profile="diffusers",
    max_sequence_length=None,
    model="checkpoints/sd3.5_medium",
    dtype="bfloat16",
    device="cuda",
    image="photo.png",
    image_digest="0123456789abcdef",
    strength=0.6,
    keep_outside=True,
    differential=0.5,
    padding_mask_crop=32,
    fit="crop",
    outpaint="64,0,64,0,40",
    hires="scale=1.5 strength=0.5 filter=bislerp space=latent",
)
ABOUT = ("image", "mask", "strength", "keep", "differential", "padding", "fit", "outpaint", "hires")
PLAIN = {one.name: one.default for one in fields(Settings) if one.name.startswith(ABOUT)}
JSON = USED.to_json()
FUZZED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def picture(mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(2) if channels == 1 else values, mode=None)


def other(path: Path, chunks: dict[str, str]) -> Path:
    """A PNG of another program."""
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    picture().save(path, pnginfo=info)
    return path


def test_round_trip(tmp_path):
    path = save_png(picture(), tmp_path / "new" / "cat.png", JSON)
    assert read_settings(path) == JSON
    assert Settings.from_json(read_settings(path), path) == USED
    assert USED.library_version == __version__
    assert [file.name for file in path.parent.iterdir()] == ["cat.png"]  # nothing temporary stays


@FUZZED
@given(prompt=st.text(), negative=st.text(), seed=st.integers(-(2**63), 2**64 - 1), scale=st.floats(-1e9, 1e9))
def test_any_text_and_number_comes_back(tmp_path, prompt, negative, seed, scale):
    used = replace(USED, prompt=prompt, negative_prompt=negative, seed=seed, guidance_scale=scale)
    back = Settings.from_json(read_settings(save_png(picture(), tmp_path / "a.png", used.to_json())))
    assert repr(back) == repr(used)  # repr tells 0.0 from -0.0


@FUZZED
@given(others=st.dictionaries(st.text(), VALUES, max_size=3))
def test_any_json_comes_back(tmp_path, others):
    stored = {**others, "format_version": 1}
    assert read_settings(save_png(picture(), tmp_path / "a.png", stored)) == stored


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_are_kept(tmp_path, mode):
    image = picture(mode)
    with Image.open(save_png(image, tmp_path / "a.png", JSON)) as back:
        assert back.mode == mode
        assert back.tobytes() == image.tobytes()


def test_chunk_is_strict_sorted_ascii_json_and_the_only_one(tmp_path):
    image = other(tmp_path / "b.png", {"parameters": "of the picture that was opened"})
    with Image.open(image) as opened, Image.open(save_png(opened, tmp_path / "a.png", JSON)) as back:
        assert list(back.text) == [KEYWORD]
        text = back.text[KEYWORD]
    assert text.isascii()
    assert b"tEXt" + KEYWORD.encode() + b"\0" + text.encode() in (tmp_path / "a.png").read_bytes()
    assert list(json.loads(text)) == sorted(JSON)


def test_failed_writing_leaves_the_old_file(tmp_path):
    path = save_png(picture(), tmp_path / "a.png", JSON)
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(Image.new("F", (2, 2)), path, JSON)
    assert read_settings(path) == JSON
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "Out of range float"),
        ([1.0, float("-inf")], "Out of range float"),
        ((1, 2), "comes back as {'extra': [1, 2]}"),
        ({1: "a"}, "comes back as"),
        (b"bytes", "bytes"),
        (np.int64(3), "int64"),
        ("a\ud800", "surrogates not allowed"),
        ("\ud83d\ude00", "comes back as"),  # two branches would come back as one character
        (10**5000, "digits"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_json_does_not_keep(tmp_path, value, said):
    path = tmp_path / "a.png"
    refuses(lambda: save_png(picture(), path, {**JSON, "extra": value}), path, "'extra'", said, error=SettingsError)
    assert not path.exists()


def test_names_that_json_does_not_keep(tmp_path):
    refuses(lambda: save_png(picture(), tmp_path / "a.png", {**JSON, 1: 2}), "setting 1", error=SettingsError)


def test_other_endings(tmp_path):
    refuses(lambda: save_png(picture(), tmp_path / "a.jpg", JSON), "must end in .png", error=ValueError)


@pytest.mark.parametrize("version", [None, 0, -1, True, "1", 1.0])
def test_no_version(tmp_path, version):
    found = {**JSON, "format_version": version}
    for call in (lambda: save_png(picture(), tmp_path / "a.png", found), lambda: Settings.from_json(found)):
        refuses(call, f"format_version is {version!r}", f"expected {FORMAT_VERSION}", error=SettingsError)


def test_newer_version(tmp_path):
    version = FORMAT_VERSION + 1
    newer = {**JSON, "format_version": version, "library_version": "9.1", "later": 1}
    path = other(tmp_path / "a.png", {KEYWORD: json.dumps(newer)})
    said = (f"format_version is {version}", "'9.1'", f"reads up to {FORMAT_VERSION}", "update")
    refuses(lambda: read_settings(path), path, *said, error=SettingsError)
    refuses(lambda: Settings.from_json(newer, path), path, *said, error=SettingsError)
    refuses(lambda: replace(USED, format_version=version), *said[0:1], error=SettingsError)


def test_older_version_is_filled_in():
    third = {name: value for name, value in JSON.items() if name not in PLAIN} | {"format_version": 3}
    assert Settings.from_json(third) == replace(USED, **PLAIN)
    second = {name: value for name, value in third.items() if name != "model_digest"} | {"format_version": 2}
    assert Settings.from_json(second) == replace(USED, model_digest="", **PLAIN)
    older = {name: value for name, value in second.items() if name != "guidance"} | {"format_version": 1}
    assert Settings.from_json(older) == replace(USED, guidance="", model_digest="", **PLAIN)
    refuses(lambda: Settings.from_json(older | {"format_version": 2}), "guidance is missing", error=SettingsError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": 1', "delimiter"),
        ("", "Expecting value"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        ('{"shift": NaN}', "NaN is no number"),
        ('{"shift": -Infinity}', "-Infinity is no number"),
        ('{"shift": 1e999}', "1e999 is beyond"),
        ('{"prompt": "\\ud800"}', "surrogates not allowed"),
        ('{"prompt": "a\tb"}', "control character"),
        ("[" * 100_000, "recursion"),
        ("[1, 2]", "a JSON list, expected an object"),
        ("null", "a JSON NoneType, expected an object"),
        ('{"prompt": "a"}', "format_version is None"),
    ],
)
def test_broken_json(tmp_path, text, said):
    path = other(tmp_path / "a.png", {KEYWORD: text})
    refuses(lambda: read_settings(path), path, said, "mmdit-lab", error=SettingsError)


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ({"prompt": "{}", "workflow": "{}"}, "ComfyUI, with 'prompt' and 'workflow'"),
        ({"workflow": "{}"}, "ComfyUI, with 'workflow'"),
        ({"parameters": "a cat\nSteps: 20"}, "AUTOMATIC1111's web UI, with 'parameters'"),
        ({"Software": "GIMP", "Comment": "c"}, "text chunks that it has: 'Software', 'Comment'"),
        ({}, "text chunks that it has: none"),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, dict) else "",
)
def test_pictures_of_others(tmp_path, chunks, said):
    path = other(tmp_path / "a.png", chunks)
    refuses(lambda: read_settings(path), path, "no 'mmdit' chunk", said, error=SettingsError)


def test_text_behind_the_pixels_and_in_other_chunks_is_read(tmp_path):
    """Programs that save a picture again may move, pack or re-encode its text."""
    text, path = json.dumps(JSON), tmp_path / "a.png"
    for chunk, packed in (("add_text", True), ("add_itxt", False), ("add_itxt", True)):
        info = PngInfo()
        getattr(info, chunk)(KEYWORD, text, zip=packed)
        picture().save(path, pnginfo=info)
        assert read_settings(path) == JSON
    whole = save_png(picture(), path, JSON).read_bytes()
    pixels, end = whole.index(b"IDAT") - 4, whole.index(b"IEND") - 4
    start = whole.index(b"tEXt") - 4
    path.write_bytes(whole[:start] + whole[pixels:end] + whole[start:pixels] + whole[end:])
    assert read_settings(path) == JSON


def test_not_a_png(tmp_path):
    path = tmp_path / "a.png"
    picture().save(path, format="jpeg")
    refuses(lambda: read_settings(path), path, r"is not a PNG: it begins with b'\xff\xd8", error=SettingsError)
    path.write_bytes(b"")
    refuses(lambda: read_settings(path), path, "is not a PNG: it begins with b''", error=SettingsError)
    refuses(lambda: read_settings(tmp_path / "no.png"), "no.png", error=FileNotFoundError)


def test_truncated_or_damaged_files_are_refused_or_read_right(tmp_path):
    """At every length and with any byte changed: an error that names the file, or the settings as they were."""
    path = save_png(picture(), tmp_path / "a.png", JSON)
    whole = path.read_bytes()
    cut = [whole[:n] for n in range(0, len(whole), 3)]
    changed = [whole[:n] + bytes([whole[n] ^ 0x10]) + whole[n + 1 :] for n in range(0, len(whole), 3)]
    refused = 0
    for data in cut + changed:
        path.write_bytes(data)
        try:
            assert read_settings(path) == JSON
        except SettingsError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > len(cut + changed) // 2


def test_all_mistakes_are_listed():
    found = {**JSON, "seed": "7", "height": True, "shift": float("inf"), "sede": 1, "max_sequence_length": 1.5}
    del found["prompt"]
    refuses(
        lambda: Settings.from_json(found, "cat.png"),
        "cat.png: 'sede' is unknown; prompt is missing",
        "seed is '7' (str), expected int",
        "height is True (bool), expected int",
        "max_sequence_length is 1.5 (float), expected int or None",
        "shift is inf, expected a finite float",
        error=SettingsError,
    )


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_each_key_is_needed_and_checked(name):
    rest = {key: value for key, value in JSON.items() if key != name}
    refuses(lambda: Settings.from_json(rest), name, error=SettingsError)
    refuses(lambda: Settings.from_json({**JSON, name: [1]}), f"{name} is [1]", error=SettingsError)


def test_whole_numbers_do_for_floats():
    """Other languages write 7.0 as 7."""
    assert repr(Settings.from_json({**JSON, "guidance_scale": 7})) == repr(replace(USED, guidance_scale=7.0))
    for long in (2**53 + 1, 10**400, 10**5000):
        refuses(
            lambda n=long: Settings.from_json({**JSON, "shift": n}), "shift is", "a finite float", error=SettingsError
        )


def test_values_are_checked_when_settings_are_made():
    """Their types too, but in this suite jaxtyping is quicker."""
    refuses(lambda: replace(USED, shift=float("nan")), "shift is nan, expected a finite float", error=SettingsError)
    refuses(lambda: replace(USED, prompt="a\udc80b"), "prompt is 'a\\udc80b'", "U+DC80", error=SettingsError)


def test_grid():
    cells = [Image.new("RGB", (3, 2), (i, 10 * i, 0)) for i in range(1, 6)]
    for columns, size in ((None, (9, 4)), (2, (6, 6)), (1, (3, 10)), (9, (15, 2))):
        sheet = grid(cells, columns)
        assert sheet.size == size
        across = size[0] // 3
        for i, cell in enumerate(cells):
            x, y = i % across * 3, i // across * 2
            assert sheet.crop((x, y, x + 3, y + 2)).tobytes() == cell.tobytes()
    assert grid(cells).getpixel((8, 3)) == (0, 0, 0)
    assert [grid(cells[:1] * n).size for n in (1, 2, 4, 5)] == [(3, 2), (6, 2), (6, 4), (9, 4)]


def test_grid_refusals():
    one = picture()
    refuses(lambda: grid([]), "no pictures", error=ValueError)
    refuses(lambda: grid([one, one, picture(size=(5, 7))]), "picture 0 is 7 x 5, picture 2 is 5 x 7", error=ValueError)
    refuses(lambda: grid([one], 0), "at least 1, got 0", error=ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 10**9),
        ("num_inference_steps", 0),
        ("height", 2**32),
        ("width", -16),
        ("max_sequence_length", 2**50),
        ("guidance_scale", 1e30),
        ("shift", -1.0),
        ("seed", 2**64),
    ],
)
def test_numbers_of_a_picture_are_bounded(name, value):
    refuses(
        lambda: Settings.from_json(JSON | {name: value}), f"{name} is", "expected a number from", error=SettingsError
    )


def test_a_digest_tells_weights_apart():
    pipe = mmdit.Pipeline.demo()
    first = pipe.digest
    assert first == mmdit.Pipeline.demo().digest
    assert len(first) == 16
    few = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    assert pipe("a", seed=1, **few).settings[0].model_digest == first
    with torch.no_grad():
        pipe.transformer.joint_blocks[1].x_block.mlp.fc1.weight.mul_(1.01)
    assert pipe.digest != first
    float8 = mmdit.Pipeline.demo(quant="fp8")
    second = float8.digest
    assert second != first
    float8.transformer.joint_blocks[1].x_block.mlp.fc1.weight.qdata.view(torch.uint8)[0, 0] += 1
    assert float8.digest != second


def test_settings_hold_the_files_of_a_call(tmp_path):
    """By name and digest of the pixels, which no folder and no format changes."""
    pipe, size = mmdit.Pipeline.demo(), (32, 32)
    photo, mask = picture(size=size), picture("L", size)
    photo.save(tmp_path / "photo.png")
    photo.save(tmp_path / "other.tif")
    mask.save(tmp_path / "mask.png")
    few = {"seed": 1, "num_inference_steps": 1, "height": 32, "width": 32}
    files = {"image": tmp_path / "photo.png", "mask_image": tmp_path / "mask.png"}
    one = pipe("a", **files, strength=1.0, padding_mask_crop=4, **few).settings[0]
    assert (one.image, one.mask_image, one.strength, one.padding_mask_crop) == ("photo.png", "mask.png", 1.0, 4)
    assert len(one.image_digest) == len(one.mask_digest) == 16
    assert one.image_digest != one.mask_digest
    pictures = [tmp_path / "other.tif", np.asarray(mask.convert("RGB"))]
    again = pipe("a", image=pictures, strength=1.0, **few | {"seed": [1, 2]}).settings
    assert [(each.image, each.mask_digest) for each in again] == [("other.tif", ""), ("", "")]
    assert again[0].image_digest == one.image_digest != again[1].image_digest
    assert Settings.from_json(one.to_json()) == one
    assert pipe("a", **few).settings[0] == replace(one, **PLAIN)
