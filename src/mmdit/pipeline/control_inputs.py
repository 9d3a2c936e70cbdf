"""Check the ControlNet arguments of a call, and convert hints to the size and value range that a net expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from encoders import VAE
from encoders.vae import DiagonalGaussian
from mmdit.models.config import MMDiTConfig
from mmdit.models.controlnet import ControlNet, ControlNetConfig
from mmdit.pictures.read import PictureLike
from mmdit.pictures.resize import resize
from mmdit.pipeline.control import Control
from mmdit.pipeline.image_inputs import Picture, PictureSize, at_size, masks_of, pictures_of
from mmdit.pipeline.masks import repeated
from mmdit.pipeline.profiles import Profile
from mmdit.pipeline.settings import digest_of
from mmdit.utils import number

ControlNetLike = ControlNet | Sequence[ControlNet]  # the type of the argument `controlnet`
Numbers = float | Sequence[float]  # one number for all nets, or one for each


@dataclass(frozen=True, eq=False, kw_only=True)
class ControlInput:
    """One net of a call, with its hint as given by the caller."""

    net: ControlNet
    pictures: tuple[Picture, ...]  # hints: one for all drawings, or one for each
    masks: tuple[Picture, ...]  # masks for an inpainting net: one for all drawings, or one for each
    scale: float
    start: float
    stop: float

    @property
    def words(self) -> str:
        """The net and its hint as text for the settings of a picture: kind, numbers and digests."""
        config = self.net.config
        hints = "+".join(one.digest for one in (*self.pictures, *self.masks))
        numbers = ":".join(format(one, ".12g") for one in (self.scale, self.start, self.stop))
        return f"{config.kind or 'unknown'}:{numbers}:net={digest_of(self.net)}:hint={hints}"


def control_inputs(
    controlnet: ControlNetLike | None,
    control_image: PictureLike | None,
    control_mask: PictureLike | None = None,
    *,
    scale: Numbers = 1.0,
    start: Numbers = 0.0,
    stop: Numbers = 1.0,
    config: MMDiTConfig,
) -> tuple[ControlInput, ...]:
    """Check the ControlNet arguments of `mmdit.Pipeline.__call__`; without `controlnet`, the result is empty.

    Args:
        controlnet, control_image, control_mask: see `mmdit.Pipeline.__call__`.
        scale, start, stop: `controlnet_conditioning_scale`, `control_guidance_start` and `control_guidance_end`.
        config: the transformer's config.

    Raises:
        TypeError: a net is not an `mmdit.ControlNet`, or a hint is not a picture.
        ValueError: an argument is given without the argument that it requires; a net does not fit the transformer; the
            numbers of nets and hints differ; a number is not finite or out of its range; or start is above stop.
    """
    if controlnet is None:
        if given := [
            name for name, one in (("control_image", control_image), ("control_mask", control_mask)) if one is not None
        ]:
            raise ValueError(
                f"{given[0]} is given without controlnet, the net that reads it, see mmdit.load_controlnet"
            )
        return ()
    nets: list[Any] = list(controlnet) if isinstance(controlnet, list | tuple) else [controlnet]
    if not nets:
        raise ValueError("controlnet is an empty list; give at least one net, or leave it out")
    for i, net in enumerate(nets):
        check_net("controlnet" if len(nets) == 1 else f"controlnet[{i}]", net, config)
    if control_image is None:
        raise ValueError("controlnet is given without control_image, its hint")
    hints = _hints(control_image, isinstance(controlnet, list | tuple), len(nets))
    masks = _masks(control_mask, nets)
    names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    scales, starts, stops = (
        _numbers(name, one, len(nets)) for name, one in zip(names, (scale, start, stop), strict=True)
    )
    for first, last in zip(starts, stops, strict=True):
        if not 0 <= first < last <= 1:
            raise ValueError(
                f"control_guidance_start {first:g} and control_guidance_end {last:g} must be 0 <= start < end <= 1"
            )
    return tuple(
        ControlInput(
            net=net, pictures=tuple(hint), masks=masks if net.config.inpaints else (), scale=s, start=a, stop=b
        )
        for net, hint, s, a, b in zip(nets, hints, scales, starts, stops, strict=True)
    )


def check_counts(inputs: Sequence[ControlInput], count: int) -> None:
    """Raise ValueError unless each net has one hint and mask, or one for each of `count` pictures."""
    for one in inputs:
        for name, found in (("control_image", len(one.pictures)), ("control_mask", len(one.masks))):
            if found not in (0, 1, count):
                raise ValueError(f"{name} holds {found} pictures for {count} drawings; give one, or one for each")


def make_control(
    one: ControlInput,
    vae: VAE,
    profile: Profile,
    size: PictureSize,
    count: int,
    *,
    twice: bool,
    shifted: bool | None = None,
) -> Control:
    """Encode the hint of a net.

    Args:
        one: the net and its hint.
        vae: the VAE that encodes the hint.
        profile: the profile, which decides size, value range, noise and scaling.
        size: the size of the drawing, in pixels.
        count: the number of pictures that are drawn.
        twice: whether an unconditional branch runs.
        shifted: whether to subtract the VAE's shift from the hint's latents; None takes the net's own rule.
    """
    weight = next(vae.parameters())
    hint, masks = (
        _inpaint_hint(one, profile, size, vae.config.downscale)
        if one.net.config.inpaints
        else (_hint(one, profile, size), None)
    )
    encoded = vae.encode(hint.to(weight.device, weight.dtype))
    each = profile.control_latent == "sampled_each" and twice and masks is None
    latents = _drawn(encoded, count, 2 if each else 1, profile)
    if not (takes_shift(one.net.config, profile) if shifted is None else shifted):
        latents = latents + vae.config.shift * vae.config.scale
    if masks is not None:
        latents = torch.cat([latents, repeated(masks, len(latents)).to(latents)], dim=1)
    # diffusers' batch begins with the unconditional branch, which therefore gets the first noise.
    without, given = (latents[:count], latents[count:]) if each else (latents, latents)
    return Control(one.net, given, without, one.scale, one.start, one.stop)


def takes_shift(config: ControlNetConfig, profile: Profile) -> bool:
    """Whether the VAE's shift is subtracted from the latents of a net's hint before they are scaled."""
    if not config.is_joint:
        return True
    if profile.control_joint == "zeros":
        return False
    return config.inpaints or not config.zero_pooled


@dataclass(frozen=True)
class HintRules:
    """How a profile encodes the hints of a net. Training encodes them by the same rules, see `hint_rules`."""

    values: Literal["signed", "inverted", "bytes", "signed_bytes"]  # the VAE's input, see `in_range`
    shifted: bool  # whether the VAE's shift is subtracted from the latents
    sampled: bool  # whether latents are samples of the VAE's distribution; otherwise they are its mean

    def in_range(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] as the VAE's input: 2x - 1, 1 - 2x, 127.5x + 0.5, or 255x."""
        if self.values == "inverted":
            return 1 - 2 * x
        if self.values == "signed":
            return 2 * x - 1
        levels = 127.5 * x + 0.5
        return levels if self.values == "bytes" else 2 * levels - 1

    def distribution(self, vae: VAE, x: Float[Tensor, "b 3 h w"]) -> DiagonalGaussian:
        """The distribution of the latents of hints with pixels in [0, 1], in the space that the net takes."""
        weight = next(vae.parameters())
        found = vae.encode(self.in_range(x).to(weight.device, weight.dtype))
        return found if self.shifted else DiagonalGaussian(found.mean + vae.config.shift * vae.config.scale, found.std)


