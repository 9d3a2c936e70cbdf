"""The training loop, and the parts that it is made of.

    run = start(config)                          # mmdit.training.setup: model, data, optimizer
    for step in range(run.step, config.steps):
        batch = run.batch(step)                  # mmdit.training.batches: which samples, which noise, which times
        losses = flow_losses(run.model, batch)   # predict the velocity, compare it
        losses.mean().backward()
        run.optimizer.step()

`train` is this loop with accumulation, clipping, averages, checkpoints, the log and sample pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdit.pipeline.failures import nonfinite_layers
from mmdit.runtime.hooks import repeating
from mmdit.training.batches import Batch, Samples, batch_at
from mmdit.training.config import TrainingConfig
from mmdit.training.ema import Ema
from mmdit.training.rates import rate_at, set_rate
from samplers.training import WEIGHTINGS, noised, sample_losses

Weight = Callable[[Tensor], Tensor]  # times [b] -> a factor of the loss of each sample [b]


@dataclass
class Processes:
    """What a step needs to know of the other processes; the default is one process.

    Attributes:
        rank, world: the number of this process, and of all.
        sharded: whether each process holds a share of each weight.
        prepare: wraps the model that computes the loss (DDP), or shards it (fully_shard), before the optimizer is made.
        no_sync: the context of a backward pass whose gradients are not yet exchanged.
        average: replaces the gradients of these parameters by their means over all processes, where the backward pass
            has not done so; called after the last pass of a step.
        mean: the mean over all processes of a tensor for the log.
        whole: a parameter, or a tensor of its optimizer's state, as a plain tensor, for checkpoints.
        fill: copies a plain tensor into a parameter, or a tensor of its optimizer's state.
        in_turn: a context that the first process enters and leaves before the others enter it.
    """

    rank: int = 0
    world: int = 1
    sharded: bool = False
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    no_sync: Callable[[nn.Module], AbstractContextManager[object]] = lambda model: nullcontext()
    average: Callable[[Iterable[nn.Parameter]], object] = lambda parameters: None
    mean: Callable[[Tensor], Tensor] = lambda value: value
    whole: Callable[[Tensor], Tensor] = lambda value: value
    fill: Callable[[Tensor, Tensor], object] = lambda into, value: into.copy_(value)
    in_turn: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class Training:
    """A run: what a step reads and changes.

    Attributes:
        model: (latent, timestep, context, pooled, hint=None) -> velocity; it may wrap the transformer.
        parameters: what is trained, by name.
        step: the number of steps that are done.
    """

    config: TrainingConfig
    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    samples: Samples
    optimizer: torch.optim.Optimizer
    shift: float
    device: torch.device
    dtype: torch.dtype
    ema: Ema | None = None
    processes: Processes = field(default_factory=Processes)
    step: int = 0
    before_pass: Callable[[int], None] | None = None  # called with the number of each pass before it runs

    def batch(self, step: int, micro: int = 0) -> Batch:
        """The batch of a step, or of one of its accumulated passes."""
        return self.batch_of(step * self.config.accumulation + micro)

    def batch_of(self, place: int) -> Batch:
        """The batch of the pass number `place`, counted over all steps."""
        return batch_at(
            self.samples,
            self.config,
            self.shift,
            place,
            rank=self.processes.rank,
            world=self.processes.world,
            device=self.device,
            dtype=torch.promote_types(self.dtype, torch.float32),
        )


class StepResult(NamedTuple):
    """What a step tells the log."""

    step: int
    loss: Tensor  # mean over the samples of the step, on this process
    norm: Tensor | None  # of all gradients together, before clipping; None with `fused_backward`
    rate: float
    times: Tensor  # [samples of the step]
    losses: Tensor  # one for each time
    norms: dict[str, Tensor]  # of the gradients of each block, before clipping; empty unless `config.block_norms`


def flow_losses(model: nn.Module, batch: Batch, weight: Weight | None = None) -> Tensor:
    """The velocity loss of each sample, weight (predicted - (noise - x0))^2, [b], in float32 or wider.

    The model gets the noised latents, the text and the hint in its own dtype, and the timestep 1000 t.
    """
    dtype = dtype_of(model)
    latent = noised(batch.x0, batch.noise, batch.t).to(dtype)
    hint = {} if batch.hint is None else {"hint": batch.hint.to(dtype)}
    predicted = model(latent, 1000 * batch.t, batch.context.to(dtype), batch.pooled.to(dtype), **hint)
    return sample_losses(predicted, batch.x0, batch.noise, None if weight is None else weight(batch.t))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes: that of its first weight, whose float8 codes stand for a wider one."""
    return next(model.parameters()).dtype


