"""The links between GPUs: what an exchange takes by each way and size, launched one by one and as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mmdit.bench.rows import FAILURES, Cells, said_of
from mmdit.runtime import mesh, peer_setup
from mmdit.runtime.mesh import Team, shares
from mmdit.runtime.peers import Peers
from mmdit.utils import markdown_table

SIZES = (2**19, 2**21, 2**23, 2**24, 2**26)  # bytes that a rank sends to all others together
_HEADS, _HEAD_DIM = 19, 64  # of a rank, when stores are measured: those of SD3.5-Large on two ranks
_TIMES = 20  # exchanges in a row
_TITLES = ("way", "launched", *(f"{size / 2**20:g} MiB" for size in SIZES))


@dataclass(frozen=True)
class Link:
    """Measured speed of a rank's link in one direction.

    Attributes:
        gather: bytes a second of a gather.
        exchange: bytes a second of an exchange of tokens for heads, beside its latency.
        latency: seconds that an exchange takes beside its bytes.
        way: how tokens are exchanged; see `mmdit.parallelize`.
    """

    gather: float
    exchange: float
    latency: float = 0.0
    way: str = ""


def link_of(device: torch.device) -> Link:
    """Measure the links between all ranks; every rank calls this.

    An exchange takes latency + bytes / speed, by its times for two sizes: on GPUs as a CUDA graph, as drawings do it,
    because launched one by one, small ones take the host's time.
    """
    team = _world()
    direct, way = peer_setup.connected(team, device) if team.size > 1 else (None, "")
    small, large = (2**19, 2**25) if device.type == "cuda" else (2**14, 2**20)
    part = torch.zeros(large // 4, device=device)
    graph = device.type == "cuda"
    gather = (team.size - 1) * part.nbytes / _seconds(lambda: team.gathered(part), device, graph=graph)
    try:
        times = (_seconds(_exchange(team, direct, size, device), device, graph=graph) for size in (small, large))
        least, most = times
    finally:
        _close(direct)
    return Link(
        gather, (large - small) / max(most - least, 1e-9), max(least - small * (most - least) / large, 0.0), way
    )


def links(device: torch.device, seconds: float = 25.0) -> Iterator[list[str]]:
    """The rows of the table of links: GB/s and microseconds by way and size; every rank calls this.

    Args:
        device: of this rank.
        seconds: no row begins later.
    """
    begin, team = time.monotonic(), _world()
    direct, way = peer_setup.connected(team, device)
    try:
        yield from _rows(team, direct, way, device, begin + seconds)
    finally:
        _close(direct)


def _close(direct: Peers | None) -> None:
    if direct is not None:
        direct.close()


def _rows(team: Team, direct: Peers | None, way: str, device: torch.device, end: float) -> Iterator[list[str]]:
    ways: dict[str, Callable[[int], Callable[[], object]]] = {
        f"stores ({way})": lambda size: _exchange(team, direct, size, device),
        "all_to_all of tensors": lambda size: _exchange(team, None, size, device),
        "all_to_all_single": lambda size: _single(team, size, device),
        "gather": lambda size: _gather(team, size, device),
    }
    if direct is None:
        yield ["stores", f"not possible: {way}", *["-"] * len(SIZES)]
        del ways[f"stores ({way})"]
    for name, make in ways.items():
        for graph in (False, True) if device.type == "cuda" else (False,):
            cells: list[str] = []
            for size in SIZES if device.type == "cuda" else SIZES[:1]:
                if mesh.from_first(time.monotonic() > end):
                    cells.append("not measured")
                    continue
                try:
                    one = _seconds(make(size), device, graph=graph)
                    cells.append(f"{size / one / 1e9:.1f} GB/s, {1e6 * one:.0f} us")
                except FAILURES as error:
                    cells.append(f"failed: {said_of(error, 100)}")
            yield [name, "as a graph" if graph else "one by one", *cells, *["-"] * (len(SIZES) - len(cells))]


def table(rows: Sequence[Cells]) -> str:
    """The table of `links`."""
    return "\n".join(markdown_table(_TITLES, rows))


def _world() -> Team:
    assert dist.group.WORLD is not None
    return Team(dist.group.WORLD)


def _exchange(team: Team, direct: Peers | None, size: int, device: torch.device) -> Callable[[], object]:
    """An exchange in which this rank sends `size` bytes in all."""
    if team.size == 1:
        return lambda: None
    if direct is None:
        part = torch.zeros(max(size // (team.size - 1) // 4, 1), device=device)
        given, out = [part] * team.size, [torch.empty_like(part) for _ in range(team.size)]
        return lambda: team.exchanged(out, given)
    heads = _HEADS * team.size
    tokens = size * team.size // ((team.size - 1) * _HEADS * _HEAD_DIM * 2)
    z = torch.zeros(1, tokens, _HEADS, _HEAD_DIM, dtype=torch.bfloat16, device=device)
    image = shares(tokens, team.size)
    return lambda: direct.send_back(z, heads, [0] * team.size, image)


def _single(team: Team, size: int, device: torch.device) -> Callable[[], object]:
    part = torch.zeros(size * team.size // (team.size - 1) // 4 // team.size * team.size, device=device)
    out = torch.empty_like(part)
    return lambda: dist.all_to_all_single(out, part, group=team.group)


def _gather(team: Team, size: int, device: torch.device) -> Callable[[], object]:
    part = torch.zeros(size // (team.size - 1) // 4, device=device)
    return lambda: team.gathered(part)


def _seconds(run: Callable[[], Any], device: torch.device, *, graph: bool = False) -> float:
    """Seconds of a call, of many in a row; the slowest rank counts."""
    run()
    if device.type != "cuda":
        times = [_by_clock(run) for _ in range(3)]
    else:
        torch.cuda.synchronize(device)
        several = _recorded(run) if graph else _repeated(run)
        several()
        times = [_by_events(several, device) / _TIMES for _ in range(3)]
    slowest = torch.tensor([min(times)])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _repeated(run: Callable[[], Any]) -> Callable[[], None]:
    def several() -> None:
        for _ in range(_TIMES):
            run()

    return several


def _recorded(run: Callable[[], Any]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_TIMES):
            run()
    return graph.replay


def _by_clock(run: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _by_events(several: Callable[[], None], device: torch.device) -> float:
    dist.barrier()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    several()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000
