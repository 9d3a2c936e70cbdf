"""The fast path of a model: fused kernels, precomputed modulation tables and CUDA graphs, with a report of the choices.

The model is left unchanged: `Accelerated.velocity` computes the same function from the same parameters, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Lock
from types import ModuleType
from typing import TypeVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.attention import Attend
from mmdit.models.mmdit import MMDiT
from mmdit.runtime import plain_kernels
from mmdit.runtime.activations import TABLE_BYTES
from mmdit.runtime.attention import BestAttention
from mmdit.runtime.compiled import ACCELERATED, refuse_changed
from mmdit.runtime.fast import FastMMDiT
from mmdit.runtime.graphs import Graphs
from mmdit.runtime.sequence import SequenceParallel
from mmdit.runtime.streaming import Residency
from quant import emulation

_TEXTS = 8  # texts whose tables are kept
T = TypeVar("T")


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
    others: dict[str, str] = field(default_factory=dict)  # what runs faster beside the transformer, and how

    def __str__(self) -> str:
        lines = [f"kernels: {self.kernels}; a step is {'a CUDA graph' if self.graph else 'launched kernel by kernel'}"]
        counted: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            counted.setdefault((layer.runs, layer.reads), []).append(layer.name)
        lines += [
            f"{len(names)} Linears run in {runs} and read {reads}: {names[0]} to {names[-1]}"
            for (runs, reads), names in counted.items()
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


class Accelerated:
    """A model's second, faster forward.

    Args:
        model: an MMDiT with nothing compiled, replaced or hooked.
        graph: record steps as CUDA graphs; None does where the model is on a GPU.
        attention: the name of the one attention kernel to use; None measures those that are there.
        graphs: how many graphs are kept, one per shape.
        sequence: the ranks that share the image tokens; their exchanges are recorded in the graphs.
        weights: brings the model's weights; whoever calls has let it enter the model before. Steps are graphs only
            where it moves no block.

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
        self.attention = BestAttention(attention)
        self.graphs = Graphs(graphs)
        self._version: object = None
        self._moved: int | None = None  # of the weights, when they were looked at
        self._planned: tuple[float, ...] = ()  # timesteps of the current drawing, descending
        self._texts: dict[tuple[int, ...], _Text] = {}
        self._lock = Lock()  # guards the buffers that the graphs read and write
        self._refresh()
        ACCELERATED.setdefault(model, WeakSet()).add(self)

    def drawing(self, steps: Iterable[T], timesteps: Sequence[float]) -> Iterator[T]:
        """The steps, with `begin` before the first and what was kept for the drawing forgotten after the last."""
        self.begin(timesteps)
        try:
            yield from steps
        finally:
            self._planned = ()
            self._texts.clear()

    def begin(self, timesteps: Sequence[float] = ()) -> None:
        """Before a drawing: build the fast forward anew if a parameter has changed since, and forget all tables.

        Args:
            timesteps: 1000 x sigma of the steps that are planned, falling; modulation is computed for them together.

        Raises:
            ValueError: see the class.
        """
        self._planned = tuple(timesteps)
        self._texts.clear()
        if self._weights is None:
            self._refresh()
        else:  # they are not there yet
            self._moved = None
            _check_whole(self.model)

    def without_graphs(self) -> Accelerated:
        """The same forward with the same attention kernels, launched kernel by kernel."""
        other = Accelerated(self.model, graph=False, sequence=self.sequence, weights=self._weights)
        other.attention.kernels, other.attention.choices = self.attention.kernels, self.attention.choices
        return other

    def share(self, sequence: SequenceParallel | None) -> None:
        """Compute on the ranks that share the image tokens from now on; None computes on this one."""
        self.sequence, self._version = sequence, None
        self.begin()

    def close(self) -> None:
        """Free graphs and tables; the model counts as plain."""
        self.graphs.clear()
        self._texts.clear()
        ACCELERATED.get(self.model, WeakSet()).discard(self)

    def _refresh(self) -> None:
        """Detect changes of the model since the fast forward was built."""
        _check_whole(self.model)
        if self._weights is not None:
            self._moved = self._weights.moved
        version = (version_of(self.model), self._may_record)
        if version != self._version:
            device = self.model.pos_embed.device
            if self._asked and device.type != "cuda":
                raise ValueError(f"graph=True needs a model on a GPU, this one is on {device}; leave it out")
            self.graph = self._may_record and (device.type == "cuda" if self._asked is None else self._asked)
            self.graphs.clear()
            self._texts.clear()
            self.fast = FastMMDiT(
                self.model, kernels=_kernels_for(self.model), attention=self.attention, sequence=self.sequence
            )
            self._version = version

    def report(self) -> AccelerationReport:
        """What was chosen."""
        layers = []
        for i, block in enumerate(self.fast.blocks):
            for place, pair in block.pairs.items():
                reads = "16 bits" if pair.rounding.kind == "none" else "codes"
                streams = (("context_block", pair.text), ("x_block", pair.image))
                layers += [
                    LayerChoice(f"joint_blocks.{i}.{stream}.{place}", product.runs, reads)
                    for stream, product in streams
                    if product is not None
                ]
        by_triton = self.fast.kernels is not plain_kernels
        left_out = ["branches of perturbed attention, which run on the model's own forward, and ControlNets themselves"]
        if not by_triton:
            left_out.append(f"Triton kernels: {why_no_triton(self.model.pos_embed)}")
        if not self.graph:
            why = "no GPU" if not self.model.pos_embed.is_cuda else "not asked for"
            left_out.append(f"CUDA graphs: {why if self._may_record else 'blocks move, and graphs need them in place'}")
        name = "Triton" if by_triton else "plain torch"
        return AccelerationReport(name, self.graph, layers, left_out, self.attention, self.graphs)

    @torch.no_grad()
    def velocity(
        self,
        latent: Tensor,
        timestep: float,
        contexts: Sequence[Tensor],
        pooled: Sequence[Tensor],
        *,
        skip_layers: tuple[int, ...] = (),
        control: Sequence[Tensor | None] | None = None,
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

        Raises:
            ValueError: see the class; or a size does not fit the model.
        """
        if timestep not in self._planned or (self._weights is not None and self._weights.moved != self._moved):
            self._refresh()
        self.model.check(latent, contexts[0], pooled[0], control, skip_layers)
        text = self._text(contexts, pooled)
        vectors = text.vectors(self.fast, timestep, [one for one in self._planned if one < timestep], self._visiting)
        latent = latent.to(self.model.pos_embed.dtype)
        places, residuals = _distinct(control, self.model.pos_embed.dtype)
        inputs = (latent, text.tokens, vectors, *residuals)

        def step(latent: Tensor, tokens: Tensor, vectors: Tensor, *given: Tensor) -> Tensor:
            added = [None if place is None else given[place] for place in places] if places else None
            return self.fast(latent, tokens, vectors, skip_layers, added)

        if not self.graph:
            return step(*inputs)
        with self._lock:
            return self.graphs((latent.shape, text.tokens.shape, skip_layers, places), step, inputs)

    @property
    def _may_record(self) -> bool:
        """Whether weights stay where they are, as a graph needs it."""
        return self._weights is None or self._weights.still

    def _visiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self._weights is None else self._weights.visiting(self.model)

    def _text(self, contexts: Sequence[Tensor], pooled: Sequence[Tensor]) -> _Text:
        key = tuple(map(id, (*contexts, *pooled)))
        if key not in self._texts:
            while len(self._texts) >= _TEXTS:
                self._texts.pop(next(iter(self._texts)))
            self._texts[key] = _Text(self.fast, contexts, pooled)
        return self._texts[key]


class _Text:
    """The text tokens of a batch, and its modulation by timestep; holds on to what its key was made of."""

    def __init__(self, fast: FastMMDiT, contexts: Sequence[Tensor], pooled: Sequence[Tensor]) -> None:
        self.sources = (*contexts, *pooled)
        self.tokens, self.pooled = fast.tokens(torch.cat(list(contexts))), torch.cat(list(pooled))
        self._rows: dict[float, Tensor] = {}

    def vectors(
        self,
        fast: FastMMDiT,
        timestep: float,
        ahead: Sequence[float],
        visiting: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        """The modulation at a timestep; computed together with those that are expected next."""
        if timestep not in self._rows:
            per_step = fast.vectors * fast.model.config.hidden_size * self.pooled.nbytes // self.pooled.shape[1]
            most = max(TABLE_BYTES // max(per_step, 1), 1)
            wanted = list(dict.fromkeys([timestep, *ahead]))[:most]
            timesteps = torch.tensor(wanted, dtype=torch.float32, pin_memory=self.pooled.is_cuda)
            with visiting():
                table = fast.table(timesteps.to(self.pooled.device, non_blocking=True), self.pooled)
            self._rows = dict(zip(wanted, table.unbind(0), strict=True))
        return self._rows[timestep]


def _distinct(
    control: Sequence[Tensor | None] | None, dtype: torch.dtype
) -> tuple[tuple[int | None, ...], list[Tensor]]:
    """Which residual each block gets, and the residuals, each once: one may be added after several blocks."""
    found = {id(one): one for one in control or () if one is not None}
    order = {key: place for place, key in enumerate(found)}
    places = tuple(None if one is None else order[id(one)] for one in control or ())
    return places, [one.to(dtype) for one in found.values()]


def version_of(model: nn.Module) -> object:
    """Equal as long as no parameter was replaced, moved or written to."""
    return tuple(_identity(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Which tensor it is, where its memory lies and how often it was written to; of a float8 one, of its codes too."""
    version = None if tensor.is_inference() else tensor._version
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return (id(tensor), version, *(_identity(getattr(tensor, name)) for name in flatten()[0]))
    return (id(tensor), version, tensor.data_ptr())


def _kernels_for(model: MMDiT) -> ModuleType:
    if why_no_triton(model.pos_embed):
        return plain_kernels
    from mmdit.runtime import kernels

    return kernels


def why_no_triton(weight: Tensor) -> str:
    """Return why Triton kernels cannot run for a model with such weights; empty where they can."""
    if weight.device.type != "cuda":
        return f"they run on GPUs, the model is on {weight.device}"
    if find_spec("triton") is None:
        return "triton is not installed"
    return f"they compute in float32, the model in {weight.dtype}" if weight.dtype == torch.float64 else ""


def _check_whole(model: MMDiT) -> None:
    """Raise ValueError where the model runs what the fast forward would not."""
    refuse_changed(model, "the model")
    for name, module in model.named_modules():
        if name.endswith(("attend", "attend2")) and not _is_plain(module):
            raise ValueError(f"{name} is replaced, and the fast forward would not run it: restore it first")


def _is_plain(slot: nn.Module) -> bool:
    """Return whether a slot holds exactly torch's attention."""
    return type(slot) is Attend and not slot.strategies and slot.kernel is F.scaled_dot_product_attention
