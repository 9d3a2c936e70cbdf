"""Check numbers and noise levels that a caller gave, with errors that name the argument and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from numbers import Real
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_STEPS = 10_000  # more steps than any table of timesteps has; a bound against a mistyped number
MIN_LEVEL = 1e-30  # the smallest level above 0: what is divided by it must stay finite in float32
MIN_GAP = 1e-9  # the smallest step, relative to its level: below it log-SNRs are equal by rounding


def shown(value: object) -> str:
    """Return what an error shows of a value: its repr, cut, or the shape of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4300 digits has no repr
        text = f"a {type(value).__name__} of {value.bit_length() if isinstance(value, int) else '?'} bits"
    return text if len(text) <= 60 else text[:57] + "..."


def summary(value: Tensor | None) -> str:
    """Return the shape, dtype and range of a tensor in a few words."""
    if value is None:
        return "None"
    found = f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if value.is_meta or not value.is_floating_point() or not value.numel():
        return found
    least, most = value.detach().aminmax()
    return f"{found} from {float(least):.4g} to {float(most):.4g}"


def number(name: str, value: Any, low: int | float = -inf, high: int | float = inf, *, above: bool = False) -> float:
    """Return a finite number as a float. NumPy's numbers are numbers; booleans and strings are not.

    Args:
        name: the argument's name.
        value: what was given.
        low, high: the bounds, both allowed.
        above: `low` itself is not allowed.

    Raises:
        ValueError: it is no finite number in these bounds.
    """
    found = _float(value)
    if found is None or not low <= found <= high or (above and found == low):
        bound = f" above {low:g}" if above else f" of at least {low:g}" if low > -inf else ""
        most = f"{' and' if bound else ' of'} at most {high:g}" if high < inf else ""
        raise ValueError(f"{name} must be a finite number{bound}{most}, got {shown(value)}")
    return found


def _float(value: Any) -> float | None:
    """Return a finite real number as a float, None for everything else."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        return None
    try:
        found = float(value)
    except OverflowError:  # such as 10**400
        return None
    return found if isfinite(found) else None


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number as an int. NumPy's whole numbers are whole numbers; booleans are not.

    Raises:
        ValueError: it is no whole number from `low` to `high`.
    """
    try:
        found = None if isinstance(value, bool | np.bool_ | Tensor) else index(value)
    except TypeError:
        found = None
    if found is None or not low <= found <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return found


def tensor(name: str, value: Any) -> Tensor:
    """Return a tensor as it is.

    Raises:
        TypeError: the value is not a tensor; lists and arrays are refused because their dtype and device are ambiguous.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {shown(value)}, expected a tensor: torch.tensor(...) makes one of numbers")
    return value


def as_levels(levels: Any) -> Tensor:
    """Return noise levels as a float64 tensor [steps + 1] on the CPU, checked to be finite and to fall.

    Args:
        levels: a tensor, an array or a sequence of numbers.

    Raises:
        ValueError: the levels are no finite real numbers in a sequence or tensor, or do not fall; the message names the
            first that is wrong.
    """
    if isinstance(levels, Tensor):
        if levels.is_complex() or levels.dtype == torch.bool or levels.is_meta or levels.layout != torch.strided:
            kind = f"a {levels.layout} tensor of {levels.dtype} on {levels.device}"
            raise ValueError(f"sigmas are {kind}, expected real numbers")
        found = levels.detach().to("cpu", torch.float64)
    else:
        given = levels.tolist() if isinstance(levels, np.ndarray) else levels
        if isinstance(given, str | bytes) or not isinstance(given, Sequence):
            raise ValueError(f"sigmas must be a sequence of numbers or a tensor, got {shown(levels)}")
        found = torch.tensor([_level(i, level) for i, level in enumerate(given)], dtype=torch.float64, device="cpu")
    check_falls(found)
    return found


def _level(i: int, level: Any) -> float:
    if isinstance(level, Tensor) and level.ndim == 0 and level.dtype.is_floating_point:
        level = level.item()
    if isinstance(level, float) and not isfinite(level):
        return level  # counted by check_falls
    return number(f"sigmas[{i}]", level)


def check_falls(levels: Tensor) -> None:
    """Raise ValueError unless these are finite levels of shape [steps + 1], each below the one before."""
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"sigmas have shape {list(levels.shape)}, expected [steps + 1] with at least one step")
    if len(levels) > MAX_STEPS + 1:
        raise ValueError(f"sigmas are {len(levels) - 1} steps, expected at most {MAX_STEPS}")
    if not torch.isfinite(levels).all():
        raise ValueError(f"sigmas hold {int((~torch.isfinite(levels)).sum())} values that are not finite")
    if (rises := levels.diff() >= 0).any():
        at = int(rises.nonzero()[0])
        raise ValueError(f"sigmas must fall, but sigmas[{at + 1}] = {levels[at + 1]} after {levels[at]}")


def check_apart(levels: Tensor) -> None:
    """Raise ValueError where falling levels lie so close together, or to 0, that a step cannot be computed."""
    before, after = levels[:-1], levels[1:]
    if (close := before - after < MIN_GAP * before).any():
        at = int(close.nonzero()[0])
        raise ValueError(
            f"sigmas[{at}] = {float(levels[at])} and sigmas[{at + 1}] = {float(levels[at + 1])} are too close, "
            f"expected a fall of at least {MIN_GAP:g} of the level"
        )
    if ((levels > 0) & (levels < MIN_LEVEL)).any():
        raise ValueError(f"sigmas hold {levels[levels > 0].min()}, expected 0 or at least {MIN_LEVEL:g}")
