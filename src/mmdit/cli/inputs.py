"""The input picture and mask of `mmdit generate`: read, fitted and enlarged before a model is loaded."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmdit.cli.console import Note
from mmdit.cli.usage import UsageError, usage_errors
from mmdit.pictures.outpaint import pad_for_outpaint
from mmdit.pictures.overlay import FITS, fit
from mmdit.pictures.read import load_image, load_mask
from mmdit.pipeline.hires import Hires
from mmdit.pipeline.image_inputs import digest_of_picture
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.settings import Settings
from mmdit.utils import number, whole
from samplers import pick

SIDES = ("left", "top", "right", "bottom", "feather")
_FEATHER = 40  # pixels, as `mmdit.pad_for_outpaint` has it
_OF_IMAGE = ("mask", "strength", "padding_mask_crop", "keep_outside", "differential", "fit", "outpaint")
_OF_MASK = ("padding_mask_crop", "keep_outside", "differential")


@dataclass(frozen=True)
class Inputs:
    """The picture arguments of a call of the pipeline, and the settings that describe them."""

    arguments: dict[str, Any] = field(default_factory=dict)  # of `mmdit.Pipeline.__call__`
    settings: dict[str, Any] = field(default_factory=dict)  # settings that the pipeline does not know


def read_inputs(ask: Namespace, before: Settings | None, profile: Profile, note: Note) -> Inputs:
    """Read the files of --image and --mask, and check all options about them.

    Args:
        ask: the options, filled in from a picture's settings.
        before: the settings of the picture that is drawn again; None without one.
        profile: the profile, which decides the default size of a drawing.
        note: prints a note that is not an error.

    Raises:
        UsageError: options do not go together.
        ValueError, OSError: a file cannot be read, or a number is out of its range; the option is named.
    """
    with usage_errors() if before is None else nullcontext():
        second = {"hires": Hires.from_text(ask.hires)} if ask.hires else {}
        _check_numbers(ask)
    _check_files(ask, before)
    if ask.image is None:
        _check_alone(ask)
        return Inputs(second)
    _check_together(ask)
    picture = load_image(ask.image, "--image").picture
    mask = None if ask.mask is None else load_mask(ask.mask, "--mask")
    if before is not None:
        _compare(ask, before, picture, mask, note)
    options = {name: getattr(ask, name) for name in ("strength", "padding_mask_crop")}
    options |= {"keep_outside": bool(ask.keep_outside), "differential": ask.differential or 0.0} | second
    if not ask.fit and not ask.outpaint:
        files = {"image": Path(ask.image), "mask_image": None if mask is None else Path(ask.mask)}
        return Inputs(files | options)
    return _enlarged(ask, profile, picture, mask, options)


def borders_of(text: str) -> dict[str, int]:
    """The numbers of --outpaint LEFT,TOP,RIGHT,BOTTOM[,FEATHER], in pixels.

    Raises:
        ValueError: the text does not have this form.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == len(SIDES) - 1:
        numbers.append(_FEATHER)
    if len(numbers) != len(SIDES) or min(numbers) < 0 or not any(numbers[:4]) or max(numbers) > 2**16:
        raise ValueError(
            f"--outpaint must be four numbers of pixels to add, LEFT,TOP,RIGHT,BOTTOM, such as 64,0,64,0, and may end "
            f"with a fifth, how far the mask goes into the picture; got {text!r}"
        )
    return dict(zip(SIDES, numbers, strict=True))


def _check_files(ask: Namespace, before: Settings | None) -> None:
    """Raise ValueError if a picture is to be drawn again and its input files are not given."""
    if before is None:
        return
    for option, name, digest in (
        ("image", before.image, before.image_digest),
        ("mask", before.mask_image, before.mask_digest),
    ):
        made_here = option == "mask" and ask.outpaint and not name
        if digest and getattr(ask, option) is None and not made_here:
            called = f"the file {name}" if name else f"a picture without a name, of digest {digest}"
            what = "was drawn from" if option == "image" else "was drawn inside of a mask,"
            raise ValueError(f"{ask.settings} {what} {called}; give it with --{option} FILE")


def _check_alone(ask: Namespace) -> None:
    """Raise UsageError for an option that is about a picture where there is none."""
    if given := [name for name in _OF_IMAGE if getattr(ask, name)]:
        raise UsageError(f"--{given[0].replace('_', '-')} is about a picture to start from; give --image FILE")


