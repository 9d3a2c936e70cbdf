"""Merge LoRAs into a checkpoint and write the result tensor by tensor: `mmdit merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import StoredModel
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.lora import Lora
from mmdit.checkpoints.lora_merge import Rounding, Weighted, merged, planned
from mmdit.checkpoints.lora_names import PARTS, Part
from mmdit.checkpoints.quantize import layout_of
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.checkpoints.write import opened, tokenizers_of, write_checkpoint
from mmdit.utils import number
from quant.tensor import Float8Tensor


class Merged(NamedTuple):
    """A summary of the written checkpoint."""

    path: Path
    tensors: int  # number of tensors that the LoRAs changed

    def __str__(self) -> str:
        return f"{self.path}: {self.tensors} tensors changed"


class Strengths(NamedTuple):
    """The strengths of a LoRA."""

    transformer: float = 1.0
    text_encoders: float | None = None  # None: the same as for the transformer

    def of(self, part: Part) -> float:
        """The strength for a model."""
        other = self.text_encoders
        return number("strength", self.transformer if part == "transformer" or other is None else other)


def merge_checkpoint(
    source: str | Path,
    loras: Sequence[tuple[Lora, Strengths]],
    target: str | Path,
    *,
    rounding: Rounding | None = None,
) -> Merged:
    """Write the checkpoint at `source`, of any layout, with LoRAs merged; all other tensors are copied unchanged.

    Only one weight at a time is in memory. Scaled float8 weights are read twice: for the new scale, and for the qdata.

    Args:
        source: a file or folder; all models in it are written.
        loras: the LoRAs to merge, in this order, with their strengths.
        target: a .safetensors file, which gets official names, or a folder, which gets the layout of the source.
        rounding: how float8 weights are rounded, see `mmdit.merge_lora`.

    Raises:
        FileExistsError: `target` exists.
        CheckpointError: the source is broken or incomplete, or a LoRA does not fit it or changes none of its weights.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already; give another place, or remove it first")
    found = locate(source)
    layout = layout_of(found, target)
    models, count, done = opened(found), 0, []
    for lora, _ in loras:
        if not {model.component for model in models} & set(lora.parts):
            raise CheckpointError(f"{lora.source} changes {', '.join(lora.parts)}, and {source} holds none of these")
    for model in models:
        part = next((each for each in PARTS if each == model.component), None)
        shapes = {key: lazy.shape for key, lazy in model.tensors.items()}
        strengths = [] if part is None else [strength.of(part) for _, strength in loras]
        plan = {} if part is None else planned(part, shapes, [lora for lora, _ in loras], strengths)
        count += len(plan)
        done.append(model if part is None else _merged(model, part, plan, rounding))
    write_checkpoint(
        done,
        target,
        layout,
        shift=3.0 if found.shift is None else found.shift,
        sampling=found.sampling,
        tokenizers=tokenizers_of(found, models),
    )
    return Merged(target, count)


def _merged(model: StoredModel, part: Part, plan: dict[str, list[Weighted]], rounding: Rounding | None) -> StoredModel:
    tensors = dict(model.tensors)
    for key, patches in plan.items():
        tensors[key] = _changed(tensors[key], partial(merged, key=key, part=part, patches=patches, rounding=rounding))
    return replace(model, tensors=tensors)


def _changed(lazy: LazyTensor, change: partial[Tensor]) -> LazyTensor:
    """A lazy tensor whose patches are applied when it is read."""

    def load(dtype: torch.dtype, device: torch.device) -> Tensor:
        return change(lazy.read()).to(device, dtype)

    codes = lazy.codes
    if codes is None or codes.plain:
        plain = None if codes is None else replace(codes, load=lambda device: load(codes.dtype, device))
        return LazyTensor(lazy.shape, lazy.dtype, load, plain)

    def whole() -> Float8Tensor:
        new = change(codes.read(codes.logical, torch.device("cpu")))
        assert isinstance(new, Float8Tensor), "a float8 weight stays one"
        return new

    def load_codes(device: torch.device) -> Tensor:
        return whole().qdata.to(device)

    def load_values(dtype: torch.dtype, device: torch.device) -> Tensor:
        return whole().dequantize(torch.float32).to(device, dtype)

    scaled = replace(codes, load=load_codes, scale=whole().scale)
    return LazyTensor(lazy.shape, lazy.dtype, load_values, scaled)
