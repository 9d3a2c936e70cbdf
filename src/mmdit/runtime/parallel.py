"""A model over several ranks: the parts of a parallel run, and what all ranks must agree on.

`mmdit.parallelize` makes a `Parallel`. Guidance branches are split by `branches`, image tokens by `sequence`, decoding
by `bands`; `mesh` holds the ranks, and `lifeline` tells each of them when another one fails.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from encoders.vae import VAE
from mmdit.runtime import mesh, peer_setup
from mmdit.runtime.bands import BandDecoder
from mmdit.runtime.branches import split_branches
from mmdit.runtime.fast_vae import FastVAE
from mmdit.runtime.lifeline import Lifeline, ParallelError
from mmdit.runtime.mesh import Layout, Mesh
from mmdit.runtime.peer_setup import Exchange
from mmdit.runtime.sequence import SequenceParallel
from mmdit.runtime.shared_text import SharedText

T = TypeVar("T")


class Parallel:
    """The ranks that draw together; all of them make the same calls in the same order.

    Args:
        layout: the layout of the mesh.
        device: the device of this rank.
        exchange: how a fast forward exchanges tokens for heads; see `mmdit.parallelize`.
        head_dim, dtype: of the model.

    Attributes:
        texts: text encoders over all ranks.
        sequence: forwards over the ranks that share the tokens; None where each rank computes whole forwards.
        exchange: what was chosen, and why; empty where no tokens are split.

    Raises:
        RuntimeError: the exchange that is asked for is not possible, on every rank.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        exchange: Exchange = "auto",
        *,
        head_dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.layout, self.device = layout, device
        self.mesh = Mesh.of(layout, device)
        self.rank, self.world = self.mesh.world.rank, self.mesh.world.size
        self.sequence, self.exchange = None, ""
        if layout.sequence > 1:
            exchanges, self.exchange = peer_setup.connected(
                self.mesh.sequence, device, exchange, head_dim=head_dim, dtype=dtype
            )
            self.sequence = SequenceParallel(self.mesh.sequence, exchanges)
        self.decoder, self.texts = BandDecoder(self.mesh.world), SharedText(self.mesh.world)
        self.lifeline = connected(self._free)

    def __reduce__(self) -> str:
        """Refuse copies and pickles: connections belong to one process."""
        raise TypeError(
            "a parallel pipeline cannot be copied or pickled: call pipe.parallel.close() on every rank first"
        )

    def __str__(self) -> str:
        cfg, sequence = self.mesh.cfg.rank, self.mesh.sequence.rank
        place = f"this is rank {self.rank} (cfg {cfg}, sequence {sequence})"
        return "; ".join(filter(None, (f"{self.layout} on {self.world} ranks; {place}", self.choices)))

    @property
    def choices(self) -> str:
        """What was chosen, in words; that of decoding is known once two pictures of a size are decoded."""
        why_not, direct = self.decoder.why_not, self.sequence.peers if self.sequence is not None else None
        refused = "" if direct is None else ", ".join(direct.refused)
        said = (
            f"tokens are exchanged by {self.exchange}" if self.exchange else "",
            f"some forwards by a collective, because {refused}" if refused else "",
            f"bands are a CUDA graph for {len(self.decoder.graphs)} sizes" if len(self.decoder.graphs) else "",
            f"bands are launched kernel by kernel, because recording them failed: {why_not}" if why_not else "",
        )
        return "; ".join(filter(None, said))

    def _free(self) -> None:
        """Release what waits on the GPU for a rank that has failed."""
        direct = self.sequence.peers if self.sequence is not None else None
        mesh.abort(lambda: None if direct is None else direct.free(lambda: self.lifeline.waits))

    def guarded(self) -> AbstractContextManager[None]:
        """See `Lifeline.guarded`."""
        return self.lifeline.guarded()

    def predictions(self, branches: Sequence[T], run: Callable[[Sequence[T]], list[Tensor]], x: Tensor) -> list[Tensor]:
        """See `split_branches`."""
        return run(branches) if self.layout.cfg == 1 else split_branches(branches, run, x, self.mesh.cfg)

    def decoded(self, vae: VAE, latent: Tensor, fast: FastVAE | None = None, *, graph: bool = False) -> Tensor:
        """See `BandDecoder`."""
        return self.decoder(vae, latent, fast, graph=graph)

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, on every rank.

        One on the CPU does not go over the GPUs, where it would wait until they have nothing left to do.
        """
        found = tensor.to(tensor.device if mesh.sends(tensor.device) else self.device).contiguous().clone()
        dist.broadcast(found, src=0)
        return found.to(tensor.device)

    def connect(self) -> None:
        """Let the collectives take their memory of the GPU, which they do when they first run."""
        with self.lifeline.guarded():
            for team in (self.mesh.world, self.mesh.cfg, self.mesh.sequence):
                ones = [torch.ones(1, device=self.device) for _ in range(2 * team.size)]
                team.gathered(ones[0])
                if team.size > 1:
                    team.exchanged(ones[: team.size], ones[team.size :])

    def smallest(self, size: int | None) -> int | None:
        """The smallest size that a rank gives, on every rank; None where all give None."""
        with self.lifeline.guarded():
            return min((one for one in mesh.of_all(size) if one is not None), default=None)

    def agree(self, what: str, **facts: object) -> None:
        """Raise RanksDifferError, on every rank, where a fact differs between the ranks; see `mesh.check_equal`."""
        with self.lifeline.guarded():
            mesh.check_equal(facts, what)

    def agreed(self, make: Callable[[], T], what: str, facts_of: Callable[[T], dict[str, object]]) -> T:
        """What a function that checks arguments gives on this rank, where all ranks accept theirs and agree.

        Torch's global generator has the state of rank 0 before, so that random seeds are equal: where another rank's
        differs, all of them call the function again. The ranks can draw again after an error.

        Args:
            make: checks arguments.
            what: what the facts are of, for the error.
            facts_of: what must be equal on all ranks, by name; see `mesh.check_equal`.

        Raises:
            ParallelError: another rank has refused its arguments.
            RanksDifferError: the ranks were given different ones.
        """
        state, made, error = torch.get_rng_state(), list[T](), None
        try:
            with self.lifeline.guarded():
                try:
                    made.append(make())
                except Exception as found:  # of which the others must hear, so that none of them goes on
                    error = found
                said = "" if error is None else f"{type(error).__name__}: {error}"
                facts = facts_of(made[0]) if made else {}
                alike = mesh.all_equal(said, state, *facts.items())
                refused = [said] if alike else mesh.of_all(said)
            if error is not None:
                raise error
        finally:
            del error  # whose traceback holds this frame: a cycle would keep what `make` has used
        for rank, why in enumerate(refused):
            if why:
                raise ParallelError(f"rank {rank} refused its arguments: {why}. Nothing was drawn on rank {self.rank}")
        if alike:
            return made[0]
        with self.lifeline.guarded():
            if mesh.all_equal(state):
                mesh.check_equal(facts, what)
                return made[0]
            mesh.same_random_state(state)
        return self.agreed(make, what, facts_of)

    def close(self) -> None:
        """Leave the run."""
        self.decoder.close()
        self.lifeline.close()


def connected(on_failure: Callable[[], None] = mesh.abort) -> Lifeline:
    """The lifeline of all running processes; all ranks call this. See `Lifeline` for `on_failure`."""
    rank, world, host = dist.get_rank(), dist.get_world_size(), "127.0.0.1"
    if len(set(mesh.of_all(socket.gethostname()))) > 1:
        host = os.environ["MASTER_ADDR"]
    return Lifeline.connected(rank, world, mesh.from_first, host=host, on_failure=on_failure)
