"""Read pictures and masks from files, bytes, Pillow pictures, arrays and tensors, as tensors in [0, 1].

Files are only opened in the formats of `FORMATS`, whose decoders are part of Pillow and run no other program (Pillow's
EPS reader would start Ghostscript). A picture of more than `MOST_PIXELS` pixels is refused before it is decoded.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from mmdit.pictures.masks import CHANNELS
from samplers import pick

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 8192 * 8192  # maximum number of pixels of all frames together
Frames = Literal["refuse", "first", "all"]
MaskChannel = Literal["gray", "red", "green", "blue", "alpha"]
PictureLike: TypeAlias = str | Path | bytes | Image.Image | np.ndarray | Tensor | Sequence[Any]  # of the same, nested
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
_LEVELS = {"uint8": 255.0, "uint16": 65535.0, "bool": 1.0}  # the value of an array that becomes 1.0, by dtype


class LoadedImage(NamedTuple):
    """Pictures and where they are transparent.

    `picture`: float [b, h, w, 3], in [0, 1]. `mask`: 1 - alpha, float [b, h, w], or None without an alpha channel.
    """

    picture: Tensor
    mask: Tensor | None


def load_image(source: PictureLike, name: str = "image", *, frames: Frames = "refuse") -> LoadedImage:
    """Read pictures.

    Files and Pillow's pictures are turned upright as their EXIF orientation says. Gray, palette and CMYK pictures
    become RGB as Pillow converts them; gray ones of 16 bits keep their precision. An alpha channel changes no colour.

    Args:
        source: A path, the bytes of a file, a `PIL.Image.Image`, an array [h, w, c] or [b, h, w, c], a tensor
            [c, h, w], [b, c, h, w] or, with its channels last, as an array; or a list of these, of equal sizes. Values
            are in [0, 1], or 8 or 16 bits unsigned.
        name: the name of the argument, for errors.
        frames: the treatment of animated files: raise an error, take the first frame, or all as a batch (ComfyUI).

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file, or it cannot be opened.
        ValueError: the file is not a picture in one of `FORMATS`, or is broken, animated or too large; or a shape or a
            value is invalid.
        TypeError: the source has another type.
    """
    pick(dict.fromkeys(get_args(Frames)), frames, "frames")
    if isinstance(source, list | tuple):
        return _joined([load_image(one, f"{name}[{i}]", frames=frames) for i, one in enumerate(source)], name)
    if isinstance(source, np.ndarray | Tensor):
        return _split(_channels_last(_unit(source, name), name), name)
    return _joined([_rgb(one, _named(source, name)) for one in _pictures(source, name, frames)], name)


def load_mask(
    source: PictureLike, name: str = "mask_image", *, channel: MaskChannel = "gray", frames: Frames = "refuse"
) -> Tensor:
    """Read masks, float [b, h, w] in [0, 1]; white (1) is drawn anew.

    Args:
        source: Whatever `load_image` takes; arrays and tensors also without channels, [h, w] or [b, h, w].
        name: of the argument, for errors.
        channel: of a picture. "gray" is Pillow's mean of the colours (diffusers), "red", "green" and "blue" are those
            channels as they are, "alpha" is 1 - alpha (ComfyUI's LoadImageMask).
        frames: see `load_image`.

    Raises:
        FileNotFoundError, ValueError, TypeError: see `load_image`.
    """
    pick(dict.fromkeys(get_args(MaskChannel)), channel, "channel")
    pick(dict.fromkeys(get_args(Frames)), frames, "frames")
    if isinstance(source, list | tuple):
        masks = [load_mask(one, f"{name}[{i}]", channel=channel, frames=frames) for i, one in enumerate(source)]
        return _stacked(masks, name)
    if isinstance(source, np.ndarray | Tensor):
        return _mask_of_array(_unit(source, name), name, channel)
    pictures = _pictures(source, name, frames)
    return _stacked([_mask_of(one, channel, _named(source, name)) for one in pictures], name)


def _named(source: object, name: str) -> str:
    """The name of a source in errors."""
    return f"{name}: {source}" if isinstance(source, str | Path) else name


def _pictures(source: object, name: str, frames: Frames) -> Iterator[Image.Image]:
    """The frames of a file or a Pillow picture, upright, decoded one at a time."""
    called = _named(source, name)
    if isinstance(source, Image.Image):
        _check_size(source, 1, called)
        yield _decoded(source, called)
        return
    if not isinstance(source, str | Path | bytes):
        raise TypeError(
            f"{name} is {type(source).__name__}, expected a path, bytes, a Pillow picture, an array, a tensor or a list"
        )
    with _opened(source, called) as image:
        yield from _frames(image, called, frames)


def _opened(source: str | Path | bytes, called: str) -> Image.Image:
    """A picture file whose header was read."""
    if isinstance(source, str) and "://" in source:
        raise ValueError(f"{called} is an address; nothing is downloaded here: give a file")
    data: BytesIO | Path = BytesIO(source) if isinstance(source, bytes) else Path(source)
    if isinstance(data, Path):
        data.open("rb").close()  # a missing file raises the system's own error, which names it
    try:
        return Image.open(data, formats=FORMATS)
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ValueError(f"{called} is no picture of the formats {known}, or its header is broken") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{called} is too large: {error}. At most {MOST_PIXELS:,} pixels are read") from error
    except _BROKEN as error:
        raise ValueError(f"{called} cannot be read: {error}") from error


def _frames(image: Image.Image, called: str, frames: Frames) -> Iterator[Image.Image]:
    """The frames that are asked for. MPO files, JPEGs of some cameras, hold several pictures but no animation."""
    _check_size(image, 1, called)
    animated = getattr(image, "is_animated", False) and image.format != "MPO"
    if animated and frames == "refuse":
        raise ValueError(
            f"{called} holds {getattr(image, 'n_frames', 2)} frames; read it by mmdit.images.load_image with "
            "frames='first' or frames='all', and give what that returns"
        )
    if not animated or frames == "first":
        yield _decoded(image, called)
        return
    for count, frame in enumerate(_sequence(image, called), start=1):
        _check_size(frame, count, called)
        if frame.size == image.size:
            yield _decoded(frame, called)


def _sequence(image: Image.Image, called: str) -> Iterator[Image.Image]:
    try:
        yield from ImageSequence.Iterator(image)
    except _BROKEN as error:
        raise ValueError(f"{called} cannot be read: {error}") from error


def _check_size(image: Image.Image, count: int, called: str) -> None:
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{called} has {width} x {height} pixels; a picture needs at least one")
    if width * height * count > MOST_PIXELS:
        raise ValueError(
            f"{called} has {width} x {height} pixels{f' in {count} frames or more' if count > 1 else ''}; at most "
            f"{MOST_PIXELS:,} are read: make it smaller first"
        )


def _decoded(image: Image.Image, called: str) -> Image.Image:
    """A picture in memory, upright."""
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except _BROKEN as error:
        raise ValueError(f"{called} cannot be decoded: {error}") from error


def _rgb(image: Image.Image, called: str) -> LoadedImage:
    """A decoded picture as tensors, with a batch of 1."""
    if image.mode.startswith(("I", "F")):
        return LoadedImage(_wide_gray(image, called).unsqueeze(-1).expand(-1, -1, -1, 3).contiguous(), None)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    mask = 1 - _levels(image.getchannel("A")) if "A" in image.getbands() else None
    return LoadedImage(_levels(image.convert("RGB")), mask)


def _mask_of(image: Image.Image, channel: MaskChannel, called: str) -> Tensor:
    """A decoded picture as a mask, with a batch of 1."""
    if image.mode.startswith(("I", "F")):
        gray = _wide_gray(image, called)
        return torch.zeros_like(gray) if channel == "alpha" else gray
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if channel == "gray":
        return _levels(image.convert("L"))
    values = _levels(image.convert("RGBA"))[..., CHANNELS.index(channel)]
    return 1 - values if channel == "alpha" else values


def _levels(image: Image.Image) -> Tensor:
    """A picture of 8 bits as float32 [1, h, w] or [1, h, w, c]."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255).unsqueeze(0)


def _wide_gray(image: Image.Image, called: str) -> Tensor:
    """A gray picture of 16 bits as float32 [1, h, w]. Some versions of Pillow open it as 32 bits."""
    values = np.asarray(image)
    if image.mode == "F":
        raise ValueError(f"{called} holds 32-bit floats, whose white is not known; give an array with values in [0, 1]")
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"{called} has values from {values.min()} to {values.max()}; gray pictures of up to 16 bits are read"
        )
    return torch.from_numpy(values.astype(np.float32) / 65535).unsqueeze(0)


