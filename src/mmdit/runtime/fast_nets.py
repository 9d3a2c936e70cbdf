"""The ControlNets that act in accelerated steps: their fast forwards, hints and modulation tables."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.models.controlnet import ControlNet, made_pos_embed
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.compiled import ACCELERATED
from mmdit.runtime.fast_control import FastControlNet
from mmdit.runtime.graphs import Graphs
from mmdit.runtime.products import Product
from mmdit.runtime.rows import Attention, Rounding
from mmdit.runtime.sequence import SequenceParallel
from mmdit.runtime.texts import Kept, Text
from mmdit.runtime.versions import check_whole, kernels_for, version_of


@dataclass(frozen=True, eq=False)
class ActingNet:
    """A ControlNet that acts in a step, and what it is given.

    Args:
        net: the net, on the device of the transformer.
        hints: the hint's latents of parts of the batch, [b / parts, e, rows, columns] each.
        timestep: 1000 x sigma.
        scale: factor of the residuals.
        places: which of its residuals is added after each block of the transformer; None adds nothing.
        makes_positions: whether tokens get the positions of `made_pos_embed`; False takes the transformer's table.
        zeroes_pooled: whether the net reads zeros in place of the pooled text vectors.
        rounds_timestep: whether the timestep is rounded to the dtype of the net.
    """

    net: ControlNet
    hints: tuple[Tensor, ...]
    timestep: float
    scale: float
    places: tuple[int | None, ...]
    makes_positions: bool = False
    zeroes_pooled: bool = False
    rounds_timestep: bool = False


class Prepared(NamedTuple):
    """A net's part of a step: what its fast forward reads, and a key of what it launches."""

    fast: FastControlNet
    acting: ActingNet
    inputs: tuple[Tensor, Tensor, Tensor]  # text tokens, embedded hint, modulation vectors
    key: Hashable


class _Known(NamedTuple):
    version: object
    number: int  # differs for each forward that was built
    fast: FastControlNet


class _Drawing(threading.local):
    """By thread, what is known of its current drawing.

    Attributes:
        planned: 1000 x sigma of its steps, falling.
        rounded: the same, by the dtype that they are rounded to.
        checked: the nets that were looked at.
    """

    def __init__(self) -> None:
        self.planned: tuple[float, ...] = ()
        self.rounded: dict[torch.dtype, tuple[float, ...]] = {}
        self.checked: WeakSet[ControlNet] = WeakSet()


