"""Tiled decoding and encoding: the same result as in one piece, with the memory of one tile on the device.

Whole activations are kept on one device, and each layer is computed tile by tile on another. A tile is read with the
neighbouring cells around it, and a norm uses the statistics of the whole picture, so that no seam can arise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product
from types import EllipsisType
from typing import NamedTuple, Self, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from encoders.vae import VAE, DiagonalGaussian, Downsample, Mid, ResnetBlock, Upsample

Area: TypeAlias = tuple[EllipsisType, slice, slice]  # rows and columns, as an index
RIM = 1  # input cells around a tile that one 3x3 convolution sees; norms and activations see none


@torch.no_grad()
def decode_tiled(
    vae: VAE, latent: Tensor, *, tile: int = 256, park: torch.device | str = "cpu"
) -> Float[Tensor, "b 3 h8 w8"]:
    """Compute `vae.decode(latent)` tile by tile, equal up to rounding and without gradients.

    Only the attention sees all cells at once; it runs at the latent's size. With the official widths in bfloat16, a
    picture of 1024 x 1024 pixels takes 0.2 GiB of activations on the latent's device and 1.0 GiB on `park`, where whole
    decoding takes 1.5 GiB; one of 2048 x 2048 takes 0.5 and 4.0 GiB in place of 6.0 (elements counted, not measured).

    Args:
        vae: The VAE, on the device and in the dtype of the latent.
        latent: Latents of shape [b, z, h, w], in model space.
        tile: Side of a tile in cells of each layer's output: pixels in the last layers, latent cells in the first.
        park: The device on which whole activations are kept between layers. If it is the latent's own device, nothing
            is copied, and the memory is only a third less than that of whole decoding.

    Raises:
        ValueError: `tile` is below 1, or the latent does not have the channels of this VAE.
    """
    _check(vae, latent, tile)
    walk, decoder = _Walk(tile, latent.device, torch.device(park)), vae.decoder
    x = walk.mid(decoder.mid, walk.run(decoder.conv_in, vae.from_model(latent).to(park)))
    for layer in (layer for level in reversed(decoder.up) for layer in level.modules()):
        if isinstance(layer, ResnetBlock):
            x = walk.resnet(layer, x)
        elif isinstance(layer, Upsample):
            x = walk.run(layer, x)
    return walk.run(decoder.conv_out, x, decoder.norm_out).to(latent.device)


@torch.no_grad()
def encode_tiled(vae: VAE, image: Tensor, *, tile: int = 256, park: torch.device | str = "cpu") -> DiagonalGaussian:
    """Compute `vae.encode(image)` tile by tile, equal up to rounding and without gradients.

    Args:
        vae: The VAE, on the device and in the dtype of the pictures.
        image: Pictures of shape [b, 3, h, w], with pixels in [-1, 1] and sides in multiples of `config.downscale`.
        tile: Side of a tile in cells of each layer's output, as in `decode_tiled`.
        park: The device on which whole activations are kept between layers, as in `decode_tiled`.

    Returns:
        The distribution of the latents, in model space, on the device of the pictures.

    Raises:
        ValueError: `tile` is below 1, or the pictures have another shape.
    """
    if tile < 1:
        raise ValueError(f"tile is {tile}; it must be at least 1 cell")
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {list(image.shape)}; expected [b, 3, h, w], none of them 0")
    vae.check_sides(image)
    walk, encoder = _Walk(tile, image.device, torch.device(park)), vae.encoder
    x = walk.run(encoder.conv_in, image.to(park))
    for layer in (layer for level in encoder.down for layer in level.modules()):
        if isinstance(layer, ResnetBlock):
            x = walk.resnet(layer, x)
        elif isinstance(layer, Downsample):
            x = walk.run(layer, x)
    x = walk.mid(encoder.mid, x)
    return vae.posterior(walk.run(encoder.conv_out, x, encoder.norm_out).to(image.device))


def _check(vae: VAE, latent: Tensor, tile: int) -> None:
    channels = vae.config.latent_channels
    if tile < 1:
        raise ValueError(f"tile is {tile}; it must be at least 1 cell")
    if latent.ndim != 4 or latent.shape[1] != channels or 0 in latent.shape:
        raise ValueError(f"latent has shape {list(latent.shape)}; expected [b, {channels}, h, w], none of them 0")


class Moments(NamedTuple):
    """Number of values in a group, and mean and sum of squared deviations [b, groups], in float32 or wider."""

    total: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Float[Tensor, "b c h w"], groups: int) -> Self:
        """Compute the moments of one tile."""
        values = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1)).flatten(2)  # b groups n
        variance, mean = torch.var_mean(values, dim=2, correction=0)
        return cls(values.shape[2], mean, variance * values.shape[2])

    def merge(self, other: Self) -> Self:
        """Combine the moments of two sets of values without cancellation (Chan, Golub and LeVeque 1979)."""
        share, delta = other.total / (self.total + other.total), other.mean - self.mean
        squares = self.squares + other.squares + delta.square() * (self.total * share)
        return type(self)(self.total + other.total, self.mean + delta * share, squares)


class _Scale(NamedTuple):
    """How many output cells a layer has for how many input cells along a side, and which depend on which."""

    up: int = 1
    down: int = 1

    def output(self, size: int) -> int:
        """The number of output cells along a side."""
        return size * self.up // self.down

    def seen(self, own: slice, size: int) -> slice:
        """The input cells that the outputs `own` depend on, clipped so that zeros are padded at the true border only.

        A layer that halves the sides sees a rim only after the cells, where it pads.
        """
        before = RIM if self.down == 1 else 0
        start, stop = own.start * self.down // self.up, -(-own.stop * self.down // self.up)
        return slice(max(start - before, 0), min(stop + RIM, size))

    def within(self, own: slice, seen: slice) -> slice:
        """The position of the outputs `own` among the outputs of the inputs `seen`."""
        start = own.start - self.output(seen.start)
        return slice(start, start + own.stop - own.start)


_SAME = _Scale()
_SCALES: dict[type[nn.Module], _Scale] = {Upsample: _Scale(up=2), Downsample: _Scale(down=2)}


@dataclass(frozen=True)
class _Walk:
    """How layers are computed: the side of a tile, the device of the tiles, the device of whole activations."""

    tile: int
    device: torch.device
    park: torch.device

    def mid(self, mid: Mid, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Compute `mid(x)`; its attention sees all cells at once."""
        x = self.resnet(mid.block_1, x)
        return self.resnet(mid.block_2, mid.attn_1(x.to(self.device)).to(self.park))

    def resnet(self, block: ResnetBlock, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Compute `block(x)`; overwrites x where the block keeps its width."""
        hidden = self.run(block.conv1, x, block.norm1)
        shortcut = self.run(block.nin_shortcut, x) if hasattr(block, "nin_shortcut") else x
        for area, update in self.outputs(block.conv2, hidden, block.norm2):
            shortcut[area] += update.to(self.park)
        return shortcut

    def run(
        self, layer: nn.Conv2d | Upsample | Downsample, x: Float[Tensor, "b c h w"], norm: nn.GroupNorm | None = None
    ) -> Float[Tensor, "b d h2 w2"]:
        """Compute `layer(silu(norm(x)))`, or `layer(x)` without a norm."""
        conv, scale = (layer, _SAME) if isinstance(layer, nn.Conv2d) else (layer.conv, _SCALES[type(layer)])
        whole = x.new_empty(x.shape[0], conv.out_channels, *(scale.output(side) for side in x.shape[2:]))
        for area, part in self.outputs(layer, x, norm, scale):
            whole[area] = part
        return whole

    def outputs(
        self, layer: nn.Module, x: Float[Tensor, "b c h w"], norm: nn.GroupNorm | None, scale: _Scale = _SAME
    ) -> Iterator[tuple[Area, Tensor]]:
        """Yield `layer(silu(norm(x)))` tile by tile, each with its place in the output."""
        height, width = x.shape[2:]
        moments = self.moments(x, norm.num_groups) if norm else None
        for rows, columns in self.tiles(scale.output(height), scale.output(width)):
            seen_rows, seen_columns = scale.seen(rows, height), scale.seen(columns, width)
            part = x[..., seen_rows, seen_columns].to(self.device)
            if norm and moments:
                part = F.silu(normed(norm, part, moments), inplace=True)
            own = (..., scale.within(rows, seen_rows), scale.within(columns, seen_columns))
            yield (..., rows, columns), layer(part)[own]

    def moments(self, x: Float[Tensor, "b c h w"], groups: int) -> Moments:
        """The moments of whole activations; each cell counts once."""
        parts = (x[..., rows, columns].to(self.device) for rows, columns in self.tiles(*x.shape[2:]))
        return reduce(Moments.merge, (Moments.of(part, groups) for part in parts))

    def tiles(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each tile; those at the right and the bottom may be smaller."""
        spans = ([slice(i, min(i + self.tile, size)) for i in range(0, size, self.tile)] for size in (height, width))
        return product(*spans)


def normed(norm: nn.GroupNorm, x: Float[Tensor, "b c h w"], moments: Moments) -> Float[Tensor, "b c h w"]:
    """Compute `norm(x)` with given statistics, by a batch norm that takes one mean and variance for each channel."""
    samples, channels = x.shape[:2]
    mean, variance = (
        part.repeat_interleave(channels // norm.num_groups, dim=1).flatten()
        for part in (moments.mean, moments.squares / moments.total)
    )
    weight, bias = (part.to(mean.dtype).repeat(samples) for part in (norm.weight, norm.bias))
    normed = F.batch_norm(x.flatten(0, 1).unsqueeze(0), mean, variance, weight, bias, eps=norm.eps)
    return normed.view_as(x)