def hint_rules(config: ControlNetConfig, profile: Profile) -> HintRules:
    """The rules by which a profile encodes the hints of a net that is not for inpainting.

    Only Stability's nets have value ranges other than [-1, 1].
    """
    kind = None if config.is_joint else config.kind
    values: Literal["signed", "inverted", "bytes", "signed_bytes"] = "signed"
    if kind == "canny" and profile.control_canny != "unit":
        values = "bytes" if profile.control_canny == "bytes" else "signed_bytes"
    elif kind == "depth" and profile.control_depth == "inverted":
        values = "inverted"
    return HintRules(values, takes_shift(config, profile), profile.control_latent != "mean")


def check_net(name: str, net: object, config: MMDiTConfig) -> None:
    """Raise TypeError or ValueError unless `net` (`name` in errors) is a ControlNet that fits the transformer."""
    if not isinstance(net, ControlNet):
        hint = "; give mmdit.load_controlnet(path)" if isinstance(net, str | Path) else ""
        raise TypeError(f"{name} is {type(net).__name__}, expected mmdit.ControlNet{hint}")
    own = net.config
    pairs = [("width", own.hidden_size, config.hidden_size), ("pooled width", own.pooled_dim, config.pooled_dim)]
    pairs += [
        ("patch size", own.patch_size, config.patch_size),
        ("latent channels", own.in_channels, config.in_channels),
    ]
    if own.context_dim is not None:
        pairs.append(("context width", own.context_dim, config.context_dim))
    for what, found, expected in pairs:
        if found != expected:
            raise ValueError(
                f"{name} is for a transformer with {what} {found}, this one has {expected}; they do not go together"
            )
    if own.depth > config.depth:
        raise ValueError(f"{name} has {own.depth} blocks, more than the {config.depth} of the transformer")


