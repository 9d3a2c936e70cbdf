"""Weights that wait in host memory and visit the device: models by turns, and blocks that arrive while others compute.

Weights go one way only. On leaving, a tensor gets its memory on the host back, and is copied only where it was changed
on the device. So an interrupted drawing leaves nothing to mend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from mmdit.runtime.graphs import Graphs
from mmdit.runtime.host_memory import Layout, copy_parts, give_back, host_memory, parts_of
from mmdit.runtime.plan import SLOTS, ModelBytes

Key: TypeAlias = str | tuple[str, int]
"""Names a part of a model that travels in one piece: "rest", ("block", i) or ("adaln", i)."""
_BLOCKS = ("joint_blocks", "encoder.block")  # lists of blocks that can be streamed: the transformer's and T5's
_ARRIVALS: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()


def arrive(module: nn.Module) -> None:
    """Called before the weights of a module are used: let the device wait until they are there."""
    if (wait := _ARRIVALS.get(module)) is not None:
        wait()


def arriving(module: nn.Module, _: tuple[object, ...]) -> None:
    """`arrive` as a hook."""
    arrive(module)


@dataclass(frozen=True)
class Presence:
    """What of a model is on the device.

    Args:
        blocks: numbers of the blocks that are there all the time; None is all.
        streamed: numbers of blocks that arrive when they compute, in the order in which they run.
        adaln: whether adaLN matrices are there all the time.
        rest: whether everything else is.
    """

    blocks: tuple[int, ...] | None = None
    streamed: tuple[int, ...] = ()
    adaln: bool = True
    rest: bool = True

    def has(self, key: Key) -> bool:
        """Whether a part is there all the time."""
        if isinstance(key, str):
            return self.rest
        if key[0] == "adaln":
            return self.adaln
        return key[1] not in self.streamed and (self.blocks is None or key[1] in self.blocks)


WHOLE = Presence()


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a model that can be streamed; empty for models that travel whole."""
    for path in _BLOCKS:
        found: object = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return list(found)
    return []


def tensors_of(model: nn.Module) -> dict[Key, list[tuple[str, Tensor]]]:
    """The named tensors of each part of a model.

    A block's part has its matrices only. Vectors are small, the fast forward copies some of them, and embeddings inside
    of a block may be read outside of it, so that these are in "rest", as is what LoRAs attach, and what two modules
    share: it is needed with both.
    """
    found: dict[Key, list[tuple[str, Tensor]]] = {"rest": []}
    places = {each: i for i, block in enumerate(blocks_of(model)) for each in _matrices(block)}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    uses = Counter(id(tensor) for _, tensor in every)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        place = places.get(id(tensor))
        if place is None or uses[id(tensor)] > 1:
            key: Key = "rest"
        else:
            key = ("adaln" if "adaLN_modulation" in name else "block", place)
        found.setdefault(key, []).append((name, tensor))
    return found


def model_bytes(model: nn.Module, size: Callable[[str, Tensor], int] | None = None) -> ModelBytes:
    """Bytes of a model by part, for the planner.

    Args:
        model: on any device, also on the meta device.
        size: bytes of a tensor, by its name and itself; None is what it takes as it is.
    """
    size = stored_bytes if size is None else size
    sums = {key: sum(size(name, tensor) for name, tensor in named) for key, named in tensors_of(model).items()}
    count = len(blocks_of(model))

    def of(kind: str) -> tuple[int, ...]:
        return tuple(sums.get((kind, i), 0) for i in range(count))

    has_adaln = any(key[0] == "adaln" for key in sums if not isinstance(key, str))
    return ModelBytes(sums["rest"], of("block"), of("adaln") if has_adaln else ())


def stored_bytes(name: str, tensor: Tensor) -> int:
    """Bytes that a tensor takes as it is."""
    return sum(part.numel() * part.element_size() for part in parts_of(tensor))


def _matrices(block: nn.Module) -> Iterator[int]:
    for module in block.modules():
        if not isinstance(module, nn.Embedding):
            yield from (id(one) for one in module._parameters.values() if one is not None and one.ndim >= 2)


