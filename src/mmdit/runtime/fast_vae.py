"""A second forward of the VAE over the same parameters: channels last, norm and SiLU in one, and less memory.

Each activation is freed or overwritten as soon as nothing reads it any more; the plain forward keeps it until a block
ends. Pictures above a stated size are computed tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from encoders import VAE, decode_tiled, encode_tiled
from encoders.vae import AttnBlock, DiagonalGaussian, Downsample, Mid, ResnetBlock, Upsample
from mmdit.runtime.compiled import refuse_changed
from quant.current import on_its_device

WHOLE = 2048 * 2048  # pixels that are computed at once; larger pictures are computed in tiles, several one by one
TILE = 512  # side of a tile in cells of each layer's output
_SCORES = 2**28  # bytes of attention scores at once
_ALIGNED = 8  # convolutions of tensor cores take multiples of this many channels
# (x, norm, silu=, in_place=) -> GroupNorm, with SiLU where `silu`; written into x where `in_place`
Norm = Callable[..., Tensor]


def plain_norm(x: Tensor, norm: nn.GroupNorm, *, silu: bool, in_place: bool = False) -> Tensor:
    """What `mmdit.runtime.vae_kernels.norm` computes, in plain torch."""
    found = norm(x)
    found = F.silu(found, inplace=True) if silu else found
    return x.copy_(found) if in_place else found


class FastVAE:
    """What `vae.encode` and `vae.decode` compute, up to rounding, without gradients.

    Args:
        vae: its weights are read where they lie.
        norm: `mmdit.runtime.vae_kernels.norm`, or `plain_norm` where there is no Triton.

    Raises:
        ValueError: a module of the VAE is compiled, hooked or replaced.
    """

    def __init__(self, vae: VAE, norm: Norm) -> None:
        self.vae, self.norm = vae, norm
        refuse_changed(vae, "the VAE")

    @torch.no_grad()
    @on_its_device
    def decode(self, latent: Float[Tensor, "b z h w"]) -> Float[Tensor, "b 3 h8 w8"]:
        """Latents in model space to pictures with pixels about in [-1, 1], as `VAE.decode`.

        Raises:
            ValueError: see the class.
        """
        refuse_changed(self.vae, "the VAE")
        pixels = latent.shape[2] * latent.shape[3] * self.vae.config.downscale**2
        if pixels > WHOLE:
            return _one_by_one(lambda one: decode_tiled(self.vae, one, tile=TILE, park=one.device), latent)
        return torch.cat([self._decoded(part) for part in latent.split(max(WHOLE // pixels, 1))])

    @torch.no_grad()
    @on_its_device
    def encode(self, image: Float[Tensor, "b 3 h w"]) -> DiagonalGaussian:
        """Pictures with pixels in [-1, 1] to the distribution of their latents, as `VAE.encode`.

        Raises:
            ValueError: see the class; or a side of the picture is not a multiple of `config.downscale` (8).
        """
        refuse_changed(self.vae, "the VAE")
        self.vae.check_sides(image)
        pixels = image.shape[2] * image.shape[3]
        if pixels > WHOLE:
            found = [encode_tiled(self.vae, one, tile=TILE, park=one.device) for one in image.split(1)]
            return DiagonalGaussian(torch.cat([one.mean for one in found]), torch.cat([one.std for one in found]))
        return self.vae.posterior(torch.cat([self._encoded(part) for part in image.split(max(WHOLE // pixels, 1))]))

    @torch.no_grad()
    @on_its_device
    def attended(self, latent: Float[Tensor, "b z h w"], first: int, count: int) -> Float[Tensor, "b c n w"]:
        """Rows of the decoder's activations after the attention of its middle; a resnet block of it is still to come.

        Args:
            latent: in model space.
            first, count: the rows, of which each attends to all others.

        Raises:
            ValueError: see the class.
        """
        refuse_changed(self.vae, "the VAE")
        decoder = self.vae.decoder
        x = self._through([decoder.mid.block_1], conv(decoder.conv_in, self.vae.from_model(latent)))
        return self._attention(decoder.mid.attn_1, x, slice(first, first + count))

    def _decoded(self, latent: Tensor) -> Tensor:
        decoder = self.vae.decoder
        layers = [*_middle(decoder.mid)]
        for level in reversed(decoder.up):
            layers += _layers(level)
        x = self._through(layers, conv(decoder.conv_in, self.vae.from_model(latent)))
        x = self.norm(x, decoder.norm_out, silu=True, in_place=True)
        return conv(decoder.conv_out, x).contiguous()

    def _encoded(self, image: Tensor) -> Tensor:
        encoder = self.vae.encoder
        layers: list[nn.Module] = []
        for level in encoder.down:
            layers += _layers(level)
        x = self._through([*layers, *_middle(encoder.mid)], conv(encoder.conv_in, image))
        x = self.norm(x, encoder.norm_out, silu=True, in_place=True)
        return conv(encoder.conv_out, x).contiguous()

    def _through(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        """The layers one after the other; overwrites `x`. It is one frame, because a name bound anew frees memory."""
        for layer in layers:
            if isinstance(layer, ResnetBlock):
                rest = conv(layer.nin_shortcut, x) if hasattr(layer, "nin_shortcut") else x
                x = self.norm(x, layer.norm1, silu=True, in_place=rest is not x)
                x = conv(layer.conv1, x)
                x = self.norm(x, layer.norm2, silu=True, in_place=True)
                x = rest.add_(conv(layer.conv2, x))
                del rest
            elif isinstance(layer, AttnBlock):
                x = self._attention(layer, x)
            elif isinstance(layer, Upsample):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = conv(layer.conv, x)
            elif isinstance(layer, Downsample):
                x = F.pad(x, (0, 1, 0, 1))
                x = conv(layer.conv, x)
        return x

    def _attention(self, layer: AttnBlock, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Some rows after the attention, in which they attend to all; overwrites them in `x`."""
        tokens = self.norm(x, layer.norm, silu=False).permute(0, 2, 3, 1)  # b h w c
        x, own, tokens = x[:, :, rows], tokens[:, rows].flatten(1, 2), tokens.flatten(1, 2)
        q, k, v = (
            F.linear(one, part.weight.flatten(1), part.bias)
            for one, part in ((own, layer.q), (tokens, layer.k), (tokens, layer.v))
        )
        z = F.linear(attention(q, k, v), layer.proj_out.weight.flatten(1), layer.proj_out.bias)
        return x.add_(z.unflatten(1, tuple(x.shape[2:])).permute(0, 3, 1, 2))