def _hints(given: Any, several: bool, nets: int) -> list[list[Picture]]:
    """The pictures of each net."""
    if not several:
        return [pictures_of("control_image", given)]
    if not isinstance(given, list | tuple) or len(given) != nets:
        found = len(given) if isinstance(given, list | tuple) else "one that is no list"
        raise ValueError(f"{nets} ControlNets take {nets} hints in a list, got {found} as control_image")
    return [pictures_of(f"control_image[{i}]", one) for i, one in enumerate(given)]


def _masks(given: Any, nets: Sequence[ControlNet]) -> tuple[Picture, ...]:
    inpaints = any(net.config.inpaints for net in nets)
    if inpaints == (given is not None):
        return tuple(masks_of(given, "control_mask")) if inpaints else ()
    if inpaints:
        raise ValueError(
            "an inpainting ControlNet needs control_mask, which is 1 (white) where the picture is drawn anew"
        )
    raise ValueError("control_mask is given, but no ControlNet is for inpainting: its hint has no channel for a mask")


def _numbers(name: str, given: Any, nets: int) -> list[float]:
    if not isinstance(given, list | tuple):
        return [number(name, given)] * nets
    if len(given) != nets:
        raise ValueError(f"{name} has {len(given)} values for {nets} ControlNets; give one, or one for each")
    return [number(f"{name}[{i}]", one) for i, one in enumerate(given)]


def _sized(one: Picture, size: PictureSize, profile: Profile) -> Float[Tensor, "1 c h w"]:
    if profile.control_resize == "nearest_cut":
        return _cut(one.pixels, size.height, size.width, "nearest-exact")
    return at_size(one, PictureSize(size.height, size.width, cut=False), profile)


def _cut(pixels: Tensor, height: int, width: int, how: Any) -> Tensor:
    """Crop around the centre to the aspect ratio of the target, then resize."""
    return resize(pixels.movedim(1, -1), height=height, width=width, filter=how, crop="center").movedim(-1, 1)


def _hint(one: ControlInput, profile: Profile, size: PictureSize) -> Float[Tensor, "b 3 h w"]:
    """The hint in the value range of its kind, see `HintRules`."""
    x = torch.cat([_sized(picture, size, profile) for picture in one.pictures])
    return hint_rules(one.net.config, profile).in_range(x)


def _inpaint_hint(
    one: ControlInput, profile: Profile, size: PictureSize, cell: int
) -> tuple[Tensor, Float[Tensor, "b 1 h w"]]:
    """The masked picture in [-1, 1], and the inverted mask (1 is kept) at the size of the latents."""
    count = max(len(one.pictures), len(one.masks))
    rows, columns = size.height // cell, size.width // cell
    if profile.control_resize == "nearest_cut":
        pictures = torch.cat([picture.pixels for picture in one.pictures])
        keep = torch.cat([1 - mask.pixels for mask in one.masks])
        whole = _cut(keep, pictures.shape[2], pictures.shape[3], "bilinear").round()
        black = repeated(pictures, count) * repeated(whole, count)
        hint = 2 * _cut(black, size.height, size.width, "nearest-exact") - 1
        return hint, repeated(_cut(keep, rows, columns, "nearest-exact"), count)
    pictures = torch.cat([_sized(picture, size, profile) for picture in one.pictures])
    masks = (torch.cat([_sized(mask, size, profile) for mask in one.masks]) >= 0.5).float()
    hint = torch.where(repeated(masks, count) > 0.5, -1.0, 2 * repeated(pictures, count) - 1)
    return hint, 1 - F.interpolate(repeated(masks, count), size=(rows, columns))


def _drawn(encoded: DiagonalGaussian, count: int, times: int, profile: Profile) -> Tensor:
    """The latents of `times` x `count` hints: means, or samples from torch's global generator as in the references."""
    mean, std = (repeated(one, count).repeat(times, 1, 1, 1) for one in (encoded.mean, encoded.std))
    return mean if profile.control_latent == "mean" else DiagonalGaussian(mean, std).sample()
