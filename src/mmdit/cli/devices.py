"""Devices and dtypes by the names that the command line takes; torch is imported when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_of(name: str | None) -> torch.device:
    """The device of that name, if it is here; None takes CUDA where there is one, else the CPU."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is none that torch knows: use cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
    here = torch.accelerator.current_accelerator(check_available=True)
    if device.type not in ("cpu", here and here.type):
        raise ValueError(f"--device {name}: there is none here; use cpu")
    return device


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of that name; None for none."""
    import torch

    return None if name is None else getattr(torch, name)
