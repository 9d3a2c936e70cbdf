"""Where inside an MMDiT each named activation can be read: data, no hooks.

Names follow the official checkpoint keys. A point is one side of one submodule, and a part of what passes there.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from mmdit.models.config import MMDiTConfig

Side = Literal["input", "output"]
Layout = Literal["vector", "tokens", "heads", "split", "joint", "pattern", "by_head", "map"]
Stream = Literal["text", "image", "joint"]

# What the dimensions after the batch are, in the form in which a point is shown. As it passes it may lie otherwise:
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
    """The `part`-th `of` so many equal slices of the last dimension."""

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
    stream: Stream | None = None  # whose tokens they are

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the dimensions after the batch."""
        return AXES[self.layout]


def point_table(config: MMDiTConfig) -> dict[str, Point]:
    """All points of a model of this config, by name, about in the order in which a forward passes them."""
    points = [Point(name, name, "output", layout="vector") for name in ("t_embedder", "y_embedder")]
    points += [Point("x_embedder", "x_embedder", "output", stream="image")]
    points += [Point("context_embedder", "context_embedder", "output", stream="text")]
    for i in range(config.depth):
        points += _block_points(config, i)
    points += _adaln("final_layer", ("shift", "scale"))
    points += [Point("final_layer", "final_layer", "output", stream="image")]
    return {point.name: point for point in points}


def _block_points(config: MMDiTConfig, index: int) -> list[Point]:
    block = f"joint_blocks.{index}"
    last, dual = index == config.depth - 1, index in config.dual_attention_blocks
    points = []
    for argument, stream in enumerate(("context_block", "x_block")):
        ends = last and stream == "context_block"
        dual_here = dual and stream == "x_block"
        points += _stream_points(config.heads, block, stream, argument, ends=ends, dual=dual_here)
    points += _attend(f"{block}.attend", config.heads, "joint")
    return points + (_attend(f"{block}.attend2", config.heads, "image") if dual else [])


def _stream_points(heads: int, block: str, stream: str, argument: int, *, ends: bool, dual: bool) -> list[Point]:
    name = f"{block}.{stream}"
    whose: Stream = "text" if stream == "context_block" else "image"
    first = Point(f"{name}.resid_pre", block, "input", argument, stream=whose)
    if ends:
        return [first, *_adaln(name, ("shift_msa", "scale_msa")), *_attention(f"{name}.attn", heads, whose, ends=True)]
    parts = tuple(f"{what}_{where}" for where in ("msa", "mlp") for what in ("shift", "scale", "gate"))
    parts += ("shift_msa2", "scale_msa2", "gate_msa2") if dual else ()
    points = [first, *_adaln(name, parts), *_attention(f"{name}.attn", heads, whose)]
    points += _attention(f"{name}.attn2", heads, whose) if dual else []
    return [
        *points,
        Point(f"{name}.resid_mid", f"{name}.norm2", "input", stream=whose),
        Point(f"{name}.mlp.in", f"{name}.mlp.fc1", "input", stream=whose),
        Point(f"{name}.mlp.pre", f"{name}.mlp.fc1", "output", stream=whose),
        Point(f"{name}.mlp.post", f"{name}.mlp.fc2", "input", stream=whose),
        Point(f"{name}.mlp.out", f"{name}.mlp.fc2", "output", stream=whose),
        Point(f"{name}.resid_post", block, "output", argument, stream=whose),
    ]


def _attention(name: str, heads: int, stream: Stream, *, ends: bool = False) -> list[Point]:
    """Of one stream; `out_by_head` is what each head adds to `out`, which is their sum and the bias."""
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
    """Of attention itself, over all tokens that meet in it; text tokens come first."""
    points = [Point(f"{name}.{part}", name, "input", i, None, "joint", heads, stream) for i, part in enumerate("qkv")]
    points += [Point(f"{name}.pattern", name, "output", 0, None, "pattern", heads, stream)]
    return [*points, Point(f"{name}.z", name, "output", 0, None, "joint", heads, stream)]


def _adaln(name: str, parts: tuple[str, ...]) -> list[Point]:
    module, of = f"{name}.adaLN_modulation", len(parts)
    return [Point(f"{name}.adaln.{part}", module, "output", 0, Chunk(i, of), "vector") for i, part in enumerate(parts)]
