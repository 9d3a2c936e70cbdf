"""Training over several processes by torch's own engines: DDP, and FSDP2 (`fully_shard`).

    torchrun --nproc-per-node 2 ...
        run, found = start(config, processes=processes_of("ddp", device))

DDP: every process holds the whole model, and gradients are averaged while the backward pass runs; where little is
trained (a LoRA), in one message after it, without a hook on each parameter. FSDP2: every process holds a share of each
weight, of its gradient and of the optimizer's state; a block's weights are gathered when it runs. Both give the losses
of one process with the batch of all of them, up to the order of sums.

Float8 weights are frozen. Under DDP they stay as they are on every process; under FSDP2 their codes and scales are
sharded as plain tensors, so that what is gathered is as small as what is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from mmdit.runtime.mesh import check_equal
from mmdit.runtime.mesh import start as start_group
from mmdit.training.loop import Processes
from quant.recipe import Recipe
from quant.tensor import Float8Tensor

__all__ = ["Strategy", "processes_of"]

Strategy = Literal["ddp", "fsdp"]
FEW_BYTES = 2**28  # of trained parameters whose gradients are sent in one message; 1 ms between two GPUs by NVLink


def processes_of(strategy: Strategy, device: torch.device) -> Processes:
    """The place of this process in a run under torchrun, for `mmdit.training.setup.start`; all processes call this.

    Args:
        strategy: "ddp" or "fsdp".
        device: of this process; see `mmdit.runtime.mesh.own_device`.

    Raises:
        ValueError: the process was not started by torchrun.
    """
    start_group(device)
    place: dict[str, Any] = {"rank": dist.get_rank(), "world": dist.get_world_size(), "mean": _mean}
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))  # data may take long to encode
    place["in_turn"] = partial(_in_turn, patient)
    if strategy == "ddp":
        found = _DataParallel(device)
        return Processes(**place, prepare=found.prepare, no_sync=_no_sync, average=found.average)
    return Processes(**place, sharded=True, prepare=_sharded, no_sync=_no_sync, whole=_whole, fill=_fill)


class _DataParallel:
    """DDP around a model of which much is trained; little is averaged after the backward pass, in one message.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.after = device, False

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model to train; frozen parameters and buffers are not sent, because every process has loaded the same."""
        _check_same(model)
        self.after = sum(one.nbytes for one in model.parameters() if one.requires_grad) <= FEW_BYTES
        if self.after:
            return model
        frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average what the backward pass has not averaged: one all-reduce for each dtype."""
        found = [one.grad for one in parameters if one.grad is not None] if self.after else []
        for dtype in dict.fromkeys(one.dtype for one in found):
            parts = [one for one in found if one.dtype == dtype]
            flat = torch.cat([one.flatten() for one in parts]).div_(dist.get_world_size())
            dist.all_reduce(flat)
            means = flat.split([one.numel() for one in parts])
            torch._foreach_copy_(parts, [mean.view_as(one) for mean, one in zip(means, parts, strict=True)])


def _sharded(model: nn.Module) -> nn.Module:
    """FSDP2 over the blocks of a model and over what is around them, in place."""
    blocks = dict(_blocks(model))
    _check_ties(model, blocks)
    _check_same(model)
    for part in list(model.modules()):
        weight = part._parameters.get("weight")
        if isinstance(weight, Float8Tensor):
            parametrize.register_parametrization(part, "weight", _Parts(weight), unsafe=True)
    model.register_forward_hook(lambda _, __, output: output.clone())  # FSDP warns of views, which lose its hooks
    for block in blocks.values():
        fully_shard(block)
    fully_shard(model)
    return model


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The names and blocks of all models inside: members of lists named `joint_blocks` or `transformer_blocks`."""
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in ("joint_blocks", "transformer_blocks"):
            yield from ((f"{name}.{key}", block) for key, block in part.named_children())


def _check_ties(model: nn.Module, blocks: Iterable[str]) -> None:
    """Raise ValueError for a parameter that two blocks share, or a block and what is around the blocks.

    `fully_shard` would make a parameter of its own in each of them.
    """
    firsts: dict[int, tuple[str, str]] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        block = next((block for block in blocks if name.startswith(f"{block}.")), "")
        other, first = firsts.setdefault(id(one), (block, name))
        if other != block:
            raise ValueError(f"{first} and {name} are one parameter, which fsdp would split: take ddp")


class _Parts(nn.Module):
    """A float8 weight [out, in] made of its codes [out, in] and its scales, [out, 1] or [1], which can be sharded.

    The codes keep their float8 dtype: `fully_shard` of torch 2.11 makes every shard a parameter with a gradient at
    first, which integers such as bytes cannot be.
    """

    input_scale: Tensor | None

    def __init__(self, weight: Float8Tensor) -> None:
        super().__init__()
        self.recipe: Recipe = weight.recipe
        self.dtype = weight.dtype
        self.input_scale = weight.input_scale  # an attribute, because one number cannot be sharded

    def forward(self, codes: Tensor, scale: Tensor) -> Float8Tensor:
        scale = scale if self.recipe.granularity == "row" else scale.reshape(())
        return Float8Tensor(codes, scale, self.input_scale, self.recipe, self.dtype)

    def right_inverse(self, weight: Float8Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.scale if weight.recipe.granularity == "row" else weight.scale.reshape(1)
        return weight.qdata, scale


def _check_same(model: nn.Module) -> None:
    """Raise RanksDifferError unless what is trained starts alike on every process; sums tell it."""
    trained = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    sums = [torch.stack([one.float().sum(), one.float().norm()]) for one in trained.values()]
    facts: dict[str, object] = {"names": sorted(trained)}
    facts |= dict(zip(trained, torch.stack(sums).tolist(), strict=True)) if sums else {}
    check_equal(facts, "what is trained")


def _no_sync(model: nn.Module) -> AbstractContextManager[object]:
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return _Unsynced(model) if isinstance(model, FSDPModule) else nullcontext()


class _Unsynced(AbstractContextManager[None]):
    """Gradients of passes inside are kept by each process until a later pass sends their sum."""

    def __init__(self, model: FSDPModule) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *raised: object) -> None:
        self.model.set_requires_gradient_sync(True)


@contextmanager
def _in_turn(group: dist.ProcessGroup) -> Iterator[None]:
    if dist.get_rank():
        dist.barrier(group)
    yield
    if not dist.get_rank():
        dist.barrier(group)


def _mean(value: Tensor) -> Tensor:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _fill(into: Tensor, value: Tensor) -> object:
    if not isinstance(into, DTensor):
        return into.copy_(value)
    return into.copy_(distribute_tensor(value.to(into.device), into.device_mesh, into.placements))