def training_step(run: Training, step: int) -> StepResult:
    """One step of the optimizer: passes forward and backward, clipping, the step itself, the average.

    Raises:
        FloatingPointError: a loss is not finite (the step, the times and the first layer are named), or the norm of the
            gradients; no weight has changed in this step. With `fused_backward` gradients are gone by then and are not
            checked.
    """
    config, weight = run.config, WEIGHTINGS[run.config.weighting]
    rate = rate_at(step, config.steps, peak=config.learning_rate, warmup=config.warmup, schedule=config.schedule)
    set_rate(run.optimizer, rate)
    times, losses = [], []
    for micro in range(config.accumulation):
        batch = run.batch(step, micro)
        if run.before_pass is not None:
            run.before_pass(step * config.accumulation + micro)
        last = micro == config.accumulation - 1
        with nullcontext() if last else run.processes.no_sync(run.model):
            each = flow_losses(run.model, batch, weight)
            check_finite_losses(run.model, batch, each, step, sharded=run.processes.sharded)
            (each.mean() / config.accumulation).backward()
        times.append(batch.t.detach())
        losses.append(each.detach())
    run.processes.average(run.parameters.values())
    norms = block_norms(run.parameters) if config.block_norms else {}
    norm = clipped(run.parameters.values(), config.clip)
    if norm is not None and not torch.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the norm of the gradients is {norm.item()}, with finite losses. No weight has changed in"
            " this step: go on from the last checkpoint with a lower learning_rate, or dtype float32"
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update()
    run.step = step + 1
    every = torch.cat(losses)
    return StepResult(step, every.mean(), norm, rate, torch.cat(times), every, norms)


def block_norms(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The norm of the gradients of each block, by its name "joint_blocks.3"; other parameters by their module."""
    blocks: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            words = name.split(".")
            block = ".".join(words[: 2 if words[1:] and words[1].isdigit() else 1])
            blocks.setdefault(block, []).append(_whole(parameter.grad.norm()))
    return {block: torch.stack(norms).norm() for block, norms in blocks.items()}


def clipped(parameters: Iterable[nn.Parameter], most: float | None) -> Tensor | None:
    """Scale all gradients so that their common norm is at most `most`; returns the norm before.

    None scales nothing. Without any gradient, as after a fused backward pass, the norm is None.
    """
    made = [one for one in parameters if one.grad is not None]
    if not made:
        return None
    if most is None:
        return _whole(nn.utils.get_total_norm([one.grad for one in made if one.grad is not None]))
    return _whole(nn.utils.clip_grad_norm_(made, most))


def _whole(norm: Tensor) -> Tensor:
    """The norm as a plain tensor, also of gradients that are sharded."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def check_finite_losses(model: nn.Module, batch: Batch, losses: Tensor, step: int, *, sharded: bool = False) -> None:
    """Raise FloatingPointError where a loss is not finite, with the step, the times, and the first layer to blame.

    Args:
        model, batch: what gave the losses.
        losses: [b].
        step: the number of the step.
        sharded: other processes hold shares of the weights. The layer is then not searched for, because that takes a
            forward pass of all processes, and the losses of the others may be finite.
    """
    bad = ~torch.isfinite(losses.detach())
    if not bool(bad.any()):
        return
    times = ", ".join(f"{1000 * t:.1f}" for t in batch.t[bad].tolist())
    where = "the layer is not known under fsdp: one process or ddp finds it" if sharded else _first_layer(model, batch)
    inputs = [name for name, part in batch._asdict().items() if part is not None and not torch.isfinite(part).all()]
    if inputs:
        where = f"the batch's {', '.join(inputs)} is not finite: delete the cache, and look at the pictures"
    raise FloatingPointError(
        f"step {step}: the loss of timestep {times} is not finite; {where}. No weight has changed: go on from the last "
        "checkpoint with a lower learning_rate, a smaller clip, or dtype float32"
    )


def _first_layer(model: nn.Module, batch: Batch) -> str:
    with nonfinite_layers(model) as names, repeating(), torch.no_grad():
        flow_losses(model, batch)
    return f"the first layer with such an output is {names[0]}" if names else "all layers are finite"
