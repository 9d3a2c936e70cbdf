"""Apply LoRAs to the weights of a pipeline's models, and restore the original weights bit for bit.

A LoRA is either attached (its products are added to the outputs of the Linears, whose weights are unchanged) or merged
into the weights. Tensors outside of Linears (norms, biases, the patch convolution, embeddings) are replaced in both
forms. The original tensors are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.precision import Linear, upcast
from mmdit.checkpoints.lora import Lora
from mmdit.checkpoints.lora_kinds import LowRank
from mmdit.checkpoints.lora_merge import (
    Strength,
    Weighted,
    changed,
    check_finite,
    merged,
    planned,
    refuse_folded,
    replace_tensor,
)
from mmdit.checkpoints.lora_names import Part
from mmdit.models.lora import LoraLinear, all_beside, beside, without
from mmdit.runtime.compiled import refuse_own_forward
from mmdit.runtime.host import HostCopies
from mmdit.runtime.lora_products import PRODUCTS
from quant.quantize import linears_of
from quant.tensor import Float8Tensor

_WAITING = 2  # originals on a GPU that wait for their copies
Form = Literal["attached", "merged"]
Weight: TypeAlias = float | Mapping[str, float]
"""The strength of a LoRA: a number, or numbers by globs over official names, `{"joint_blocks.1?.*": 0.5}`."""


@dataclass
class Adapter:
    """A LoRA of a pipeline, with its strengths and its form."""

    lora: Lora
    form: Form
    weight: Weight = 1.0  # strength on the transformer
    text_encoder_weight: Weight | None = None  # strength on the text encoders; None is `weight`
    active: bool = True
    scale: float = 1.0  # the factor `lora_scale` of `fuse_lora`

    def strength(self, part: Part) -> Strength:
        """The strength of the LoRA on the tensors of a model."""
        is_text = part != "transformer" and self.text_encoder_weight is not None
        weight = self.text_encoder_weight if is_text else self.weight
        assert weight is not None, "the transformer has a weight"
        if isinstance(weight, Mapping):
            return partial(_by_glob, weight, self.scale)
        return weight * self.scale


@dataclass
class PatchedWeights:
    """The original tensors that LoRAs have replaced, by model and name."""

    before: dict[tuple[Part, str], Tensor] = field(default_factory=dict)

    def apply(self, models: Mapping[Part, nn.Module], acting: Sequence[Adapter]) -> None:
        """Restore the weights, then merge and attach the active LoRAs, in their order."""
        self.restore(models)
        with _Kept(self.before) as kept:
            for part, model in models.items():
                for form in ("merged", "attached"):
                    adapters = [one for one in acting if one.form == form]
                    strengths = [one.strength(part) for one in adapters]
                    plan = planned(part, shapes_of(model), [one.lora for one in adapters], strengths, warn=False)
                    if plan:
                        refuse_folded(model)
                    linears = {f"{name}.weight" for name, _ in linears_of(model)} if form == "attached" else set()
                    for key, patches in plan.items():
                        if key in linears:
                            _attach(part, model, key, patches, self.before.get((part, key)))
                        else:
                            old = _get(model, key)
                            kept.add((part, key), old)
                            replace_tensor(model, key, merged(old, key, part, patches).detach())

    def restore(self, models: Mapping[Part, nn.Module]) -> None:
        """Restore the original weights."""
        for model in models.values():
            for name in all_beside(model):
                without(model, name)
        for (part, key), tensor in self.before.items():
            replace_tensor(models[part], key, as_stored_now(tensor, _get(models[part], key)))
        self.before.clear()


class _Kept:
    """Keeps originals; a thread copies those of a GPU to the CPU while the next weights are changed.

    Args:
        before: gets each original at once, and its copy in its place as soon as there is one, so that no interrupt and
            no error loses an original.

    Raises:
        Exception: an original could not be copied, and is kept where it is.
    """

    def __init__(self, before: dict[tuple[Part, str], Tensor]) -> None:
        self._before, self._copies = before, HostCopies()
        self._waiting: list[Future[None]] = []
        self._worker = ThreadPoolExecutor(1)

    def add(self, key: tuple[Part, str], tensor: Tensor) -> None:
        """Keep a tensor, unless one of this name is kept already."""
        if key in self._before:
            return
        self._before[key] = tensor
        if len(self._waiting) >= _WAITING:  # each one holds memory of the GPU
            wait(self._waiting[: -_WAITING + 1])
        stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        self._waiting.append(self._worker.submit(self._copy, key, tensor, stream))

    def _copy(self, key: tuple[Part, str], tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(stream):  # None changes nothing
            copy = self._copies(tensor)
        if self._before.get(key) is tensor:  # after an interrupt, it may have been given back meanwhile
            self._before[key] = copy

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._worker.shutdown()
        failed = next((found for one in self._waiting if (found := one.exception()) is not None), None)
        self._waiting.clear()
        try:
            if kind is None and failed is not None:
                raise failed
        finally:
            del failed  # an error that this frame refers to would keep the frame, and with it the weights


def _attach(part: Part, model: nn.Module, key: str, patches: Sequence[Weighted], original: Tensor | None) -> None:
    """Attach patches to a Linear: as two factors if all of them are low-rank products, else as one matrix.

    `original` is the weight before merged patches, if there are any.
    """
    name, weight = key.removesuffix(".weight"), _get(model, key)
    refuse_own_forward(model, name)
    upcasts = isinstance(model.get_submodule(name), Linear)
    if all(map(_is_low_rank, patches)):
        down, up = factors_of(weight, patches)
        factors = check_finite(down, key, part, patches), check_finite(up, key, part, patches)
        attached = beside(model, name, factors=factors, products=PRODUCTS)
    else:
        values = _values(weight)
        base = values if original is None else _values(original).to(values)
        delta = (changed(values, patches, base) - values).to(weight.dtype)
        attached = beside(model, name, delta=check_finite(delta, key, part, patches))
    if upcasts:
        attached.__class__ = UpcastLoraLinear


class UpcastLoraLinear(LoraLinear):
    """A `LoraLinear` beside a Linear of a text encoder, which upcasts what is in 16 bits to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        output = Linear.forward(self, x)  # type: ignore[arg-type] # it has the weight and the bias of one
        if (factors := self.factors) is not None:
            down, up = (upcast(factor, x.dtype) for factor in factors)
            output = output + F.linear(F.linear(x, down), up)
        return output if self.delta is None else output + F.linear(x, upcast(self.delta, x.dtype))


