"""Describe the contents of a LoRA file in text and tables: `mmdit inspect LORA`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from encoders.json_files import printable
from mmdit.checkpoints.components import title
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import open_model
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.lora import Lora, check_lora, load_lora
from mmdit.checkpoints.lora_merge import Shapes, changed, planned
from mmdit.checkpoints.lora_modules import Patch
from mmdit.checkpoints.lora_names import Part
from mmdit.checkpoints.lora_rules import HasName
from quant.tensor import Float8Tensor

Weights: TypeAlias = str | Path | Mapping[Part, nn.Module]
_SHOWN: Final = 20  # maximum number of unused keys, and of header entries, that are listed
_BLOCK: Final = re.compile(r"(.*?(?:joint_blocks|layers|block)\.)(\d+)\.(.+)")


class Norms(NamedTuple):
    """The norms of a LoRA's change of a tensor, at strength 1, and of the tensor."""

    change: float  # Frobenius norm of the change
    weight: float  # Frobenius norm of the original tensor

    @property
    def relative(self) -> float:
        """The norm of the change divided by the norm of the weight."""
        return self.change / self.weight if self.weight else float("inf")


def describe_lora(path: str | Path, profile: str | HasName | None = None, *, model: str | Path | None = None) -> str:
    """Describe a LoRA file: producer, kinds, ranks, scales, targets by block, base model, unused keys and metadata.

    Args:
        path: a LoRA file.
        profile: see `mmdit.load_lora`.
        model: a checkpoint. The description then includes the norms of the changes relative to its weights.

    Raises:
        FileNotFoundError, CheckpointError: see `mmdit.load_lora`; or the LoRA does not fit the model.
    """
    lora = load_lora(path, profile)
    lines = repr(lora).splitlines()[:4]
    for part in lora.parts:
        lines += ["", f"{title(part)}:", *_targets(lora.of(part))]
    if model is not None:
        norms = lora_norms(lora, model)
        lines += ["", "norm of the change over that of the weights, by block:", *_by_block(norms)]
    lines += ["", f"keys that are not used: {len(lora.unused)}", *_some(lora.unused)]
    lines += [f"note: {note}" for note in lora.notes]
    lines += [f"entries of the header: {len(lora.metadata)}", *_some(lora.metadata)]
    return "\n".join(lines)


def lora_norms(lora: Lora, model: Weights) -> dict[str, Norms]:
    """The norms of a LoRA's changes at strength 1, and of the weights that it changes.

    Args:
        lora: the LoRA.
        model: a checkpoint, or models by name: `pipe.models`.

    Returns:
        Norms by `part.official key`, for the models that `model` contains.

    Raises:
        CheckpointError: the LoRA does not fit.
        TypeError: it is no LoRA.
    """
    check_lora(lora)
    found = {}
    for part, shapes, read in _weights(model, lora.parts):
        for key, patches in planned(part, shapes, [lora], [1.0]).items():
            weight = read(key)
            change = changed(weight, patches) - weight
            found[f"{part}.{key}"] = Norms(float(change.norm()), float(weight.norm()))
    return found


def block_of(name: str) -> tuple[str, str]:
    """The block and the module of a tensor's name: `("joint_blocks.3", "x_block.attn.qkv.weight")`."""
    found = _BLOCK.fullmatch(name)
    return ("", name) if found is None else (f"{found[1]}{found[2]}", found[3])


def _weights(model: Weights, parts: Sequence[Part]) -> Iterable[tuple[Part, Shapes, Callable[[str], Tensor]]]:
    """The available models, each with the shapes of its tensors and a function that reads a tensor in float32."""
    if isinstance(model, Mapping):
        for part in (each for each in parts if each in model):
            state = model[part].state_dict()
            yield part, {key: tensor.shape for key, tensor in state.items()}, partial(_wide, state)
        return
    found = locate(model)
    for part in (each for each in parts if each in found.weights):
        lazy = open_model(found, part).tensors
        shapes = {key: one.shape for key, one in lazy.items()}
        yield part, shapes, partial(_read, lazy)


def _read(tensors: Mapping[str, LazyTensor], key: str) -> Tensor:
    return tensors[key].read(torch.float32)


def _wide(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    tensor = tensors[key]
    return tensor.dequantize(torch.float32) if isinstance(tensor, Float8Tensor) else tensor.detach().float()


def _targets(patches: Iterable[Patch]) -> list[str]:
    """A line for each module of a block: its blocks, kinds, ranks and scales."""
    modules: dict[str, list[tuple[int | None, Patch]]] = defaultdict(list)
    for patch in patches:
        found = _BLOCK.fullmatch(patch.target.key)
        name = patch.target.key if found is None else f"{found[1]}*.{found[3]}"
        name += "" if patch.target.third is None else f"[{'qkv'[patch.target.third]}]"
        modules[name].append((None if found is None else int(found[2]), patch))
    rows = [("tensor", "blocks", "kind", "rank", "scale")]
    for name, members in modules.items():
        columns = (
            _ranges([number for number, _ in members if number is not None]),
            _words(patch.kind for _, patch in members),
            _words("-" if patch.change.rank is None else str(patch.change.rank) for _, patch in members),
            _words(f"{patch.change.scale:g}" for _, patch in members),
        )
        rows.append((name, *columns))
    return _aligned(rows)


def _by_block(norms: Mapping[str, Norms]) -> list[str]:
    blocks: dict[str, list[Norms]] = defaultdict(list)
    for key, one in norms.items():
        part, _, name = key.partition(".")
        blocks[f"{part}.{block_of(name)[0] or name}"].append(one)
    rows = [("block", "relative norm", "tensors")]
    for name, members in blocks.items():
        change, weight = (sqrt(sum(value**2 for value in values)) for values in zip(*members, strict=True))
        rows.append((name, f"{Norms(change, weight).relative:.4f}", str(len(members))))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: 0-11, 13."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found) or "-"


def _words(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _some(entries: Mapping[str, str]) -> list[str]:
    lines = [f"  {printable(key, 120)}: {printable(value, 200)}" for key, value in list(entries.items())[:_SHOWN]]
    return lines + ([f"  and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else [])
