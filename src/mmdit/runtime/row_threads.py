"""The rows of a batch in threads of their own, for small models on a CPU.

A step of the embedded model is 350 operations of some microseconds to milliseconds. Where OpenMP splits each of them,
its threads meet at the end of each; threads with rows of their own meet twice a step. `mmdit generate` asks for them by
`use`; a drawing in a script does not, so that it has the same bits whether something watches its steps or not. What
depends on the number of rows
is computed for all of them together, so that the result is that of one thread, bit for bit where a row of a matrix
product does not depend on the rows below it. MKL's do not on Intel's CPUs with AVX-512; those for AVX2 do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain
from threading import Lock
from typing import TypeVar
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.nn.modules.module import _has_any_global_hook

from mmdit.models.attention import Attend
from mmdit.models.blocks import JointBlock, StreamBlock
from mmdit.models.layers import (
    FinalLayer,
    Mlp,
    PatchEmbed,
    RMSNorm,
    SelfAttention,
    TimestepEmbedder,
    VectorEmbedder,
)
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.compiled import modules_of
from mmdit.runtime.mesh import shares, starts
from mmdit.runtime.versions import is_whole

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
_WIDEST = 512  # hidden size; operations of wider models take long enough for OpenMP
# What an MMDiT is built of. Any other module may use the rows of a batch together.
_PARTS = frozenset(
    {
        *(MMDiT, JointBlock, StreamBlock, FinalLayer, PatchEmbed, TimestepEmbedder, VectorEmbedder),
        *(SelfAttention, Attend, Mlp, RMSNorm, nn.LayerNorm, nn.Linear, nn.Conv2d, nn.GELU, nn.SiLU, nn.Identity),
        *(nn.ModuleList, nn.Sequential),
    }
)


_using: WeakSet[nn.Module] = WeakSet()


def use(model: nn.Module) -> None:
    """From now on, compute the steps of this model by `velocity` where they suit."""
    _using.add(model)


def suits(model: nn.Module, latent: Tensor) -> bool:
    """Whether a step is computed by `velocity`: of a small float32 model on a CPU, with a row or more for each thread.

    Never without `use`.

    Args:
        model: the transformer.
        latent: the rows, [b, c, h, w].
    """
    if (
        model not in _using
        or type(model) is not MMDiT
        or model.config.hidden_size > _WIDEST
        or model.pos_embed.dtype != torch.float32
    ):
        return False
    if latent.device.type != "cpu" or not 2 <= torch.get_num_threads() <= len(latent):
        return False
    return all(map(_is_plain, _weights(modules_of(model))))  # float8 ones are not


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

    The model's own forward computes all rows where gradients are needed, where hooks, modes, a profiler or a transform
    of `torch.func` would see the operations of this thread only, and where a module is none that an MMDiT is built of.
    Its operations are split by OpenMP, so that a step that is watched differs by roundings from one that is not; with
    `torch.set_num_threads(1)` both have the same bits.

    Other steps of several callers run one after the other. A thread of yours that uses torch for the first time during
    such a step is left with one OpenMP thread: their number is the process's.

    Args:
        model: see `suits`.
        latent, timestep, context, pooled, control, skip_layers: see `MMDiT.forward`.
    """
    given = latent, timestep, context, pooled
    if not _is_alone(model, given, control or ()):
        found: Tensor = model(*given, control=control, skip_layers=skip_layers)
        return found
    with _one_thread_each() as threads:
        model.check(latent, context, pooled, control, skip_layers)
        known = _Known(model, latent, timestep, pooled, threads)

        def run(rows: slice) -> Tensor:
            residuals = None if control is None else [_rows_of(one, rows, len(latent)) for one in control]
            own = (one[rows] for one in given)
            predicted: Tensor = known.part(rows)(*own, control=residuals, skip_layers=skip_layers)
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


def _rows_of(residual: Tensor | None, rows: slice, batch: int) -> Tensor | None:
    """The residual of some rows of the batch; one that is the same for all rows stays as it is."""
    is_batch = residual is not None and residual.ndim == 3 and len(residual) == batch
    return residual[rows] if residual is not None and is_batch else residual


def _is_alone(model: MMDiT, given: Sequence[Tensor], control: Sequence[Tensor | None]) -> bool:
    """Whether nothing sees or changes what this thread computes, no gradient is needed, and each row is one's own."""
    if _is_seen() or len({one.shape[:1] for one in given}) > 1:
        return False
    modules = modules_of(model)
    if not (all(map(_is_part, modules)) and is_whole(modules)):
        return False
    inputs = [*given, *(one for one in control if one is not None)]
    if not all(map(_is_plain, inputs)):
        return False
    return not (torch.is_grad_enabled() and any(one.requires_grad for one in chain(inputs, _weights(modules))))


def _is_seen() -> bool:
    """Whether something that acts in this thread alone sees or changes each operation."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    transformed = torch._C._functorch.maybe_current_level() is not None
    recast = torch.is_autocast_enabled("cpu")
    return bool(modes or transformed or recast or _profiler_enabled() or _has_any_global_hook())


def _is_part(module: nn.Module) -> bool:
    """Whether an MMDiT is built of such modules, and no method of this one is replaced."""
    return type(module) in _PARTS and vars(type(module)).keys().isdisjoint(vars(module))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


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
