"""Input pictures and masks of a call: check them, convert them to tensors, and resize them to the drawing's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmdit.pictures.overlay import Box, crop_region, fit
from mmdit.pictures.read import PictureLike, load_image, load_mask
from mmdit.pictures.resize import resize
from mmdit.pipeline.arguments import check_tensor
from mmdit.pipeline.masks import MaskValues, latent_mask
from mmdit.pipeline.profiles import Profile
from mmdit.utils import number, whole


class Picture(NamedTuple):
    """An input picture or mask of a call."""

    pixels: Float[Tensor, "1 c h w"]  # float32 in [0, 1]; 3 channels for a picture, 1 for a mask
    from_pillow: bool  # whether it was a Pillow picture, which every profile resizes with Pillow
    name: str  # name of the file; "" if unknown
    digest: str  # see `digest_of_picture`

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]


class Paste(NamedTuple):
    """The picture, mask and box that a drawing is pasted back into."""

    original: Image.Image
    mask: Image.Image  # gray, of the original's size
    box: Box


class PictureSize(NamedTuple):
    """The size at which pictures are drawn, in pixels."""

    height: int
    width: int
    cut: bool  # whether pictures are cropped around their centre to this size; else they are resized


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageInputs:
    """The checked picture arguments of a call; `image_inputs` makes it.

    Pictures are kept at their given size. `drawn` resizes them to the size of the drawing, and `latent_masks` resizes
    the masks to the size of its latents, both by the rules of the profile.
    """

    pictures: tuple[Picture, ...] = ()  # one for all drawings, or one for each; empty where latents are given
    latents: Float[Tensor, "b c h w"] | None = None  # instead of pictures
    masks: tuple[Picture, ...] = ()  # none, one, or one for each picture
    keep_outside: bool = False
    differential: float = 0.0
    padding_mask_crop: int | None = None
    pastes: tuple[Paste, ...] = ()  # one for each picture, where only a part of the picture is drawn

    @property
    def count(self) -> int:
        """The number of drawings that the pictures and masks determine; a single picture or mask serves any number."""
        return max(len(self.pictures) if self.latents is None else len(self.latents), len(self.masks))

    def size(self, profile: Profile, unit: int) -> tuple[int, int] | None:
        """The default height and width of a drawing in pixels: those of the picture, cut to multiples of `unit`.

        None is the model's own size, to which diffusers resizes pictures.

        Raises:
            ValueError: the pictures have different sizes, or a side is smaller than `unit`.
        """
        if profile.image_size == "model":
            return None
        sizes = {one.size for one in self.pictures}
        if len(sizes) > 1:
            raise ValueError(f"the pictures have several sizes, {_sizes(sizes)}; give height and width")
        height, width = sizes.pop()
        if min(height, width) < unit:
            raise ValueError(f"image is {height} x {width} pixels (height x width); its sides must be at least {unit}")
        return height - height % unit, width - width % unit

    def cropped(self, size: PictureSize) -> ImageInputs:
        """Replace pictures and masks with the regions around the masks, resized to the size of the drawing.

        This is diffusers' padding_mask_crop, which converts to 8 bits; see `mmdit.images.crop_region`, `fit` and
        `paste_back`.
        """
        pictures, masks, pastes = list[Picture](), list[Picture](), list[Paste]()
        for i in range(self.count):
            one, mask = self.pictures[i % len(self.pictures)], self.masks[i % len(self.masks)]
            original, gray = _pillow(one), _pillow(mask)
            box = crop_region(gray, height=size.height, width=size.width, pad=self.padding_mask_crop or 0)
            part, part_mask = (
                fit(given.crop(box), height=size.height, width=size.width, how="pad") for given in (original, gray)
            )
            pictures.append(one._replace(pixels=load_image(part).picture.movedim(-1, 1), from_pillow=True))
            masks.append(mask._replace(pixels=load_mask(part_mask).unsqueeze(1), from_pillow=True))
            pastes.append(Paste(original, gray, box))
        return replace(self, pictures=tuple(pictures), masks=tuple(masks), pastes=tuple(pastes))

    def settings(self, count: int, strength: float) -> list[dict[str, Any]]:
        """The settings that describe the input picture of each of `count` drawings."""
        common = {
            "strength": strength,
            "padding_mask_crop": self.padding_mask_crop,
            "keep_outside": self.keep_outside,
            "differential": self.differential,
        }
        found = []
        for i in range(count):
            image = self.pictures[i * len(self.pictures) // count]
            named = {"image": image.name, "image_digest": image.digest}
            if self.masks:
                mask = self.masks[i * len(self.masks) // count]
                named |= {"mask_image": mask.name, "mask_digest": mask.digest}
            found.append(named | common)
        return found

    def drawn(self, size: PictureSize, profile: Profile) -> Float[Tensor, "b 3 h w"]:
        """The pictures at the size of the drawing, in [0, 1]; the profile says how arrays are resized."""
        return torch.cat([at_size(one, size, profile) for one in self.pictures])

    def inside(self, size: PictureSize, profile: Profile) -> Float[Tensor, "b 1 h w"]:
        """The masks at the size of the drawing, in [0, 1], neither rounded nor cut at 0.5."""
        return torch.cat([at_size(one, size, profile) for one in self.masks])

    def latent_masks(self, size: PictureSize, cell: int, profile: Profile) -> Float[Tensor, "b 1 h8 w8"] | None:
        """The masks at the size of the latents, with cells of `cell` pixels per side; None if there are no masks."""
        if not self.masks:
            return None
        values: MaskValues = "soft" if self.differential else profile.mask_values
        pixels = [one.pixels if values == "soft" else at_size(one, size, profile) for one in self.masks]
        return torch.cat([latent_mask(one[:, 0], size.height // cell, size.width // cell, values) for one in pixels])


def image_inputs(
    image: PictureLike | None,
    mask_image: PictureLike | None,
    *,
    channels: int,
    keep_outside: bool = False,
    differential: float | bool = False,
    padding_mask_crop: int | None = None,
) -> ImageInputs | None:
    """Check the picture arguments of a call; the result is None if no picture is given.

    Args:
        image, mask_image, keep_outside, differential, padding_mask_crop: see `mmdit.Pipeline.__call__`.
        channels: the number of latent channels; it distinguishes a tensor of latents from a tensor of pictures.

    Raises:
        ValueError: an argument is given without the argument that it requires, or is out of its range.
        TypeError: a picture is of another type.
    """
    share = number("differential", float(differential) if isinstance(differential, bool) else differential, 0, 1)
    about_mask = {"keep_outside": keep_outside or None, "differential": share or None}
    about_mask |= {"padding_mask_crop": padding_mask_crop}
    if image is None:
        given = {"mask_image": mask_image} | about_mask
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{named[0]} is given without image, the picture that it is about")
        return None
    named = [name for name, value in about_mask.items() if value is not None]
    if mask_image is None and named:
        raise ValueError(f"{named[0]} is given without mask_image, the mask that it is about")
    latents = _latents_in(image, channels)
    pictures = () if latents is not None else tuple(pictures_of("image", image))
    masks = () if mask_image is None else tuple(masks_of(mask_image))
    if latents is not None and (keep_outside or padding_mask_crop is not None):
        raise ValueError(f"{named[0]} is about pixels, but image holds latents; give a picture")
    _check_masks(masks, pictures if latents is None else len(latents))
    return ImageInputs(
        pictures=pictures,
        latents=latents,
        masks=masks,
        keep_outside=keep_outside,
        differential=share,
        padding_mask_crop=None if padding_mask_crop is None else whole("padding_mask_crop", padding_mask_crop, 0),
    )


def center_cut(picture: Tensor, height: int, width: int) -> Float[Tensor, "b c h w"]:
    """The centre of pictures [b, c, H, W]; half of the excess, rounded down, is cut off at the top and the left."""
    top, left = (picture.shape[2] - height) // 2, (picture.shape[3] - width) // 2
    return picture[..., top : top + height, left : left + width]


def _pillow(one: Picture) -> Image.Image:
    """A picture or a mask of 8 bits."""
    levels = (one.pixels[0] * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def at_size(one: Picture, size: PictureSize, profile: Profile) -> Float[Tensor, "1 c h w"]:
    """A picture or mask at the size of a drawing; the profile says how arrays are resized."""
    if size.cut:
        return center_cut(one.pixels, size.height, size.width)
    if one.size == (size.height, size.width):
        return one.pixels
    if profile.array_resize == "nearest" and not one.from_pillow:
        return F.interpolate(one.pixels, size=(size.height, size.width))
    return resize(one.pixels.movedim(1, -1), height=size.height, width=size.width, filter="lanczos").movedim(-1, 1)


def _latents_in(image: object, channels: int) -> Tensor | None:
    """The argument `image` where it is a tensor [b, c, h, w] or [c, h, w] with the channels of latents."""
    if not isinstance(image, Tensor) or image.ndim not in (3, 4) or image.shape[-3] != channels:
        return None
    check_tensor("image", image, finite=True)
    return image if image.ndim == 4 else image.unsqueeze(0)


def _each(name: str, given: object) -> list[tuple[str, Any]]:
    """Pictures one by one, each with its name for errors."""
    if not isinstance(given, list | tuple):
        return [(name, given)]
    if not given:
        raise ValueError(f"{name} is an empty list; give at least one picture")
    return [pair for i, one in enumerate(given) for pair in _each(f"{name}[{i}]", one)]


def pictures_of(argument: str, given: object) -> list[Picture]:
    """Split the value of a picture argument, called `argument` in errors, into single pictures."""
    found: list[Picture] = []
    for name, one in _each(argument, given):
        loaded = load_image(one, name).picture.movedim(-1, 1)
        found += _as_pictures(one, loaded)
    return found


def masks_of(given: object, argument: str = "mask_image") -> list[Picture]:
    """Split the value of a mask argument, called `argument` in errors, into single masks."""
    found: list[Picture] = []
    for name, one in _each(argument, given):
        loaded = load_mask(one, name).unsqueeze(1)
        if dark := [i for i, mask in enumerate(loaded) if not mask.any()]:
            which = f"{name}[{dark[0]}]" if len(loaded) > 1 else name
            raise ValueError(f"{which} is 0 everywhere, so nothing is drawn anew; 1 (white) is what is drawn")
        found += _as_pictures(one, loaded)
    return found


def _as_pictures(given: object, loaded: Float[Tensor, "b c h w"]) -> list[Picture]:
    path = given if isinstance(given, str | Path) else getattr(given, "filename", "")
    name = Path(path).name if isinstance(path, str | Path) else ""
    from_pillow = not isinstance(given, np.ndarray | Tensor)
    pixels = loaded.float().cpu()
    return [Picture(one.unsqueeze(0), from_pillow, name, digest_of_picture(one)) for one in pixels]


def digest_of_picture(values: Float[Tensor, "c h w"]) -> str:
    """A digest of 16 hexadecimal digits over the size of a picture or mask and its values, rounded to 16 bits.

    A file and an array with the same values have the same digest, whatever the format and the name of the file.
    """
    levels = (values * 65535).round().numpy().astype("<u2")
    return sha256(f"{tuple(values.shape)}".encode() + levels.tobytes()).hexdigest()[:16]


def _check_masks(masks: Sequence[Picture], pictures: Sequence[Picture] | int) -> None:
    """Raise ValueError unless there is one mask, or one for each picture, each of its picture's size."""
    count = pictures if isinstance(pictures, int) else len(pictures)
    if masks and count not in (1, len(masks)) and len(masks) != 1:
        raise ValueError(f"mask_image holds {len(masks)} masks for {count} pictures; give one, or one for each")
    if isinstance(pictures, int):
        return
    for i in range(max(len(masks), count) if masks else 0):
        mask, picture = masks[i % len(masks)], pictures[i % count]
        if mask.size != picture.size:
            raise ValueError(
                f"mask_image is {_sizes([mask.size])} and image {_sizes([picture.size])} pixels (height x width); give "
                "masks of the size of their pictures, see mmdit.images"
            )


def _sizes(sizes: Any) -> str:
    return " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
