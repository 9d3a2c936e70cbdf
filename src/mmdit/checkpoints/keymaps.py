"""Key maps between the official names (ours) and the names of other libraries (theirs).

The maps for diffusers are data that work in both directions: a rule ties one tensor of ours to one or more of theirs,
and patterns with `{i}` stand for every block. Source of the names: diffusers `scripts/convert_sd3_to_diffusers.py`,
`loaders/single_file_utils.py`. `mmdit.checkpoints.components.REGISTRY` refers to the readers and writers of this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from encoders.json_files import printable
from encoders.vae import VAEConfig
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.models.config import MMDiTConfig

Tensors = dict[str, LazyTensor]
StoredAs = dict[str, tuple[str, ...]]
"""`{official name: names in the file}` of renamed tensors; a fused tensor has several names in the file."""


class Mapped(NamedTuple):
    """The tensors of a model under official names, and the names in the file of those that were renamed."""

    tensors: Tensors
    stored_as: StoredAs


Reader: TypeAlias = Callable[[Tensors, Path], Mapped]
"""(tensors of a file, its path for errors) -> the tensors under official names; ValueError for unmapped tensors."""


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
    """Our tensor is the concatenation of their tensors, in equal parts along the rows (fused q, k, v)."""

    def merge(self, *parts: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return torch.cat(parts)

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Their `index`-th tensor from ours."""
        return tensor.chunk(len(self.theirs))[index]


