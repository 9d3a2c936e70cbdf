"""Reading pictures and masks of every kind, and the errors of those that cannot be read."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from golden import DATA
from mmdit import images
from mmdit.pictures import read
from refusals import refuses

FOLDER = DATA / "images"
RNG = np.random.default_rng(0)
LEVELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
RGB = Image.fromarray(LEVELS)
UNIT = torch.from_numpy(LEVELS.astype(np.float32) / 255)[None]
ORIENTATION = 0x0112


def file_of(image, format="PNG", **how):
    with io.BytesIO() as file:
        image.save(file, format=format, **how)
        return file.getvalue()


def test_a_file_by_path_name_and_bytes_and_as_a_pillow_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(file_of(RGB))
    for source in (path, str(path), path.read_bytes(), RGB):
        loaded = images.load_image(source)
        assert torch.equal(loaded.picture, UNIT)
        assert loaded.mask is None
    assert path.exists()


CHANNELS_FIRST = UNIT.movedim(-1, 1)
ARRAYS = {
    "tensor b c h w": CHANNELS_FIRST,
    "tensor c h w": CHANNELS_FIRST[0],
    "tensor b h w c": UNIT,
    "float64": UNIT.double(),
    "array h w c": UNIT[0].numpy(),
    "8 bits": LEVELS,
    "16 bits": LEVELS.astype(np.uint16) * 257,
    "strides": np.ascontiguousarray(LEVELS[::-1])[::-1],
    "read-only": np.asarray(RGB),
    "read-only floats": np.broadcast_to(UNIT[0].numpy(), (6, 9, 3)),
    "other byte order": (LEVELS.astype(np.uint16) * 257).astype(">u2"),
    "list": [LEVELS],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_and_tensors(name):
    found = images.load_image(ARRAYS[name]).picture
    torch.testing.assert_close(found.float(), UNIT, rtol=0, atol=1e-7)
    assert found.shape == UNIT.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_become_float32(dtype):
    assert images.load_image(UNIT.to(dtype)).picture.dtype == torch.float32


def test_a_list_is_a_batch():
    loaded = images.load_image([RGB, UNIT, [LEVELS, RGB.convert("RGBA")]])
    assert torch.equal(loaded.picture, UNIT.repeat(4, 1, 1, 1))
    assert torch.equal(loaded.mask, torch.zeros(4, 6, 9))


def test_alpha_becomes_a_mask_and_changes_no_colour():
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    with_alpha = np.concatenate([LEVELS, alpha[..., None]], -1)
    for source in (Image.fromarray(with_alpha), file_of(Image.fromarray(with_alpha)), with_alpha):
        loaded = images.load_image(source)
        assert torch.equal(loaded.picture, UNIT)
        torch.testing.assert_close(loaded.mask, 1 - torch.from_numpy(alpha / 255).float()[None], rtol=0, atol=1e-7)


def palette(transparency):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode="P") if False else Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 1])
    return file_of(image, **({} if transparency is None else {"transparency": transparency}))


@pytest.mark.parametrize(
    ("transparency", "mask"), [(None, None), (1, [0, 1, 0, 1]), (bytes([255, 0, 51]), [0, 1, 0.8, 1])]
)
def test_palettes(transparency, mask):
    loaded = images.load_image(palette(transparency))
    assert loaded.picture.view(4, 3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert (loaded.mask is None) == (mask is None)
    if mask is not None:
        torch.testing.assert_close(loaded.mask.flatten(), torch.tensor(mask).float())


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "LA", "HSV", "LAB"])
def test_modes_become_rgb_as_pillow_converts_them(mode):
    image = RGB.convert("RGB" if mode == "LAB" else mode)
    wanted = torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255)[None]
    assert torch.equal(images.load_image(image).picture, wanted)


def test_cmyk_files():
    image = RGB.convert("CMYK")
    wanted = np.array(Image.open(io.BytesIO(file_of(image, "TIFF"))).convert("RGB"))
    assert torch.equal(images.load_image(file_of(image, "TIFF")).picture[0] * 255, torch.from_numpy(wanted).float())


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_keep_their_precision(format):
    gray = np.array([[0, 1, 256], [300, 65534, 65535]], dtype=np.uint16)
    found = images.load_image(file_of(Image.fromarray(gray), format)).picture
    torch.testing.assert_close(found[0, ..., 1].double(), torch.from_numpy(gray / 65535), rtol=0, atol=1e-7)
    mask = images.load_mask(file_of(Image.fromarray(gray), format))
    assert torch.equal(mask, found[..., 0])


def test_a_file_of_two_pictures_is_no_animation():
    """MPO, which some cameras write: the first is the picture."""
    data = file_of(RGB, "MPO", save_all=True, append_images=[RGB.rotate(180)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert images.load_image(data).picture.shape == (1, 6, 9, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned = {1: 0, 6: 3, 3: 2, 8: 1}  # quarter turns to the left
    found = images.load_image(file_of(RGB, exif=exif)).picture
    if orientation in turned:
        assert torch.equal(found, torch.rot90(UNIT, turned[orientation], (1, 2)))
    else:
        assert found.shape[1:3] == ((6, 9) if orientation in (2, 4) else (9, 6))
        assert not torch.equal(found, UNIT)


def test_frames():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "red")]
    gif = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    refuses(lambda: images.load_image(gif), "image", "3 frames", "frames='first'", error=ValueError)
    refuses(lambda: images.load_mask(gif), "mask_image", "3 frames", error=ValueError)
    first, every = images.load_image(gif, frames="first"), images.load_image(gif, frames="all")
    assert first.picture.shape == (1, 4, 4, 3)
    assert every.picture.shape == (3, 4, 4, 3)
    assert every.picture[:, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]


def test_the_pixels_of_all_frames_count(monkeypatch):
    frames = [Image.new("L", (8, 8), i * 20) for i in range(6)]
    gif = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(read, "MOST_PIXELS", 200)
    refuses(lambda: images.load_image(gif, frames="all"), "8 x 8 pixels in 4 frames", "200", error=ValueError)
    assert images.load_image(gif, frames="first").picture.shape == (1, 8, 8, 3)


def png(width, height, data=b""):
    """A PNG that claims to be of some size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(8193, 8192), (11000, 11000), (60000, 60000)])
