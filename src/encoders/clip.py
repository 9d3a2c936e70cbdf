"""The text towers of CLIP-L and CLIP-G. Module names are those of the official files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from encoders.precision import LayerNorm, Linear, upcast

Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True)
class CLIPConfig:
    """Shapes of a CLIP text tower, and its activation, which no shape tells: quick_gelu in CLIP-L, gelu in CLIP-G.

    Official values (transformers' CLIPTextConfig): L 768 x 12 layers, G 1280 x 32 layers. The official `eos_token_id`
    is 2, by which transformers means None here.
    """

    width: int
    layers: int
    mlp_dim: int
    activation: Activation
    heads: int
    vocabulary: int = 49408
    positions: int = 77
    projection_dim: int | None = None  # None: the file has no text_projection (clip_l.safetensors)
    eos_id: int | None = None  # pooled at the first token of this id; None: at the largest id of the prompt

    def __post_init__(self) -> None:
        """Raise ValueError, with the numbers, where the fields cannot describe a tower."""
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"CLIP activation must be 'quick_gelu' or 'gelu', got {self.activation!r}")
        if self.width % self.heads:
            raise ValueError(f"CLIP width {self.width} is not a multiple of its {self.heads} heads")
        if self.eos_id is not None and not 0 <= self.eos_id < self.vocabulary:
            raise ValueError(f"CLIP eos_token_id is {self.eos_id}, its vocabulary has {self.vocabulary} tokens")

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, Sequence[int]],
        *,
        activation: Activation,
        heads: int | None = None,
        eos_id: int | None = None,
    ) -> Self:
        """Infer the config from `{official key: shape}`; heads have size 64 unless their number is given.

        Raises:
            ValueError: the tensors are not those of a CLIP text tower.
        """
        embedding = shapes.get("text_model.embeddings.token_embedding.weight")
        if embedding is None:
            raise ValueError(f"not a CLIP text tower: no token embedding among {len(shapes)} tensors")
        layers = 0
        while f"text_model.encoder.layers.{layers}.mlp.fc1.weight" in shapes:
            layers += 1
        projection = shapes.get("text_projection.weight")
        return cls(
            width=embedding[1],
            layers=layers,
            mlp_dim=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            activation=activation,
            heads=heads or max(embedding[1] // 64, 1),
            vocabulary=embedding[0],
            positions=shapes["text_model.embeddings.position_embedding.weight"][0],
            projection_dim=None if projection is None else projection[0],
            eos_id=eos_id,
        )


class CLIPOutput(NamedTuple):
    """The outputs of a tower that SD3 uses."""

    penultimate: Tensor  # [b, n, width]: output of the last layer but one, without final norm
    last: Tensor  # [b, n, width]: output of the last layer after the final norm
    pooled: Tensor  # [b, width]: `last` at the first end-of-text token, unprojected
    projected: Tensor | None  # [b, projection_dim], or None where the file has no projection


class CLIPText(nn.Module):
    """A CLIP text tower: causal pre-norm transformer over 77 learned positions.

    Source: Stability-AI/sd3.5 `other_impls.py`; transformers `CLIPTextModelWithProjection`.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection_dim is not None:
            self.text_projection = Linear(config.width, config.projection_dim, bias=False)

    def forward(self, ids: Int[Tensor, "b n"], dtype: torch.dtype | None = None) -> CLIPOutput:
        """Encode token ids; with a `dtype`, 16-bit weights compute in that (float32) in place of their own."""
        penultimate, last = self.text_model(ids, dtype)
        # The official end-of-text id is the largest of the vocabulary; argmax finds the first place of the largest.
        ranks = ids if self.config.eos_id is None else (ids == self.config.eos_id).int()
        pooled = last[torch.arange(len(ids), device=ids.device), ranks.argmax(dim=-1)]
        projected = None if self.config.projection_dim is None else self.text_projection(pooled)
        return CLIPOutput(penultimate, last, pooled, projected)


class TextModel(nn.Module):
    """Embeddings, layers and final norm (`text_model`)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.width)

    def forward(
        self, ids: Int[Tensor, "b n"], dtype: torch.dtype | None = None
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        penultimate, last = self.encoder(self.embeddings(ids, dtype))
        return penultimate, self.final_layer_norm(last)


class Embeddings(nn.Module):
    """Token plus learned position."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, ids: Int[Tensor, "b n"], dtype: torch.dtype | None = None) -> Float[Tensor, "b n d"]:
        positions = self.position_embedding.weight[: ids.shape[1]]
        return upcast(self.token_embedding(ids), dtype) + upcast(positions, dtype)


class Encoder(nn.Module):
    """The layers; returns the outputs of the last layer but one and of the last."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        penultimate = x
        for layer in self.layers:
            penultimate = cast(Layer, layer).resid_pre(x)
            x = layer(penultimate)
        return penultimate, x


class Layer(nn.Module):
    """Causal attention, then an MLP, each after a norm and around a residual.

    `resid_pre` and `resid_mid` have no parameters: they name the residual stream before the layer (the encoder calls
    it, since the stream before the last layer is an output too) and between attention and MLP, for hooks to change.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.resid_pre, self.resid_mid = nn.Identity(), nn.Identity()
        self.layer_norm1 = LayerNorm(config.width)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = self.resid_mid(x + self.self_attn(self.layer_norm1(x)))
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )  # b heads n head_dim
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(z.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linears around the tower's activation."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_dim)
        self.act = nn.GELU() if config.activation == "gelu" else QuickGELU()
        self.fc2 = Linear(config.mlp_dim, config.width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(self.act(self.fc1(x)))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
