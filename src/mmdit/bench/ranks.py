"""What several GPUs bring to training: `torchrun --nproc-per-node 2 -m mmdit.bench.ranks`, under a minute for two.

Random weights, one cached sample of 1024 x 1024 pixels a process, gradient checkpointing, AdamW. In rows "alone" the
processes exchange nothing, and samples/s are those of one; in the others they are those of all together, and "to alone"
is how many times as many that is. Full fine-tuning of Large needs two GPUs of 80 GB.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from mmdit.bench.random_models import MODELS, Inputs, check_size, ours
from mmdit.bench.rows import FAILURES, said_of
from mmdit.runtime.devices import resolve_device
from mmdit.runtime.mesh import from_first, own_device, start
from mmdit.training.adapters import attach
from mmdit.training.batches import Batch
from mmdit.training.blocks import compile_blocks, recompute
from mmdit.training.config import TrainingConfig
from mmdit.training.distributed import Strategy, processes_of
from mmdit.training.loop import Processes, clipped, flow_losses
from mmdit.training.setup import make_optimizer
from mmdit.utils import markdown_table

__all__ = ["main", "step_of"]

ROWS: tuple[tuple[str, str, str | None, Strategy | None], ...] = (
    ("LoRA, alone", "lora", None, None),
    ("LoRA, DDP", "lora", None, "ddp"),
    ("LoRA, FSDP2", "lora", None, "fsdp"),
    ("LoRA on fp8, alone", "lora", "fp8", None),
    ("LoRA on fp8, DDP", "lora", "fp8", "ddp"),
    ("LoRA on fp8, FSDP2", "lora", "fp8", "fsdp"),
    ("full, FSDP2", "full", None, "fsdp"),
)


def step_of(
    model_name: str,
    size: int,
    method: str,
    recipe: str | None,
    strategy: Strategy | None,
    device: torch.device,
    *,
    compiled: bool = False,
) -> tuple[Callable[[], None], Processes]:
    """A training step of a model with random weights on this process's device, and its place among the others."""
    config, dtype = MODELS[model_name], torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)  # the same weights on every process
    model, _ = ours(config, recipe=recipe, compiled=False, device=device, dtype=dtype)
    given: dict[str, Any] = {"method": method, "device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    settings = TrainingConfig(**given)
    if method == "lora":
        attach(model, settings)
    else:
        model.requires_grad_(True)
    recompute(model.get_submodule("joint_blocks").children(), keep_attention=True)
    if compiled and strategy != "fsdp":
        compile_blocks(model.get_submodule("joint_blocks").children())
    processes = Processes() if strategy is None else processes_of(strategy, device)
    prepared = processes.prepare(model)
    parameters = [one for one in prepared.parameters() if one.requires_grad]
    optimizer = make_optimizer(parameters, settings)
    x = Inputs.random(config, size, 333, 1, device, torch.float32)
    batch = Batch(x.latent, torch.randn_like(x.latent), x.timestep / 1000, x.context, x.pooled)

    def step() -> None:
        flow_losses(prepared, batch).mean().backward()
        processes.average(parameters)
        clipped(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, processes


def measured(
    row: tuple[str, str, str | None, Strategy | None],
    model: str,
    size: int,
    device: torch.device,
    repeats: int,
    *,
    compiled: bool = False,
) -> tuple[float, float]:
    """Median milliseconds of a step and its peak memory in units of 1e9 bytes, each of the process with the most.

    The peak is that of the steps: making the model, whole on every process, takes more than a sharded step.
    """
    step, _ = step_of(model, size, *row[1:], device, compiled=compiled)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(2 + repeats):
        dist.barrier()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - begin))
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    found = torch.tensor([median(times[2:]), peak])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found[0]), float(found[1])


def cells_of(row: str, found: tuple[float, float], alone: float | None, world: int) -> list[str]:
    """A line of the table."""
    ms, peak = found
    count = 1 if row.endswith("alone") else world
    ratio = "-" if alone is None else f"{count * alone / ms:.2f}"
    return [row, f"{ms:.1f}", f"{1000 * count / ms:.2f}", ratio, f"{peak:.2f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="torchrun -m mmdit.bench.ranks", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="large")
    parser.add_argument("--size", type=int, help="side of the picture in pixels (default: the model's)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: %(default)s)")
    every = range(len(ROWS))
    parser.add_argument("--rows", type=int, nargs="+", choices=every, default=list(every), help="numbers of rows")
    parser.add_argument("--seconds", type=float, default=50.0, help="no row starts later (default: %(default)s)")
    compiled = "compile the blocks, but under fsdp; it takes half a minute for the first row"
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    device = own_device(resolve_device(options.device, "device"))
    start(device, timedelta(seconds=60))
    begin, lines, alone = time.monotonic(), [], dict[tuple[str, str | None], float]()
    sizes: dict[str, Any] = {"model": options.model, "size": check_size(options.model, options.size)}
    measure: Callable[..., tuple[float, float]] = partial(measured, device=device, compiled=options.compile, **sizes)
    for row in (ROWS[i] for i in options.rows):
        if from_first(time.monotonic() - begin) > options.seconds:
            lines.append([row[0], f"not started, {options.seconds:g} s are over", *"---"])
            continue
        try:
            found = measure(row, repeats=options.repeats)
            if row[3] is None:
                alone[row[1:3]] = found[0]
            lines.append(cells_of(row[0], found, alone.get(row[1:3]), dist.get_world_size()))
        except FAILURES as error:
            lines.append([row[0], f"failed: {said_of(error, 200)}", *"---"])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            sys.stderr.write(f"{lines[-1]} ({time.monotonic() - begin:.0f} s)\n")
    if dist.get_rank() == 0:
        head = ("row", "ms a step", "samples/s", "to alone", "peak GB of a process")
        sys.stdout.write("\n".join(markdown_table(head, lines)) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
