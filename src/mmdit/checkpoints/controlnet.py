"""ControlNet files: key maps, configs and descriptions, for the registry of components.

Stability's files contain single-stream blocks under the names of our modules, and a number for the kind of the hint.
diffusers splits q, k and v. Nets with joint blocks (InstantX) are only published under diffusers' names, so these are
their official names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmdit.checkpoints.config_json import Shapes
from mmdit.checkpoints.keymaps import (
    Concat,
    Mapped,
    Rename,
    Tensors,
    count,
    joint_block_rules,
    linears,
    numbered,
    read_by,
    write_by,
)
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.models.controlnet import CONTROL_KINDS, ControlKind, ControlNetConfig

CONTROL_TYPE = "control_type"
TYPES: tuple[ControlKind, ...] = ("blur", "canny", "depth")  # by the number in Stability's files
CONTROL_DIMENSIONS = {
    r"pos_embed_input\.proj\.weight|pos_embed\.proj\.weight": 4,
    r"pos_embed\.pos_embed": 3,
    r"(time_text_embed\.text_embedder\.linear_1|context_embedder)\.weight": 2,
    r"transformer_blocks\.0\.(x_block\.)?mlp\.fc1\.weight": 2,
    r"transformer_blocks\.\d+\.((x|context)_block\.)?attn\.ln_[qk]\.weight": 1,
}


def control_said(tensors: Tensors) -> dict[str, Any]:
    """Read the kind of the hint from a tensor in Stability's files, as an entry of diffusers' config.

    Raises:
        ValueError: the number is not an index of `TYPES`.
    """
    if CONTROL_TYPE not in tensors:
        return {}
    lazy = tensors[CONTROL_TYPE]
    whole = tuple(lazy.shape) in ((), (1,)) and not lazy.dtype.is_floating_point
    value = int(lazy.read()) if whole else -1
    if value not in range(len(TYPES)):
        said = f"{value}" if whole else f"{lazy.dtype} of shape {list(lazy.shape)}"
        known = ", ".join(f"{number} ({name})" for number, name in enumerate(TYPES))
        raise ValueError(f"{CONTROL_TYPE} is {said}, expected one of {known}")
    return {KIND: TYPES[value]}


def read_control(tensors: Tensors, source: Path) -> Mapped:
    """Map a file of Stability's; `control_said` has already read its kind."""
    return Mapped({key: lazy for key, lazy in tensors.items() if key != CONTROL_TYPE}, {})


def read_diffusers_control(tensors: Tensors, source: Path) -> Mapped:
    """A net in diffusers' names."""
    found = read_control(tensors, source).tensors
    depth = count(found, "transformer_blocks.{i}.", 10)
    return read_by(control_rules(max(depth, count(found, "controlnet_blocks.{i}.")), is_joint(found)), found)


def write_official_control(tensors: Tensors, config: ControlNetConfig) -> Tensors:
    """Map a net to its official names: Stability's with the kind, or diffusers' for nets with joint blocks."""
    if config.is_joint:
        return write_diffusers_control(tensors, config)
    if config.kind not in TYPES:
        return dict(tensors)
    kind = torch.tensor([TYPES.index(config.kind)], dtype=torch.int32)
    return tensors | {CONTROL_TYPE: LazyTensor.of(kind)}


def write_diffusers_control(tensors: Tensors, config: ControlNetConfig) -> Tensors:
    """A net in diffusers' names."""
    return write_by(control_rules(config.depth, config.is_joint), tensors)


def control_rules(depth: int, joint: bool) -> list[Rename]:
    """The key map of a net of `depth` blocks, which are joint or single-stream."""
    rules = [*linears({name: (name,) for name in _OUTER}, Rename)]
    rules.append(Rename("pos_embed.pos_embed", ("pos_embed.pos_embed",)))
    for i in range(depth):
        rules += _joint_block(i) if joint else numbered(_SINGLE_BLOCK, i)
        rules += linears({f"controlnet_blocks.{i}": (f"controlnet_blocks.{i}",)}, Rename)
    return rules


