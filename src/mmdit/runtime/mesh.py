"""The processes of a parallel run as a mesh of guidance branches and parts of the sequence, checked on every rank."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mmdit.runtime.lifeline import RanksDifferError
from mmdit.utils import shortened, whole

TIMEOUT = timedelta(minutes=10)  # of a collective, where no failure is reported


class Layout(NamedTuple):
    """How many ranks share the branches of guidance, and how many share the image tokens of a branch."""

    cfg: int
    sequence: int

    def __str__(self) -> str:
        return f"cfg {self.cfg} x sequence {self.sequence}"


def layout_of(world: int, cfg: int | Literal["auto"], sequence: int | None, *, guided: bool, heads: int) -> Layout:
    """The layout of a mesh over `world` processes.

    Args:
        world: the number of processes.
        cfg: the number of ranks that share the branches; "auto" is 2 for guided drawings on an even number of
            processes, else 1.
        sequence: the number of ranks that share the tokens of a branch; None is what remains.
        guided: whether drawings have several branches.
        heads: attention heads of the model, of which each rank of a sequence needs one.

    Raises:
        ValueError: the numbers do not fit the processes or the model.
    """
    if sequence is not None:
        sequence = whole("sequence", sequence, 1)
    if cfg == "auto":
        cfg = 2 if guided and world // (sequence or 1) % 2 == 0 else 1
    elif isinstance(cfg, str):
        raise ValueError(f"cfg is {cfg!r}, expected a whole number or 'auto'")
    cfg = whole("cfg", cfg, 1)
    found = Layout(cfg, max(world // cfg, 1) if sequence is None else sequence)
    if found.cfg * found.sequence != world:
        wanted = found.cfg * found.sequence
        raise ValueError(
            f"{found} is a mesh of {wanted} processes, and {world} are running: start "
            f"torchrun --nproc-per-node {wanted}, or give numbers whose product is {world}"
        )
    if found.sequence > heads:
        raise ValueError(
            f"sequence {found.sequence}: the model has {heads} attention heads, and each rank of a sequence needs one"
        )
    return found


def shares(total: int, parts: int) -> list[int]:
    """The sizes of `parts` shares, which differ by at most one, the larger ones first: 38 = 10 + 10 + 9 + 9."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each share begins."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


class Team:
    """The ranks of a process group, and their collectives on tensors; a team of one rank exchanges nothing.

    Args:
        group: the process group.

    Attributes:
        rank: the number of this rank in the team.
        size: the number of ranks.
        sent: bytes that this rank has sent to others so far; replays of CUDA graphs are not counted.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0

    def gathered(self, part: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape, [size, ...]."""
        if self.size == 1:
            return part.unsqueeze(0)
        found = part.new_empty((self.size, *part.shape))
        # The first name is that of torch 2.13 on, where the other one warns.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(found.flatten(0, 1) if part.ndim else found, part.contiguous(), group=self.group)
        self.sent += part.nbytes * (self.size - 1)
        return found

    def joined(self, part: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The parts of all ranks, whose sizes along `dim` are `sizes`, as one tensor."""
        if self.size == 1:
            return part
        most = max(sizes)
        padded = part
        if part.shape[dim] < most:
            shape = list(part.shape)
            shape[dim] = most
            padded = part.new_zeros(shape)
            padded.narrow(dim, 0, part.shape[dim]).copy_(part)
        found = self.gathered(padded)
        return torch.cat([one.narrow(dim, 0, size) for one, size in zip(found, sizes, strict=True)], dim)

    def exchanged(self, out: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Send each rank its part, and receive what it sends into `out`: contiguous tensors by rank.

        The entries of this rank itself are not exchanged.
        """
        nothing = parts[self.rank].new_empty(0)
        given, found = ([nothing if i == self.rank else one for i, one in enumerate(each)] for each in (parts, out))
        assert all(one.is_contiguous() for one in (*given, *found)), "NCCL takes contiguous tensors"
        self.sent += sum(one.nbytes for one in given)
        if nothing.is_cuda:
            dist.all_to_all(found, given, group=self.group)
            return
        flat = torch.cat([one.flatten() for one in given])  # gloo exchanges equal sizes, or one flat tensor
        sizes = [one.numel() for one in found]
        arrived = flat.new_empty(sum(sizes))
        dist.all_to_all_single(arrived, flat, sizes, [one.numel() for one in given], group=self.group)
        for one, values in zip(found, arrived.split(sizes), strict=True):
            one.copy_(values.view_as(one))


@dataclass(frozen=True)
class Mesh:
    """The mesh of a run: its layout, and the teams of this rank."""

    layout: Layout
    world: Team
    cfg: Team
    sequence: Team

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Mesh:
        """The mesh of the running processes; all ranks call this."""
        mesh = init_device_mesh(device.type, tuple(layout), mesh_dim_names=("cfg", "sequence"))
        assert dist.group.WORLD is not None
        return cls(layout, Team(dist.group.WORLD), Team(mesh.get_group("cfg")), Team(mesh.get_group("sequence")))


def start(device: torch.device, timeout: timedelta = TIMEOUT) -> None:
    """Start torch.distributed from the variables that torchrun sets, unless it has been started.

    Raises:
        ValueError: the process was not started by torchrun.
    """
    if dist.is_initialized():
        return
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"there is only this process ({missing[0]} is not set): start one process for each GPU with "
            "torchrun --nproc-per-node N"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)


