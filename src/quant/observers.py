"""Statistics of the inputs of Linears, for static scales and for folds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any, Final

import torch
from torch import Tensor, nn

from quant.quantize import _selected, check_module, linears_of
from quant.rounding import Moments
from quant.scaling import all_finite

# Bins of the histogram of |x| are ranges of float32 patterns: 64 to an octave, so that a percentile is right to 1.6 %.
_BIN: Final = 2**17  # bit patterns in one bin
_BINS: Final = 0x7F800000 // _BIN + 1  # to infinity; the first holds zero and nothing else
PIECE: Final = 2**23  # values of an input that are counted at a time
ADDING: Final = 24  # bytes for each of them meanwhile: sizes in float32, squares in float64, and bins


class Observed:
    """Statistics of the inputs of one Linear, [rows, in] over all calls; sums are in float64.

    A GPU adds up behind the model, and the host waits for it only where it reads a statistic.

    Args:
        channels: Of the input.
        device: Where the statistics are kept, until an input comes from elsewhere.
        second: Whether to sum the products of all pairs of channels, which takes 8 bytes * in^2.
    """

    def __init__(self, channels: int, device: torch.device, *, second: bool = False) -> None:
        self.rows = 0
        self._channel_amax = torch.zeros(channels, dtype=torch.float32, device=device)
        self._finite = torch.zeros((), dtype=torch.int64, device=device)  # how many of the values are
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self._sum, self._squares = (torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(2))
        self._counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self._products = torch.zeros(channels, channels, dtype=torch.float64, device=device) if second else None

    def add(self, x: Tensor) -> None:
        """Count the rows of one input.

        Args:
            x: The input, [..., in].

        Raises:
            ValueError: A value is not finite in float32. On a CPU nothing of the input has been counted then; on a GPU
                it has, and each statistic raises the error when it is read.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.numel():
            return
        if self._finite.device != x.device:
            self._move(x.device)
        pieces = rows.split(max(1, PIECE // rows.shape[-1]))
        if not x.is_cuda and not all(all_finite(piece.float()) for piece in pieces):
            _check_finite(rows.numel(), sum(int(piece.float().isfinite().sum()) for piece in pieces))
        for piece in pieces:
            self._add(piece)

    def _add(self, rows: Tensor) -> None:
        size = rows.abs().float()
        self.rows += len(rows)
        self._finite += (size < torch.inf).sum()
        self._channel_amax = torch.maximum(self._channel_amax, size.amax(0))
        wide = rows.double()
        self._sum += wide.sum(0)
        self._squares += wide.square().sum(0)
        if self._products is not None:
            self._products += wide.T @ wide  # in float64: TF32 would leave covariances that are not positive
        pattern = size.flatten().view(torch.int32)
        # NaN is beyond the bins, and who reads what has one is refused. `bincount` would wait for the largest bin.
        bins = ((pattern + (_BIN - 1)) // _BIN).clamp_(0, _BINS - 1)
        self._counts.index_add_(0, bins, self._one.expand_as(bins))

    def _move(self, device: torch.device) -> None:
        """Go on where the inputs are: weights that visit a device were elsewhere when the Linear was looked at."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    @property
    def nbytes(self) -> int:
        """The bytes of the statistics."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def check(self) -> None:
        """Wait for the device.

        Raises:
            ValueError: A value was not finite in float32.
        """
        _check_finite(self.rows * len(self._channel_amax), self._finite)

    @property
    def channel_amax(self) -> Tensor:
        """The largest absolute value of each channel, float32 [in]."""
        self.check()
        return self._channel_amax

    @property
    def amax(self) -> Tensor:
        """The largest absolute value, float32 ()."""
        return self.channel_amax.amax()

    @property
    def mean(self) -> Tensor:
        """The mean of each channel, float32 [in]."""
        self.check()
        return (self._sum / max(self.rows, 1)).float()

    @property
    def rms(self) -> Tensor:
        """Root of the mean square of each channel, float32 [in]."""
        self.check()
        return (self._squares / max(self.rows, 1)).sqrt().float()

    @property
    def moments(self) -> Moments:
        """Mean and second moments over all rows, float64 [in] and [in, in].

        Raises:
            ValueError: They were not observed.
        """
        if self._products is None:
            raise ValueError(
                "second moments were not observed: give observe(..., second=True) or calibrate(second=True)"
            )
        self.check()
        rows = max(self.rows, 1)
        return Moments(self._sum / rows, self._products / rows)

    def percentile(self, share: float) -> Tensor:
        """The absolute value that `share` percent of all values do not exceed, float32 (); 0 before any were counted.

        It comes from a histogram: never too small, too large by at most a 64th (by 2**-132 below 2**-126), never above
        amax, and exactly 0 where that many values are zero.

        Args:
            share: A percentage, above 0 and at most 100.

        Raises:
            ValueError: The percentage is out of that range.
        """
        check_percentile(share)
        self.check()
        if share == 100:
            return self.amax
        wanted = ceil(share * self.rows * len(self._channel_amax) / 100)
        place = int(torch.searchsorted(self._counts.cumsum(0), wanted))
        upper = torch.tensor(place * _BIN, dtype=torch.int32, device=self._counts.device).view(torch.float32)
        return torch.minimum(self.amax, upper)


def _check_finite(values: int, finite: Tensor | int) -> None:
    if bad := values - int(finite):
        raise ValueError(f"{bad} of {values} values are not finite in float32")


def check_percentile(share: float) -> None:
    """Raise ValueError unless the percentage is above 0 and at most 100."""
    if not 0 < share <= 100:
        raise ValueError(f"a percentile is above 0 and at most 100, got {share}")


@contextmanager
def observe(
    module: nn.Module, select: str | Sequence[str] | None = None, *, second: bool = False
) -> Iterator[dict[str, Observed]]:
    """Count the inputs of the selected Linears within the context; its hooks are removed on exit, also after an error.

    Args:
        module: Any model. Its outputs are bit-equal to those without observation.
        select: Globs over module names; None takes the Linears that `quantize_` would.
        second: Whether to observe second moments too, for `quant.rounding`; they take 8 bytes * in^2 for each Linear.

    Yields:
        The statistics by module name, which fill up while the module runs.

    Raises:
        ValueError: A part of the module is compiled; a glob matches nothing; or an input has values that are not finite
            (the error names the layer). A CPU raises the latter before the layer runs and does not count the input. A
            GPU counts it, and the error is raised at the end of the context, also where the body has raised
            `FloatingPointError`.
        TypeError: The module is no nn.Module.
    """
    check_module(module)
    _refuse_compiled(module)
    every = dict(linears_of(module))
    linears = {name: every[name] for name in _selected(every, select)}
    found = {
        name: Observed(linear.in_features, linear.weight.device, second=second) for name, linear in linears.items()
    }
    handles = [
        linear.register_forward_pre_hook(partial(_add, name, found[name]), with_kwargs=True)
        for name, linear in linears.items()
    ]
    try:
        yield found
    except FloatingPointError:
        _check(found)
        raise
    finally:
        for handle in handles:
            handle.remove()
    _check(found)


def _add(name: str, into: Observed, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    with _named(name):
        into.add(args[0] if args else kwargs["input"])


def _check(found: dict[str, Observed]) -> None:
    for name, seen in found.items():
        with _named(name):
            seen.check()


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the input of {name!r}: {error}") from error


def _refuse_compiled(module: nn.Module) -> None:
    # mmdit.runtime.compiled refuses the same for its hooks; quant is used without mmdit and imports nothing from it.
    for name, part in module.named_modules():
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            raise ValueError(
                f"{name or 'the module'} is compiled (torch.compile), and hooks that are added after compiling never "
                "fire: nothing would be counted. Observe it before it is compiled"
            )