def is_joint(tensors: Mapping[str, object]) -> bool:
    """Whether a net has joint blocks, judged by its diffusers or official names."""
    return any(".norm1_context." in key or ".context_block." in key for key in tensors)


def _joint_block(i: int) -> Iterator[Rename]:
    for rule in joint_block_rules(i):
        yield replace(rule, ours=rule.ours.replace("joint_blocks.", "transformer_blocks.", 1))


def control_config(shapes: Shapes, said: Mapping[str, object]) -> ControlNetConfig:
    """The config of a net. config.json contains the kind of the hint, and how the pooled text vector was trained.

    Raises:
        KeyError, ValueError: see `ControlNetConfig.from_shapes`; or an entry has the wrong type.
    """
    kind, zeros = said.get(KIND), said.get(ZEROS)
    if kind is not None and kind not in CONTROL_KINDS:
        raise ValueError(f"config.json says {KIND} = {kind!r:.80}, expected one of {', '.join(CONTROL_KINDS)}")
    if zeros is not None and not isinstance(zeros, bool):
        raise ValueError(f"config.json says {ZEROS} = {zeros!r:.80}, expected true or false")
    return ControlNetConfig.from_shapes(shapes, kind=kind, zero_pooled=zeros)


def control_json(config: ControlNetConfig) -> dict[str, Any]:
    """The config.json of diffusers' SD3ControlNetModel, which ignores our entry for the kind, prefixed with "_"."""
    return {
        "_class_name": "SD3ControlNetModel",
        KIND: config.kind,
        "attention_head_dim": config.head_dim,
        "dual_attention_layers": [],
        "extra_conditioning_channels": config.hint_channels - config.in_channels,
        ZEROS: config.zero_pooled,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.heads,
        "num_layers": config.depth,
        "out_channels": config.in_channels,
        "patch_size": config.patch_size,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_type": "sincos" if config.is_joint else None,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "use_pos_embed": config.is_joint,
        **(
            {"caption_projection_dim": config.hidden_size, "pos_embed_max_size": config.pos_embed_size}
            if config.is_joint
            else {}
        ),
    }


def control_stem(config: ControlNetConfig) -> str:
    """The official file name of such a net, without its suffix."""
    kind = config.kind or "unknown"
    return f"sd3_controlnet_{kind}" if config.is_joint else f"{_BASES.get(config.hidden_size, 'sd3')}_controlnet_{kind}"


def control_words(config: ControlNetConfig) -> str:
    """A short description of a net."""
    blocks = "joint blocks with a text embedder" if config.is_joint else "single-stream blocks"
    kind = f"{config.kind} hints" if config.kind else "kind of hint not said"
    base = _TITLES.get((config.hidden_size, config.is_joint), f"a transformer of width {config.hidden_size}")
    return f"{kind}, {config.depth} {blocks} x {config.hidden_size}, for {base}"


KIND, ZEROS = "_control_type", "force_zeros_for_pooled_projection"
_BASES = {2432: "sd3.5_large", 1536: "sd3"}
_TITLES = {(2432, False): "SD3.5-Large", (1536, True): "SD3-Medium"}
_OUTER = (
    "pos_embed.proj",
    "pos_embed_input.proj",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2",
    "context_embedder",
)
_ONE = "transformer_blocks.{i}"
_SINGLE_BLOCK = [
    *linears({f"{_ONE}.attn.qkv": tuple(f"{_ONE}.attn.to_{part}" for part in "qkv")}, Concat),
    *linears(
        {
            f"{_ONE}.attn.proj": (f"{_ONE}.attn.to_out.0",),
            f"{_ONE}.adaLN_modulation.1": (f"{_ONE}.norm1.linear",),
            f"{_ONE}.mlp.fc1": (f"{_ONE}.ff.net.0.proj",),
            f"{_ONE}.mlp.fc2": (f"{_ONE}.ff.net.2",),
        },
        Rename,
    ),
]