def test_decompression_bombs_are_not_decoded(size):
    """The middle one is where Pillow only warns, the last where it refuses."""
    refuses(lambda: images.load_image(png(*size)), "image", "67,108,864", error=ValueError)


def test_large_pillow_pictures_are_refused(monkeypatch):
    monkeypatch.setattr(read, "MOST_PIXELS", 50)
    refuses(lambda: images.load_image(RGB), "9 x 6 pixels", "50", error=ValueError)


BROKEN = {
    "cut": file_of(RGB)[:-30],
    "header only": png(9, 6),
    "checksum": file_of(RGB).replace(b"IDAT", b"IDAT\0", 1),
    "empty": b"",
    "text": b"not a picture",
    "html": b"<html></html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "jpeg cut": file_of(RGB, "JPEG")[:80],
    "gif cut": file_of(RGB, "GIF")[:40],
    "webp cut": file_of(RGB, "WEBP")[:30],
    "no pixels": png(0, 5),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_files_name_themselves(name, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(BROKEN[name])
    refuses(lambda: images.load_image(path), "image", path, error=ValueError)
    refuses(lambda: images.load_mask(BROKEN[name], "masks[3]"), "masks[3]", error=ValueError)


@pytest.mark.parametrize("name", ["text", "html", "postscript"])
def test_only_pictures_are_opened(name):
    """Pillow's reader of PostScript would start Ghostscript."""
    refuses(lambda: images.load_image(BROKEN[name]), "no picture of the formats PNG, JPEG", error=ValueError)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken EXIF data
def test_random_damage_is_an_error_or_a_picture():
    """Nothing else comes out, whatever byte is wrong."""
    for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        whole = file_of(RGB, format)
        for place in RNG.integers(0, len(whole), 40):
            damaged = bytearray(whole)
            damaged[place] ^= int(RNG.integers(1, 256))
            try:
                found = images.load_image(bytes(damaged), frames="first")
            except ValueError as error:
                assert str(error).startswith("image")
            else:
                assert found.picture.shape[3] == 3


def test_system_errors_name_the_file(tmp_path):
    missing = tmp_path / "missing.png"
    with pytest.raises(FileNotFoundError) as caught:
        images.load_image(missing)
    assert caught.value.filename == str(missing)
    with pytest.raises(IsADirectoryError):
        images.load_image(tmp_path)
    refuses(lambda: images.load_image("https://example.org/a.png"), "https://example.org/a.png", error=ValueError)


REFUSED = [
    (torch.zeros(0, 3, 4, 4), ("[0, 3, 4, 4]",)),
    (torch.zeros(1, 5, 8, 8), ("[1, 5, 8, 8]", "no axis")),
    (torch.zeros(1, 3, 8, 3), ("[1, 3, 8, 3]", "two axes")),
    (torch.zeros(1, 1, 3, 8, 8), ("[1, 1, 3, 8, 8]",)),
    (torch.zeros(1, 16, 8, 8), ("[1, 16, 8, 8]",)),
    (torch.full((1, 3, 8, 8), 1.5), ("1.5", "[0, 1]")),
    (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), ("-1", "[0, 1]", "(x + 1) / 2")),
    (torch.full((1, 3, 8, 8), float("nan")), ("192 of 192", "not finite")),
    (torch.zeros(1, 3, 8, 8, dtype=torch.int64), ("int64",)),
    (np.zeros((8, 8, 3), dtype=complex), ("complex128",)),
    (np.zeros((8, 8, 3), dtype=object), ("object",)),
    (Image.new("RGB", (0, 5)), ("0 x 5",)),
    (Image.new("F", (5, 5)), ("32-bit floats",)),
    (Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)), ("70000", "16 bits")),
    ([], ("empty list",)),
    ([RGB, RGB.resize((4, 4))], ("image[1]", "4 x 4", "9 x 6")),
    ([RGB, torch.zeros(1, 5, 8, 8)], ("image[1]", "[1, 5, 8, 8]")),
]


