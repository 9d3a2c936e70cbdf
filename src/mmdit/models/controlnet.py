"""ControlNets for Stable Diffusion 3 and 3.5: a second, smaller net whose outputs are added to the image tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.models.attention import Attend
from mmdit.models.blocks import JointBlock
from mmdit.models.config import MMDiTConfig, table_side
from mmdit.models.layers import (
    Mlp,
    Modulation,
    PatchEmbed,
    SelfAttention,
    centre_of_table,
    layer_norm,
    modulate,
    sincos_pos_embed,
    timestep_sinusoid,
)

ControlKind = Literal["blur", "canny", "depth", "tile", "pose", "inpaint"]
CONTROL_KINDS: tuple[ControlKind, ...] = get_args(ControlKind)
_FREQUENCIES = 256  # channels of the sinusoidal timestep embedding
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True)
class ControlNetConfig:
    """The dimensions of a ControlNet, and the conventions with which it was trained.

    There are two kinds. Stability's nets for SD3.5-Large (19 blocks of width 2432) have single-stream blocks, read no
    text tokens, and take the image tokens that the transformer has embedded. InstantX's nets for SD3-Medium (6 or 12
    blocks of width 1536) have joint blocks, and their own text embedder, patch embedding and position table.
    """

    depth: int  # number of blocks, and therefore of residuals
    hidden_size: int  # equal to the transformer's
    pooled_dim: int  # width of the pooled text vector
    hint_channels: int = 16  # 17 for inpainting: the latents of the masked picture, and the mask
    context_dim: int | None = None  # width of the text tokens; None: single-stream blocks, which read none
    pos_embed_size: int | None = None  # side of the net's own position table, in patches; None without a table
    head_dim: int = 64
    patch_size: int = 2
    in_channels: int = 16
    mlp_dim: int | None = None  # None: 4 x hidden_size
    qk_norm: Literal["rms"] | None = None
    kind: ControlKind | None = None  # kind of the hint; None where the files do not specify it
    # diffusers' force_zeros_for_pooled_projection: the net was trained with a pooled text vector of zeros, and with
    # hint latents that are scaled but not shifted.
    zero_pooled: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError, with the numbers, if they are inconsistent."""
        for name in ("depth", "hidden_size", "pooled_dim", "head_dim", "patch_size", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"ControlNetConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.head_dim or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 and of head_dim {self.head_dim}")
        if self.hint_channels not in (self.in_channels, self.in_channels + 1):
            raise ValueError(
                f"the hint has {self.hint_channels} channels, expected {self.in_channels}, or {self.in_channels + 1} "
                "with a mask"
            )
        if (self.context_dim is None) != (self.pos_embed_size is None):
            raise ValueError(
                "a ControlNet has both a text embedder and a position table (joint blocks) or neither (single-stream "
                f"blocks); got context_dim {self.context_dim} and pos_embed_size {self.pos_embed_size}"
            )
        if self.kind is not None and self.kind not in CONTROL_KINDS:
            raise ValueError(f"kind must be one of {', '.join(CONTROL_KINDS)}, got {self.kind!r}")
        if self.kind is not None and (self.kind == "inpaint") != self.inpaints:
            raise ValueError(
                f"kind is {self.kind!r}, but the hint has {self.hint_channels} channels: an inpainting net has "
                f"{self.in_channels + 1}, all others {self.in_channels}"
            )
        if self.mlp_dim is None:
            object.__setattr__(self, "mlp_dim", 4 * self.hidden_size)
        if self.inpaints:
            object.__setattr__(self, "kind", "inpaint")

    @property
    def heads(self) -> int:
        """Attention heads per stream."""
        return self.hidden_size // self.head_dim

    @property
    def is_joint(self) -> bool:
        """Whether the net has joint blocks, which read text tokens."""
        return self.context_dim is not None

    @property
    def inpaints(self) -> bool:
        """Whether the hint contains a mask channel."""
        return self.hint_channels == self.in_channels + 1

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, Sequence[int]],
        *,
        kind: ControlKind | None = None,
        zero_pooled: bool | None = None,
    ) -> Self:
        """Infer the config from `{official key: shape}`; a net with a text embedder has joint blocks.

        ComfyUI (`comfy/cldm/dit_embedder.py`) treats a net whose pooled text vector is as wide as its tokens as a 2B
        net with parallel blocks. No such net was published, and this function does not support it.

        Args:
            shapes: the shapes of all tensors.
            kind, zero_pooled: values that cannot be inferred. `zero_pooled` None is True for nets with joint blocks, as
                in diffusers.

        Raises:
            KeyError: a tensor that the inference needs is missing.
            ValueError: the shapes contradict each other.
        """
        found = {key: tuple(shape) for key, shape in shapes.items()}
        hidden, hint_channels, patch, _ = found["pos_embed_input.proj.weight"]
        joint = "context_embedder.weight" in found
        stream = "transformer_blocks.0.x_block" if joint else "transformer_blocks.0"
        norm = next((shape[0] for key, shape in found.items() if key.endswith(("ln_q.weight", "ln_k.weight"))), None)
        in_channels = found["pos_embed.proj.weight"][1] if joint else hint_channels
        return cls(
            depth=1 + max((int(block[1]) for key in found if (block := _BLOCK.match(key))), default=-1),
            hidden_size=hidden,
            pooled_dim=found["time_text_embed.text_embedder.linear_1.weight"][1],
            hint_channels=hint_channels,
            context_dim=found["context_embedder.weight"][1] if joint else None,
            pos_embed_size=table_side(found["pos_embed.pos_embed"][1]) if joint else None,
            head_dim=norm or 64,
            patch_size=patch,
            in_channels=in_channels,
            mlp_dim=found[f"{stream}.mlp.fc1.weight"][0],
            qk_norm="rms" if norm else None,
            kind=kind,
            zero_pooled=joint if zero_pooled is None else zero_pooled,
        )

    def joint_blocks(self) -> MMDiTConfig:
        """The config of the joint blocks, with one more block, so that none of them is a last, context-free block."""
        assert self.context_dim is not None, "single-stream blocks are no joint blocks"
        assert self.pos_embed_size is not None, "joint blocks come with a table"
        return MMDiTConfig(
            depth=self.depth + 1,
            hidden_size=self.hidden_size,
            context_dim=self.context_dim,
            pooled_dim=self.pooled_dim,
            pos_embed_size=self.pos_embed_size,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            qk_norm=self.qk_norm,
        )


