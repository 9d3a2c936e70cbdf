"""Whether ranks can store into each other's memory: that memory is made and tried, or a sentence says why not."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from mmdit.runtime.mesh import Team, of_all
from mmdit.runtime.peers import Arena, Peers, rounded, unfit

Exchange = Literal["auto", "peers", "nccl"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)
_FAILURES = (RuntimeError, ValueError, ImportError, AttributeError, TypeError)  # of symmetric memory, a young interface


def connected(
    team: Team,
    device: torch.device,
    exchange: Exchange = "auto",
    *,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Peers | None, str]:
    """The exchanges of a team by stores into each other's memory, and how it exchanges; all ranks of the run call this.

    Args:
        team: the ranks of a sequence.
        device: the device of this rank.
        exchange: "auto" takes NCCL where stores are not possible, and says why; "nccl" takes it anyway.
        head_dim, dtype: of the model; the defaults are those of Stable Diffusion 3.

    Returns:
        The exchanges, None where a collective of torch does them; and a sentence for reports.

    Raises:
        RuntimeError: "peers" is asked for, and stores are not possible, on every rank.
    """
    backend = "NCCL" if device.type == "cuda" else "gloo"
    if exchange == "nccl":
        return None, f"{backend}, as asked for"
    peers, why = None, _agreed(_why_not(team, device, unfit(head_dim, dtype)))
    if not why:
        peers, why = _tried(team, device)
    if why and exchange == "peers":
        raise RuntimeError(f'exchange="peers": {why}; leave it out')
    return peers, f"{backend}: {why}" if why else "stores into the memory of the other GPUs"


def _tried(team: Team, device: torch.device) -> tuple[Peers | None, str]:
    """Make the exchanges and check them, on all ranks or on none."""
    made, why = None, ""
    try:
        made = Peers(team, device, lambda nbytes: _symmetric(nbytes, team, device))
        torch.cuda.synchronize(device)
    except _FAILURES as error:
        why = _first_line(error)
    if why := _agreed(why):
        return None, why
    assert made is not None, "it was made without an error"
    try:
        made.check()
    except _FAILURES as error:
        why = _first_line(error)
    why = _agreed(why)
    return (None, why) if why else (made, "")


def _symmetric(nbytes: int, team: Team, device: torch.device) -> Arena:
    """Symmetric memory of torch; all ranks of the team call this."""
    import torch.distributed._symmetric_memory as symmetric

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # which torch would set up, and nothing here uses
    own = symmetric.empty(rounded(nbytes), dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(own, team.group)
    each = [handle.get_buffer(rank, own.shape, torch.uint8).data_ptr() for rank in range(team.size)]
    return Arena(own, tuple(one - each[team.rank] for one in each))


def _why_not(team: Team, device: torch.device, why: str) -> str:
    """Why stores into the memory of the team's other ranks are not possible, as far as this rank can see.

    All ranks call this, and all of them gather the names of the hosts, whatever they find themselves. `why` is what is
    known of the model.
    """
    hosts: list[object] = [None] * team.size
    torch.distributed.all_gather_object(hosts, socket.gethostname(), group=team.group)
    if device.type != "cuda":
        return f"stores into the memory of others need GPUs, this rank is on {device}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if len(set(hosts)) > 1:
        return f"the ranks are on several hosts: {', '.join(map(str, hosts))}"
    return why


def _agreed(why: str) -> str:
    """The first reason of any rank, on every rank; all ranks call this."""
    return next((f"{one} (rank {rank})" for rank, one in enumerate(of_all(why)) if one), "")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
