"""Where inside each model every named activation can be read and changed: data, no hooks.

Names follow the official checkpoint keys. A point is one side of one submodule, and a part of what passes there.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.models.config import MMDiTConfig
from mmdit.models.controlnet import ControlNetConfig

Side = Literal["input", "output"]
Layout = Literal["vector", "tokens", "heads", "split", "joint", "pattern", "by_head", "map"]
Stream = Literal["text", "image", "joint"]

# Names of the dimensions after the batch, in the form in which a point is shown. The layout may differ:
# "heads" is [b, l, heads x d], "split" is [b, l, heads, d]. "pattern" and "by_head" are computed from what passes.
AXES: Final[dict[Layout, tuple[str, ...]]] = {
    "vector": ("channel",),
    "tokens": ("token", "channel"),
    "heads": ("head", "token", "channel"),
    "split": ("head", "token", "channel"),
    "joint": ("head", "token", "channel"),
    "pattern": ("head", "query", "key"),
    "by_head": ("head", "token", "channel"),
    "map": ("channel", "row", "column"),
}
DERIVED: Final = ("pattern", "by_head")


class Chunk(NamedTuple):
    """Slice number `part` of `of` equal slices of the last dimension."""

    part: int
    of: int


class Point(NamedTuple):
    """One activation: `side` of `module`, its `argument`-th tensor, and of that the `chunk`."""

    name: str
    module: str
    side: Side
    argument: int = 0
    chunk: Chunk | None = None
    layout: Layout = "tokens"
    heads: int = 1
    stream: Stream | None = None  # the stream that the tokens belong to

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the dimensions after the batch."""
        return AXES[self.layout]


def point_table(config: MMDiTConfig) -> dict[str, Point]:
    """All points of an MMDiT by name, roughly in the order in which a forward passes them."""
    points = [Point(name, name, "output", layout="vector") for name in ("t_embedder", "y_embedder")]
    points += [Point("x_embedder", "x_embedder", "output", stream="image")]
    points += [Point("context_embedder", "context_embedder", "output", stream="text")]
    for i in range(config.depth):
        points += _block_points(config, i)
    points += _adaln("final_layer", ("shift", "scale"))
    points += [Point("final_layer", "final_layer", "output", stream="image")]
    return _named(points)


def control_points(config: ControlNetConfig) -> dict[str, Point]:
    """All points of a ControlNet; `controlnet_blocks` are the residuals that it gives to the transformer."""
    embedders = [
        Point(f"time_text_embed.{name}_embedder", f"time_text_embed.{name}_embedder", "output", layout="vector")
        for name in ("timestep", "text")
    ]
    points = [*embedders, Point("pos_embed_input", "pos_embed_input", "output", stream="image")]
    if config.is_joint:
        points.append(Point("pos_embed", "pos_embed", "output", stream="image"))
        points.append(Point("context_embedder", "context_embedder", "output", stream="text"))
    for i in range(config.depth):
        block = f"transformer_blocks.{i}"
        streams = [(0, f"{block}.context_block"), (1, f"{block}.x_block")] if config.is_joint else [(1, block)]
        for argument, name in streams:
            points += _stream_points(config.heads, block, name, argument)
        points += _attend(f"{block}.attend", config.heads, "joint" if config.is_joint else "image")
        points.append(Point(f"controlnet_blocks.{i}", f"controlnet_blocks.{i}", "output", stream="image"))
    return _named(points)


def _block_points(config: MMDiTConfig, index: int) -> list[Point]:
    block = f"joint_blocks.{index}"
    last, dual = index == config.depth - 1, index in config.dual_attention_blocks
    points = []
    for argument, stream in enumerate(("context_block", "x_block")):
        ends = last and stream == "context_block"
        dual_here = dual and stream == "x_block"
        points += _stream_points(config.heads, block, f"{block}.{stream}", argument, ends=ends, dual=dual_here)
    points += _attend(f"{block}.attend", config.heads, "joint")
    return points + (_attend(f"{block}.attend2", config.heads, "image") if dual else [])


