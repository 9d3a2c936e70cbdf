"""Exchanges of a sequence by stores into the memory of other GPUs, in place of NCCL's all-to-all.

The kernel that norms queries and keys writes each head straight to the GPU that attends with it, and another one writes
the results back. Nothing is copied before or after, and all tokens lie in the order that they have on one GPU. The
memory is torch's symmetric memory; its multicast is not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from types import ModuleType
from typing import Literal, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from mmdit.runtime.graphs import Graphs
from mmdit.runtime.mesh import Team, shares, starts
from mmdit.runtime.rows import Added, Attention, AttentionInputs, Rows

_LAST = 2**31 - 1  # a flag that lets every meeting pass
_ROUND = 2**21  # bytes; memory is mapped in pages of this size
_PATIENCE = 30.0  # seconds for the first exchange, for which all ranks compile
_FREEING = 10.0  # seconds in which waiting kernels are released again and again


class Arena(NamedTuple):
    """Memory of this rank that the others write."""

    own: Tensor  # uint8 [bytes]
    distances: tuple[int, ...]  # bytes from here to the same memory of each rank


Allocate = Callable[[int], Arena]  # of so many bytes on every rank; all ranks call it together


class Places(NamedTuple):
    """Where the heads and tokens of one attention go; see `peer_kernels`."""

    joint: Tensor
    back: Tensor
    heads: Tensor
    tokens: Tensor
    starts: tuple[int, int]
    first: int


class Peers:
    """The memory that the GPUs of a team share, and exchanges through it.

    Args:
        team: the ranks.
        device: the GPU of this rank.
        allocate: makes shared memory.

    Attributes:
        graphs: those that record exchanges; they are cleared where a larger attention needs larger memory.
        refused: forwards that were exchanged by a collective instead, and why.
    """

    def __init__(self, team: Team, device: torch.device, allocate: Allocate) -> None:
        self.team, self.device, self._allocate = team, device, allocate
        self._flags = self._allocate(4 * team.size)
        self.flags = self._flags.own[: 4 * team.size].view(torch.int32)
        self.distances = torch.tensor([one // 4 for one in self._flags.distances], device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self._release()  # so that its kernel is loaded when it is needed
        self.flags.zero_()
        # Heads and results are in separate memory, also those of attentions of different sizes. A rank may store heads
        # while another one still reads the last results; it cannot store results before all have sent their heads.
        self._arenas: dict[Literal["heads", "results"], Arena] = {}
        self.graphs = WeakSet[Graphs]()
        self.refused: dict[str, None] = {}
        self._places: dict[tuple[object, ...], Places] = {}

    def takes(self, like: Tensor, head_dim: int) -> bool:
        """Whether heads of this dtype and size can be exchanged; `refused` keeps why not."""
        why = unfit(head_dim, like.dtype)
        if like.device != self.device:
            why = f"the model is on {like.device}, and the shared memory on {self.device}"
        if why:
            self.refused[why] = None
        return not why

    def send(
        self, qkv: Tensor, norms: Tensor | None, rows: Rows, head_dim: int, text: Sequence[int], image: Sequence[int]
    ) -> AttentionInputs:
        """Queries, keys and values of all tokens with this rank's heads, [samples, tokens, own heads, head_dim].

        Tokens are in the order of one GPU: all text, then all of the image. What is returned lasts until the next call.

        Args:
            qkv, norms, rows, head_dim: see `kernels.pack`; of this rank's tokens.
            text, image: the number of text and image tokens of each rank.
        """
        from mmdit.runtime import peer_kernels

        places = self.places(rows.samples, qkv.shape[1] // (3 * head_dim), head_dim, qkv.dtype, text, image)
        peer_kernels.send_heads(qkv, norms, rows, places.joint, places.heads, places.starts)
        self.team.sent += qkv.nbytes // qkv.shape[1] * 3 * head_dim * (len(places.heads) - places.joint.shape[3])
        self.meet()
        q, k, v = places.joint.unbind(0)
        return q, k, v

    def send_back(self, z: Tensor, heads: int, text: Sequence[int], image: Sequence[int]) -> Tensor:
        """This rank's tokens of all heads, [samples, own tokens, heads, head_dim], until the next call.

        Args:
            z: results of all tokens with this rank's heads, as `send` ordered them.
            heads: the number of all heads.
            text, image: as in `send`.
        """
        from mmdit.runtime import peer_kernels

        places = self.places(len(z), heads, z.shape[3], z.dtype, text, image)
        peer_kernels.send_tokens(z.contiguous(), places.back, places.tokens, places.first)
        self.team.sent += z.nbytes // z.shape[1] * (z.shape[1] - places.back.shape[1])
        self.meet()
        return places.back

    def meet(self) -> None:
        """Wait on the GPU until all ranks are here."""
        from mmdit.runtime import peer_kernels

        peer_kernels.meet(self.flags, self.distances, self.counter, self.team.rank)

    def places(
        self, samples: int, heads: int, head_dim: int, dtype: torch.dtype, text: Sequence[int], image: Sequence[int]
    ) -> Places:
        """Where everything goes in an attention of these sizes."""
        key = (samples, heads, head_dim, dtype, *text, *image)
        if key not in self._places:
            self._places[key] = self._planned(samples, heads, head_dim, dtype, text, image)
        return self._places[key]

    def _planned(
        self, samples: int, heads: int, head_dim: int, dtype: torch.dtype, text: Sequence[int], image: Sequence[int]
    ) -> Places:
        rank, unit = self.team.rank, head_dim * dtype.itemsize
        by_rank, both = shares(heads, self.team.size), [sum(pair) for pair in zip(text, image, strict=True)]
        joint = (3, samples, sum(both), by_rank[rank], head_dim)
        back = (samples, both[rank], heads, head_dim)
        forth = self._arena("heads", rounded(3 * samples * sum(both) * max(by_rank) * unit))
        home = self._arena("results", rounded(samples * max(both) * heads * unit))

        def of(arena: Arena, shape: tuple[int, ...]) -> Tensor:
            return arena.own[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

        def distances(arena: Arena) -> list[int]:
            return [one // unit for one in arena.distances]

        return Places(
            of(forth, joint),
            of(home, back),
            torch.tensor(head_places(distances(forth), by_rank), device=self.device),
            torch.tensor(token_places(distances(home), text, image), device=self.device),
            (starts(text)[rank], sum(text) + starts(image)[rank]),
            starts(by_rank)[rank],
        )

    def _arena(self, of: Literal["heads", "results"], nbytes: int) -> Arena:
        """Memory of at least so many bytes; what was too small is freed, with everything that writes into it."""
        if of not in self._arenas or self._arenas[of].own.numel() < nbytes:
            if of in self._arenas:
                self._forget()
                del self._arenas[of]
            self._arenas[of] = self._allocate(nbytes)
        return self._arenas[of]

    def _forget(self) -> None:
        """Free all graphs, and the places in the memory; all ranks are between the same two exchanges here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for graphs in self.graphs:
            graphs.clear()
        self._places.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory on this rank."""
        return sum(one.own.numel() for one in (self._flags, *self._arenas.values()))

    @cached_property
    def _beside(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def _release(self) -> None:
        if self.device.type != "cuda":
            self.flags.fill_(_LAST)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._beside):
            self.flags.fill_(_LAST)
        self._beside.synchronize()

    def close(self) -> None:
        """Free the memory, after the graphs that use it; now, because it cannot be freed while a graph is recorded."""
        self._places.clear()
        self._arenas.clear()
        self._flags = self._flags._replace(own=torch.empty(0, dtype=torch.uint8))
        self.flags = self._flags.own.view(torch.int32)

    def free(self, waiting: Callable[[], bool]) -> None:
        """Let kernels pass that wait for a rank which has failed; what they exchange is wrong from now on.

        Again and again while the main thread is `waiting`, because ranks that go on write their flags.
        """
        end = time.monotonic() + _FREEING
        while waiting() and time.monotonic() < end:
            self._release()
            time.sleep(0.02)

    def check(self) -> None:
        """Exchange known numbers.

        Raises:
            RuntimeError: they did not arrive, or not in time.
        """
        heads, size, team = self.team.size + 1, 16, self.team
        counts = [1] * team.size
        rows = Rows(1, 1, 1)
        qkv = torch.arange(2.0 * 3 * heads * size, device=self.device).view(2, -1) + 1000 * team.rank

        def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q + 2 * k + 4 * v

        own = qkv.view(2, 3, heads, size)
        found = self.send_back(attended(*self.send(qkv, None, rows, size, counts, counts)), heads, counts, counts)
        self._arrived()
        if not torch.equal(found[0], attended(*own.unbind(1))):
            raise RuntimeError("numbers stored into the memory of other GPUs came back wrong")

    def _arrived(self) -> None:
        """Wait for the GPU; RuntimeError where that takes too long."""
        if self.device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        end = time.monotonic() + _PATIENCE
        while not done.query():
            if time.monotonic() > end:
                self._release()
                raise RuntimeError(f"stores into the memory of other GPUs were not seen there in {_PATIENCE:.0f} s")
            time.sleep(0.001)


class Exchanging(NamedTuple):
    """Attention of a fast forward over the ranks: `pack` in place of the kernels' one, and `attention` of its result.

    Attributes:
        kernels: `mmdit.runtime.kernels`.
        peers: the exchanges.
        inner: attention of all tokens with this rank's heads.
        heads: the number of all heads.
        text, image: the number of text and image tokens of each rank.
    """

    kernels: ModuleType
    peers: Peers
    inner: Attention
    heads: int
    text: Sequence[int]
    image: Sequence[int]

    def pack(
        self, qkv: Tensor, norms: Tensor | None, rows: Rows, head_dim: int, added: Added | None = None
    ) -> AttentionInputs:
        """See `Peers.send`; what LoRAs add to qkv is added before."""
        if added is not None:
            self.kernels.add_up(qkv, added, rows)
        return self.peers.send(qkv, norms, rows, head_dim, self._text(bool(rows.text)), self.image)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of what `pack` gave; this rank's tokens of all heads."""
        z = self.inner(q, k, v)
        return self.peers.send_back(z, self.heads, self._text(z.shape[1] > sum(self.image)), self.image)

    def _text(self, there: bool) -> Sequence[int]:
        return self.text if there else [0] * len(self.text)


