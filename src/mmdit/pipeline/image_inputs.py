"""Pictures and masks that a call starts from: what people have, checked, and brought to the size of the drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmdit.pipeline.arguments import check_tensor
from mmdit.pipeline.masks import MaskValues, latent_mask
from mmdit.pipeline.profiles import Profile
from mmdit.utils import number

PictureLike = Image.Image | np.ndarray | Tensor
ImageLike = PictureLike | Sequence[PictureLike]  # what `image=` and `mask_image=` take


class Picture(NamedTuple):
    """A picture or a mask of a call."""

    pixels: Float[Tensor, "1 c h w"]  # float32 in [0, 1]; 3 channels, a mask 1
    from_pillow: bool  # so that every profile resizes it by Pillow
    name: str  # of the file that it was read from; "" where Pillow does not say
    digest: str  # sixteen hexadecimal digits of the pixels and the size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]


class PictureSize(NamedTuple):
    """The size at which pictures are drawn, in pixels."""

    height: int
    width: int
    cut: bool  # whether they are cut to it around their centre; else they are resized


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageInputs:
    """The arguments of a call that are about pictures, checked; `image_inputs` makes it.

    Pictures are kept as they were given. `drawn` brings them to the size of the drawing, `mask_of` the masks to that
    of its latents, both as the profile says.
    """

    pictures: tuple[Picture, ...]  # one, or one for each drawing; none where latents are given
    latents: Float[Tensor, "b c h w"] | None  # instead of pictures
    masks: tuple[Picture, ...]  # none, one, or one for each picture
    strength: float | None  # None is the profile's
    keep_outside: bool
    differential: float

    @property
    def count(self) -> int:
        """The number of drawings that pictures and masks are for; a single one of them is for all."""
        return max(len(self.pictures) if self.latents is None else len(self.latents), len(self.masks))

    def size(self, profile: Profile, unit: int) -> tuple[int, int] | None:
        """Height and width of a drawing that is given none, in pixels, cut to multiples of `unit`.

        None is the model's own size, to which diffusers resizes pictures.

        Raises:
            ValueError: pictures of several sizes, or a side that is smaller than `unit`.
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

    def drawn(self, size: PictureSize, profile: Profile) -> Float[Tensor, "b 3 h w"]:
        """The pictures at the size of the drawing, in [0, 1]; the profile says how arrays are resized."""
        return torch.cat([_at_size(one, size, profile) for one in self.pictures])

    def inside(self, size: PictureSize, profile: Profile) -> Float[Tensor, "b 1 h w"]:
        """The masks at the size of the drawing, in [0, 1], neither rounded nor cut at 0.5."""
        return torch.cat([_at_size(one, size, profile) for one in self.masks])

    def latent_masks(self, size: PictureSize, cell: int, profile: Profile) -> Float[Tensor, "b 1 h8 w8"] | None:
        """The masks at the size of the latents, of cells of so many pixels; None where there are none."""
        if not self.masks:
            return None
        values: MaskValues = "soft" if self.differential else profile.mask_values
        pixels = [one.pixels if values == "soft" else _at_size(one, size, profile) for one in self.masks]
        return torch.cat([latent_mask(one[:, 0], size.height // cell, size.width // cell, values) for one in pixels])


def image_inputs(
    image: ImageLike | None,
    mask_image: ImageLike | None,
    *,
    channels: int,
    strength: float | None,
    keep_outside: bool,
    differential: float | bool,
) -> ImageInputs | None:
    """Check the arguments of a call that are about pictures; None where no picture is given.

    Args:
        image, mask_image, strength, keep_outside, differential: as `mmdit.Pipeline.__call__` takes them.
        channels: of latents, by which a tensor of latents is told from one of pictures.

    Raises:
        ValueError: an argument is given without the one that it is about, or is out of its range.
        TypeError: a picture is of another type.
    """
    share = number("differential", float(differential) if isinstance(differential, bool) else differential, 0, 1)
    if image is None:
        given = {"mask_image": mask_image, "strength": strength}
        given |= {"keep_outside": keep_outside or None, "differential": share or None}
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{named[0]} is given without image, the picture that it is about")
        return None
    if mask_image is None and (keep_outside or share):
        raise ValueError(f"{'keep_outside' if keep_outside else 'differential'} is given without mask_image")
    latents = _latents_in(image, channels)
    pictures = () if latents is not None else tuple(_pictures("image", image))
    masks = () if mask_image is None else tuple(_masks(mask_image))
    if latents is not None and keep_outside:
        raise ValueError("keep_outside lays pixels over the drawing, but image holds latents; give a picture")
    _check_masks(masks, pictures if latents is None else len(latents))
    return ImageInputs(
        pictures=pictures,
        latents=latents,
        masks=masks,
        strength=strength,
        keep_outside=keep_outside,
        differential=share,
    )


def fitted(picture: Tensor, height: int, width: int, *, nearest: bool = False) -> Float[Tensor, "b c h w"]:
    """Pictures [b, c, H, W] at another size: by Pillow's LANCZOS of 8 bits, truncated, or nearest."""
    if picture.shape[2:] == (height, width):
        return picture
    if nearest:
        return F.interpolate(picture, size=(height, width))
    levels = (picture.float().cpu() * 255).clamp(0, 255).to(torch.uint8).numpy()
    planes = [
        [Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS) for plane in one] for one in levels
    ]
    found = np.stack([np.stack([np.asarray(plane) for plane in one]) for one in planes])
    return (torch.from_numpy(found.astype(np.float32)) / 255).to(picture.device)


def center_cut(picture: Tensor, height: int, width: int) -> Float[Tensor, "b c h w"]:
    """The centre of pictures [b, c, H, W]; what is cut is half of it, rounded down, at the top and the left."""
    top, left = (picture.shape[2] - height) // 2, (picture.shape[3] - width) // 2
    return picture[..., top : top + height, left : left + width]


def _at_size(one: Picture, size: PictureSize, profile: Profile) -> Tensor:
    if size.cut:
        return center_cut(one.pixels, size.height, size.width)
    nearest = profile.array_resize == "nearest" and not one.from_pillow
    return fitted(one.pixels, size.height, size.width, nearest=nearest)


def _latents_in(image: Any, channels: int) -> Tensor | None:
    """The argument `image` where it is latents: a tensor [b, c, h, w] or [c, h, w] of as many channels as the VAE's."""
    if not isinstance(image, Tensor) or image.ndim not in (3, 4) or image.shape[-3] != channels:
        return None
    check_tensor("image", image, finite=True)
    return image if image.ndim == 4 else image.unsqueeze(0)


def _pictures(name: str, given: Any) -> list[Picture]:
    return [_picture(*one) for one in _each(name, given)]


def _each(name: str, given: Any) -> list[tuple[str, Any]]:
    """Pictures one by one, each with its name for errors."""
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        if not given:
            raise ValueError(f"{name} is an empty list; give at least one picture")
        return [pair for i, one in enumerate(given) for pair in _each(f"{name}[{i}]", one)]
    if isinstance(given, np.ndarray | Tensor) and given.ndim == 4:
        return [(f"{name}[{i}]", one) for i, one in enumerate(given)]
    return [(name, given)]


def _picture(name: str, given: Any) -> Picture:
    if isinstance(given, Image.Image):
        return _of_pillow(given, given.convert("RGB"))
    values = _values(name, given)
    if values.ndim == 3 and values.shape[0] != 3 and values.shape[2] == 3:
        values = values.movedim(2, 0)
    if values.ndim != 3 or values.shape[0] != 3 or 0 in values.shape:
        raise ValueError(
            f"{name} has shape {list(values.shape)}, expected a picture [3, h, w] or [h, w, 3] with values in [0, 1], "
            "or latents [b, c, h, w]"
        )
    return _of_values(values)


def _masks(given: Any) -> list[Picture]:
    """The argument `mask_image`, one mask for each picture or for all."""
    if isinstance(given, np.ndarray | Tensor) and given.ndim == 3:
        given = [given] if 1 in (given.shape[0], given.shape[2]) and given.shape[1] > 1 else list(given)
    found = [_mask(*one) for one in _each("mask_image", given)]
    for i, one in enumerate(found):
        if not one.pixels.any():
            raise ValueError(f"mask_image[{i}] is 0 everywhere, so nothing is drawn anew; 1 (white) is what is drawn")
    return found


def _mask(name: str, given: Any) -> Picture:
    if isinstance(given, Image.Image):
        return _of_pillow(given, given.convert("L"))
    values = _values(name, given)
    values = values.squeeze(0) if values.ndim == 3 and values.shape[0] == 1 else values
    values = values.squeeze(2) if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} has shape {list(values.shape)}, expected a mask [h, w] with values in [0, 1]")
    return _of_values(values.unsqueeze(0))


def _values(name: str, given: Any) -> Tensor:
    """An array or tensor of whole numbers of 8 bits, of bools or of shares, in float32 and [0, 1]."""
    if not isinstance(given, np.ndarray | Tensor):
        raise TypeError(
            f"{name} is {type(given).__name__}, expected a PIL picture, an array, a tensor, or a list of these"
        )
    values = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.ascontiguousarray(given))
    if values.dtype == torch.uint8:
        return values.float() / 255
    if values.dtype == torch.bool:
        return values.float()
    check_tensor(name, values, finite=True)
    if values.numel() and not 0 <= float(values.min()) <= float(values.max()) <= 1:
        raise ValueError(
            f"{name} has values from {float(values.min()):g} to {float(values.max()):g}, expected [0, 1], or uint8; "
            "pictures from -1 to 1 become so by x / 2 + 0.5"
        )
    return values.float()


def _of_pillow(given: Image.Image, picture: Image.Image) -> Picture:
    levels = torch.from_numpy(np.asarray(picture).copy())
    values = (levels.float() / 255).view(*levels.shape[:2], -1).movedim(2, 0).contiguous()
    path = getattr(given, "filename", "") or ""
    return Picture(values.unsqueeze(0), True, Path(path).name, _digest(values))


def _of_values(values: Float[Tensor, "c h w"]) -> Picture:
    return Picture(values.contiguous().unsqueeze(0), False, "", _digest(values))


def _digest(values: Float[Tensor, "c h w"]) -> str:
    """The same for a picture of 8 bits, whether it was given as one or as shares."""
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