def _stream_points(
    heads: int, block: str, name: str, argument: int, *, ends: bool = False, dual: bool = False
) -> list[Point]:
    """Points of one stream of a block: its submodules are in `name`, its tokens the block's `argument`-th."""
    whose: Stream = "text" if name.endswith("context_block") else "image"
    first = Point(f"{name}.resid_pre", block, "input", argument, stream=whose)
    if ends:
        return [first, *_adaln(name, ("shift_msa", "scale_msa")), *_attention(f"{name}.attn", heads, whose, ends=True)]
    parts = tuple(f"{what}_{where}" for where in ("msa", "mlp") for what in ("shift", "scale", "gate"))
    parts += ("shift_msa2", "scale_msa2", "gate_msa2") if dual else ()
    points = [first, *_adaln(name, parts), *_attention(f"{name}.attn", heads, whose)]
    points += _attention(f"{name}.attn2", heads, whose) if dual else []
    return [
        *points,
        Point(f"{name}.resid_mid", f"{name}.resid_mid", "output", stream=whose),
        Point(f"{name}.mlp.in", f"{name}.mlp.fc1", "input", stream=whose),
        Point(f"{name}.mlp.pre", f"{name}.mlp.fc1", "output", stream=whose),
        Point(f"{name}.mlp.post", f"{name}.mlp.fc2", "input", stream=whose),
        Point(f"{name}.mlp.out", f"{name}.mlp.fc2", "output", stream=whose),
        Point(f"{name}.resid_post", block, "output", argument, stream=whose),
    ]


def _attention(name: str, heads: int, stream: Stream, *, ends: bool = False) -> list[Point]:
    """Points of the attention of one stream; `out` is the sum of `out_by_head` over heads, plus the bias."""
    points = [Point(f"{name}.in", f"{name}.qkv", "input", stream=stream)]
    points += [
        Point(f"{name}.{part}", f"{name}.qkv", "output", 0, Chunk(i, 3), "heads", heads, stream)
        for i, part in enumerate("qkv")
    ]
    points += [
        Point(f"{name}.{part}_normed", f"{name}.ln_{part}", "output", 0, None, "split", heads, stream) for part in "qk"
    ]
    if ends:
        return points
    return [
        *points,
        Point(f"{name}.z", f"{name}.proj", "input", 0, None, "heads", heads, stream),
        Point(f"{name}.out_by_head", f"{name}.proj", "input", 0, None, "by_head", heads, stream),
        Point(f"{name}.out", f"{name}.proj", "output", stream=stream),
    ]


def _attend(name: str, heads: int, stream: Stream) -> list[Point]:
    """Points of attention itself, over the tokens of both streams; text tokens come first."""
    points = [Point(f"{name}.{part}", name, "input", i, None, "joint", heads, stream) for i, part in enumerate("qkv")]
    points += [Point(f"{name}.pattern", name, "output", 0, None, "pattern", heads, stream)]
    return [*points, Point(f"{name}.z", name, "output", 0, None, "joint", heads, stream)]


def _adaln(name: str, parts: tuple[str, ...]) -> list[Point]:
    module, of = f"{name}.adaLN_modulation", len(parts)
    return [Point(f"{name}.adaln.{part}", module, "output", 0, Chunk(i, of), "vector") for i, part in enumerate(parts)]


def clip_points(config: CLIPConfig) -> dict[str, Point]:
    """All points of a CLIP tower."""
    points = [Point("text_model.embeddings", "text_model.embeddings", "output")]
    for i in range(config.layers):
        points += _clip_layer(f"text_model.encoder.layers.{i}", config.heads)
    points += [Point("text_model.final_layer_norm", "text_model.final_layer_norm", "output")]
    if config.projection_dim is not None:
        points += [Point("text_projection", "text_projection", "output", layout="vector")]
    return _named(points)


def t5_points(config: T5Config) -> dict[str, Point]:
    """All points of a T5 encoder."""
    points = [Point("shared", "shared", "output")]
    for i in range(config.layers):
        points += _t5_block(f"encoder.block.{i}", config.heads)
    return _named([*points, Point("encoder.final_layer_norm", "encoder.final_layer_norm", "output")])


