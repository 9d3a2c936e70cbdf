"""Generated PNGs: chunks that are cut, broken, doubled, moved or foreign. A reader gives settings or its own error."""

import random
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fuzzing import SECONDS
from mmdit import read_settings, save_png
from mmdit.pipeline.settings import Settings, SettingsError

FEWEST = 100
KINDS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tRNS", b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"eXIf", b"PLTE", b"acTL")
KINDS = (*KINDS, b"fcTL", b"fdAT", b"IHDR", b"IDAT", b"IEND", b"tIME", b"bKGD", b"abcd", b"\xff\0\0\0")
# What failed once: an iTXt chunk that ends after its keyword or in its fields, and chunks of no bytes (IndexError).
CUT = [(b"iTXt", content) for content in (b"mmdit", b"mmdit\0", b"mmdit\0\1", b"mmdit\0\1\0", b"mmdit\0\1\0en\0x\0abc")]
CUT += [(kind, content) for kind in KINDS for content in (b"", b"\0", b"a", b"a\0", b"mmdit\0\0xx")]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.fixture(scope="module")
def picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="png")
    return file.getvalue()


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> bytes:
    """A picture with settings."""
    numbers = {"seed": 0, "height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "shift": 3.0}
    words = {"sampler": "euler", "schedule": "normal", "profile": "diffusers", "model": "demo", "dtype": "float32"}
    more = {"prompt": "a ☃", "negative_prompt": "", "device": "cpu", "max_sequence_length": None, "quant": None}
    path = tmp_path_factory.mktemp("png") / "x.png"
    return save_png(Image.new("RGB", (4, 4)), path, Settings(**numbers, **words, **more).to_json()).read_bytes()


def check(path: Path, content: bytes) -> dict | None:
    """The settings, or None where they are refused by an error of ours that names the file."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd chunks
        try:
            found = read_settings(path)
            Settings.from_json(found, path)
        except SettingsError as error:
            assert str(path) in str(error)
            return None
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("place", ["front", "back"])
@pytest.mark.parametrize(("kind", "content"), CUT, ids=str)
def test_chunks_that_are_cut(picture, tmp_path, kind, content, place):
    cut = chunk(kind, content)
    before = 33 if place == "front" else len(picture) - 12  # after IHDR, before IEND
    assert check(tmp_path / "x.png", picture[:before] + cut + picture[before:]) is None


def seeds() -> Iterator[random.Random]:
    end, seed = time.monotonic() + SECONDS, 0
    while seed < FEWEST or time.monotonic() < end:
        yield random.Random(seed)
        seed += 1


def changed(content: bytes, draw: random.Random) -> bytes:
    """The file with some of its bytes or chunks cut, changed, doubled or added."""
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        kind, text = draw.choice(KINDS), draw.randbytes(draw.choice((0, 1, 2, 5, 40)))
        added = chunk(kind, draw.choice((text, b"mmdit\0" + text, b'mmdit\0{"format_version": 2}', b"mmdit\0[1e999]")))
        content = draw.choice(
            (
                content[:place],
                content[:place] + text + content[place:],
                content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :],
                content[:33] + added + content[33:],
                content[:-12] + added + content[-12:],
                content + content[place:],
            )
        )
    return content


def test_any_file_gives_settings_or_our_error(ours, tmp_path):
    path, read = tmp_path / "x.png", 0
    assert check(path, ours) is not None
    for draw in seeds():
        read += check(path, changed(ours, draw)) is not None
    assert read, "some changes do not touch the settings"
