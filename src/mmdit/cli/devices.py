"""Devices, dtypes and models by the names that the command line takes; torch is imported when they are asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit.cli.usage import UsageError, exists

if TYPE_CHECKING:
    import torch

    from mmdit.pipeline.pipeline import Pipeline

DEMO = "demo"  # the embedded model, wherever a model is named


def device_of(name: str | None) -> torch.device:
    """The device of that name, if it is here; None and "auto" take CUDA where there is one, else the CPU.

    Raises:
        UsageError: torch knows no such name, or the machine has no such device.
    """
    from mmdit.runtime.devices import resolve_device

    try:
        device = resolve_device(name, "--device")
    except ValueError as error:
        raise UsageError(str(error)) from error
    if device.type == "meta":  # a device for loading alone, on which nothing is computed
        raise UsageError(f"--device {name}: there is none here; use cpu")
    return device


def dtype_of(name: str | None, device: torch.device | None = None) -> torch.dtype | None:
    """The dtype of that name. Without a name it is the device's default: float32 on a CPU, bfloat16 elsewhere.

    Without a name and a device it is None, which keeps what is stored.
    """
    import torch

    if name is not None:
        return getattr(torch, name)
    if device is None:
        return None
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def path_of(model: str) -> Path:
    """Where a model is on the disk: that of the embedded model for "demo"."""
    from mmdit.embedded import EMBEDDED

    return EMBEDDED if model == DEMO else Path(model)


def is_file(model: str | None) -> bool:
    """Whether the model is a single file."""
    return model is not None and model != DEMO and exists(model)


def choose_threads(threads: int | None, model: str | None, device: torch.device) -> None:
    """Set the number of CPU threads: what is asked for, else one for the embedded model, unless the environment says.

    The embedded model is so small that a step is hundreds of parallel regions of some microseconds. With as many
    threads as cores, every region waits, spinning, for a thread that another program has pushed off its core.
    """
    import torch

    small = device.type == "cpu" and model in (None, DEMO)
    if threads is not None:
        torch.set_num_threads(threads)
    elif small and not any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        torch.set_num_threads(1)


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