def vae_points(config: VAEConfig) -> dict[str, Point]:
    """All points of the encoder and the decoder of a VAE; every value is a map [b, channels, rows, columns]."""
    levels, points = len(config.widths), [_out("encoder.conv_in")]
    for i in range(levels):
        for j in range(config.blocks_per_level):
            points += _resnet(f"encoder.down.{i}.block.{j}")
        points += [_out(f"encoder.down.{i}.downsample")] if i < levels - 1 else []
    points += [*_middle("encoder.mid"), _out("encoder.norm_out"), _out("encoder.conv_out")]
    points += [_out("decoder.conv_in"), *_middle("decoder.mid")]
    for i in reversed(range(levels)):
        for j in range(config.blocks_per_level + 1):
            points += _resnet(f"decoder.up.{i}.block.{j}")
        points += [_out(f"decoder.up.{i}.upsample")] if i else []
    return _named([*points, _out("decoder.norm_out"), _out("decoder.conv_out")])


def _clip_layer(name: str, heads: int) -> list[Point]:
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    return [
        Point(f"{name}.resid_pre", f"{name}.resid_pre", "output"),
        *(
            Point(f"{attention}.{part}", f"{attention}.{part}_proj", "output", 0, None, "heads", heads)
            for part in "qkv"
        ),
        Point(f"{attention}.z", f"{attention}.out_proj", "input", 0, None, "heads", heads),
        Point(f"{attention}.out_by_head", f"{attention}.out_proj", "input", 0, None, "by_head", heads),
        Point(f"{attention}.out", f"{attention}.out_proj", "output"),
        Point(f"{name}.resid_mid", f"{name}.resid_mid", "output"),
        Point(f"{mlp}.in", f"{mlp}.fc1", "input"),
        Point(f"{mlp}.pre", f"{mlp}.fc1", "output"),
        Point(f"{mlp}.post", f"{mlp}.fc2", "input"),
        Point(f"{mlp}.out", f"{mlp}.fc2", "output"),
        Point(f"{name}.resid_post", name, "output"),
    ]


def _t5_block(name: str, heads: int) -> list[Point]:
    """The MLP is gated: `mlp.gate` goes through the GELU and is multiplied with `mlp.pre`."""
    attention, mlp = f"{name}.layer.0.SelfAttention", f"{name}.layer.1.DenseReluDense"
    return [
        Point(f"{name}.resid_pre", name, "input"),
        *(Point(f"{attention}.{part}", f"{attention}.{part}", "output", 0, None, "heads", heads) for part in "qkv"),
        Point(f"{attention}.z", f"{attention}.o", "input", 0, None, "heads", heads),
        Point(f"{attention}.out_by_head", f"{attention}.o", "input", 0, None, "by_head", heads),
        Point(f"{attention}.out", f"{attention}.o", "output"),
        Point(f"{name}.resid_mid", f"{name}.layer.1", "input"),
        Point(f"{mlp}.gate", f"{mlp}.wi_0", "output"),
        Point(f"{mlp}.pre", f"{mlp}.wi_1", "output"),
        Point(f"{mlp}.post", f"{mlp}.wo", "input"),
        Point(f"{mlp}.out", f"{mlp}.wo", "output"),
        Point(f"{name}.resid_post", name, "output"),
    ]


def _resnet(name: str) -> list[Point]:
    """`update` is what the block adds."""
    first = Point(f"{name}.resid_pre", name, "input", layout="map")
    return [first, _out(f"{name}.conv2", f"{name}.update"), _out(name, f"{name}.resid_post")]


def _middle(name: str) -> list[Point]:
    attention = f"{name}.attn_1"
    return [
        *_resnet(f"{name}.block_1"),
        *(_out(f"{attention}.{part}") for part in "qkv"),
        _out(f"{attention}.proj_out", f"{attention}.update"),
        _out(attention, f"{attention}.resid_post"),
        *_resnet(f"{name}.block_2"),
    ]


def _out(module: str, name: str | None = None) -> Point:
    return Point(name or module, module, "output", layout="map")


def _named(points: list[Point]) -> dict[str, Point]:
    return {point.name: point for point in points}
