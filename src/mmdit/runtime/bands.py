"""Decoding over several ranks: each computes a band of rows of every layer, with the adjacent rows of its neighbours.

Norms use the statistics of the whole picture, so the result is that of one process up to rounding, without seams.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from encoders.tiling import Moments, normed
from encoders.vae import VAE, ResnetBlock, Upsample
from mmdit.runtime.compiled import refuse_changed
from mmdit.runtime.fast_vae import WHOLE, FastVAE, conv, plain_norm
from mmdit.runtime.graphs import Graphs
from mmdit.runtime.mesh import Team, shares, starts
from mmdit.runtime.versions import version_of
from mmdit.utils import is_out_of_memory

# Pixels from which bands are quicker than the fast VAE alone. One H200: 33 ms at 1024 x 1024 and 79 ms at 1536 x 1536;
# in bands of two to four ranks 34 to 59 ms and 42 to 65 ms, because the host launches each layer's exchange. A graph of
# the bands has no such wait; from where it is worth it is an estimate.
WORTH = 1280 * 1280
WORTH_GRAPH = 768 * 768


class Layers(NamedTuple):
    """How the layers of a band are computed."""

    run: Callable[[nn.Module, Tensor], Tensor]  # a convolution, or an `Upsample`
    kernels: ModuleType | None = None  # `mmdit.runtime.vae_kernels`; None norms in plain torch


def _channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, Upsample):
        return conv(layer.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert isinstance(layer, nn.Conv2d), "a layer of the decoder's levels"
    return conv(layer, x)


PLAIN = Layers(lambda layer, x: layer(x))


def layers_of(fast: FastVAE | None) -> Layers:
    """Those of the VAE itself, or of its fast forward: channels last, with its kernels where it has them."""
    if fast is None:
        return PLAIN
    if fast.norm is plain_norm:
        return Layers(_channels_last)
    from mmdit.runtime import vae_kernels

    return Layers(_channels_last, vae_kernels)


class BandDecoder:
    """Decoding in bands that is a CUDA graph from the second time on, bit-equal to the first.

    Args:
        team: the ranks.

    Attributes:
        why_not: why there is no graph, where recording it has failed; empty elsewhere.
    """

    def __init__(self, team: Team) -> None:
        self.team, self.graphs, self.why_not = team, Graphs(2), ""
        self._version: object = None
        self._seen: set[torch.Size] = set()

    def __call__(
        self, vae: VAE, latent: Float[Tensor, "b z h w"], fast: FastVAE | None, *, graph: bool
    ) -> Float[Tensor, "b 3 h8 w8"]:
        """See `decode_in_bands`; `graph` allows a graph of the fast forward."""
        graph = graph and fast is not None and not self.why_not
        worth = WORTH_GRAPH if graph else WORTH
        if not graph or not _splits(vae, latent, self.team, fast, worth):
            return decode_in_bands(vae, latent, self.team, fast, worth)
        version = (id(fast), version_of(vae, refuse_changed(vae, "the VAE")))
        if version != self._version:
            self.close()
            self._version = version
        if latent.shape not in self._seen:
            self._seen.add(latent.shape)
            return decode_in_bands(vae, latent, self.team, fast, worth)
        try:
            return self.graphs(
                latent.shape, lambda latent: decode_in_bands(vae, latent, self.team, fast, worth), [latent]
            )
        except RuntimeError as error:  # alike on all ranks, which launch the same work, but for memory
            if latent.shape in self.graphs or _lacks_memory(error):
                raise
            self.why_not = (str(error).splitlines() or [type(error).__name__])[0]
            return decode_in_bands(vae, latent, self.team, fast, worth)

    def close(self) -> None:
        """Free the graphs."""
        self.graphs.clear()
        self._seen.clear()
        self._version = None


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether this rank lacks memory, by an error or one before it: a recording that fails raises again as it ends."""
    return error is not None and (is_out_of_memory(error) or _lacks_memory(error.__cause__ or error.__context__))


def _splits(vae: VAE, latent: Tensor, team: Team, fast: FastVAE | None, worth: int) -> bool:
    """Whether pictures are split into bands: each rank has a row, and a picture is neither too small nor too large."""
    pixels = latent.shape[2] * latent.shape[3] * vae.config.downscale**2
    small = fast is not None and pixels < worth
    return team.size > 1 and latent.shape[2] >= team.size and not small and pixels <= WHOLE * team.size