def attention(
    q: Float[Tensor, "b n c"], k: Float[Tensor, "b m c"], v: Float[Tensor, "b m c"]
) -> Float[Tensor, "b n c"]:
    """Softmax attention of one head that is too wide for fused kernels: scores in float32, some queries at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = max(_SCORES // (len(q) * k.shape[1] * wide.itemsize), 1)
    keys, found = k.transpose(1, 2), []
    for part in q.split(rows, dim=1):
        scores = torch.bmm(part, keys, out_dtype=wide) if q.is_cuda else part.to(wide) @ keys.to(wide)
        weights = scores.mul_(q.shape[2] ** -0.5).softmax(-1)
        del scores
        found.append(weights.to(v.dtype) @ v)
    return torch.cat(found, dim=1)


def _layers(level: nn.Module) -> list[nn.Module]:
    """Resnet blocks and resampling of a level, in the order in which they run; `Identity` does nothing."""
    return [one for one in level.modules() if isinstance(one, ResnetBlock | Upsample | Downsample)]


def _middle(mid: Mid) -> list[nn.Module]:
    return [mid.block_1, mid.attn_1, mid.block_2]


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """`layer(x)`, channels last; numbers of channels that tensor cores do not take are filled up with zeros."""
    weight, bias, outs = layer.weight, layer.bias, layer.out_channels
    more_in, more_out = -layer.in_channels % _ALIGNED, -outs % _ALIGNED
    if more_in:
        x, weight = (F.pad(one, (0, 0, 0, 0, 0, more_in)) for one in (x, weight))
    if more_out:
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, more_out))
        bias = None if bias is None else F.pad(bias, (0, more_out))
    x = x.contiguous(memory_format=torch.channels_last)
    found = F.conv2d(x, weight, bias, layer.stride, layer.padding)
    return found[:, :outs].contiguous(memory_format=torch.channels_last)


def _one_by_one(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([run(one) for one in x.split(1)])
