"""Checkpoints of a run: safetensors and JSON in a folder that appears whole, from which a run goes on bit for bit.

OUTPUT/checkpoints/step-00000500/parameters.safetensors      what is trained, by name
                                 optimizer.safetensors       its state, "parameter/name" (exp_avg ...)
                                 average.safetensors         the moving average, where there is one
                                 state.json                  step, config, versions, numbers of the optimizer
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from encoders.json_files import read_json
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import CheckpointError, open_tensors, write_tensors
from mmdit.training.config import TrainingConfig
from mmdit.training.loop import Training
from mmdit.utils import remove_folder, replacing_folder

FORMAT: Final = 1
_PREFIX: Final = "step-"
# Settings that change nothing of the numbers of a step, and may differ when a run goes on.
FREE: Final = frozenset(
    {
        *("output", "cache", "naming", "device", "keep", "save_every", "log_every", "time_bins", "block_norms"),
        *("tensorboard", "sample_every", "sample_prompts", "sample_steps"),
        *("checkpoint_blocks", "keep_attention", "compile", "ahead"),
    }
)


@dataclass(frozen=True)
class Place:
    """A checkpoint on the disk."""

    step: int
    folder: Path


def checkpoints(output: str | Path) -> list[Place]:
    """The checkpoints of a run, oldest first."""
    folder = Path(output) / "checkpoints"
    found = (path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())
    return sorted((Place(int(path.name.removeprefix(_PREFIX)), path) for path in found), key=lambda one: one.step)


def save(run: Training) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `config.keep`; returns its folder.

    A process that is killed leaves the new checkpoint whole or none, and each of the others whole or removed.
    """
    folder = Path(run.config.output) / "checkpoints" / f"{_PREFIX}{run.step:08}"
    tensors, numbers = optimizer_state(run)
    parts: dict[str, Mapping[str, Tensor]] = {"parameters": run.parameters, "optimizer": tensors}
    if run.ema is not None:
        parts["average"] = dict(zip(run.parameters, run.ema.average, strict=True))
    state = {
        "format": FORMAT,
        "step": run.step,
        "processes": run.processes.world,
        "config": run.config.to_json(),
        "optimizer": numbers,
        "average_updates": None if run.ema is None else run.ema.updates,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    whole = {name: {key: _plain(run, one) for key, one in part.items()} for name, part in parts.items()}
    if run.processes.rank:
        return folder
    with replacing_folder(folder, over=True) as part:
        for name, one in whole.items():
            write_tensors(part / f"{name}.safetensors", {key: LazyTensor.of(tensor) for key, tensor in one.items()})
        write_tensors(part / "random.safetensors", {"torch": LazyTensor.of(torch.get_rng_state())})
        (part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in checkpoints(run.config.output)[: -run.config.keep]:
        remove_folder(old.folder)
    return folder


def load(run: Training, place: Place) -> None:
    """Continue from a checkpoint: parameters, optimizer, average, step, and torch's random state.

    Raises:
        CheckpointError: the checkpoint is broken, of another format, beyond the config's last step, or of a run with
            other settings, parameters, or another number of processes, which decides the batches.
    """
    state = read_json(place.folder / "state.json", kind=dict)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{place.folder} has format {state.get('format')!r}, this version reads {FORMAT}")
    if missing := sorted({"step", "config", "optimizer", "average_updates"} - state.keys()):
        raise CheckpointError(f"{place.folder / 'state.json'} has no {missing[0]!r}: remove {place.folder}")
    check_config(run.config, state["config"], place.folder)
    if (before := state.get("processes", run.processes.world)) != run.processes.world:
        raise CheckpointError(
            f"{place.folder} was trained by {before} processes, which share each batch, and now there are "
            f"{run.processes.world}: start as many as before, or give another output"
        )
    if state["step"] > run.config.steps:
        raise CheckpointError(
            f"{place.folder} has done {state['step']} steps, and steps is {run.config.steps}: set it to at least as "
            "many, or give another output"
        )
    prime(run.optimizer)
    with torch.no_grad():
        _fill(run, dict(run.parameters), place.folder / "parameters.safetensors")
        _fill(run, dict(state_tensors(run)), place.folder / "optimizer.safetensors")
        if run.ema is not None:
            _fill(run, dict(zip(run.parameters, run.ema.average, strict=True)), place.folder / "average.safetensors")
            run.ema.updates = state["average_updates"]
    _set_numbers(run, state["optimizer"])
    run.step = state["step"]
    torch.set_rng_state(open_tensors(place.folder / "random.safetensors")[0]["torch"].read())


def check_config(config: TrainingConfig, saved: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError where a setting that decides the numbers differs from the checkpoint's."""
    now = config.to_json()
    free = FREE | {"steps"} if config.schedule == "constant" else FREE  # the other schedules end with the last step
    if other := [key for key in now if key not in free and saved.get(key) != now[key]]:
        said = ", ".join(f"{key} {saved.get(key)!r} (now {now[key]!r})" for key in other)
        raise CheckpointError(
            f"{where} was trained with {said}; a run goes on with its own settings: set them back, or give another "
            "output"
        )


def optimizer_state(run: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state: its tensors by "parameter/name", and everything else as JSON has it."""
    numbers = {key: value for key, value in _entries(run) if not isinstance(value, Tensor)}
    return dict(state_tensors(run)), numbers


def state_tensors(run: Training) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the optimizer's state; of a tensor subclass (8-bit states), those that it holds."""
    for key, value in _entries(run):
        if isinstance(value, Tensor):
            yield from _inner(key, value)


def _inner(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(value, "__tensor_flatten__") or hasattr(value, "full_tensor"):  # a DTensor is made whole instead
        yield key, value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _inner(f"{key}/{name}", getattr(value, name))


def _entries(run: Training) -> Iterator[tuple[str, Any]]:
    for name, parameter in run.parameters.items():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            yield f"{name}/{key}", value


def _set_numbers(run: Training, numbers: Mapping[str, Any]) -> None:
    for name, parameter in run.parameters.items():
        state = run.optimizer.state.get(parameter, {})
        for key in state:
            if f"{name}/{key}" in numbers:
                state[key] = numbers[f"{name}/{key}"]


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make its state, by a step of rate 0 with gradients of 0; values are loaded afterwards."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    for one in parameters:
        one.grad = torch.zeros_like(one)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _plain(run: Training, tensor: Tensor) -> Tensor:
    return run.processes.whole(tensor.detach()).cpu()


def _fill(run: Training, into: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors of a file to tensors in memory; names and shapes must be the same."""
    stored, _ = open_tensors(path)
    if wrong := sorted(set(stored) ^ set(into)):
        raise CheckpointError(f"{path} and the run differ in {len(wrong)} tensors, such as {wrong[0]}")
    for key, tensor in into.items():
        if tuple(stored[key].shape) != tuple(tensor.shape) or stored[key].dtype != tensor.dtype:
            found = f"{list(stored[key].shape)} {stored[key].dtype}"
            raise CheckpointError(f"{path}: {key} is {found}, the run has {list(tensor.shape)} {tensor.dtype}")
        run.processes.fill(tensor, stored[key].read())
