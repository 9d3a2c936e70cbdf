"""Devices and dtypes to compute on: "auto", the names that torch knows, and what is not there."""

from __future__ import annotations

import warnings

import torch

_SLOW = (torch.float16, torch.bfloat16)


def resolve_device(device: torch.device | str | None, argument: str = "device") -> torch.device:
    """Return the named device, if this machine has it. None and "auto" take CUDA where there is one, else the CPU.

    Args:
        device: "auto", or a name that torch knows: "cpu", "cuda", "cuda:1", "mps".
        argument: name of the argument in errors.

    Raises:
        ValueError: the name is unknown to torch, or the machine lacks the device; the available ones are listed.
        TypeError: the device is neither a string nor a `torch.device`.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"{argument} is {type(device).__name__}, expected a string such as 'cuda' or a torch.device")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        hint = "use 'cuda'" if str(device).lower() in ("gpu", "nvidia") else "use 'auto', 'cpu', 'cuda' or 'cuda:1'"
        raise ValueError(f"{argument} {device!r} is none that torch knows: {hint}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"{argument} {str(device)!r}: torch sees {count} CUDA devices here; use 'auto' or 'cpu'")
    here = torch.accelerator.current_accelerator(check_available=True)
    if found.type not in ("cpu", "meta", here and here.type):
        raise ValueError(f"{argument} {str(device)!r}: there is none here; use 'auto' or 'cpu'")
    return found


def warn_if_slow(device: torch.device, dtype: torch.dtype | None) -> None:
    """Warn of 16-bit arithmetic on a CPU: decoding takes about 100 times as long as in float32."""
    if device.type == "cpu" and dtype in _SLOW:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{name} is slow on a CPU, decoding most of all (about 100 times float32); leave dtype out for float32",
            stacklevel=3,
        )