class EmbedMlp(nn.Module):
    """Two Linears with a SiLU between them, with the key names of the files (`timestep_embedder`, `text_embedder`)."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """The conditioning vector: embedded timestep + embedded pooled text (`time_text_embed`)."""

    def __init__(self, pooled_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.timestep_embedder = EmbedMlp(_FREQUENCIES, hidden_size)
        self.text_embedder = EmbedMlp(pooled_dim, hidden_size)

    def forward(self, timestep: Float[Tensor, " b"], pooled: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        return self.timestep_embedder(timestep_sinusoid(timestep).to(pooled.dtype)) + self.text_embedder(pooled)


class TableEmbed(PatchEmbed):
    """Patches projected to tokens, plus the centre crop of a position table (`pos_embed` of nets with joint blocks)."""

    pos_embed: Tensor

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int, side: int) -> None:
        super().__init__(patch_size, in_channels, hidden_size)
        self.side, self.patch_size = side, patch_size
        self.register_buffer("pos_embed", sincos_pos_embed(hidden_size, side))

    def forward(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        rows, columns = (size // self.patch_size for size in latent.shape[2:])
        return super().forward(latent) + centre_of_table(self.pos_embed, self.side, rows, columns)


class SingleBlock(nn.Module):
    """A block for image tokens only: attention and MLP, modulated by the 6 chunks of adaLN, without QK-norm.

    It returns the text tokens unchanged, so that it has the call signature of a joint block. Source: Stability-AI/sd3.5
    `dit_embedder.py`.
    """

    chunks = 6  # of adaLN: shift, scale and gate of attention, then those of the MLP

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, config.head_dim, qk_norm=config.qk_norm == "rms")
        self.resid_mid = nn.Identity()
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, config.mlp_dim or 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))
        self.attend = Attend()

    def forward(
        self, context: Tensor, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]
    ) -> tuple[Tensor, Float[Tensor, "b l d"]]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(self.chunks, dim=-1)
        update = self.attn(modulate(self.norm1(x), Modulation(shift, scale)), lambda qkv: self.attend(*qkv))
        x = self.resid_mid(x + gate.unsqueeze(1) * update)
        return context, x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), Modulation(shift_mlp, scale_mlp)))


class ControlNet(nn.Module):
    """Computes the residuals that a hint (edges, depth, a blurred picture ...) adds to an MMDiT's image tokens.

    Parameter names are those of Stability's files, and for nets with joint blocks those of InstantX's, with q, k and v
    fused. See `ControlNetConfig` for the two kinds and `mmdit.load_controlnet` to read a file.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        if config.context_dim is not None and config.pos_embed_size is not None:
            self.pos_embed = TableEmbed(patch, config.in_channels, width, config.pos_embed_size)
            self.context_embedder = nn.Linear(config.context_dim, width)
        self.pos_embed_input = PatchEmbed(patch, config.hint_channels, width)
        self.time_text_embed = TimeTextEmbed(config.pooled_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config.joint_blocks(), index=i) if config.is_joint else SingleBlock(config)
            for i in range(config.depth)
        )
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))

    def forward(
        self,
        latent: Float[Tensor, "b c h w"],
        timestep: Float[Tensor, " b"],
        context: Float[Tensor, "b n k"],
        pooled: Float[Tensor, "b p"],
        hint: Float[Tensor, "b e rows columns"],
        tokens: Float[Tensor, "b l d"] | None = None,
    ) -> list[Float[Tensor, "b l d"]]:
        """Compute one residual of the image tokens for each block of the net.

        Args:
            latent: the latents that the transformer gets, [b, c, h, w], in model space.
            timestep: 1000 x sigma, one per sample.
            context: text tokens [b, n, k]; only joint blocks read them.
            pooled: the pooled text vectors [b, p].
            hint: the hint's latents; for an inpainting net, the mask is an additional channel.
            tokens: the latent's tokens [b, l, d] with positions, as the transformer embeds them. Nets with joint blocks
                have their own embedder and need none.

        Raises:
            ValueError: a size does not fit the config, or tokens are missing.
        """
        self.check(latent, context, pooled, hint, tokens)
        c = self.time_text_embed(timestep, pooled)
        if self.config.is_joint:
            context, tokens = self.context_embedder(context), self.pos_embed(latent)
        x = tokens + self.pos_embed_input(hint)
        residuals = []
        for block, project in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            context, x = block(context, x, c)
            residuals.append(project(x))
        return residuals

    def check(self, latent: Tensor, context: Tensor, pooled: Tensor, hint: Tensor, tokens: Tensor | None) -> None:
        """Raise ValueError, with the numbers, for inputs that this net cannot take."""
        config = self.config
        pairs: list[tuple[str, object, object]] = [
            ("latent channels", latent.shape[1], config.in_channels),
            ("hint channels", hint.shape[1], config.hint_channels),
            ("the hint's rows and columns", list(hint.shape[2:]), list(latent.shape[2:])),
            ("pooled width", pooled.shape[-1], config.pooled_dim),
        ]
        if config.is_joint:
            pairs.append(("context width", context.shape[-1], config.context_dim))
        elif tokens is None:
            raise ValueError("tokens are missing: this net has no embedder, give it the tokens of the transformer")
        else:
            pairs.append(("width of the transformer's tokens", tokens.shape[-1], config.hidden_size))
        for name, found, expected in pairs:
            if found != expected:
                raise ValueError(f"{name}: got {found}, this ControlNet takes {expected}")


def made_pos_embed(
    hidden_size: int, rows: int, columns: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "1 l d"]:
    """The positions that ComfyUI adds to the tokens of Stability's nets, instead of the transformer's table.

    Coordinates run from 0 to 15 along the shorter side; along the longer side, they extend beyond this range on both
    ends. The first half of the channels encodes the column and the second half the row, each as [sin | cos], in
    float32. Source: ComfyUI `comfy/ldm/modules/diffusionmodules/mmdit.py`, `get_2d_sincos_pos_embed_torch`.
    """
    short, quarter = min(rows, columns), hidden_size // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)

    def waves(count: int) -> Tensor:
        reach = 7.5 * count / short
        angles = torch.linspace(7.5 - reach, 7.5 + reach, count, device=device)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # count d/2

    column = waves(columns)[None, :, :].expand(rows, -1, -1)
    row = waves(rows)[:, None, :].expand(-1, columns, -1)
    return torch.cat([column, row], dim=-1).reshape(1, rows * columns, hidden_size)