@pytest.mark.parametrize(("source", "said"), REFUSED)
def test_refuses(source, said):
    refuses(lambda: images.load_image(source), "image", *said, error=ValueError)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("source", [None, 3, io.BytesIO(b"")])
def test_refuses_other_types(source):
    for load in (images.load_image, images.load_mask):
        refuses(lambda load=load: load(source, "picture"), "picture", type(source).__name__, error=TypeError)
    refuses(lambda: images.load_image(RGB, frames="last"), "frames", "'last'", error=ValueError)
    refuses(lambda: images.load_mask(RGB, channel="grey"), "channel", "'grey'", "'gray'", error=ValueError)


MASK = torch.from_numpy(LEVELS[..., 0].astype(np.float32) / 255)[None]
MASKS = {
    "gray picture": RGB.getchannel("R"),
    "h w": MASK[0],
    "b h w": MASK,
    "b 1 h w": MASK[:, None],
    "b h w 1": MASK[..., None],
    "h w 1": MASK[0, ..., None].numpy(),
    "8 bits": LEVELS[..., 0],
    "three equal channels": MASK[..., None].repeat(1, 1, 1, 3),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    torch.testing.assert_close(images.load_mask(MASKS[name]), MASK, rtol=0, atol=1e-6)


def test_a_mask_of_booleans():
    assert torch.equal(images.load_mask(MASK > 0.5), (MASK > 0.5).float())


@pytest.mark.parametrize("place", range(4))
def test_channels_of_a_mask(place):
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    values = np.concatenate([LEVELS, alpha[..., None]], -1)
    wanted = torch.from_numpy(values[..., place].astype(np.float32) / 255)[None]
    wanted = 1 - wanted if place == 3 else wanted
    channel = ("red", "green", "blue", "alpha")[place]
    for source in (Image.fromarray(values), values, torch.from_numpy(values).movedim(-1, 0)):
        assert torch.equal(images.load_mask(source, channel=channel), wanted)


def test_gray_is_pillows():
    wanted = torch.from_numpy(np.asarray(RGB.convert("L")).astype(np.float32) / 255)[None]
    assert torch.equal(images.load_mask(RGB), wanted)
    torch.testing.assert_close(images.load_mask(LEVELS), wanted, rtol=0, atol=1 / 255)
    assert torch.equal(images.load_mask(RGB, channel="alpha"), torch.zeros(1, 6, 9))
    assert torch.equal(images.load_mask(LEVELS, channel="alpha"), torch.zeros(1, 6, 9))


def test_recorded_alpha_is_the_same_by_both_readers():
    path = FOLDER / "pub_alpha.png"
    assert torch.equal(images.load_image(path).mask, images.load_mask(path, channel="alpha"))
