"""Why a drawing failed: values that are not finite, or too little memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdit.pipeline.passes import Branch
from mmdit.runtime.hooks import After, Hook, hooks, repeating
from samplers import Step


class Call(NamedTuple):
    """One call of the model by a solver."""

    x: Tensor
    sigma: float
    branches: Sequence[Branch]


class BadCount:
    """How many values are NaN or infinite. A GPU counts them, and the host only waits for it when it reads the number.

    Args:
        values: any floating-point tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        self._count = (~torch.isfinite(values)).sum()
        if not values.is_cuda:
            return
        count, self._count = self._count, torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
        with torch.cuda.device(values.device):
            self._count.copy_(count, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> int:
        """The number."""
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        return int(self._count)


class AllFinite:
    """Whether all values are finite; on a GPU the host learns it in `read`, elsewhere at once.

    Args:
        values: any floating-point tensor.
        what: what they are, for the error.

    Raises:
        FloatingPointError: see `read`; on devices other than GPUs.
    """

    def __init__(self, values: Tensor, what: str) -> None:
        self._bad, self._total, self._what = BadCount(values), values.numel(), what
        if not values.is_cuda:
            self.read()

    def read(self) -> None:
        """Raise FloatingPointError, with their number, where values are NaN or infinite."""
        if bad := self._bad.read():
            raise FloatingPointError(
                f"{bad} of {self._total} values of {self._what} are not finite; use a wider dtype, such as "
                "torch.float32"
            )


PredictAgain = Callable[[Tensor, float, Sequence[Branch]], Sequence[Tensor]]


class FiniteCheck:
    """Whether the latent after a step is finite; `read` raises where it is not.

    A GPU counts the values that are not finite behind the step, and the host need not wait: it reads their number once
    the next step is launched. See `begin_check` for other devices.

    Args:
        step: the step that was just made.
        calls: the calls of the model in this step; their inputs are kept until the check is read.
        predict: repeats the predictions of a call; captures and attention maps ignore these.
        transformer: the model, whose layers are checked while the predictions are repeated.
    """

    def __init__(self, step: Step, calls: Sequence[Call], predict: PredictAgain, transformer: nn.Module) -> None:
        self._calls, self._predict, self._transformer = calls, predict, transformer
        self._i, self._sigma, self._values = step.i, step.sigma, step.x.numel()
        self._bad: BadCount | None = BadCount(step.x)

    def read(self) -> None:
        """Wait until the step is done.

        Raises:
            FloatingPointError: the latent is not finite; the step, its noise level and the first layer are named.
        """
        count, self._bad = self._bad, None
        if count is not None and (bad := count.read()):
            self._fail(bad)

    def _fail(self, bad: int) -> NoReturn:
        level = f"from sigma {self._calls[0].sigma:g} to" if self._calls else "to sigma"
        raise FloatingPointError(
            f"step {self._i} {level} {self._sigma:g} gave {bad} of {self._values} values that are not finite: "
            f"{_reason(self._calls, self._predict, self._transformer)}"
        )


def begin_check(step: Step, calls: Sequence[Call], predict: PredictAgain, transformer: nn.Module) -> FiniteCheck:
    """The check of a step, which is to be read later; on devices other than GPUs it is read at once.

    Raises:
        FloatingPointError: see `FiniteCheck.read`; on devices other than GPUs.
    """
    check = FiniteCheck(step, calls, predict, transformer)
    if not step.x.is_cuda:
        check.read()
    return check


def _reason(calls: Sequence[Call], predict: PredictAgain, transformer: nn.Module) -> str:
    for call in calls:
        if not torch.isfinite(call.x).all():
            return f"the input of the model at sigma {call.sigma:g} was not finite"
        with nonfinite_layers(transformer) as names, repeating(), torch.no_grad():
            predictions = predict(*call)
        if names:
            return (
                f"at sigma {call.sigma:g} the first layer with such an output is {names[0]}; "
                "look at its weights and its inputs, or use a wider dtype (float16 ends at 65504)"
            )
        if any(not torch.isfinite(one).all() for one in predictions):
            return f"at sigma {call.sigma:g} all layers are finite, and the prediction made from them is not"
    return "all predictions of the step are finite, so the values come from the sampler, its noise or the guidance"


@contextmanager
def nonfinite_layers(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the names of the layers whose output is not finite are collected, in the order in which they finish."""
    found: list[str] = []

    def watch(name: str) -> After:
        def hook(module: nn.Module, _: tuple[object, ...], __: dict[str, Any], output: object) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                found.append(name or type(module).__name__)

        return hook

    with hooks([Hook(module, "output", watch(name)) for name, module in model.named_modules()]):
        yield found


class ExplainedMemoryError(MemoryError):
    """An allocation failed; the message says what was needed, what there was, and what would do."""


def released(error: BaseException, handled: BaseException | None) -> str:
    """Let everything go that an error holds, and return where it was raised, in words.

    Errors during whose handling it was raised let go too, up to `handled`: the one that the caller was handling when
    the computation began, which keeps its traceback.

    The frames that it has passed hold tensors, also after they were cleared: in the closures of their functions. Who
    handles the error holds its traceback, so that this is cut into pieces.
    """
    where = "".join(traceback.format_tb(error.__traceback__)[-8:])
    found: BaseException | None = error
    while found is not None and found is not handled:
        traceback.clear_frames(found.__traceback__)
        piece = found.__traceback__
        while piece is not None:
            following, piece.tb_next = piece.tb_next, None
            piece = following
        found = found.with_traceback(None).__context__
    return f"It was raised here:\n{where}"
