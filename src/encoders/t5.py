"""The encoder of T5 v1.1 (T5-XXL in Stable Diffusion 3). Module names are those of the official files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from encoders.precision import Linear, upcast

_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class T5Config:
    """Shapes of a T5 encoder. T5-XXL: width 4096, 24 layers, 64 heads of size 64, MLP 10240."""

    width: int
    layers: int
    heads: int
    head_dim: int
    mlp_dim: int
    vocabulary: int = 32128
    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        """Raise ValueError where the number of buckets cannot be split by sign and distance."""
        if self.buckets % 4 or self.buckets < 4:
            raise ValueError(f"T5 needs a multiple of 4 relative position buckets, got {self.buckets}")

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """Infer the config from `{official key: shape}`.

        Raises:
            ValueError: the tensors are not those of a T5 encoder.
        """
        if missing := [key for key in ("shared.weight", _BIAS) if key not in shapes]:
            raise ValueError(f"not a T5 encoder: {', '.join(missing)} missing among {len(shapes)} tensors")
        layers = 0
        while f"encoder.block.{layers}.layer.1.DenseReluDense.wo.weight" in shapes:
            layers += 1
        buckets, heads = shapes[_BIAS]
        vocabulary, width = shapes["shared.weight"]
        return cls(
            width=width,
            layers=layers,
            heads=heads,
            head_dim=shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
            mlp_dim=shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
            vocabulary=vocabulary,
            buckets=buckets,
        )


class T5Encoder(nn.Module):
    """Token ids to text features [b, n, width], without a mask: padding is attended to, because SD3 was trained so.

    Source: Raffel et al. 2020 (arXiv 1910.10683), T5 v1.1; Stability-AI/sd3.5 `other_impls.py`.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocabulary, config.width)
        self.encoder = Stack(config)

    def forward(self, ids: Int[Tensor, "b n"], dtype: torch.dtype | None = None) -> Float[Tensor, "b n d"]:
        """Encode token ids; with a `dtype`, 16-bit weights compute in that (float32) in place of their own."""
        return self.encoder(upcast(self.shared(ids), dtype))


class Stack(nn.Module):
    """The blocks and the final norm (`encoder`). One table of relative biases, in block 0, serves all blocks.

    The dtype of the embeddings is the one to compute in. From here on it is the bias's, because the residual stream of
    a float16 model is float32.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.max_distance = config.max_distance
        self.block = nn.ModuleList(Block(config, has_bias=i == 0) for i in range(config.layers))
        self.final_layer_norm = RMSNorm(config.width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        table = cast(Tensor, self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias").weight)
        bias = position_bias(upcast(table, x.dtype), x.shape[1], self.max_distance)
        x = widened(x)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x, bias.dtype)


class Block(nn.Module):
    """Attention, then a gated MLP."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, has_bias=has_bias), MlpLayer(config)])

    def forward(self, x: Float[Tensor, "b n d"], bias: Float[Tensor, "1 h n n"]) -> Float[Tensor, "b n d"]:
        return self.layer[1](self.layer[0](x, bias), bias.dtype)


class AttentionLayer(nn.Module):
    """Norm, attention, residual."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.layer_norm = RMSNorm(config.width)
        self.SelfAttention = Attention(config, has_bias=has_bias)

    def forward(self, x: Float[Tensor, "b n d"], bias: Float[Tensor, "1 h n n"]) -> Float[Tensor, "b n d"]:
        return x + self.SelfAttention(self.layer_norm(x, bias.dtype), bias)


class MlpLayer(nn.Module):
    """Norm, gated MLP, residual."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.layer_norm = RMSNorm(config.width)
        self.DenseReluDense = GatedMlp(config)

    def forward(self, x: Float[Tensor, "b n d"], dtype: torch.dtype) -> Float[Tensor, "b n d"]:
        return x + self.DenseReluDense(self.layer_norm(x, dtype))


class Attention(nn.Module):
    """Multi-head attention without scaling of the scores, plus a bias by relative position."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.q, self.k, self.v = (Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, config.width, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Float[Tensor, "b n d"], bias: Float[Tensor, "1 h n n"]) -> Float[Tensor, "b n d"]:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # b heads n head_dim
        return self.o(z.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """wo(gelu_tanh(wi_0 x) * wi_1 x)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = Linear(config.width, config.mlp_dim, bias=False)
        self.wi_1 = Linear(config.width, config.mlp_dim, bias=False)
        self.wo = WideLinear(config.mlp_dim, config.width, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class WideLinear(Linear):
    """A Linear without bias that computes in float32 where its weight is float16."""

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        return super().forward(widened(x))


class RMSNorm(nn.Module):
    """Root-mean-square norm with weight, no bias, eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "b n d"], dtype: torch.dtype | None = None) -> Float[Tensor, "b n d"]:
        """Normalize a residual stream of any dtype; the result has `dtype`, by default the weight's."""
        normed = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)
        return normed.to(self.weight.dtype if dtype is None else dtype)


def widened(x: Tensor) -> Tensor:
    """Upcast float16 to float32; every other dtype stays.

    T5-XXL's residual stream and the output of `wo` exceed 65504, the largest float16; transformers also keeps both in
    float32.
    """
    return x.float() if x.dtype == torch.float16 else x


def position_bias(table: Float[Tensor, "buckets h"], length: int, max_distance: int) -> Float[Tensor, "1 h n n"]:
    """The bias that is added to the attention scores of `length` tokens, by head, query and key."""
    position = torch.arange(length, device=table.device)
    buckets = relative_buckets(position[None, :] - position[:, None], len(table), max_distance)
    return F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0).contiguous()


def relative_buckets(relative: Int[Tensor, "n m"], buckets: int = 32, max_distance: int = 128) -> Int[Tensor, "n m"]:
    """The bucket of each relative position, which is that of the key less that of the query.

    Half of the buckets are for later keys. In each half, the first half of the buckets stands for single distances, and
    the others are logarithmic up to `max_distance`.
    Source: T5, arXiv 1910.10683 section 2.1, as in mesh-tensorflow (bidirectional).
    """
    half = buckets // 2
    exact = half // 2
    distance = relative.abs()
    # float32 as in every reference: at the borders of the logarithmic buckets, rounding decides.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return (relative > 0).long() * half + torch.where(distance < exact, distance, far)
