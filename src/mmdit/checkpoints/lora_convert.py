"""Convert LoRA files to the key names of another program: `mmdit convert LORA OUT --layout diffusers|kohya|comfyui`.

Every reader computes the same weights from the converted file. If the target layout cannot represent a module, the
conversion raises an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from mmdit.checkpoints.keymaps import mmdit_rules
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.lora import Lora, load_lora
from mmdit.checkpoints.lora_kinds import (
    Change,
    Full,
    Generalized,
    Hadamard,
    Kronecker,
    LowRank,
    Orthogonal,
    Replacement,
)
from mmdit.checkpoints.lora_modules import Patch
from mmdit.checkpoints.lora_names import Part
from mmdit.checkpoints.lora_rules import HEADER
from mmdit.checkpoints.safetensors_io import CheckpointError, write_tensors
from samplers import pick

LoraLayout = Literal["diffusers", "kohya", "comfyui"]
Tensors = dict[str, Tensor]
_DOTTED: Final[dict[Part, str]] = {
    "transformer": "diffusion_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
_FLAT: Final[dict[Part, str]] = {
    "transformer": "lora_unet_",
    "clip_l": "lora_te1_",
    "clip_g": "lora_te2_",
    "t5": "lora_te3_",
}
_DIFFUSERS: Final[dict[Part, str]] = {
    "transformer": "transformer.",
    "clip_l": "text_encoder.",
    "clip_g": "text_encoder_2.",
}


@dataclass(frozen=True, eq=False)
class _Pair:
    """A plain LoRA for all rows of an official weight, or for a third of them; sigma is alpha / rank."""

    up: Tensor
    down: Tensor
    scale: float


def convert_lora(source: str | Path, target: str | Path, layout: str) -> Path:
    """Convert a LoRA file to the key names of another program.

    Args:
        source: a LoRA file of any program.
        target: the path of the .safetensors file to write; it must not exist.
        layout: "diffusers" (alpha / rank is multiplied into the factors, because diffusers reads no alpha), "kohya" or
            "comfyui" (official names with dots).

    Raises:
        FileExistsError: `target` exists.
        CheckpointError: see `mmdit.load_lora`; or the layout cannot represent a module, which is named.
        ValueError: the layout is unknown, or the target does not end in .safetensors.
    """
    target = Path(target)
    pick(dict.fromkeys(get_args(LoraLayout)), layout, "layout")
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors")
    if target.exists():
        raise FileExistsError(f"{target} exists already; give another place, or remove it first")
    lora = load_lora(source)
    tensors = in_diffusers_names(lora) if layout == "diffusers" else in_official_names(lora, flat=layout == "kohya")
    metadata = {key: value for key, value in lora.metadata.items() if key != HEADER} | {"format": "pt"}
    write_tensors(target, {key: LazyTensor.of(tensor) for key, tensor in tensors.items()}, metadata, new=True)
    return target


def in_official_names(lora: Lora, *, flat: bool) -> Tensors:
    """The tensors of a LoRA in official names: kohya's (`flat`), or ComfyUI's with dots.

    LoRAs for thirds of a fused weight become one LoRA for all of its rows; its rank is the sum of their ranks.

    Raises:
        CheckpointError: a kind other than LoRA patches thirds or exchanged halves, or has peft's DoRA.
    """
    found: Tensors = {}
    for patches in lora.targets.values():
        target = patches[0].target
        module = target.key.removesuffix(".weight").removesuffix(".bias")
        name = (_FLAT if flat else _DOTTED)[target.part] + (module.replace(".", "_") if flat else module)
        suffixes = _native(lora, patches[0]) if len(patches) == 1 else None
        if suffixes is None:
            pair = _joined([_pair(lora, patch, "official names") for patch in patches], patches)
            alpha = torch.tensor(pair.scale * pair.down.shape[0])
            suffixes = {".lora_up.weight": pair.up, ".lora_down.weight": pair.down, ".alpha": alpha}
        found |= {name + suffix: tensor.contiguous() for suffix, tensor in suffixes.items()}
    return found


def in_diffusers_names(lora: Lora) -> Tensors:
    """The tensors of a LoRA in diffusers' names, with alpha / rank in `lora_B`; fused weights are split into three.

    Raises:
        CheckpointError: the file patches T5, biases or norms, or has a kind other than LoRA; diffusers reads none.
    """
    names, found = diffusers_names_of(lora), Tensors()
    for patch in lora.patches:
        target, pair = patch.target, _pair(lora, patch, "diffusers' names")
        prefix = _DIFFUSERS.get(target.part)
        if prefix is None:
            raise _unsaid(lora, patch, "diffusers' names: diffusers has no LoRA of T5")
        module = target.key.removesuffix(".weight")
        theirs = names.get(module, (module,)) if target.part == "transformer" else (module,)
        ups = [pair.up] if target.third is not None or len(theirs) == 1 else pair.up.chunk(len(theirs))
        shown = theirs if target.third is None else (theirs[target.third],)
        for name, up in zip(shown, ups, strict=True):
            swaps = _is_exchanged_in_diffusers(target.key, up, pair.down)
            theirs_up = pair.scale * (up.roll(len(up) // 2, dims=0) if swaps else up).float()
            if f"{prefix}{name}.lora_A.weight" in found:
                raise _unsaid(lora, patch, "diffusers' names: another module of the file patches the same rows")
            found[f"{prefix}{name}.lora_A.weight"] = pair.down.contiguous()
            found[f"{prefix}{name}.lora_B.weight"] = theirs_up.to(up.dtype).contiguous()
    return found


def _pair(lora: Lora, patch: Patch, layout: str) -> _Pair:
    """The factors of a plain LoRA, with rows in official order; raises CheckpointError for any other patch."""
    change = patch.change
    if not isinstance(change, LowRank) or change.mid is not None or change.padded is not None or patch.magnitude:
        raise _unsaid(lora, patch, layout)
    up, down = change.up, change.down
    if down.ndim > 2 or up.ndim > 2:  # patch convolution: readers also accept 2-dimensional factors
        up, down = up.flatten(1), down.flatten(1)
    return _Pair(up.roll(len(up) // 2, dims=0) if _is_exchanged(patch) else up, down, change.scale)


def _joined(pairs: Sequence[_Pair], patches: Sequence[Patch]) -> _Pair:
    """Join several LoRAs for a weight, or for thirds of its rows, into one equivalent LoRA for all rows."""
    if len(pairs) == 1 and patches[0].target.third is None:
        return pairs[0]
    rows = max(
        len(pair.up) * (1 if patch.target.third is None else 3) for pair, patch in zip(pairs, patches, strict=True)
    )
    ups = []
    for pair, patch in zip(pairs, patches, strict=True):
        whole = torch.zeros(rows, pair.up.shape[1], dtype=pair.up.dtype)
        whole[patch.target.rows(rows)] = (pair.scale * pair.up.float()).to(pair.up.dtype)
        ups.append(whole)
    return _Pair(torch.cat(ups, dim=1), torch.cat([pair.down for pair in pairs]), 1.0)


def _native(lora: Lora, patch: Patch) -> Tensors | None:
    """The tensors of a patch by suffix, if they can be copied: for all rows, in official order. Otherwise None."""
    if patch.target.third is not None or _is_exchanged(patch):
        return None
    change = patch.change
    if isinstance(change, LowRank) and patch.magnitude is None and change.mid is None:
        return None
    writer = _WRITERS.get(type(change))
    if writer is None or (patch.magnitude is not None and patch.magnitude.rule == "peft"):
        raise _unsaid(lora, patch, "official names")
    found = writer(change)
    if isinstance(change, Full) and patch.target.key.endswith(".bias"):
        found = {".diff_b": change.scale * change.diff}
    if change.rank is not None and not isinstance(change, Orthogonal):
        found[".alpha"] = torch.tensor(change.scale * change.rank)
    return found if patch.magnitude is None else found | {".dora_scale": patch.magnitude.values}


def _fields(change: Change, names: str, prefix: str, suffix: str = "") -> Tensors:
    """The fields that hold tensors, by their key suffix in files."""
    return {
        f".{prefix}{name}{suffix}": value
        for name in names.split()
        if isinstance(value := getattr(change, name), Tensor)
    }


def _low_rank(change: Change) -> Tensors:
    assert isinstance(change, LowRank), "by the table of writers"
    found = {".lora_up.weight": change.up, ".lora_down.weight": change.down}
    return found if change.mid is None else found | {".lora_mid.weight": change.mid}


def _orthogonal(change: Change) -> Tensors:
    assert isinstance(change, Orthogonal), "by the table of writers"
    found = {".oft_blocks": change.blocks, ".alpha": torch.tensor(change.limit)}
    return found if change.rescale is None else found | {".rescale": change.rescale}


_WRITERS: Final[dict[type[Change], Callable[[Change], Tensors]]] = {
    LowRank: _low_rank,
    Hadamard: lambda change: _fields(change, "w1_a w1_b w2_a w2_b t1 t2", "hada_"),
    Kronecker: lambda change: _fields(change, "w1 w1_a w1_b w2 w2_a w2_b t2", "lokr_"),
    Generalized: lambda change: _fields(change, "a1 a2 b1 b2", "", ".weight"),
    Orthogonal: _orthogonal,
    Full: lambda change: _fields(change, "diff", ""),
    Replacement: lambda change: dict(zip([".set_weight"], change.tensors(), strict=True)),
}


def _is_exchanged(patch: Patch) -> bool:
    rows, columns = patch.change.sizes
    return rows is not None and columns is not None and patch.target.is_exchanged(rows, columns)


def _is_exchanged_in_diffusers(key: str, up: Tensor, down: Tensor) -> bool:
    """Whether diffusers stores the two halves of a weight's rows in the opposite order, see `keymaps.SwapHalves`."""
    is_last = key.endswith("context_block.adaLN_modulation.1.weight") and len(up) == 2 * down.shape[1]
    return is_last or key == "final_layer.adaLN_modulation.1.weight"


def diffusers_names_of(lora: Lora) -> dict[str, tuple[str, ...]]:
    """diffusers' module names by official module name, one or three for each."""
    blocks = [
        int(found[1]) for patch in lora.patches if (found := re.match(r"joint_blocks\.(\d+)\.", patch.target.key))
    ]
    return {
        rule.ours.removesuffix(".weight"): tuple(name.removesuffix(".weight") for name in rule.theirs)
        for rule in mmdit_rules(max(blocks, default=0) + 1)
        if rule.ours.endswith(".weight")
    }


def _unsaid(lora: Lora, patch: Patch, layout: str) -> CheckpointError:
    return CheckpointError(f"{lora.source}: {patch.module} ({patch.kind} of {patch.target}) cannot be said in {layout}")
