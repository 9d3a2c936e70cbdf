"""Text encoders as CUDA graphs: their many small kernels take the host longer than the GPU."""

from __future__ import annotations

from threading import Lock
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Int
from torch import Tensor

from encoders import CLIPText, T5Encoder
from mmdit.runtime.compiled import ACCELERATED, refuse_changed
from mmdit.runtime.graphs import Graphs
from mmdit.runtime.versions import version_of

_GRAPHS = 4  # kept of each encoder, one per shape of its token ids


class GraphedEncoder:
    """A text encoder on a GPU that runs as a CUDA graph, bit-equal to the encoder, without gradients.

    Args:
        model: the encoder; its weights are read where they lie.
        name: what it is called in errors.

    Raises:
        ValueError: a module of the encoder is compiled, hooked or replaced.
    """

    def __init__(self, model: CLIPText | T5Encoder, name: str) -> None:
        self.model, self.name = model, name
        self.graphs = Graphs(_GRAPHS)
        self._version: object = None
        self._lock = Lock()  # guards the buffers that the graphs read and write
        refuse_changed(model, name)
        ACCELERATED.setdefault(model, WeakSet()).add(self)

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "b n"], dtype: torch.dtype | None = None) -> Any:
        """What the encoder makes of token ids on its device; see `CLIPText.forward` and `T5Encoder.forward`.

        Raises:
            ValueError: see the class.
        """
        found = refuse_changed(self.model, self.name)
        with self._lock:
            version = version_of(self.model, found)
            if version != self._version:
                self.graphs.clear()
                self._version = version
            return self.graphs((ids.shape, dtype), lambda ids: self.model(ids, dtype), [ids])

    def close(self) -> None:
        """Free the graphs; the encoder counts as plain."""
        self.graphs.clear()
        ACCELERATED.get(self.model, WeakSet()).discard(self)
