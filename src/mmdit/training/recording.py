"""Gradients of one batch after the other, computed eagerly or by a recorded CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mmdit.runtime.graphs import record

B = TypeVar("B", bound=tuple[Tensor | None, ...])  # a named tuple


class RecordedGradients(Generic[B]):
    """Forward and backward of a loss as one CUDA graph: a call copies a batch to where the graph reads, and replays it.

    A call sets the gradients of the trained parameters and returns the loss. All recordings of the same parameters own
    their gradients, so that several of them (one for each kind of step) may take turns.

    Args:
        loss_of: the loss of a batch. It must not wait for the GPU, and autocast inside must not keep copies of weights
            (`cache_enabled=False`), because a replay would read them.
        batch: a named tuple of tensors, or None, of the shapes of all batches.
        trained: parameters on one GPU.

    Raises:
        ValueError: the parameters are not on a GPU.
        RuntimeError: the step cannot be recorded. No weight has changed.
    """

    def __init__(self, loss_of: Callable[[B], Tensor], batch: B, trained: Sequence[Tensor]) -> None:
        device = _gpu(trained[0].device)
        kind: Any = type(batch)
        self.batch: B = kind(*(None if part is None else part.clone() for part in batch))
        self.trained = trained

        def step() -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss = loss_of(self.batch)
            return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)

        self.graph, (self.loss, self.grads), _ = record(step, device, before=2)

    def __call__(self, batch: B) -> Tensor:
        """The loss of a batch; sets the gradients of the trained parameters.

        Raises:
            ValueError: a part of the batch has another shape than the recorded one, or one of both is None. Nothing has
                been computed.
        """
        _check_parts(self.batch, batch)
        for into, part in zip(self.batch, batch, strict=True):
            if into is not None and part is not None:
                into.copy_(part)
        self.graph.replay()
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            parameter.grad = grad
        return self.loss.clone()


def eager_gradients(loss_of: Callable[[B], Tensor], trained: Sequence[Tensor], batch: B) -> Tensor:
    """The loss of a batch; sets the gradients of the trained parameters, None where the loss does not depend on one."""
    loss = loss_of(batch)
    for parameter, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
        parameter.grad = grad
    return loss.detach()


def _gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        raise ValueError(f"a step is recorded as a CUDA graph of a GPU; the parameters are on {device}")
    return device


def _check_parts(recorded: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
    """Raise ValueError unless all parts of two named tuples have the same shapes; a smaller one would be broadcast."""
    names = getattr(recorded, "_fields", range(len(recorded)))
    for name, wanted, found in zip(names, map(_shape, recorded), map(_shape, given), strict=True):
        if found != wanted:
            raise ValueError(
                f"{name} of the batch has shape {found}, that of the recorded step has {wanted}: give batches of the "
                "same shapes, or record a step for this one"
            )


def _shape(part: Tensor | None) -> list[int] | None:
    return None if part is None else list(part.shape)
