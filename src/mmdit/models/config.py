"""The config of an MMDiT, inferred from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

_BLOCK = re.compile(r"joint_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class MMDiTConfig:
    """Every number that shapes an MMDiT; nothing in it comes from a file's name.

    Official values (Stability-AI/sd3.5, `sd3_impls.py`): SD3-Medium 24 blocks of width 1536 without QK-norm;
    SD3.5-Medium the same width with RMS QK-norm and second attention in blocks 0-12; SD3.5-Large and Large-Turbo
    38 blocks of width 2432 with RMS QK-norm.
    """

    depth: int  # joint blocks
    hidden_size: int
    context_dim: int  # width of the text tokens that come in: 4096 officially
    pooled_dim: int  # width of the pooled text vector: 2048 officially
    pos_embed_size: int  # side of the square position table, in patches
    head_dim: int = 64
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    mlp_dim: int | None = None  # None: 4 x hidden_size
    qk_norm: Literal["rms"] | None = "rms"
    dual_attention_blocks: tuple[int, ...] = ()  # blocks whose image stream has a second attention (MMDiT-X)
    sample_size: int | None = (
        None  # side of the default picture in latent cells; None: 128, or the whole position table
    )

    def __post_init__(self) -> None:
        """Raise ValueError, with the numbers, where no model can have them."""
        for name in ("depth", "hidden_size", "context_dim", "pooled_dim", "pos_embed_size", "head_dim", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"MMDiTConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of head_dim {self.head_dim}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4, as the position table needs")
        if self.qk_norm not in (None, "rms"):
            raise ValueError(f"qk_norm must be None or 'rms', got {self.qk_norm!r}")
        if any(not 0 <= i < self.depth for i in self.dual_attention_blocks):
            raise ValueError(f"dual_attention_blocks {self.dual_attention_blocks} outside of 0..{self.depth - 1}")
        if self.mlp_dim is None:
            object.__setattr__(self, "mlp_dim", 4 * self.hidden_size)
        if self.sample_size is None:
            object.__setattr__(self, "sample_size", min(128, self.patch_size * self.pos_embed_size))

    @property
    def heads(self) -> int:
        """Attention heads per stream."""
        return self.hidden_size // self.head_dim

    @property
    def max_pixels(self) -> int:
        """Longest side of a picture in pixels: 8 per latent cell, `patch_size` cells per entry of the table."""
        return 8 * self.patch_size * self.pos_embed_size

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], *, sample_size: int | None = None) -> Self:
        """Infer the config from `{official key: shape}` (no prefix); `sample_size` is in no shape.

        Source: Stability-AI/sd3.5 `sd3_impls.BaseModel`; ComfyUI `comfy/model_detection.py`.

        Raises:
            ValueError: a tensor that the inference needs is missing, or the shapes contradict each other.
        """
        shape = _Needed(shapes)
        hidden, in_channels, patch, _ = shape["x_embedder.proj.weight"]
        last = max(_block_numbers(shapes), default=-1)
        norm = next((tuple(of) for key, of in shapes.items() if key.endswith((".ln_q.weight", ".ln_k.weight"))), None)
        return cls(
            depth=last + 1,
            hidden_size=hidden,
            context_dim=shape["context_embedder.weight"][1],
            pooled_dim=shape["y_embedder.mlp.0.weight"][1],
            pos_embed_size=table_side(shape["pos_embed"][1]),
            head_dim=norm[0] if norm else 64,
            patch_size=patch,
            in_channels=in_channels,
            out_channels=shape["final_layer.linear.weight"][0] // patch**2,
            mlp_dim=shape["joint_blocks.0.x_block.mlp.fc1.weight"][0],
            qk_norm="rms" if norm else None,
            dual_attention_blocks=tuple(sorted(_dual_attention_blocks(shapes))),
            sample_size=sample_size,
        )


def table_side(positions: int) -> int:
    """The side of a square position table of so many positions.

    Raises:
        ValueError: it is no square.
    """
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ValueError(f"pos_embed holds {positions} positions, which is not a square")
    return side


class _Needed(dict[str, tuple[int, ...]]):
    """Shapes by key; a key that is missing is an error that names it."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__({key: tuple(shape) for key, shape in shapes.items()})

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise ValueError(f"not an MMDiT: the tensor {key!r} is missing among {len(self)} tensors")


def _block_numbers(shapes: Mapping[str, Sequence[int]]) -> set[int]:
    return {int(found[1]) for key in shapes if (found := _BLOCK.fullmatch(key))}


def _dual_attention_blocks(shapes: Mapping[str, Sequence[int]]) -> set[int]:
    blocks = (found for key in shapes if (found := _BLOCK.fullmatch(key)))
    return {int(found[1]) for found in blocks if found[2].startswith("x_block.attn2.")}
