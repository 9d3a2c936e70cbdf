"""Devices, dtypes and models by the names that the command line takes; torch is imported when they are asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit.cli.console import Note
from mmdit.cli.usage import UsageError, exists

if TYPE_CHECKING:
    import torch

    from mmdit.pipeline.pipeline import Pipeline

DEMO = "demo"  # the embedded model, wherever a model is named


def device_of(name: str | None, note: Note | None = None) -> torch.device:
    """The device of that name, if it is here; None and "auto" take CUDA, else MPS, else the CPU.

    A GPU that is named by its number becomes the current one of this process.

    Args:
        name: What the user gave.
        note: Tells the user which device was taken, where the name leaves it open.

    Raises:
        UsageError: torch knows no such name, or the machine has no such device.
    """
    import torch

    from mmdit.runtime.devices import resolve_device

    try:
        device = resolve_device(name, "--device")
    except ValueError as error:
        raise UsageError(str(error)) from error
    if device.type == "meta":  # a device for loading alone, on which nothing is computed
        raise UsageError(f"--device {name}: there is none here; use cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if note is not None and name in (None, "auto"):
        note(computing_on(device))
    return device


def dtype_of(name: str | None, device: torch.device | None = None) -> torch.dtype | None:
    """The dtype of that name. Without a name it is the device's default, see `mmdit.runtime.devices.default_dtype`.

    Without a name and a device it is None, which keeps what is stored.
    """
    import torch

    from mmdit.runtime.devices import default_dtype

    if name is not None:
        return getattr(torch, name)
    return None if device is None else default_dtype(device)


def place_of(device: str | None, dtype: str | None, note: Note) -> tuple[torch.device, torch.dtype]:
    """Device and dtype by name, or by themselves, which the note says.

    Raises:
        UsageError: see `device_of`.
    """
    found = device_of(device)
    kind = dtype_of(dtype, found)
    assert kind is not None
    if device in (None, "auto") or dtype is None:
        note(computing_on(found, kind))
    return found, kind


def computing_on(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """What is said of a device and dtype that were not both asked for."""
    from mmdit.runtime.devices import described

    return f"computing on {described(device)}" + ("" if dtype is None else f" in {str(dtype).removeprefix('torch.')}")


def path_of(model: str) -> Path:
    """Where a model is on the disk: that of the embedded model for "demo"."""
    from mmdit.embedded import EMBEDDED

    return EMBEDDED if model == DEMO else Path(model)


def is_file(model: str | None) -> bool:
    """Whether the model is a single file."""
    return model is not None and model != DEMO and exists(model)


def choose_threads(threads: int | None, model: str | None, device: torch.device) -> None:
    """Set the number of CPU threads: what is asked for, else at most two for the embedded model.

    Without `threads`, the environment decides where it says a number. A step of the embedded model is hundreds of
    parallel regions of some microseconds, too small for many threads. The order of sums depends on the number of
    threads, so that with two, its pictures are the same on all machines with that many cores.
    """
    import torch

    small = device.type == "cpu" and model in (None, DEMO)
    if threads is not None:
        torch.set_num_threads(threads)
    elif small and not any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        torch.set_num_threads(min(2, torch.get_num_threads()))


def load(
    model: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    beside: dict[str, Any] | None = None,
    hub: dict[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """The pipeline that a model's name on the command line means, see `mmdit.checkpoints.load_pipeline.Source`.

    Args:
        model: A folder, a file, or owner/name on the Hugging Face Hub; None and "demo" are the embedded model.
        device, dtype: The device and dtype of all models.
        beside: Files and the folder of tokenizers to take beside a single file, by argument of `from_single_file`.
        hub: The revision and the variant of a repository.
        options: What all ways of loading take.
    """
    from mmdit.checkpoints.load_pipeline import Source
    from mmdit.pipeline.pipeline import Pipeline

    others = dict(beside or {})
    tokenizers = others.pop("tokenizers", None)
    source = Source(DEMO if model is None else model, others, tokenizers, **(hub or {}))
    return Pipeline.load(source, device=device, dtype=dtype, **options)
