"""Devices and dtypes to compute on: "auto", the names that torch knows, and what is not there."""

from __future__ import annotations

import warnings

import torch

HALF = (torch.float16, torch.bfloat16)


def resolve_device(device: torch.device | str | None, argument: str = "device") -> torch.device:
    """Return the named device, if this machine has it. None and "auto" take CUDA, else MPS, else the CPU.

    Args:
        device: "auto", or a name that torch knows: "cpu", "cuda", "cuda:1", "mps".
        argument: name of the argument in errors.

    Raises:
        ValueError: the name is unknown to torch, or the machine lacks the device; the available ones are listed.
        TypeError: the device is neither a string nor a `torch.device`.
    """
    if device is None or device == "auto":
        return torch.device(_best())
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


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a device computes quickly enough and exactly enough.

    float32 on a CPU; bfloat16 on GPUs of NVIDIA from compute capability 8.0 (RTX 30, A100), on Apple's from macOS 14
    and on others; float16 on older ones, which compute in bfloat16 slowly or not at all.
    """
    if device.type in ("cpu", "meta"):
        return torch.float32
    return torch.bfloat16 if _has_bfloat16(device) else torch.float16


def suited_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to compute with weights of a dtype where the caller asks for none.

    The stored one, but 16 bits become float32 on a CPU, and bfloat16 becomes float16 on GPUs without it.
    """
    if stored not in HALF or device.type == "meta" or (device.type != "cpu" and _has_bfloat16(device)):
        return stored
    return default_dtype(device)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def described(device: torch.device) -> str:
    """The device, and the name of a GPU of NVIDIA."""
    if device.type != "cuda":
        return "the CPU" if device.type == "cpu" else str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def warn_if_slow(device: torch.device, dtype: torch.dtype | None) -> None:
    """Warn of 16-bit arithmetic on a CPU: decoding takes about 100 times as long as in float32."""
    if device.type == "cpu" and dtype in HALF:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{name} is slow on a CPU, decoding most of all (about 100 times float32); leave dtype out for float32",
            stacklevel=3,
        )
