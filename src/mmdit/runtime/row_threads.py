"""The rows of a batch in threads of their own, for small models on a CPU.

A step of the embedded model is 350 operations of some microseconds to milliseconds. Where OpenMP splits each of them,
its threads meet at the end of each; threads with rows of their own meet once a step. What depends on the number of rows
is computed for all of them together, so that the result is that of one thread, bit for bit where a row of a matrix
product does not depend on the rows below it (MKL's do not).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain
from threading import Lock
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.nn.modules.module import _has_any_global_hook

from mmdit.models.blocks import JointBlock, StreamBlock
from mmdit.models.layers import FinalLayer
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.compiled import modules_of
from mmdit.runtime.mesh import shares, starts
from mmdit.runtime.versions import is_whole

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
_WIDEST = 512  # hidden size; operations of wider models take long enough for OpenMP


def suits(model: nn.Module, latent: Tensor) -> bool:
    """Whether a step is computed by `velocity`: of a small float32 model on a CPU, with a row or more for each thread.

    Args:
        model: the transformer.
        latent: the rows, [b, c, h, w].
    """
    if type(model) is not MMDiT or model.config.hidden_size > _WIDEST or model.pos_embed.dtype != torch.float32:
        return False
    if latent.device.type != "cpu" or not 2 <= torch.get_num_threads() <= len(latent):
        return False
    return all(type(one) in (nn.Parameter, Tensor) for one in _weights(modules_of(model)))  # float8 ones are others


def velocity(
    model: MMDiT,
    latent: Float[Tensor, "b c h w"],
    timestep: Float[Tensor, " b"],
    context: Float[Tensor, "b n k"],
    pooled: Float[Tensor, "b p"],
    *,
    control: Sequence[Tensor | None] | None = None,
    skip_layers: Collection[int] = (),
) -> Float[Tensor, "b o h w"]:
    """What `MMDiT.forward` computes, by as many threads as torch has, each of which computes some rows alone.

    This thread computes all rows where gradients are needed, and where hooks, modes or a profiler would see the
    operations of this thread only. Steps of several callers run one after the other. A thread of yours that uses torch
    for the first time during a step is left with one OpenMP thread: their number is the process's.

    Args:
        model: see `suits`.
        latent, timestep, context, pooled, control, skip_layers: see `MMDiT.forward`.
    """
    with _one_thread_each() as threads:
        if not _is_alone(model, latent):
            found: Tensor = model(latent, timestep, context, pooled, control=control, skip_layers=skip_layers)
            return found
        model.check(latent, context, pooled, control, skip_layers)
        known = _Known(model, latent, timestep, pooled, threads)

        def run(rows: slice) -> Tensor:
            own = None if control is None else [None if one is None else one[rows] for one in control]
            given = latent[rows], timestep[rows], context[rows], pooled[rows]
            predicted: Tensor = known.part(rows)(*given, control=own, skip_layers=skip_layers)
            return predicted

        return torch.cat(_together(run, _slices(len(latent), threads)))


class _Known:
    """The parts of a forward that depend on the number of rows, computed for all of them.

    These are products of one row per sample, and the convolution.
    """

    def __init__(self, model: MMDiT, latent: Tensor, timestep: Tensor, pooled: Tensor, threads: int) -> None:
        with torch.no_grad():
            self.model, self.tokens = model, model.x_embedder(latent)
            self.c = model.t_embedder(timestep) + model.y_embedder(pooled)
        parts: list[StreamBlock | FinalLayer] = [part for block in model.joint_blocks for part in _streams(block)]
        parts.append(model.final_layer)

        def modulations(some: slice) -> list[Tensor]:
            return [part.adaLN_modulation(self.c) for part in parts[some]]

        found = chain(*_together(modulations, _slices(len(parts), threads)))
        self.modulation: dict[nn.Module, Tensor] = dict(zip(parts, found, strict=True))

    def part(self, rows: slice) -> MMDiT:
        """The model for these rows of the batch, over the same parameters."""
        blocks = []
        for block in self.model.joint_blocks:
            text, image = (self._modulated(stream, rows) for stream in _streams(block))
            blocks.append(_with(block, context_block=text, x_block=image))
        return _with(
            self.model,
            x_embedder=_Given(self.tokens[rows]),
            t_embedder=_Given(self.c[rows]),
            y_embedder=_Given(0.0),
            joint_blocks=nn.ModuleList(blocks),
            final_layer=self._modulated(self.model.final_layer, rows),
        )

    def _modulated(self, module: M, rows: slice) -> M:
        return _with(module, adaLN_modulation=_Given(self.modulation[module][rows]))


class _Given(nn.Module):
    """A layer whose output is known."""

    def __init__(self, output: Tensor | float) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor | float:
        return self.output


def _streams(block: nn.Module) -> tuple[StreamBlock, StreamBlock]:
    assert isinstance(block, JointBlock)
    return block.context_block, block.x_block


def _with(module: M, **children: nn.Module) -> M:
    """The module with other children; it shares everything else."""
    other = object.__new__(type(module))
    other.__dict__ |= module.__dict__ | {"_modules": module._modules | children}
    return other


def _is_alone(model: MMDiT, latent: Tensor) -> bool:
    """Whether nothing sees or changes what this thread computes, and no gradient is needed."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    if modes or _profiler_enabled() or torch.is_autocast_enabled("cpu") or _has_any_global_hook():
        return False
    modules = modules_of(model)
    if not is_whole(modules):
        return False
    grads = torch.is_grad_enabled()
    return not (grads and (latent.requires_grad or any(one.requires_grad for one in _weights(modules))))


def _weights(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    return (one for module in modules for one in module._parameters.values() if one is not None)


def _slices(total: int, parts: int) -> list[slice]:
    """Neighbouring parts of a range of `total`, of about equal size."""
    sizes = shares(total, parts)
    return [slice(start, start + size) for start, size in zip(starts(sizes), sizes, strict=True)]


def _together(run: Callable[[slice], T], parts: Sequence[slice]) -> list[T]:
    """What `run` gives for each part, the first one in this thread, and all others in one each."""

    def plain(part: slice) -> T:
        with torch.no_grad():
            return run(part)

    others = [_threads.pool(len(parts) - 1).submit(plain, part) for part in parts[1:]]
    try:
        here = plain(parts[0])
    finally:
        wait(others)
    return [here, *(one.result() for one in others)]


class _Threads:
    """The threads of this process, and the lock of who uses them: the number of threads is the process's."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a child process, which has none of them."""
        self.stepping, self.pools = Lock(), dict[int, Executor]()

    def pool(self, count: int) -> Executor:
        if count not in self.pools:
            self.pools[count] = ThreadPoolExecutor(count, thread_name_prefix="mmdit-rows")
        return self.pools[count]


_threads = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.forget)


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Inside, operations run in the one thread that calls them. Gives the number of threads that torch had."""
    with _threads.stepping:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)
