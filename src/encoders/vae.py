"""The 16-channel VAE of Stable Diffusion 3: pictures in [-1, 1] to latents with 1/8 of their sides, and back.

Module names are those of the official files (LDM names, without `first_stage_model.`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


@dataclass(frozen=True)
class VAEConfig:
    """Widths per level, finest first, and the scale and shift between the VAE's own latents and model space.

    Official values: Stability-AI/sd3.5 `sd3_impls.SDVAE`; scaling_factor and shift_factor of diffusers' config.json.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 16
    blocks_per_level: int = 2  # in the encoder; the decoder has one more
    groups: int = 32
    scale: float = 1.5305
    shift: float = 0.0609

    def __post_init__(self) -> None:
        """Raise ValueError where a width is not a multiple of the number of groups."""
        if uneven := [width for width in self.widths if width % self.groups]:
            raise ValueError(f"VAE widths {uneven} are not multiples of the {self.groups} groups of their norms")

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return int(2 ** (len(self.widths) - 1))

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], *, groups: int = 32, scale: float = 1.5305, shift: float = 0.0609
    ) -> Self:
        """Infer widths, latent channels and depth from `{official key: shape}`.

        Raises:
            ValueError: the tensors are not those of a VAE in LDM names.
        """
        widths: list[int] = []
        blocks = 0
        while (key := f"encoder.down.{len(widths)}.block.0.conv1.weight") in shapes:
            widths.append(shapes[key][0])
        while f"encoder.down.0.block.{blocks}.conv1.weight" in shapes:
            blocks += 1
        if not widths or "decoder.conv_in.weight" not in shapes:
            raise ValueError(f"not a VAE in LDM names: no encoder levels or no decoder among {len(shapes)} tensors")
        return cls(tuple(widths), shapes["decoder.conv_in.weight"][1], blocks, groups, scale, shift)


class ResnetBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a residual shortcut (a 1x1 convolution where the width changes)."""

    def __init__(self, in_width: int, out_width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_width, eps=1e-6)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_width, eps=1e-6)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        if in_width != out_width:
            self.nin_shortcut = nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        update = self.conv1(F.silu(self.norm1(x)))
        update = self.conv2(F.silu(self.norm2(update)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + update


class AttnBlock(nn.Module):
    """Self-attention over all latent cells, with one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        normed = self.norm(x)
        # Contiguous, because fused attention refuses other layouts and the fallback holds all hw x hw scores.
        q, k, v = (
            part(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for part in (self.q, self.k, self.v)
        )
        z = F.scaled_dot_product_attention(q, k, v)  # b 1 hw c
        return x + self.proj_out(z.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halve both sides: pad right and bottom by one, then a 3x3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    """The middle, at the coarsest level: resnet block, attention, resnet block."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttnBlock(width, groups)
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class DownLevel(nn.Module):
    """Resnet blocks of one width, then `Downsample` (not after the coarsest level)."""

    def __init__(self, in_width: int, width: int, blocks: int, groups: int, *, last: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(*_resnets(in_width, width, blocks, groups))
        self.downsample = nn.Identity() if last else Downsample(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.downsample(self.block(x))


class UpLevel(nn.Module):
    """Resnet blocks of one width, then `Upsample` (not after the finest level)."""

    def __init__(self, in_width: int, width: int, blocks: int, groups: int, *, last: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(*_resnets(in_width, width, blocks, groups))
        self.upsample = nn.Identity() if last else Upsample(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.upsample(self.block(x))


def _resnets(in_width: int, width: int, blocks: int, groups: int) -> Iterator[ResnetBlock]:
    return (ResnetBlock(width if i else in_width, width, groups) for i in range(blocks))


class Encoder(nn.Module):
    """Picture to the mean and the log-variance of its latent, one after the other in the channels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups, last = config.widths, config.groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[max(i - 1, 0)], width, config.blocks_per_level, groups, last=i == last)
            for i, width in enumerate(widths)
        )
        self.mid = Mid(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b z2 h8 w8"]:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent to picture. `up` is indexed by level, finest first, and runs from the last level to the first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups, last = config.widths, config.groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups)
        self.up = nn.ModuleList(
            UpLevel(widths[min(i + 1, last)], width, config.blocks_per_level + 1, groups, last=i == 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Float[Tensor, "b z h w"]) -> Float[Tensor, "b 3 h8 w8"]:
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution for each value of a latent [b, z, h, w], in model space."""

    mean: Tensor
    std: Tensor

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A random latent; its noise is drawn on the generator's device, or without a generator on the mean's."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


class VAE(nn.Module):
    """Encoder and decoder; both take and return latents in model space, (z - shift) * scale."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image: Float[Tensor, "b 3 h w"]) -> DiagonalGaussian:
        """Encode pictures with pixels in [-1, 1] to the distribution of their latents.

        Raises:
            ValueError: a side of the picture is not a multiple of `config.downscale` (8).
        """
        self.check_sides(image)
        return self.posterior(self.encoder(image))

    def check_sides(self, image: Float[Tensor, "b 3 h w"]) -> None:
        """Raise ValueError unless both sides of a picture are multiples of `config.downscale`."""
        if any(size % self.config.downscale for size in image.shape[2:]):
            raise ValueError(
                f"picture is {image.shape[2]} x {image.shape[3]} pixels; both must be multiples of "
                f"{self.config.downscale}"
            )

    def posterior(self, moments: Float[Tensor, "b z2 h w"]) -> DiagonalGaussian:
        """The distribution, in model space, that the encoder's output describes: means, then log-variances."""
        mean, logvar = moments.chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR))
        return DiagonalGaussian(self.to_model(mean), std * self.config.scale)

    def decode(self, latent: Float[Tensor, "b z h w"]) -> Float[Tensor, "b 3 h8 w8"]:
        """Decode latents in model space to pictures with pixels about in [-1, 1], not clamped."""
        return self.decoder(self.from_model(latent))

    def to_model(self, z: Tensor) -> Tensor:
        """Convert latents of the VAE to model space."""
        return (z - self.config.shift) * self.config.scale

    def from_model(self, latent: Tensor) -> Tensor:
        """Convert latents in model space to those of the VAE."""
        return latent / self.config.scale + self.config.shift