@torch.no_grad()
def decode_in_bands(
    vae: VAE, latent: Float[Tensor, "b z h w"], team: Team, fast: FastVAE | None = None, worth: int | None = None
) -> Float[Tensor, "b 3 h8 w8"]:
    """Compute `vae.decode(latent)` on all ranks of a team; each gets the whole picture.

    What comes before the attention in the middle of the decoder runs on every rank; it is a small part of the work.

    Args:
        vae: the VAE, equal on all ranks.
        latent: latents in model space, equal on all ranks. With fewer rows than ranks, where a band has more than
            `fast_vae.WHOLE` pixels, and by the fast forward below `worth` pixels, every rank decodes alone.
        team: the ranks.
        fast: the VAE's fast forward; None runs its own.
        worth: pixels; None is `WORTH`.
    """
    if not _splits(vae, latent, team, fast, WORTH if worth is None else worth):
        return (vae if fast is None else fast).decode(latent)
    rows = shares(latent.shape[2], team.size)
    pixels = latent.shape[2] * latent.shape[3] * vae.config.downscale**2
    parts = latent.split(max(WHOLE * team.size // pixels, 1))
    return torch.cat([_decoded(vae, part, team, rows, fast) for part in parts])


def _decoded(vae: VAE, latent: Tensor, team: Team, rows: list[int], fast: FastVAE | None) -> Tensor:
    decoder, band = vae.decoder, Band(team, rows, layers_of(fast))
    first, count = starts(rows)[team.rank], rows[team.rank]
    if fast is None:
        x = decoder.mid(decoder.conv_in(vae.from_model(latent)))[:, :, first : first + count]
    else:
        x = band.resnet(decoder.mid.block_2, fast.attended(latent, first, count))
    for layer in (layer for level in reversed(decoder.up) for layer in level.modules()):
        if isinstance(layer, ResnetBlock):
            x = band.resnet(layer, x)
        elif isinstance(layer, Upsample):
            x, band = band.run(layer, x, up=2), band.larger()
    return team.joined(band.run(decoder.conv_out, x, decoder.norm_out), band.rows, 2)


class Band(NamedTuple):
    """The rows of the activations that each rank of a team holds."""

    team: Team
    rows: list[int]
    layers: Layers

    def larger(self) -> Band:
        """The bands after the sides were doubled."""
        return self._replace(rows=[2 * one for one in self.rows])

    def resnet(self, block: ResnetBlock, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Compute `block(x)`."""
        update = self.run(block.conv2, self.run(block.conv1, x, block.norm1), block.norm2)
        return (self.layers.run(block.nin_shortcut, x) if hasattr(block, "nin_shortcut") else x) + update

    def run(
        self, layer: nn.Module, x: Float[Tensor, "b c h w"], norm: nn.GroupNorm | None = None, *, up: int = 1
    ) -> Float[Tensor, "b d h2 w2"]:
        """Compute `layer(silu(norm(x)))` for a layer that sees one row above and below.

        Args:
            layer: a 3x3 convolution that keeps the size, or one that first enlarges it.
            x: this rank's rows.
            norm: the norm before the layer.
            up: the factor by which the layer enlarges the sides.
        """
        if norm is not None and self.layers.kernels is not None:
            rows, above = self._normed(self.layers.kernels, norm, x), min(self.team.rank, 1)
        else:
            rows, above = self._with_neighbours(x)
            if norm is not None:
                rows = F.silu(normed(norm, rows, self._moments(x, norm.num_groups)), inplace=True)
        first = up * above
        return self.layers.run(layer, rows)[:, :, first : first + up * x.shape[2]]

    def _normed(self, kernels: ModuleType, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """These rows and the adjacent ones, normed and after SiLU; the ranks exchange one message."""
        x = x.contiguous(memory_format=torch.channels_last)
        messages = self.team.gathered(kernels.band_message(x, norm.num_groups))
        found: Tensor = kernels.norm_band(norm, x, messages, self.team.rank, self.rows)
        return found

    def _with_neighbours(self, x: Tensor) -> tuple[Tensor, int]:
        """These rows and the adjacent ones, and how many of those are above."""
        above, below = self._neighbours(x)
        order = torch.contiguous_format if self.layers is PLAIN else torch.channels_last
        parts = [one.contiguous(memory_format=order) for one in (above, x, below) if one.shape[2]]
        return torch.cat(parts, dim=2).contiguous(memory_format=order), above.shape[2]

    def _neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The row above and the row below, [b, c, 1, w]; empty at the border of the picture."""
        edges = self.team.gathered(torch.stack([x[:, :, :1], x[:, :, -1:]]))
        rank, nothing = self.team.rank, x[:, :, :0]
        above = edges[rank - 1, 1] if rank else nothing
        return above, edges[rank + 1, 0] if rank + 1 < self.team.size else nothing

    def _moments(self, x: Tensor, groups: int) -> Moments:
        """The moments of the whole activations."""
        own = Moments.of(x, groups)
        found = self.team.gathered(torch.stack([own.mean, own.squares]))
        each = own.total // x.shape[2]
        parts = (Moments(each * rows, *one.unbind(0)) for rows, one in zip(self.rows, found, strict=True))
        return reduce(Moments.merge, parts)
