"""Steps as CUDA graphs: the GPU replays a recorded step after a single launch by the host."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

T = TypeVar("T")
Step = Callable[..., Any]  # tensors -> a tensor, or a tuple of tensors
_TURN = threading.RLock()  # threads record and launch graphs one after the other; see `_last`


class _Beside(threading.local):
    """By thread, the second stream of the recording that it makes."""

    stream: torch.cuda.Stream | None = None


_BESIDE = _Beside()


def beside(run: Callable[[], object]) -> Callable[[], None]:
    """Run something at the same time as what is launched after it, where a step is being recorded; else run it now.

    Small products take the multiprocessors that large ones leave idle at their end. Launched one by one they would wait
    for the host. A recording with before=0 (see `record`) runs them one after the other too.

    Args:
        run: launches work on the current GPU; it reads what was launched before, and nothing that follows writes it.

    Returns:
        What makes all that is launched later wait for the end of `run`; to be called once.
    """
    stream = _BESIDE.stream
    if stream is None:
        run()
        return lambda: None
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        run()
    return partial(here.wait_stream, stream)


class Captured(NamedTuple):
    """A recorded step, the memory that it reads, and the memory that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Any
    nbytes: int  # bytes of device memory that the recording took


class Graphs:
    """A cache with one graph per kind of step; the least recently used graph is evicted first.

    A step must read tensors that stay where they are (weights, tables) and its inputs, and must not wait for the GPU.
    Threads may call with streams of their own: on a GPU, each graph waits for the one that was launched before.

    Args:
        limit: how many graphs are kept.
    """

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()

    def __call__(self, key: Hashable, step: Step, inputs: Sequence[Tensor], *, before: int = 1) -> Any:
        """`step(*inputs)`, recorded at the first call with this key; the result is the caller's own.

        Args:
            key: equal for steps that launch the same work on inputs of the same shapes.
            step: recorded when it is new.
            inputs: on one GPU, which need not be the current one; copied into the graph's own memory.
            before: how often the step runs before it is recorded, so that libraries and compilers set themselves up
                outside of the graph; 0 where it has run already, which records `beside` in turn (see `record`).
        """
        with _TURN:
            if key not in self._captured:
                while len(self._captured) >= self.limit:
                    self._captured.popitem(last=False)
                self._captured[key] = _capture(step, inputs, before)
            self._captured.move_to_end(key)
            return _replayed(self._captured[key], inputs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def nbytes(self) -> int:
        """Memory of the device that the graphs hold."""
        return sum(one.nbytes for one in self._captured.values())

    def clear(self) -> None:
        """Free all graphs and their memory."""
        self._captured.clear()


class Pace:
    """Whether the host launches more slowly than the GPU computes, so that the GPU waits and a graph pays.

    Attributes:
        kinds: the kinds of steps that were launched.
    """

    def __init__(self) -> None:
        self.kinds: set[Hashable] = set()
        self._end: torch.cuda.Event | None = None

    def waits(self, kind: Hashable) -> bool:
        """Whether a step of this kind was launched before, and the GPU is done with the last step by now."""
        return kind in self.kinds and self._end is not None and self._end.query()

    def launched(self, device: torch.device) -> None:
        """A step has just been launched, kernel by kernel."""
        self._end = torch.cuda.Event()
        self._end.record(torch.cuda.current_stream(device))

    def clear(self) -> None:
        """Forget all steps."""
        self._end = None
        self.kinds.clear()


def _replayed(captured: Captured, inputs: Sequence[Tensor]) -> Any:
    """Launch a graph on the current stream of its GPU; copies of its output."""
    device = inputs[0].device
    here, last = torch.cuda.current_stream(device), _last(device.index)
    here.wait_event(last)
    for own, given in zip(captured.inputs, inputs, strict=True):
        own.copy_(given, non_blocking=True)
        own.record_stream(here)  # it may be freed, for another stream, while this one reads it
    captured.graph.replay()
    found = tree_map(_copied, captured.output)
    last.record(here)
    return found


def _copied(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@cache
def _last(device: int) -> torch.cuda.Event:
    """The end of the last graph on a GPU, and of the copies of what it wrote.

    The next one waits for it, on whatever stream: it may be the same graph, and different ones share the memory that
    cuBLAS keeps for the stream on which they were recorded.
    """
    return torch.cuda.Event()


@cache
def _streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Those of all recordings on a GPU, the second for `beside`: cuBLAS keeps 32 MB for each stream that it ran on."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _capture(step: Step, inputs: Sequence[Tensor], before: int) -> Captured:
    own = tuple(one.clone() for one in inputs)
    graph, output, taken = record(lambda: step(*own), own[0].device, before=before)
    return Captured(graph, own, output, taken + sum(one.nbytes for one in own))


def record(step: Callable[[], T], device: torch.device, *, before: int = 1) -> tuple[torch.cuda.CUDAGraph, T, int]:
    """Record what a step launches: the graph, the result, and the device memory that it took.

    Args:
        step: reads and writes tensors of one GPU only.
        device: that GPU, which need not be the current one.
        before: how often it runs before it is recorded, so that libraries and compilers set themselves up. With 0, what
            is given to `beside` is recorded in turn, because libraries may not have set up the second stream.
    """
    with _TURN, torch.cuda.device(device):
        number = torch.cuda.current_device()
        first, second = _streams(number)
        # Libraries set themselves up on the second stream as well, which they must not do while a graph is recorded.
        _BESIDE.stream = second if before else None
        try:
            first.wait_stream(torch.cuda.current_stream())
            first.wait_event(_last(number))
            with torch.cuda.stream(first):
                for _ in range(before):
                    step()
            torch.cuda.current_stream().wait_stream(first)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=first, capture_error_mode="thread_local"):
                output = step()
        finally:
            _BESIDE.stream = None
        return graph, output, torch.cuda.memory_reserved() - reserved
