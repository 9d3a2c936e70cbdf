"""Key maps between the official names (ours) and diffusers' names (theirs): data that runs both ways.

A rule ties one tensor of ours to one or more of theirs. Patterns with `{i}` stand for every block. Source of the
names: diffusers `scripts/convert_sd3_to_diffusers.py`, `loaders/single_file_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdit.checkpoints.lazy import LazyTensor

Tensors = dict[str, LazyTensor]


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    ours: str
    theirs: tuple[str, ...]

    def merge(self, *parts: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return parts[0]

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Their `index`-th tensor from ours."""
        return tensor


@dataclass(frozen=True)
class Concat(Rename):
    """Our tensor holds theirs one below the other, in equal parts (fused q, k, v)."""

    def merge(self, *parts: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return torch.cat(parts)

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Their `index`-th tensor from ours."""
        return tensor.chunk(len(self.theirs))[index]


@dataclass(frozen=True)
class SwapHalves(Rename):
    """Ours is shift | scale, theirs scale | shift."""

    def merge(self, *parts: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return parts[0].roll(len(parts[0]) // 2, dims=0)

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Their tensor from ours."""
        return tensor.roll(len(tensor) // 2, dims=0)


@dataclass(frozen=True)
class Conv1x1(Rename):
    """Ours is a 1x1 convolution [o, i, 1, 1], theirs a linear [o, i]; biases are equal."""

    def merge(self, *parts: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return parts[0][:, :, None, None] if parts[0].ndim == 2 else parts[0]

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Their tensor from ours."""
        return tensor.flatten(1) if tensor.ndim == 4 else tensor


def to_ours(tensors: Mapping[str, LazyTensor], rules: Iterable[Rename]) -> tuple[Tensors, list[str]]:
    """Tensors under our names, and the keys that no rule takes.

    A rule that finds only a part of its tensors takes none, so that they are all reported.

    Raises:
        ValueError: tensors whose shapes do not go together.
    """
    found, left = {}, dict(tensors)
    for rule in rules:
        if all(key in left for key in rule.theirs):
            found[rule.ours] = _merged(rule, [left.pop(key) for key in rule.theirs])
    return found, list(left)


def _merged(rule: Rename, parts: Sequence[LazyTensor]) -> LazyTensor:
    try:
        return LazyTensor.derived(rule.merge, *parts)
    except (RuntimeError, IndexError, TypeError) as error:
        shapes = ", ".join(f"{key} {list(part.shape)}" for key, part in zip(rule.theirs, parts, strict=True))
        raise ValueError(f"shapes that do not make {rule.ours}: {shapes}") from error


def partners(left: Iterable[str], rules: Iterable[Rename]) -> list[str]:
    """The tensors that would have to be there for `left` to be taken: q without its k and v, say."""
    left = set(left)
    return [key for rule in rules if left.intersection(rule.theirs) for key in rule.theirs if key not in left]


def to_theirs(tensors: Mapping[str, LazyTensor], rules: Iterable[Rename]) -> tuple[Tensors, list[str]]:
    """Tensors under diffusers' names, and the keys that no rule takes."""
    found, left = {}, dict(tensors)
    for rule in rules:
        if rule.ours in left:
            tensor = left.pop(rule.ours)
            for index, key in enumerate(rule.theirs):
                found[key] = LazyTensor.derived(_part_of(rule, index), tensor)
    return found, list(left)


def _part_of(rule: Rename, index: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: rule.part(tensor, index)


def mmdit_rules(depth: int) -> list[Rename]:
    """For a transformer of `depth` joint blocks, of any of the variants."""
    rules = [*_linears(_OUTER, Rename), *_linears({"final_layer.adaLN_modulation.1": ("norm_out.linear",)}, SwapHalves)]
    rules.append(Rename("pos_embed", ("pos_embed.pos_embed",)))
    for i in range(depth):
        rules += _numbered(_JOINT_BLOCK, i)
        last = {_CONTEXT_ADALN: (_THEIR_CONTEXT_ADALN,)}
        rules += _numbered(list(_linears(last, SwapHalves if i == depth - 1 else Rename)), i)
    return rules


def vae_rules(levels: int, blocks: int) -> list[Rename]:
    """For a VAE of so many levels and resnets per level of the encoder."""
    rules = list(_linears(_VAE_OUTER, Rename))
    for side in ("encoder", "decoder"):
        rules += _linears({f"{side}.mid.{ours}": (f"{side}.mid_block.{theirs}",) for ours, theirs in _ATTN}, Conv1x1)
        for block in (1, 2):
            rules += _resnet(f"{side}.mid.block_{block}", f"{side}.mid_block.resnets.{block - 1}")
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        rules += _linears({f"encoder.down.{i}.downsample.conv": (f"{down}.downsamplers.0.conv",)}, Rename)
        rules += _linears({f"decoder.up.{i}.upsample.conv": (f"{up}.upsamplers.0.conv",)}, Rename)
        for block in range(blocks):
            rules += _resnet(f"encoder.down.{i}.block.{block}", f"{down}.resnets.{block}")
        for block in range(blocks + 1):
            rules += _resnet(f"decoder.up.{i}.block.{block}", f"{up}.resnets.{block}")
    return rules


def count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest number that stands for `{i}` at the start of any key; 0 where none does."""
    number = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    return 1 + max((int(found[1]) for key in keys if (found := number.match(key))), default=-1)


def _linears(names: Mapping[str, tuple[str, ...]], kind: type[Rename]) -> Iterator[Rename]:
    for ours, theirs in names.items():
        for what in ("weight", "bias"):
            yield kind(f"{ours}.{what}", tuple(f"{key}.{what}" for key in theirs))


def _numbered(rules: Iterable[Rename], i: int) -> list[Rename]:
    return [
        replace(
            rule, ours=rule.ours.replace("{i}", str(i)), theirs=tuple(key.replace("{i}", str(i)) for key in rule.theirs)
        )
        for rule in rules
    ]


def _resnet(ours: str, theirs: str) -> Iterator[Rename]:
    names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    return _linears({f"{ours}.{our}": (f"{theirs}.{their}",) for our, their in names.items()}, Rename)


_OUTER = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
}
_X, _CONTEXT, _THEIRS = "joint_blocks.{i}.x_block", "joint_blocks.{i}.context_block", "transformer_blocks.{i}"
_CONTEXT_ADALN, _THEIR_CONTEXT_ADALN = f"{_CONTEXT}.adaLN_modulation.1", f"{_THEIRS}.norm1_context.linear"
_FUSED = {
    f"{_X}.attn.qkv": tuple(f"{_THEIRS}.attn.to_{part}" for part in "qkv"),
    f"{_X}.attn2.qkv": tuple(f"{_THEIRS}.attn2.to_{part}" for part in "qkv"),
    f"{_CONTEXT}.attn.qkv": tuple(f"{_THEIRS}.attn.add_{part}_proj" for part in "qkv"),
}
_BLOCK = {
    f"{_X}.attn.ln_q": (f"{_THEIRS}.attn.norm_q",),
    f"{_X}.attn.ln_k": (f"{_THEIRS}.attn.norm_k",),
    f"{_X}.attn.proj": (f"{_THEIRS}.attn.to_out.0",),
    f"{_X}.attn2.ln_q": (f"{_THEIRS}.attn2.norm_q",),
    f"{_X}.attn2.ln_k": (f"{_THEIRS}.attn2.norm_k",),
    f"{_X}.attn2.proj": (f"{_THEIRS}.attn2.to_out.0",),
    f"{_X}.adaLN_modulation.1": (f"{_THEIRS}.norm1.linear",),
    f"{_X}.mlp.fc1": (f"{_THEIRS}.ff.net.0.proj",),
    f"{_X}.mlp.fc2": (f"{_THEIRS}.ff.net.2",),
    f"{_CONTEXT}.attn.ln_q": (f"{_THEIRS}.attn.norm_added_q",),
    f"{_CONTEXT}.attn.ln_k": (f"{_THEIRS}.attn.norm_added_k",),
    f"{_CONTEXT}.attn.proj": (f"{_THEIRS}.attn.to_add_out",),
    f"{_CONTEXT}.mlp.fc1": (f"{_THEIRS}.ff_context.net.0.proj",),
    f"{_CONTEXT}.mlp.fc2": (f"{_THEIRS}.ff_context.net.2",),
}
_JOINT_BLOCK = [*_linears(_FUSED, Concat), *_linears(_BLOCK, Rename)]
_ATTN = [("attn_1.norm", "attentions.0.group_norm"), ("attn_1.proj_out", "attentions.0.to_out.0")]
_ATTN += [(f"attn_1.{part}", f"attentions.0.to_{part}") for part in "qkv"]
_VAE_OUTER = {
    f"{side}.{ours}": (f"{side}.{theirs}",)
    for side in ("encoder", "decoder")
    for ours, theirs in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out"))
}