def own_device(name: torch.device) -> torch.device:
    """The device of this process on its host: a CUDA device without a number becomes that of LOCAL_RANK.

    Raises:
        ValueError: the host has fewer GPUs than processes.
    """
    if name.type != "cuda" or name.index is not None:
        return name
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"process {local} of this host needs a GPU of its own, and torch sees {count}: start "
            f"torchrun --nproc-per-node {count}"
        )
    return torch.device("cuda", local)


def sends(device: torch.device) -> bool:
    """Whether collectives take tensors on such a device: a process group can be for GPUs alone."""
    group = dist.group.WORLD
    return group is not None and any(one.type == device.type for one in group._device_types)


def from_first(value: Any) -> Any:
    """The picklable value of rank 0, on every rank."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def of_all(value: Any) -> list[Any]:
    """The picklable values of all ranks, in their order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check_equal(facts: dict[str, object], what: str) -> None:
    """Compare facts across ranks; all ranks call this.

    Args:
        facts: what must be equal, by name. Tensors are compared by their bytes.
        what: what the facts are of, for the error.

    Raises:
        RanksDifferError: a fact differs, on every rank, with the values of rank 0 and of the first rank that differs.
    """
    found = of_all({name: (_digest(value), shortened(value)) for name, value in facts.items()})
    for name in facts:
        for rank, other in enumerate(found):
            if other.get(name, ("", ""))[0] != found[0].get(name, ("", ""))[0]:
                raise RanksDifferError(
                    f"{what}: {name} differs between the ranks: {found[0].get(name, '?')[1]} on rank 0, "
                    f"{other.get(name, '?')[1]} on rank {rank}. All ranks must be given the same"
                )


def all_equal(*values: object) -> bool:
    """Whether all ranks give equal values, on every rank; all of them call this.

    It takes one message of 32 bytes, so that nothing is lost where they are equal, as they mostly are.
    """
    own = sha256("".join(map(_digest, values)).encode()).digest()
    if not sends(torch.device("cpu")):
        return len(set(of_all(own))) == 1
    message = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    found = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    dist.all_gather(found, message)
    return all(torch.equal(one, found[0]) for one in found)


def same_random_state(state: Tensor) -> None:
    """Give torch's global generator on the CPU the `state` of rank 0."""
    torch.set_rng_state(from_first(state))


def abort(meanwhile: Callable[[], None] = lambda: None) -> None:
    """Release the NCCL kernels that wait for a rank that has failed; the process groups cannot be used afterwards.

    All communicators at once: freeing the memory of one waits for the running kernels of the others.

    Args:
        meanwhile: releases kernels that wait for other reasons.
    """
    threads = []
    for group in reversed(list(dist.distributed_c10d._world.pg_map)):
        with suppress(RuntimeError):
            backend = group._get_backend(torch.device("cuda"))
            threads.append(threading.Thread(target=_abort, args=(backend,), name="abort", daemon=True))
            threads[-1].start()
    meanwhile()
    for thread in threads:
        thread.join()


def _abort(backend: Any) -> None:
    with suppress(RuntimeError):
        backend.abort()


def _digest(value: object) -> str:
    return sha256(pickle.dumps(_plain(value))).hexdigest()


def _plain(value: object) -> object:
    """The value with tensors as bytes, so that equal values have equal pickles."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        return (str(data.dtype), tuple(data.shape), data.flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(value, torch.Generator):
        return _plain(value.get_state())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