@dataclass(frozen=True)
class SwapHalves(Rename):
    """Our tensor holds shift, then scale; theirs holds scale, then shift."""

    def merge(self, *parts: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return parts[0].roll(len(parts[0]) // 2, dims=0)

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Their tensor from ours."""
        return tensor.roll(len(tensor) // 2, dims=0)


@dataclass(frozen=True)
class Conv1x1(Rename):
    """Our weight is a 1x1 convolution [o, i, 1, 1], theirs a linear layer [o, i]; biases are equal."""

    def merge(self, *parts: Tensor) -> Tensor:
        """Our tensor from theirs."""
        return parts[0][:, :, None, None] if parts[0].ndim == 2 else parts[0]

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """Their tensor from ours."""
        return tensor.flatten(1) if tensor.ndim == 4 else tensor


def to_ours(tensors: Mapping[str, LazyTensor], rules: Iterable[Rename]) -> tuple[Tensors, list[str]]:
    """The tensors under our names, and the keys that no rule uses.

    A rule that finds only some of its tensors uses none, so that all of them are reported.

    Raises:
        ValueError: the shapes of tensors that are merged do not fit together.
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
        raise ValueError(f"{rule.ours} cannot be made of tensors with these shapes: {shapes}") from error


def partners(left: Iterable[str], rules: Iterable[Rename]) -> list[str]:
    """The missing tensors without which `left` cannot be mapped: k and v where only q is present, for example."""
    left = set(left)
    return [key for rule in rules if left.intersection(rule.theirs) for key in rule.theirs if key not in left]


def to_theirs(tensors: Mapping[str, LazyTensor], rules: Iterable[Rename]) -> tuple[Tensors, list[str]]:
    """The tensors under diffusers' names, and the keys that no rule uses."""
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
    """The rules of a transformer of any variant with `depth` joint blocks."""
    rules = [*linears(_OUTER, Rename), *linears({"final_layer.adaLN_modulation.1": ("norm_out.linear",)}, SwapHalves)]
    rules.append(Rename("pos_embed", ("pos_embed.pos_embed",)))
    for i in range(depth):
        rules += joint_block_rules(i, last=i == depth - 1)
    return rules


def joint_block_rules(i: int, *, last: bool = False) -> list[Rename]:
    """For the `i`-th joint block; the last one of a transformer ends the context, and has 2 chunks of adaLN there."""
    adaln = linears({_CONTEXT_ADALN: (_THEIR_CONTEXT_ADALN,)}, SwapHalves if last else Rename)
    return numbered([*_JOINT_BLOCK, *adaln], i)


def vae_rules(levels: int, blocks: int) -> list[Rename]:
    """The rules of a VAE with this number of levels, and of resnet blocks per level of the encoder."""
    rules = list(linears(_VAE_OUTER, Rename))
    for side in ("encoder", "decoder"):
        rules += linears({f"{side}.mid.{ours}": (f"{side}.mid_block.{theirs}",) for ours, theirs in _ATTN}, Conv1x1)
        for block in (1, 2):
            rules += _resnet(f"{side}.mid.block_{block}", f"{side}.mid_block.resnets.{block - 1}")
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        rules += linears({f"encoder.down.{i}.downsample.conv": (f"{down}.downsamplers.0.conv",)}, Rename)
        rules += linears({f"decoder.up.{i}.upsample.conv": (f"{up}.upsamplers.0.conv",)}, Rename)
        for block in range(blocks):
            rules += _resnet(f"encoder.down.{i}.block.{block}", f"{down}.resnets.{block}")
        for block in range(blocks + 1):
            rules += _resnet(f"decoder.up.{i}.block.{block}", f"{up}.resnets.{block}")
    return rules


def count(keys: Collection[str], pattern: str, least: int = 1) -> int:
    """The number of blocks that the keys name.

    Args:
        keys: names of tensors.
        pattern: the start of the keys of blocks, with `{i}` for the block's number.
        least: the smallest number of tensors in a complete block.

    Raises:
        ValueError: see `check_blocks`.
    """
    return check_blocks(keys, re.escape(pattern).replace(r"\{i\}", r"(\d+)"), least)


def check_blocks(keys: Collection[str], pattern: str, least: int) -> int:
    """The number of blocks that the keys name, after a check that these blocks are complete.

    Without the check, a single key could demand a model, and rules, far larger than the file.

    Args:
        keys: names of tensors.
        pattern: matches the start of the keys of blocks; its group is the block's number.
        least: the smallest number of tensors in a complete block.

    Raises:
        ValueError: a block is missing before the last one, or most tensors of the blocks are missing.
    """
    block = re.compile(pattern)
    numbers: dict[int, str] = {}
    for key in keys:
        if found := block.match(key):
            numbers.setdefault(int(found[1]) if len(found[1]) < _MAX_DIGITS else 10**_MAX_DIGITS, key)
    if far := [key for number, key in sorted(numbers.items()) if number >= len(numbers)]:
        gap = next(number for number in range(len(numbers)) if number not in numbers)
        raise ValueError(f"block {gap} is missing, although there is {far[0]}; blocks must be numbered without gaps")
    if len(numbers) > _FEW and 2 * len(keys) < least * len(numbers):
        raise ValueError(
            f"{len(numbers)} blocks need at least {least * len(numbers)} tensors, but there are {len(keys)}; "
            "the file is incomplete: download it again"
        )
    return len(numbers)


def unchanged(tensors: Tensors, source: Path) -> Mapped:
    """Read a model whose tensors have official names."""
    return Mapped(tensors, {})


def read_diffusers_mmdit(tensors: Tensors, source: Path) -> Mapped:
    """Read an MMDiT whose tensors have diffusers' names."""
    return read_by(mmdit_rules(count(tensors, "transformer_blocks.{i}.", 15)), tensors)


def write_diffusers_mmdit(tensors: Tensors, config: MMDiTConfig) -> Tensors:
    """The tensors of an MMDiT under diffusers' names."""
    return write_by(mmdit_rules(config.depth), tensors)


def read_diffusers_vae(tensors: Tensors, source: Path) -> Mapped:
    """Read a VAE whose tensors have diffusers' names."""
    levels, blocks = count(tensors, "encoder.down_blocks.{i}.", 8), count(tensors, "encoder.down_blocks.0.resnets.{i}.")
    return read_by(vae_rules(levels, blocks), tensors)


def write_diffusers_vae(tensors: Tensors, config: VAEConfig) -> Tensors:
    """The tensors of a VAE under diffusers' names."""
    return write_by(vae_rules(len(config.widths), config.blocks_per_level), tensors)


def read_clip(tensors: Tensors, source: Path) -> Mapped:
    """Read a CLIP text tower with official names; a projection stored as a bare matrix is transposed.

    Source: ComfyUI `comfy/utils.py`, `clip_text_transformers_convert`.
    """
    if _BARE_PROJECTION not in tensors or _PROJECTION in tensors:
        return Mapped(tensors, {})
    found = {key: lazy for key, lazy in tensors.items() if key != _BARE_PROJECTION}
    projection = LazyTensor.derived(_transposed, tensors[_BARE_PROJECTION])
    return Mapped(found | {_PROJECTION: projection}, {_PROJECTION: (_BARE_PROJECTION,)})


def read_bare_clip(tensors: Tensors, source: Path) -> Mapped:
    """Read a CLIP text tower as transformers 5 saves it, whose keys lack the prefix `text_model.`."""
    names = {key: key if key.startswith(_BARE_PROJECTION) else f"text_model.{key}" for key in tensors}
    found, stored_as = read_clip({names[key]: lazy for key, lazy in tensors.items()}, source)
    return Mapped(found, {ours: (key,) for key, ours in names.items()} | stored_as)


def read_openclip(tensors: Tensors, source: Path) -> Mapped:
    """Read a CLIP text tower with OpenCLIP's names, where q, k, v are fused and the projection is transposed.

    Source of the names: open_clip `transformer.py`; transformers `convert_open_clip_original_pytorch_to_hf.py`.
    """
    found, stored_as = Tensors(), StoredAs()
    for key, lazy in tensors.items():
        for ours, operation in _openclip(key):
            found[ours], stored_as[ours] = LazyTensor.derived(operation, lazy), (key,)
    return Mapped(found, stored_as)


def write_transformers_clip(tensors: Tensors, config: Any) -> Tensors:
    """The tensors of a CLIP text tower for transformers' class with projection, the identity where there is none."""
    if _PROJECTION in tensors:
        return dict(tensors)
    dtype = next(iter(tensors.values())).dtype
    return tensors | {_PROJECTION: LazyTensor.of(torch.eye(config.width, dtype=torch.float32)).as_dtype(dtype)}


def write_unchanged(tensors: Tensors, config: object) -> Tensors:
    """The tensors of a model whose official file has the same names."""
    return dict(tensors)


def write_official_clip_l(tensors: Tensors, config: object) -> Tensors:
    """The tensors of CLIP-L as in the official file: a projection that is the identity is left out."""
    without = {key: lazy for key, lazy in tensors.items() if key != _PROJECTION}
    return without if _PROJECTION in tensors and _is_identity(tensors[_PROJECTION]) else dict(tensors)


def write_official_t5(tensors: Tensors, config: object) -> Tensors:
    """The tensors of T5 as in the official file, which holds the token embedding twice."""
    return tensors | {_T5_EMBEDDING_TWIN: tensors[_T5_EMBEDDING]}


def read_t5(tensors: Tensors, source: Path) -> Mapped:
    """Read a T5 encoder, whose token embedding is stored once or twice; two copies must be equal."""
    found = {key: lazy for key, lazy in tensors.items() if key != _T5_EMBEDDING_TWIN}
    twin = tensors.get(_T5_EMBEDDING_TWIN)
    if twin is not None:
        kept = found.get(_T5_EMBEDDING)
        found[_T5_EMBEDDING] = twin if kept is None else _one_of(kept, twin, source)
    return Mapped(found, {})


def _one_of(kept: LazyTensor, twin: LazyTensor, source: Path) -> LazyTensor:
    """The token embedding, whose two copies are compared when it is read."""

    def load(dtype: torch.dtype, device: torch.device) -> Tensor:
        one, other = (lazy.read(device="cpu").view(torch.uint8) for lazy in (kept, twin))
        if not torch.equal(one, other):
            raise CheckpointError(
                f"{source}: {_T5_EMBEDDING} and {_T5_EMBEDDING_TWIN} differ, but T5 has a single embedding table; "
                "the file was written wrongly"
            )
        del one, other
        return kept.load(dtype, device)

    return LazyTensor(kept.shape, kept.dtype, load)


def read_by(rules: Sequence[Rename], tensors: Tensors) -> Mapped:
    """The tensors under our names by these rules; ValueError for those that no rule takes."""
    found, left = to_ours(tensors, rules)
    if left:
        without = partners(left, rules)
        why = f"missing are {some(without)}" if without else "the model has no such tensors"
        raise ValueError(f"{len(left)} unexpected tensors: {some(left)}; {why}")
    return Mapped(found, {rule.ours: rule.theirs for rule in rules})


def write_by(rules: Sequence[Rename], tensors: Tensors) -> Tensors:
    """The tensors under their names by these rules; ValueError for those that no rule takes."""
    found, left = to_theirs(tensors, rules)
    if left:
        raise ValueError(f"{len(left)} tensors have no name in diffusers: {some(left)}")
    return found


def some(keys: Iterable[str], most: int = 5) -> str:
    """The first few of these names, and the number of further ones."""
    keys = list(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(printable(key, 200) for key in keys[:most]) + more


def _openclip(key: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The official names of the parts of an OpenCLIP tensor, and how to extract each; an unknown key stays as it is."""
    if key in _OPENCLIP_OUTER:
        yield _OPENCLIP_OUTER[key], _same
    elif key == _BARE_PROJECTION:
        yield _PROJECTION, _transposed
    elif (found := _OPENCLIP_LAYER.fullmatch(key)) is None:
        yield key, _same
    elif found[2].startswith("attn.in_proj_"):
        for index, part in enumerate("qkv"):
            kind = found[2].removeprefix("attn.in_proj_")
            yield f"text_model.encoder.layers.{found[1]}.self_attn.{part}_proj.{kind}", partial(_third, index=index)
    else:
        name, _, kind = found[2].rpartition(".")
        yield f"text_model.encoder.layers.{found[1]}.{_OPENCLIP_NAMES.get(name, name)}.{kind}", _same


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous()


def _third(tensor: Tensor, index: int) -> Tensor:
    return tensor.chunk(3)[index]


def _is_identity(projection: LazyTensor) -> bool:
    square = len(projection.shape) == 2 and projection.shape[0] == projection.shape[1]
    return square and torch.equal(projection.read(torch.float32), torch.eye(projection.shape[0]))


def linears(names: Mapping[str, tuple[str, ...]], kind: type[Rename]) -> Iterator[Rename]:
    """A rule for the weight and one for the bias of each layer; `names` maps our name to theirs."""
    for ours, theirs in names.items():
        for what in ("weight", "bias"):
            yield kind(f"{ours}.{what}", tuple(f"{key}.{what}" for key in theirs))


def numbered(rules: Iterable[Rename], i: int) -> list[Rename]:
    """The rules with a block's number in the place of `{i}`."""
    return [
        replace(
            rule, ours=rule.ours.replace("{i}", str(i)), theirs=tuple(key.replace("{i}", str(i)) for key in rule.theirs)
        )
        for rule in rules
    ]


def _resnet(ours: str, theirs: str) -> Iterator[Rename]:
    names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    return linears({f"{ours}.{our}": (f"{theirs}.{their}",) for our, their in names.items()}, Rename)


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
_JOINT_BLOCK = [*linears(_FUSED, Concat), *linears(_BLOCK, Rename)]
_ATTN = [("attn_1.norm", "attentions.0.group_norm"), ("attn_1.proj_out", "attentions.0.to_out.0")]
_ATTN += [(f"attn_1.{part}", f"attentions.0.to_{part}") for part in "qkv"]
_VAE_OUTER = {
    f"{side}.{ours}": (f"{side}.{theirs}",)
    for side in ("encoder", "decoder")
    for ours, theirs in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out"))
}
_MAX_DIGITS = 10  # digits of a block's number; no file has a longer one
_FEW = 3  # up to this number of blocks, missing tensors are named one by one
_PROJECTION, _BARE_PROJECTION = "text_projection.weight", "text_projection"
_T5_EMBEDDING, _T5_EMBEDDING_TWIN = "shared.weight", "encoder.embed_tokens.weight"
_OPENCLIP_OUTER = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPENCLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPENCLIP_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
