"""Where inside an MMDiT each named activation can be read: data, no hooks.

Names follow the official checkpoint keys. A point is one side of one submodule, and a part of what passes there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mmdit.config import MMDiTConfig

Side = Literal["input", "output"]


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


def point_table(config: MMDiTConfig) -> dict[str, Point]:
    """All points of a model of this config, by name, in the order in which a forward passes them."""
    points = [Point("x_embedder", "x_embedder", "output"), Point("context_embedder", "context_embedder", "output")]
    points += [Point(name, name, "output") for name in ("t_embedder", "y_embedder")]
    for i in range(config.depth):
        points += _block_points(config, i)
    points += _adaln("final_layer", ("shift", "scale"))
    points += [Point("final_layer", "final_layer", "output")]
    return {point.name: point for point in points}


def _block_points(config: MMDiTConfig, index: int) -> list[Point]:
    block = f"joint_blocks.{index}"
    last, dual = index == config.depth - 1, index in config.dual_attention_blocks
    points = []
    for argument, stream in enumerate(("context_block", "x_block")):
        ends = last and stream == "context_block"
        points += _stream_points(block, stream, argument, ends=ends, dual=dual and stream == "x_block")
    return points


def _stream_points(block: str, stream: str, argument: int, *, ends: bool, dual: bool) -> list[Point]:
    name = f"{block}.{stream}"
    points = [Point(f"{name}.resid_pre", block, "input", argument)]
    if ends:
        return points + _adaln(name, ("shift_msa", "scale_msa")) + _attention(f"{name}.attn", ends=True)
    parts = tuple(f"{what}_{where}" for where in ("msa", "mlp") for what in ("shift", "scale", "gate"))
    parts += ("shift_msa2", "scale_msa2", "gate_msa2") if dual else ()
    points += _adaln(name, parts) + _attention(f"{name}.attn")
    points += _attention(f"{name}.attn2") if dual else []
    return [
        *points,
        Point(f"{name}.resid_mid", f"{name}.norm2", "input"),
        Point(f"{name}.mlp.pre", f"{name}.mlp.fc1", "output"),
        Point(f"{name}.mlp.post", f"{name}.mlp.fc2", "input"),
        Point(f"{name}.mlp.out", f"{name}.mlp.fc2", "output"),
        Point(f"{name}.resid_post", block, "output", argument),
    ]


def _attention(name: str, *, ends: bool = False) -> list[Point]:
    points = [Point(f"{name}.{part}", f"{name}.qkv", "output", 0, Chunk(i, 3)) for i, part in enumerate("qkv")]
    points += [Point(f"{name}.{part}_normed", f"{name}.ln_{part}", "output") for part in "qk"]
    if ends:
        return points
    return [*points, Point(f"{name}.z", f"{name}.proj", "input"), Point(f"{name}.out", f"{name}.proj", "output")]


def _adaln(name: str, parts: tuple[str, ...]) -> list[Point]:
    module = f"{name}.adaLN_modulation"
    return [Point(f"{name}.adaln.{part}", module, "output", 0, Chunk(i, len(parts))) for i, part in enumerate(parts)]