class CopyQueue:
    """Copies to a device, on a stream of their own where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, into: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy once everything is done that was launched before; returns what computation has to wait for."""
        if self.stream is None:
            into.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            into.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let computation that is launched from now on wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self) -> None:
        """Let computation wait for all copies, so that memory that is freed now may be used again."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class Unit:
    """Tensors that travel together, in one piece of memory.

    Args:
        tensors: they get memory on the host that this unit owns.
        pinned_for: the GPU for which that memory is pinned; None does not pin it.
    """

    def __init__(self, tensors: Sequence[Tensor], pinned_for: torch.device | None = None) -> None:
        self.tensors = list(tensors)
        self.layout = Layout(self.tensors)
        self.home: list[Tensor] = []
        if any(part.is_cuda for tensor in self.tensors for part in parts_of(tensor)):
            self.memory = host_memory(self.layout.size, pinned_for)  # a GPU writes to pinned pages several times faster
            self._settle(self.memory)
        else:  # one tensor at a time is on the host twice
            self.memory = host_memory(self.layout.size, pinned_for, self._settle)
        self.ready: torch.cuda.Event | None = None
        self.here: Tensor | None = None  # its memory on the device
        self._bound: list[Tensor] | None = None
        self._versions: list[int] = []

    def _settle(self, memory: Tensor) -> None:
        """Let the tensors have their values in this memory, and free what had them."""
        self.home = self.layout.placed(self.tensors, memory)
        for tensor, home in zip(self.tensors, self.home, strict=True):
            copy_parts(home, tensor)
            tensor.data = home

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it holds exactly these tensors, and nobody has given them other memory."""
        return len(tensors) == len(self.tensors) and all(
            one is other and _address(one) == _address(home)
            for one, other, home in zip(self.tensors, tensors, self.home, strict=True)
        )

    def bind(self, data: list[Tensor]) -> None:
        """Let the tensors have their values in other memory, which holds them already or will when they are used."""
        self._versions = [_version(tensor) for tensor in self.tensors]
        self._bound = data
        for tensor, one in zip(self.tensors, data, strict=True):
            tensor.data = one

    def unbind(self) -> bool:
        """Let the tensors have their values on the host again; returns whether one was changed meanwhile."""
        if self._bound is None:
            return False
        changed = False
        for tensor, home, data, version in zip(self.tensors, self.home, self._bound, self._versions, strict=True):
            if _version(tensor) != version:
                copy_parts(home, data)
                changed = True
            tensor.data = home
        self._bound = None
        return changed

    def enter(self, queue: CopyQueue) -> None:
        """Move to the device."""
        self.here = torch.empty(self.layout.size, dtype=torch.uint8, device=queue.device)
        self.ready = queue.copy(self.here, self.memory)
        self.bind(self.layout.placed(self.home, self.here))

    def leave(self) -> None:
        """Move back to the host; whoever calls has let computation wait for all copies."""
        self.unbind()
        self.here, self.ready = None, None

    def wait(self, queue: CopyQueue) -> None:
        """Let computation wait until it is there."""
        if self.ready is not None:
            queue.wait(self.ready)
            self.ready = None


class Ring:
    """Units that are on the device only while they compute: one computes while the next one arrives.

    Args:
        units: in the order in which they compute.
        queue: copies them.
        again: whether the first one comes after the last one.
    """

    def __init__(self, units: Sequence[Unit], queue: CopyQueue, *, again: bool) -> None:
        self.units, self.queue, self.again = units, queue, again
        size = max(unit.layout.size for unit in units)
        count = min(SLOTS, len(units))
        self.slots = [torch.empty(size, dtype=torch.uint8, device=queue.device) for _ in range(count)]
        self.holds: list[int | None] = [None] * count
        self.versions: list[list[int]] = [[]] * count
        self.ready: list[torch.cuda.Event | None] = [None] * count
        self.data = [unit.layout.placed(unit.home, self.slots[i % count]) for i, unit in enumerate(units)]
        self.is_bound = False

    def bind(self) -> None:
        """Before the model is called."""
        if not self.is_bound:
            self.is_bound = True
            for unit, data in zip(self.units, self.data, strict=True):
                unit.bind(data)

    def unbind(self) -> None:
        """After the model was called: the tensors are what they are on the host, for whoever reads or writes them."""
        if self.is_bound:
            for unit in self.units:
                unit.unbind()
            self.is_bound = False
            if self.again:
                self._fetch(0)

    def use(self, place: int) -> None:
        """Before a unit computes."""
        slot = place % len(self.slots)
        self._fetch(place)
        self.queue.wait(self.ready[slot])
        if place + 1 < len(self.units):
            self._fetch(place + 1)

    def _fetch(self, place: int) -> None:
        """Let a unit arrive once its slot is free, which it is when all that was launched before is done."""
        slot, unit = place % len(self.slots), self.units[place]
        versions = [_version(tensor) for tensor in unit.tensors]
        if self.holds[slot] == place and self.versions[slot] == versions:
            return
        self.holds[slot] = None
        self.ready[slot] = self.queue.copy(self.slots[slot][: unit.layout.size], unit.memory)
        self.holds[slot], self.versions[slot] = place, versions