def head_places(distances: Sequence[int], heads: Sequence[int]) -> list[list[int]]:
    """By head: the distance to its rank, and there the number of heads and the place among them.

    Args:
        distances: to the memory of each rank, in heads.
        heads: the number of heads of each rank.
    """
    return [[there, count, place] for there, count in zip(distances, heads, strict=True) for place in range(count)]


def token_places(distances: Sequence[int], text: Sequence[int], image: Sequence[int]) -> list[list[int]]:
    """By token, all text first: the distance to its rank, and there the number of tokens and the place among them.

    Args:
        distances: to the memory of each rank, in heads.
        text, image: the number of text and image tokens of each rank.
    """
    ranks = list(zip(distances, text, image, strict=True))
    found = [[there, own + more, place] for there, own, more in ranks for place in range(own)]
    return found + [[there, own + more, own + place] for there, own, more in ranks for place in range(more)]


def unfit(head_dim: int, dtype: torch.dtype) -> str:
    """Why heads of this size and dtype cannot be stored into the memory of other GPUs; empty where they can."""
    if dtype == torch.float64:
        return "the kernels compute in float32, the model in torch.float64"
    if _ROUND % (head_dim * dtype.itemsize):  # memories must be whole numbers of heads apart
        return f"a head of {head_dim} values in {dtype} does not divide {_ROUND} bytes"
    return ""


def rounded(nbytes: int) -> int:
    """Bytes up to whole pages."""
    return -(-nbytes // _ROUND) * _ROUND
