"""Where inside the text encoders and the VAE each named activation can be read: data, no hooks.

Names follow the official checkpoint keys, as those of `mmdit.inspection.points` do.
"""

from __future__ import annotations

from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.inspection.points import Point


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
    """All points of both halves of a VAE; every value is a map [b, channels, rows, columns]."""
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
        Point(f"{name}.resid_pre", name, "input"),
        *(
            Point(f"{attention}.{part}", f"{attention}.{part}_proj", "output", 0, None, "heads", heads)
            for part in "qkv"
        ),
        Point(f"{attention}.z", f"{attention}.out_proj", "input", 0, None, "heads", heads),
        Point(f"{attention}.out_by_head", f"{attention}.out_proj", "input", 0, None, "by_head", heads),
        Point(f"{attention}.out", f"{attention}.out_proj", "output"),
        Point(f"{name}.resid_mid", f"{name}.layer_norm2", "input"),
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