class FastNets:
    """The fast forwards of the nets that have acted, and what is kept of the current drawing.

    Args:
        model: the transformer.
        attention: see `FastControlNet`.
        graphs: steps that run the nets; forgotten where a net has changed.
        sequence: see `FastControlNet`.
    """

    def __init__(
        self, model: MMDiT, attention: Attention, graphs: Graphs, sequence: SequenceParallel | None = None
    ) -> None:
        self.model, self.attention, self.graphs, self.sequence = model, attention, graphs, sequence
        self._known: WeakKeyDictionary[ControlNet, _Known] = WeakKeyDictionary()
        self._built = self._alive = 0
        self._drawing = _Drawing()
        self._texts, self._hints = Kept[Text](), Kept[Tensor]()

    def begin(self, planned: Sequence[float] = ()) -> None:
        """Before a drawing and after it: forget hints and tables, and graphs of nets that are gone.

        Args:
            planned: 1000 x sigma of the steps that are planned, falling.
        """
        self._drawing.planned = tuple(planned)
        for kept in (self._drawing.rounded, self._drawing.checked, self._texts, self._hints):
            kept.clear()
        if len(self._known) != self._alive:
            self.graphs.clear()
            self._alive = len(self._known)

    def moved(self) -> None:
        """Weights may be elsewhere: look at every net again."""
        self._drawing.checked.clear()

    def close(self) -> None:
        """Forget everything; the nets count as plain."""
        for net in self._known:
            ACCELERATED.get(net, WeakSet()).discard(self)
        self._known.clear()
        self._alive = 0
        self.begin()

    def prepare(
        self, acting: ActingNet, latent: Tensor, contexts: Sequence[Tensor], pooled: Sequence[Tensor]
    ) -> Prepared:
        """What a net needs for a step.

        Args:
            acting: the net.
            latent: the transformer's input, [b, c, h, w].
            contexts, pooled: see `mmdit.runtime.accelerate.Accelerated.velocity`.

        Raises:
            ValueError: the net has hooks or replaced parts; or a size does not fit it.
        """
        net = acting.net
        number, fast = self._fast(net)

        def hint() -> Tensor:
            return self._embedded(acting, fast, latent)

        sides = tuple(latent.shape[2:])
        whole = torch.empty((1, acting.hints[0].shape[1], *sides), device="meta")  # the hint once it is padded
        net.check(latent, contexts[0], pooled[0], whole, self.model.pos_embed)
        embedded = self._hints.of(acting.hints, hint, number, sides, acting.makes_positions)

        def text() -> Text:
            vector = torch.cat(list(pooled))
            zeros = torch.zeros_like(vector) if acting.zeroes_pooled else vector
            return Text(fast, torch.cat(list(contexts)), zeros)

        kept = self._texts.of((*contexts, *pooled), text, number, acting.zeroes_pooled)
        timestep, planned = acting.timestep, self._drawing.planned
        if acting.rounds_timestep:
            timestep = _rounded([timestep], fast.dtype)[0]
            planned = self._planned_in(fast.dtype)
        inputs = kept.tokens, embedded, kept.vectors(fast, timestep, planned)
        return Prepared(fast, acting, inputs, (number, acting.scale, acting.places, acting.makes_positions))

    def layers(self) -> Iterator[tuple[str, Rounding, Product]]:
        """The Linears of the nets that have acted, by name, with what each reads."""
        for known in list(self._known.values()):
            for name, rounding, product in known.fast.products:
                yield f"controlnet.{name}", rounding, product

    def _planned_in(self, dtype: torch.dtype) -> tuple[float, ...]:
        known = self._drawing.rounded
        if dtype not in known:
            known[dtype] = tuple(_rounded(self._drawing.planned, dtype))
        return known[dtype]

    def _fast(self, net: ControlNet) -> tuple[int, FastControlNet]:
        """The fast forward of a net, built anew where a parameter has changed since.

        It is looked at in every call but those of a drawing at planned timesteps, after the first one.
        """
        known = self._known.get(net)
        if known is not None and net in self._drawing.checked:
            return known.number, known.fast
        version = version_of(net, check_whole(net, "the ControlNet"))
        if known is None or known.version != version:
            if known is not None:
                self.graphs.clear()
            weight = net.pos_embed_input.proj.weight
            fast = FastControlNet(net, kernels=kernels_for(weight), attention=self.attention, sequence=self.sequence)
            self._built += 1
            known = self._known[net] = _Known(version, self._built, fast)
            self._alive = len(self._known)
            ACCELERATED.setdefault(net, WeakSet()).add(self)
        if self._drawing.planned:
            self._drawing.checked.add(net)
        return known.number, known.fast

    def _embedded(self, acting: ActingNet, fast: FastControlNet, latent: Tensor) -> Tensor:
        """The hint's tokens, with the positions that are made for this size."""
        (rows, columns), hint = latent.shape[2:], torch.cat(list(acting.hints))
        hint = F.pad(hint, (0, columns - hint.shape[3], 0, rows - hint.shape[2]), mode="circular")
        tokens: Tensor = fast.embed_hint(hint.to(latent.device, fast.dtype))
        if not acting.makes_positions or fast.config.is_joint:
            return tokens
        patch = fast.config.patch_size
        return tokens + made_pos_embed(fast.width, rows // patch, columns // patch, latent.device).to(tokens.dtype)


def residuals_of(prepared: Prepared, model: MMDiT, latent: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The residuals of a net, in the transformer's dtype.

    Args:
        prepared: the net.
        model: the transformer, whose embedder nets of single-stream blocks read.
        latent: the transformer's input.
        inputs: `prepared.inputs`, or copies of them.
    """
    tokens = None
    if not prepared.fast.config.is_joint:
        tokens = model.x_embedder(latent)
        if not prepared.acting.makes_positions:
            tokens = tokens + model.cropped_pos_embed(*latent.shape[2:])
    found = prepared.fast(latent, tokens, inputs[0], inputs[1], inputs[2], prepared.acting.scale)
    return [one.to(latent.dtype) for one in found]


def _rounded(timesteps: Sequence[float], dtype: torch.dtype) -> list[float]:
    found: list[float] = torch.tensor(timesteps, dtype=torch.float32, device="cpu").to(dtype).double().tolist()
    return found