def _unit(values: np.ndarray | Tensor, name: str) -> Tensor:
    """An array or tensor as floats in [0, 1], in float32 at least."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "buf" or values.dtype.itemsize > 8:
            raise ValueError(f"{name} is an array of {values.dtype}; give floats in [0, 1], or 8 or 16 bits unsigned")
        values = torch.from_numpy(np.require(values, values.dtype.newbyteorder("="), ["C", "W"]))
    kind = str(values.dtype).removeprefix("torch.")
    if not values.numel():
        raise ValueError(f"{name} has shape {list(values.shape)}; a picture needs at least one pixel")
    if values.dtype.is_floating_point:
        return _checked_range(values.to(torch.promote_types(values.dtype, torch.float32)), name)
    if kind not in _LEVELS:
        raise ValueError(f"{name} holds {kind}; give floats in [0, 1], or 8 or 16 bits unsigned")
    return values.to(torch.float32) / _LEVELS[kind]


def _checked_range(values: Tensor, name: str) -> Tensor:
    if bad := int((~torch.isfinite(values)).sum()):
        raise ValueError(f"{bad} of {values.numel()} values of {name} are not finite")
    low, high = (float(one) for one in torch.aminmax(values))
    if low < 0 or high > 1:
        hint = "; values in [-1, 1] become (x + 1) / 2" if -1 <= low < 0 and high <= 1 else ""
        raise ValueError(f"{name} has values from {low:g} to {high:g}, expected values in [0, 1]{hint}")
    return values


def _channels_last(values: Tensor, name: str) -> Tensor:
    """Pictures [b, h, w, c]: of three axes or four, with 1, 3 or 4 channels at either end."""
    if values.ndim == 2:
        values = values.unsqueeze(-1)
    if values.ndim == 3:
        values = values.unsqueeze(0)
    places = [axis for axis in (1, 3) if values.ndim == 4 and values.shape[axis] in (1, 3, 4)]
    if len(places) != 1:
        found = "no axis" if not places else "two axes"
        raise ValueError(
            f"{name} has shape {list(values.shape)}, where {found} can be the 1, 3 or 4 channels; expected "
            "[b, h, w, c] or [b, c, h, w]"
        )
    return values.movedim(1, -1) if places == [1] else values


def _split(values: Tensor, name: str) -> LoadedImage:
    """Colours and 1 - alpha of pictures [b, h, w, c]."""
    colours = values[..., :3] if values.shape[3] > 1 else values.expand(-1, -1, -1, 3)
    return LoadedImage(colours.contiguous(), 1 - values[..., 3] if values.shape[3] == 4 else None)


def _mask_of_array(values: Tensor, name: str, channel: MaskChannel) -> Tensor:
    """A mask [b, h, w] of values [h, w], [b, h, w], or with channels."""
    if values.ndim == 2:
        return values.unsqueeze(0)
    if values.ndim == 3 and {values.shape[0], values.shape[2]}.isdisjoint({3, 4}) and values.shape[2] != 1:
        return values
    pictures = _channels_last(values, name)
    if pictures.shape[3] == 1:
        return pictures[..., 0]
    if channel == "gray":
        return pictures[..., :3] @ pictures.new_tensor([0.299, 0.587, 0.114])
    place = CHANNELS.index(channel)
    if place >= pictures.shape[3]:
        return torch.zeros_like(pictures[..., 0])  # 1 - alpha of an opaque picture
    return 1 - pictures[..., place] if channel == "alpha" else pictures[..., place]


def _joined(loaded: Sequence[LoadedImage], name: str) -> LoadedImage:
    """Several pictures as one batch; where only some have an alpha channel, the others are opaque."""
    pictures = _stacked([one.picture for one in loaded], name)
    if all(one.mask is None for one in loaded):
        return LoadedImage(pictures, None)
    masks = [one.picture.new_zeros(one.picture.shape[:3]) if one.mask is None else one.mask for one in loaded]
    return LoadedImage(pictures, _stacked(masks, name))


def _stacked(batches: Sequence[Tensor], name: str) -> Tensor:
    if not batches:
        raise ValueError(f"{name} is an empty list; give at least one picture")
    sizes = [tuple(one.shape[1:3]) for one in batches]
    if len(set(sizes)) > 1:
        odd = next(i for i, size in enumerate(sizes) if size != sizes[0])
        raise ValueError(
            f"{name}[{odd}] has {sizes[odd][1]} x {sizes[odd][0]} pixels and {name}[0] {sizes[0][1]} x {sizes[0][0]}; "
            "pictures of one call have one size: use mmdit.images.fit"
        )
    return torch.cat([one.to(batches[0]) for one in batches])