def factors_of(weight: Tensor, patches: Sequence[Weighted]) -> tuple[Tensor, Tensor]:
    """The joint factors down [r, in] and up [out, r] of all patches of a weight; up includes strength and scale.

    Factors for a part of the rows are zero in the other rows. Both factors have the weight's dtype.
    """
    downs, ups = [], []
    for patch, strength, _, exchanged in patches:
        assert isinstance(patch.change, LowRank), "all others are no products"
        up, down = patch.change.factors()
        up = up.roll(len(up) // 2, dims=0) if exchanged else up
        whole = torch.zeros(weight.shape[0], up.shape[1], dtype=torch.float32, device=up.device)
        whole[patch.target.rows(weight.shape[0])] = strength * up
        downs.append(down)
        ups.append(whole)
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    return down.to(weight.device, weight.dtype), up.to(weight.device, weight.dtype)


def as_stored_now(before: Tensor, now: Tensor) -> Tensor:
    """Convert an original weight to the device, dtype and quantization of the weight that replaced it.

    The result is bit-equal to the original if none of these has changed.
    """
    if isinstance(now, Float8Tensor):
        if isinstance(before, Float8Tensor) and before.recipe == now.recipe:
            return before.to(now.device, now.dtype)
        values = _values(before).to(now.device)
        new = Float8Tensor.quantize(values, recipe=now.recipe, input_scale=now.input_scale)
        return Float8Tensor(new.qdata, new.scale, new.input_scale, now.recipe, now.dtype)
    before = before.dequantize() if isinstance(before, Float8Tensor) else before
    return before.to(now.device, now.dtype)


def _is_low_rank(each: Weighted) -> bool:
    change = each.patch.change
    return isinstance(change, LowRank) and change.mid is None and change.padded is None and each.patch.magnitude is None


def _values(weight: Tensor) -> Tensor:
    weight = weight.dequantize(torch.float32) if isinstance(weight, Float8Tensor) else weight.detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


_KINDS = (LoraLinear, UpcastLoraLinear)


def refuse_trained(models: Iterable[nn.Module]) -> None:
    """Raise ValueError where something other than LoRAs of a pipeline is attached: adapters in training."""
    others = [name for model in models for name, one in all_beside(model).items() if type(one) not in _KINDS]
    if others:
        raise ValueError(
            f"adapters in training are beside {len(others)} Linears, such as {others[0]}, and LoRAs would take their "
            "place: write them, remove them by mmdit.training.adapters.detach(pipe.transformer, adapters), and load "
            "what was written"
        )


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor of a model, by name."""
    return {key: tensor.shape for key, tensor in model.state_dict(keep_vars=True).items()}


def _get(model: nn.Module, key: str) -> Tensor:
    path, _, name = key.rpartition(".")
    found = getattr(model.get_submodule(path), name)
    assert isinstance(found, Tensor), f"{key} is a tensor of the model"
    return found


def _by_glob(weights: Mapping[str, float], scale: float, key: str) -> float:
    """The weight of the first glob that matches, else 1."""
    return scale * next((weight for glob, weight in weights.items() if fnmatchcase(key, glob)), 1.0)
