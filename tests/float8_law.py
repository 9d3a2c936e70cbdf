"""The formulas of float8 tensors (DESIGN.md) in numpy and ml_dtypes, without our own code."""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

FORMATS = ("e4m3", "e5m2")
NUMPY = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def scale_by_law(values: Tensor, format: str, granularity: str) -> Tensor:
    """max(amax / largest, 2**-126) in float32, 1 for all-zero: (), or [..., 1]."""
    wide = np.abs(values.double().numpy())
    amax = wide.max(initial=0.0) if granularity == "tensor" else wide.max(-1, keepdims=True, initial=0.0)
    with np.errstate(under="ignore"):
        scale = np.float32(amax) / np.float32(LARGEST[format])
    scale = np.where(amax == 0, np.float32(1), np.maximum(scale, np.float32(2.0**-126)))
    return torch.from_numpy(np.asarray(scale, np.float32))


def codes_by_law(values: Tensor, scale: Tensor, format: str) -> Tensor:
    """RNE(clamp(values / scale)) as uint8, divided in float32, or in float64 for float64 and then rounded once."""
    kind = np.float64 if values.dtype == torch.float64 else np.float32
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        quotient = values.to(torch.float64 if kind is np.float64 else torch.float32).numpy() / scale.numpy().astype(
            kind
        )
    clamped = np.clip(quotient, -LARGEST[format], LARGEST[format])
    return torch.from_numpy(
        _nearest(clamped, format) if kind is np.float64 else clamped.astype(NUMPY[format]).view(np.uint8)
    )


def decoded(codes: Tensor, format: str) -> Tensor:
    """The numbers that uint8 or float8 codes stand for, float64."""
    return torch.from_numpy(codes.view(torch.uint8).numpy().view(NUMPY[format]).astype(np.float64))


def _nearest(values: np.ndarray, format: str) -> np.ndarray:
    """The nearest of all codes, ties to even; ml_dtypes takes float64 through float32 and rounds twice."""
    table = np.arange(128, dtype=np.uint8).view(NUMPY[format]).astype(np.float64)
    table = table[np.isfinite(table)]
    middle = (table[1:] + table[:-1]) / 2
    below, through = np.searchsorted(middle, np.abs(values), "left"), np.searchsorted(middle, np.abs(values), "right")
    codes = np.where(below % 2 == 0, below, through)  # they differ at midpoints only
    return (codes + 0x80 * np.signbit(values)).astype(np.uint8)
