"""What a fast forward keeps of the texts of a drawing: their tokens, and the modulation of the planned steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from mmdit.runtime.activations import TABLE_BYTES
from mmdit.runtime.graphs import Graphs

T = TypeVar("T")
_RECORDED_BYTES = 2**27  # of a table that is recorded, because the graph keeps one of its own; 28 guided steps: 125 MB
Visiting = Callable[[], AbstractContextManager[None]]


class Kept(threading.local, Generic[T]):
    """What was made from some tensors, which are kept alive with it; the oldest one is forgotten first.

    Threads may draw at once: each has its own, and clears its own. On a GPU, what was made on one stream may not be
    there yet for another one, so that each stream has its own too.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self._found: dict[Hashable, tuple[Sequence[Tensor], T]] = {}

    def of(self, sources: Sequence[Tensor], make: Callable[[], T], *more: Hashable) -> T:
        """What was made of these very tensors, or what `make` makes of them now; `more` tells further kinds apart."""
        key = (_stream_for(sources[0]), *more, *map(id, sources))
        if key not in self._found:
            while len(self._found) >= self.limit:
                self._found.pop(next(iter(self._found)))
            self._found[key] = sources, make()
        return self._found[key][1]

    def clear(self) -> None:
        """Forget everything that this thread has made."""
        self._found.clear()


def _stream_for(tensor: Tensor) -> torch.cuda.Stream | None:
    """The stream on which this thread works with a tensor of a GPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


@runtime_checkable
class Modulated(Protocol):
    """A fast forward of which texts are kept: `mmdit.runtime.fast.FastMMDiT`, for one."""

    vectors: int  # of the modulation of a step
    width: int  # of each of them

    def tokens(self, context: Tensor) -> Tensor:
        """The text tokens as the first block reads them."""

    def table(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """The modulation vectors at each timestep, [s, b, vectors, width]."""


class Recorded:
    """A fast forward of which small tables are a CUDA graph: their many launches take the host longer than the GPU.

    A table is recorded when one of its size is asked for again, so that a single drawing does not wait for a recording.

    Args:
        fast: the forward.
        graphs: keep the tables' graphs; whoever calls has them for itself.
    """

    def __init__(self, fast: Modulated, graphs: Graphs) -> None:
        self.fast, self.graphs = fast, graphs
        self.vectors, self.width = fast.vectors, fast.width
        self._seen: set[Hashable] = set()

    def tokens(self, context: Tensor) -> Tensor:
        """See `Modulated`."""
        return self.fast.tokens(context)

    def table(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """See `Modulated`."""
        nbytes = len(timesteps) * len(pooled) * self.vectors * self.width * pooled.itemsize
        key = (timesteps.shape, pooled.shape)
        if nbytes > _RECORDED_BYTES or key not in self._seen:
            self._seen.add(key)
            return self.fast.table(timesteps, pooled)
        table: Tensor = self.graphs(key, self.fast.table, (timesteps, pooled))
        return table


class Text:
    """The text tokens of a batch, and its modulation by timestep.

    Args:
        fast: the forward that reads them.
        context: text tokens, [b, n, k].
        pooled: pooled text vectors, [b, p].
    """

    def __init__(self, fast: Modulated, context: Tensor, pooled: Tensor) -> None:
        self.tokens, self.pooled = fast.tokens(context), pooled
        self._rows: dict[float, Tensor] = {}

    def vectors(
        self, fast: Modulated, timestep: float, planned: Sequence[float], visiting: Visiting = nullcontext
    ) -> Tensor:
        """The modulation at a timestep, [b, vectors, width]; computed together with the planned ones below it."""
        if timestep not in self._rows:
            per_step = fast.vectors * fast.width * self.pooled.nbytes // self.pooled.shape[1]
            most = max(TABLE_BYTES // max(per_step, 1), 1)
            wanted = list(dict.fromkeys([timestep, *(one for one in planned if one < timestep)]))[:most]
            timesteps = torch.tensor(wanted, dtype=torch.float32, device="cpu", pin_memory=self.pooled.is_cuda)
            with visiting():
                table = fast.table(timesteps.to(self.pooled.device, non_blocking=True), self.pooled)
            self._rows = dict(zip(wanted, table.unbind(0), strict=True))
        return self._rows[timestep]