def _check_numbers(ask: Namespace) -> None:
    if ask.strength is not None:
        number("--strength", ask.strength, 0, 1)
    if ask.differential is not None:
        number("--differential", ask.differential, 0, 1)
    if ask.padding_mask_crop is not None:
        whole("--padding-mask-crop", ask.padding_mask_crop, 0)
    if ask.fit:
        pick(dict.fromkeys(FITS), ask.fit, "--fit")
    if ask.outpaint:
        borders_of(ask.outpaint)


def _check_together(ask: Namespace) -> None:
    """Raise UsageError for an option without the one that it needs."""
    if ask.fit and (ask.height is None or ask.width is None):
        raise UsageError("--fit brings a picture to a size; give --height and --width")
    if ask.mask is None and not ask.outpaint and (given := [name for name in _OF_MASK if getattr(ask, name)]):
        raise UsageError(f"--{given[0].replace('_', '-')} is about a mask; give --mask FILE")


def _compare(ask: Namespace, before: Settings, picture: Tensor, mask: Tensor | None, note: Note) -> None:
    """Print a note if a file has other pixels than the file that the picture was drawn from."""
    for option, values, digest in (
        ("image", picture.movedim(-1, 1), before.image_digest),
        ("mask", mask, before.mask_digest),
    ):
        if digest and values is not None and digest_of_picture(_as_stored(values)) != digest:
            path = getattr(ask, option)
            note(f"{ask.settings} was drawn from another {option} than {path}, so its picture will differ")


def _as_stored(values: Tensor) -> Tensor:
    """The first picture [3, h, w] or mask [1, h, w] of a batch."""
    return values[0] if values.ndim == 4 else values[:1]


def _enlarged(
    ask: Namespace, profile: Profile, picture: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Inputs:
    """The picture and the mask at the size that is asked for, with the borders to draw."""
    if mask is not None and mask.shape[1:] != picture.shape[1:3]:
        sizes = [f"{shape[2]} x {shape[1]}" for shape in (mask.shape, picture.shape)]
        raise ValueError(f"--mask {ask.mask} has {sizes[0]} pixels and --image {ask.image} {sizes[1]}")
    about = {"fit": ask.fit or "", "outpaint": ask.outpaint or "", "image": Path(ask.image).name}
    about["image_digest"] = digest_of_picture(_as_stored(picture.movedim(-1, 1)))
    about |= {"mask_image": "", "mask_digest": ""}
    if mask is not None:
        about |= {"mask_image": Path(ask.mask).name, "mask_digest": digest_of_picture(_as_stored(mask))}
    borders = borders_of(ask.outpaint) if ask.outpaint else dict.fromkeys(SIDES, 0)
    if ask.fit:
        picture, mask = _fitted(ask, picture, mask, borders)
    if ask.outpaint:
        picture, mask = _with_borders(picture, mask, borders)
        about["outpaint"] = ",".join(str(borders[side]) for side in SIDES)
        options["strength"] = 1.0 if options["strength"] is None else options["strength"]
        if profile.image_size == "model" and ask.height is None and ask.width is None:
            ask.height, ask.width = picture.shape[1:3]
    return Inputs({"image": picture, "mask_image": mask} | options, about)


def _fitted(
    ask: Namespace, picture: Tensor, mask: Tensor | None, borders: dict[str, int]
) -> tuple[Tensor, Tensor | None]:
    """The picture and the mask, resized to the size inside of the borders."""
    height = ask.height - borders["top"] - borders["bottom"]
    width = ask.width - borders["left"] - borders["right"]
    if min(height, width) < 1:
        raise ValueError(
            f"--outpaint {ask.outpaint} leaves {width} x {height} pixels of --width {ask.width} and --height "
            f"{ask.height} for the picture"
        )
    fitted = load_image(fit(_pillow(picture), height=height, width=width, how=ask.fit)).picture
    inside = None if mask is None else load_mask(fit(_pillow(mask), height=height, width=width, how=ask.fit))
    return fitted, inside


def _with_borders(picture: Tensor, mask: Tensor | None, borders: dict[str, int]) -> tuple[Tensor, Tensor]:
    canvas, outside = pad_for_outpaint(picture, **borders)
    if mask is None:
        return canvas, outside
    around = [borders[side] for side in ("left", "right", "top", "bottom")]
    return canvas, torch.maximum(F.pad(mask, around), outside)


def _pillow(values: Tensor) -> Image.Image:
    """The first picture [b, h, w, 3] or mask [b, h, w] of a batch, of 8 bits."""
    return Image.fromarray((values[0] * 255).round().to(torch.uint8).numpy())