class Residency:
    """Decides what of some models is on a device; everything else waits on the host.

    What is there stays until other things are asked for.

    Args:
        device: where models compute.
        moves: whether weights are copied even where the device is the CPU, where they could be read as they are.
        tight: whether memory that is no longer used is given back at once, so that a budget holds.

    Attributes:
        lock: held by the caller that draws with the models.
        moved: grows when weights have moved.
        still: whether whoever decides promises that no block of the transformer moves.
        graphs_at_once: how many graphs a drawing may hold of its steps, between which no block moves; 0 where one does.
        graphs: those that are cleared before anything moves, unless all is still.
    """

    def __init__(self, device: torch.device | str, *, moves: bool = False, tight: bool = False) -> None:
        self.device = torch.device(device)
        if self.device == torch.device("cuda"):  # the current device belongs to a thread
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.lock, self.moved, self.still, self.graphs_at_once = RLock(), 0, False, 0
        self.graphs: WeakSet[Graphs] = WeakSet()
        self.moves, self.tight = moves or self.device.type != "cpu", tight
        self.queue = CopyQueue(self.device)
        self._units: WeakKeyDictionary[nn.Module, dict[Key, Unit]] = WeakKeyDictionary()
        self._wanted: dict[nn.Module, Presence] | None = None
        self._has_gathered = False  # since the last drawing
        self._rings: list[Ring] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._arrivals: list[nn.Module] = []

    def __reduce__(self) -> str:
        """Refuse copies and pickles, whose weights would be in memory that this object lends and takes back."""
        raise TypeError(
            "a pipeline with memory= or offload= cannot be copied or pickled, because its weights move: load it again "
            "from its files"
        )

    def enter(self, wanted: Mapping[nn.Module, Presence]) -> None:
        """Have exactly this on the device, and let the tensors of streamed blocks have their memory there."""
        if not self.moves:
            return
        if self._wanted != dict(wanted):
            self._move(wanted)
        for ring in self._rings:
            ring.bind()

    def drawn(self) -> None:
        """After a drawing: where weights were gathered for it, give back host memory that only a first one takes."""
        if self._has_gathered:
            self._has_gathered = False
            give_back()

    def rest(self) -> None:
        """Between calls of a model: tensors of streamed blocks are what they are on the host."""
        for ring in self._rings:
            ring.unbind()

    def leave(self) -> None:
        """Move all models back to the host, including those that an interrupted `enter` had moved."""
        self._wanted = None
        self._clear_graphs()
        self._forget_arrivals()
        self.queue.settle()
        for units in list(self._units.values()):
            for unit in units.values():
                unit.leave()
        self._rings = []
        self.moved += 1
        self._give_back()

    @contextmanager
    def visiting(self, model: nn.Module) -> Iterator[None]:
        """Inside, adaLN weights that are not on the device arrive when `arrive(adaLN_modulation)` is called."""
        presence = (self._wanted or {}).get(model)
        units = [unit for key, unit in self._units.get(model, {}).items() if key[0] == "adaln"]
        if presence is None or presence.adaln or not units:
            yield
            return
        ring = Ring(units, self.queue, again=False)
        modules = [_adaln_of(block) for block in blocks_of(model)]
        try:
            ring.bind()
            for place, of_block in enumerate(one for one in modules if one):
                for module in of_block:
                    _ARRIVALS[module] = partial(ring.use, place)
            yield
        finally:
            for module in (one for of_block in modules for one in of_block):
                _ARRIVALS.pop(module, None)
            self.queue.settle()
            ring.unbind()

    def _move(self, wanted: Mapping[nn.Module, Presence]) -> None:
        fresh = self._wanted is None
        self._wanted = None
        self._clear_graphs()
        self._forget_arrivals()
        for ring in self._rings:
            ring.unbind()
        self._rings = []
        self.queue.settle()
        gathered = [self._gather(model, fresh) for model in wanted]
        if any(gathered):
            give_back()
        self._send_home(wanted)
        for model, presence in wanted.items():
            self._bring(model, presence)
        self.moved += 1
        self._wanted = dict(wanted)

    def _gather(self, model: nn.Module, fresh: bool) -> bool:
        """Have a unit for each part of a model; returns whether one was made.

        Tensors may have been replaced since the last time.
        """
        units, made = self._units.setdefault(model, {}), False
        if units and not fresh:
            return False
        found = {key: [tensor for _, tensor in named] for key, named in tensors_of(model).items()}
        for key in units.keys() - found.keys():
            units.pop(key).leave()
        for key, tensors in found.items():
            if key not in units or not units[key].is_of(tensors):
                if key in units:
                    units.pop(key).leave()
                units[key] = Unit(tensors, self.device if self.device.type == "cuda" else None)
                made = True
        self._units[model] = {key: units[key] for key in found}
        self._has_gathered = self._has_gathered or made
        return made

    def _send_home(self, wanted: Mapping[nn.Module, Presence]) -> None:
        left = False
        for model, units in list(self._units.items()):
            presence = wanted.get(model)
            for key, unit in units.items():
                if unit.here is not None and (presence is None or not presence.has(key)):
                    unit.leave()
                    left = True
        if left:
            self._give_back()

    def _bring(self, model: nn.Module, presence: Presence) -> None:
        units, blocks = self._units[model], blocks_of(model)
        for key, unit in units.items():
            if presence.has(key) and unit.here is None:
                unit.enter(self.queue)
        if presence.rest:
            units["rest"].wait(self.queue)
        if presence.streamed:
            if compiled := [i for i in presence.streamed if blocks[i]._compiled_call_impl is not None]:
                raise ValueError(
                    f"block {compiled[0]} of {type(model).__name__} is compiled (torch.compile), and a block that is "
                    "streamed must not be: load the model again, or give a larger memory="
                )
            streamed = [units["block", i] for i in presence.streamed]
            ring = Ring(streamed, self.queue, again=hasattr(model, "joint_blocks"))
            self._rings.append(ring)
            for place, i in enumerate(presence.streamed):
                self._on_arrival(blocks[i], [partial(ring.use, place), *self._waits(units, i, ("adaln",))])
        for i, block in enumerate(blocks):
            if i not in presence.streamed and presence.has(("block", i)):
                self._on_arrival(block, self._waits(units, i, ("block", "adaln")))
            for module in _adaln_of(block) if presence.adaln else ():
                self._on_arrival(module, self._waits(units, i, ("adaln",)), hook=False)

    def _waits(self, units: Mapping[Key, Unit], place: int, kinds: Iterable[str]) -> list[Callable[[], None]]:
        return [partial(units[kind, place].wait, self.queue) for kind in kinds if (kind, place) in units]

    def _on_arrival(self, module: nn.Module, calls: Sequence[Callable[[], None]], *, hook: bool = True) -> None:
        """Let these be called before the module computes; a compiled one runs no hooks, so that all are called now."""
        if module._compiled_call_impl is not None:
            for call in calls:
                call()
            return

        def wait() -> None:
            for call in calls:
                call()

        self._arrivals.append(module)
        _ARRIVALS[module] = wait
        if hook:
            self._hooks.append(module.register_forward_pre_hook(arriving, prepend=True))

    def _forget_arrivals(self) -> None:
        for handle in self._hooks:
            handle.remove()
        for module in self._arrivals:
            _ARRIVALS.pop(module, None)
        self._hooks, self._arrivals = [], []

    def _clear_graphs(self) -> None:
        """Free graphs that hold while nothing moves, before other models need their memory."""
        if not self.still:
            for graphs in self.graphs:
                graphs.clear()

    def _give_back(self) -> None:
        if self.tight and self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def capped(device: torch.device, size: int | None) -> Iterator[None]:
    """Inside, torch takes at most this many bytes of a GPU's memory, and gives back what it only keeps for later."""
    if size is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    if torch.cuda.memory_reserved(device) > size:
        torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(before, size / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _adaln_of(block: nn.Module) -> list[nn.Module]:
    streams = (getattr(block, name, None) for name in ("context_block", "x_block"))
    return [stream.adaLN_modulation for stream in streams if stream is not None]


def _version(tensor: Tensor) -> int:
    """How often it was written to; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    return parts_of(tensor)[0].data_ptr()
