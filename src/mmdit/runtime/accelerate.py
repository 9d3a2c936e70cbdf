"""The fast path of a model: fused kernels, precomputed modulation tables and CUDA graphs, with a report of the choices.

The model is left unchanged: `Accelerated.velocity` computes the same function from the same parameters, up to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from mmdit.models.mmdit import MMDiT
from mmdit.runtime import plain_kernels
from mmdit.runtime.attention import BestAttention
from mmdit.runtime.compiled import ACCELERATED
from mmdit.runtime.fast import FastMMDiT
from mmdit.runtime.fast_control import summed
from mmdit.runtime.fast_nets import ActingNet, FastNets, residuals_of
from mmdit.runtime.graphs import Graphs, Pace, Step
from mmdit.runtime.products import Product
from mmdit.runtime.rows import Rounding
from mmdit.runtime.sequence import SequenceParallel
from mmdit.runtime.streaming import Residency
from mmdit.runtime.texts import Kept, Recorded, Text
from mmdit.runtime.versions import check_whole, kernels_for, version_of, why_no_triton
from quant import emulation
from quant.current import on_its_device

T = TypeVar("T")
_TABLES = 4  # graphs of modulation tables that are kept, one per number of steps and samples


@dataclass(frozen=True)
class LayerChoice:
    """The dtype or float8 backend of one Linear in each stream."""

    name: str
    runs: str  # dtype or float8 backend
    reads: str  # "16 bits", or "codes": rounded by the kernel before it


@dataclass
class AccelerationReport:
    """The choices made for a model; those of attention and graphs are known once a step has run."""

    kernels: str  # "Triton" or "plain torch"
    graph: bool
    layers: list[LayerChoice]
    left_out: list[str]  # and why
    attention: BestAttention = field(repr=False)
    graphs: Graphs = field(repr=False)
    nets: FastNets = field(repr=False)
    others: dict[str, str] = field(default_factory=dict)  # what runs faster beside the transformer, and how

    @property
    def controlnets(self) -> list[LayerChoice]:
        """The layers of the ControlNets that have acted since."""
        return [_choice(*one) for one in self.nets.layers()]

    def __str__(self) -> str:
        lines = [f"kernels: {self.kernels}; a step is {'a CUDA graph' if self.graph else 'launched kernel by kernel'}"]
        counted: dict[tuple[str, str, str], list[str]] = {}
        for layer in (*self.layers, *self.controlnets):
            whose = "the transformer" if layer.name.startswith("joint_blocks.") else "ControlNets"
            counted.setdefault((whose, layer.runs, layer.reads), []).append(layer.name)
        lines += [
            f"{len(names)} Linears of {whose} run in {runs} and read {reads}: {names[0]} to {names[-1]}"
            for (whose, runs, reads), names in counted.items()
        ]
        for key, choice in self.attention.choices.items():
            lines.append(f"attention of {list(key[0])}: {choice}")  # type: ignore[call-overload]
        for (rows, outs, width, kind, *_), product in emulation.choices().items():
            times = ", ".join(f"{name} {time:.3f} ms" for name, time in sorted(product.milliseconds.items()))
            refused = "".join(f"; {name} refused: {why}" for name, why in product.refused.items())
            shape = f"up to {rows} rows by [{outs}, {width}]"
            lines.append(f"{kind} product of {shape}: {product.name} ({times}{refused})")
        if len(self.graphs):
            lines.append(f"{len(self.graphs)} graphs hold {self.graphs.nbytes / 1e9:.2f} GB")
        lines += [f"{name}: {how}" for name, how in self.others.items()]
        return "\n".join([*lines, *(f"left out: {one}" for one in self.left_out)])


class _Drawing(threading.local):
    """By thread, the timesteps of its current drawing, descending."""

    planned: tuple[float, ...] = ()


class Accelerated:
    """A model's second, faster forward.

    Several threads may draw with it at once, and each drawing computes what it does alone.

    Args:
        model: an MMDiT with nothing compiled, replaced or hooked.
        graph: record steps as CUDA graphs; None does where the model is on a GPU.
        attention: the name of the one attention kernel to use; None measures those that are there.
        graphs: how many graphs are kept, one per shape.
        sequence: the ranks that share the image tokens; their exchanges are recorded in the graphs.
        weights: brings the model's weights; whoever calls has let it enter the model before. Steps are graphs only
            where it moves no block between them. Where it does between drawings, each drawing records them again, from
            the moment on that the GPU waits for the host.

    Raises:
        ValueError: the model has parts that the fast forward would not run; graphs are asked for without a GPU.
    """

    def __init__(
        self,
        model: MMDiT,
        *,
        graph: bool | None = None,
        attention: str | None = None,
        graphs: int = 4,
        sequence: SequenceParallel | None = None,
        weights: Residency | None = None,
    ) -> None:
        self.model, self._asked, self.sequence, self._weights = model, graph, sequence, weights
        self.attention, self._only = BestAttention(attention), attention
        self.graphs, self._tables, self._pace = Graphs(graphs), Graphs(_TABLES), Pace()
        if weights is not None:
            weights.graphs.add(self.graphs)
        self._tell(sequence)
        self._version: object = None
        self._moved: int | None = None  # of the weights, when they were looked at
        self._drawing, self._built = _Drawing(), 0
        self._texts = Kept[Text]()
        self._nets = FastNets(model, self.attention, self.graphs, sequence)
        self._lock = threading.Lock()  # guards the buffers that the graphs read and write
        self._refresh()
        ACCELERATED.setdefault(model, WeakSet()).add(self)

    def drawing(self, steps: Iterable[T], timesteps: Sequence[float], of_nets: Sequence[float] = ()) -> Iterator[T]:
        """The steps, with `begin` before the first and what was kept for the drawing forgotten after the last."""
        self.begin(timesteps, of_nets)
        try:
            yield from steps
        finally:
            self._drawing.planned = ()
            self._forget()

    def begin(self, timesteps: Sequence[float] = (), of_nets: Sequence[float] = ()) -> None:
        """Before a drawing: build the fast forward anew if a parameter has changed since, and forget all tables.

        Args:
            timesteps: 1000 x sigma of the steps that are planned, falling; modulation is computed for them together.
            of_nets: the timesteps that ControlNets are given in these steps.

        Raises:
            ValueError: see the class.
        """
        self._drawing.planned = tuple(timesteps)
        self._forget(of_nets)
        if self._weights is None:
            self._refresh()
        else:  # they are not there yet
            self._moved = None
            check_whole(self.model)

    def _forget(self, of_nets: Sequence[float] = ()) -> None:
        """Between drawings."""
        self._texts.clear()
        self._nets.begin(of_nets)
        self._pace.clear()
        if not self._keeps_graphs:
            self.graphs.clear()

    def without_graphs(self) -> Accelerated:
        """The same forward with the same attention kernels, launched kernel by kernel."""
        other = Accelerated(self.model, graph=False, sequence=self.sequence, weights=self._weights)
        other.attention.kernels, other.attention.choices = self.attention.kernels, self.attention.choices
        return other

    def share(self, sequence: SequenceParallel | None) -> None:
        """Compute on the ranks that share the image tokens from now on; None computes on this one."""
        self.sequence, self._version = sequence, None
        self._clear()  # now, because they write into memory that ranks share
        self._tell(sequence)
        self._nets.close()
        self._nets.sequence = sequence
        self.begin()

    def _tell(self, sequence: SequenceParallel | None) -> None:
        """Have the graphs cleared where the ranks replace the memory that they share."""
        if sequence is not None and sequence.peers is not None:
            sequence.peers.graphs.add(self.graphs)

    def close(self) -> None:
        """Free graphs and tables; the model counts as plain."""
        self._clear()
        self._texts.clear()
        self._nets.close()
        ACCELERATED.get(self.model, WeakSet()).discard(self)

    def _refresh(self) -> None:
        """Detect changes of the model since the fast forward was built."""
        found = check_whole(self.model)
        if self._weights is not None:
            self._moved = self._weights.moved
        version = (version_of(self.model, found), self._may_record)
        if version != self._version:
            device = self.model.pos_embed.device
            if self._asked and device.type != "cuda":
                raise ValueError(f"graph=True needs a model on a GPU, this one is on {device}; leave it out")
            self.graph = self._may_record and (device.type == "cuda" if self._asked is None else self._asked)
            self._clear()
            self._texts.clear()
            self.fast = FastMMDiT(
                self.model, kernels=kernels_for(self.model.pos_embed), attention=self.attention, sequence=self.sequence
            )
            recorded = self.graph and self._weights is None
            self._built += 1
            self._modulated = Recorded(self.fast, self._tables) if recorded else self.fast
            self._version = version

    def _clear(self) -> None:
        """Free all graphs."""
        self.graphs.clear()
        self._tables.clear()

    def report(self) -> AccelerationReport:
        """What was chosen."""
        layers = [
            _choice(f"joint_blocks.{i}.{name}", rounding, product)
            for i, block in enumerate(self.fast.blocks)
            for name, rounding, product in block.products
        ]
        by_triton = self.fast.kernels is not plain_kernels
        left_out = [
            "branches of perturbed attention, which run on the model's own forward, and so do their ControlNets"
        ]
        if not by_triton:
            left_out.append(f"Triton kernels: {why_no_triton(self.model.pos_embed)}")
        if self.graph and not self._keeps_graphs:
            left_out.append("CUDA graphs of several drawings: weights move between them, so that each records its own")
        if not self.graph:
            why = "no GPU" if not self.model.pos_embed.is_cuda else "not asked for"
            left_out.append(f"CUDA graphs: {why if self._may_record else 'blocks move, and graphs need them in place'}")
        name = "Triton" if by_triton else "plain torch"
        return AccelerationReport(name, self.graph, layers, left_out, self.attention, self.graphs, self._nets)

    @torch.no_grad()
    @on_its_device
    def velocity(
        self,
        latent: Tensor,
        timestep: float,
        contexts: Sequence[Tensor],
        pooled: Sequence[Tensor],
        *,
        skip_layers: tuple[int, ...] = (),
        control: Sequence[Tensor | None] | None = None,
        nets: Sequence[ActingNet] = (),
    ) -> Tensor:
        """What the model predicts for samples that share a noise level.

        Whether a parameter has changed is checked in every call but those at the planned timesteps of a drawing.

        Args:
            latent: [b, c, h, w], of any floating dtype.
            timestep: 1000 x sigma.
            contexts, pooled: text tokens [n, k] and pooled vectors of parts of the batch, [b / parts, ...] each. Tables
                are kept for these very tensors until the drawing ends.
            skip_layers: blocks that both streams pass by.
            control: one residual [b, l, hidden_size] or None per block, as in `MMDiT.forward`.
            nets: ControlNets whose residuals are computed in this step, in place of `control`. Where weights move, such
                a step is no graph.

        Raises:
            ValueError: see the class; a net cannot be run; a size does not fit the models; or both are given.
        """
        if control is not None and nets:
            raise ValueError("control and nets are both given: add the residuals of `control` up with those of a net")
        planned = self._drawing.planned
        if timestep not in planned or (self._weights is not None and self._weights.moved != self._moved):
            self._refresh()
            self._nets.moved()
            self._pace.clear()  # a step that waits for weights to arrive is no graph
        self.model.check(latent, contexts[0], pooled[0], control, skip_layers)
        text = self._text(contexts, pooled)
        # Timesteps between the planned ones have tables of many sizes, each of which is asked for once in a drawing.
        modulated = self._modulated if timestep in planned else self.fast
        with self._lock:
            vectors = text.vectors(modulated, timestep, planned, self._visiting)
        latent = latent.to(self.model.pos_embed.dtype)
        places, residuals = _distinct(control, self.model.pos_embed.dtype)
        acting = [self._nets.prepare(one, latent, contexts, pooled) for one in nets]
        inputs = (latent, text.tokens, vectors, *residuals, *(given for one in acting for given in one.inputs))

        def step(latent: Tensor, tokens: Tensor, vectors: Tensor, *given: Tensor) -> Tensor:
            added = [None if place is None else given[place] for place in places] if places else None
            if acting:
                parts = [given[i : i + 3] for i in range(0, len(given), 3)]
                found = [residuals_of(one, self.model, latent, own) for one, own in zip(acting, parts, strict=True)]
                added = summed(found, [one.acting.places for one in acting])
            return self.fast(latent, tokens, vectors, skip_layers, added)

        if not self.graph or (acting and self._weights is not None):
            return step(*inputs)
        key = (latent.shape, text.tokens.shape, skip_layers, places, *(one.key for one in acting))
        with self._lock:
            if self._keeps_graphs:
                return self.graphs(key, step, inputs)
            return self._launched_or_recorded(key, step, inputs, planned=timestep in planned)

    def _launched_or_recorded(self, key: Hashable, step: Step, inputs: Sequence[Tensor], *, planned: bool) -> Tensor:
        """A step where weights move between drawings: once the GPU waits for the host, a graph of this drawing.

        A graph takes the place of the activations of a launched step. So there are as many as fit beside each other, or
        none where there are more kinds of steps.
        """
        assert self._weights is not None, "where weights move, something moves them"
        fits = len(self._pace.kinds) <= self._weights.graphs_at_once
        if fits and (key in self.graphs or (planned and self._pace.waits(key))):
            return self.graphs(key, step, inputs, before=0)
        self._pace.kinds.add(key)
        if len(self._pace.kinds) > self._weights.graphs_at_once:
            self.graphs.clear()
        found: Tensor = step(*inputs)
        self._pace.launched(found.device)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is built anew on the copy of the model, without graphs and tables."""
        if self.sequence is not None:
            raise TypeError("a forward over several ranks cannot be copied or pickled: copy the model")
        given: dict[str, Any] = {
            "graph": self._asked,
            "attention": self._only,
            "graphs": self.graphs.limit,
            "weights": self._weights,
        }
        return partial(Accelerated, **given), (self.model,)

    @property
    def _keeps_graphs(self) -> bool:
        """Whether weights never move, so that a graph holds for other drawings too."""
        return self._weights is None or self._weights.still

    @property
    def _may_record(self) -> bool:
        """Whether weights stay where they are while a drawing's steps run; ranks record together or not at all."""
        if self._weights is None or self._weights.still:
            return True
        return self._weights.graphs_at_once > 0 and self.sequence is None

    def _visiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self._weights is None else self._weights.visiting(self.model)

    def _text(self, contexts: Sequence[Tensor], pooled: Sequence[Tensor]) -> Text:
        def make() -> Text:
            return Text(self.fast, torch.cat(list(contexts)), torch.cat(list(pooled)))

        return self._texts.of((*contexts, *pooled), make, self._built)


def _choice(name: str, rounding: Rounding, product: Product) -> LayerChoice:
    return LayerChoice(name, product.runs, "16 bits" if rounding.kind == "none" else "codes")


def _distinct(
    control: Sequence[Tensor | None] | None, dtype: torch.dtype
) -> tuple[tuple[int | None, ...], list[Tensor]]:
    """Which residual each block gets, and the residuals, each once: one may be added after several blocks."""
    found = {id(one): one for one in control or () if one is not None}
    order = {key: place for place, key in enumerate(found)}
    places = tuple(None if one is None else order[id(one)] for one in control or ())
    return places, [one.to(dtype) for one in found.values()]
