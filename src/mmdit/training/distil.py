"""Distillation without pictures: a transformer that computes in float8 learns what the one in 16 bits computes.

    states = states_of(pipe, prompts)                   # latents that the teacher meets when it draws the prompts
    student = copy.deepcopy(pipe.transformer)
    quant.training.fake_quantize_(student, "fp8-static", input_scales=scales)
    for found in distil(student, pipe.transformer, states, steps=1000):
        print(found)                                    # the loss, step by step
    quant.training.quantize_trained_(student)           # ends in float8

`distil` compares the guided velocities, which is what a drawing follows. With `along=K` it takes K states of each
drawing and squares the mean of their errors: a drawing adds the errors of its steps up, so that those which persist
from step to step count most. With `picture_channels` in the states, errors count as much as they change the decoded
picture. `distil_blocks` trains one block after the other on the outputs of the teacher's block, so that only one block
has gradients and states of an optimizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.failures import nonfinite_layers
from mmdit.runtime.hooks import Hook, hooks, repeating
from mmdit.training.recording import RecordedGradients, eager_gradients
from mmdit.training.states import StateBatch, States, guided, mix_channels, picture_channels, states_of, wanted_of

__all__ = [
    "Distilled",
    "DivergedError",
    "RecordedError",
    "States",
    "distil",
    "distil_blocks",
    "guided",
    "guided_loss",
    "picture_channels",
    "states_of",
    "wanted_of",
]


_NUDGES = 4  # eager passes that tell how far roundings lead


class DivergedError(RuntimeError):
    """The loss of a training has grown far above its start; see also `RecordedError`."""


class RecordedError(DivergedError):
    """A recorded step computes other than an eager one."""


class Distilled(NamedTuple):
    """What a step of distillation tells."""

    step: int  # the number of steps that are done
    share: float  # of the training that is done
    loss: Tensor
    block: int | None  # the block that is trained; None for all at once
    apart: float | None = None  # how far a recorded step's gradients were from eager ones, relative to their norm


def guided_loss(
    student: nn.Module,
    wanted: tuple[Tensor, Tensor, Tensor],
    batch: StateBatch,
    guidance: float,
    along: int = 1,
    channels: Tensor | None = None,
) -> Tensor:
    """The weighted mean square of the error of the guided velocity, plus those of the two that it is made of.

    Args:
        student: gives the velocities.
        wanted: the teacher's, see `guided`.
        batch: each `along` states of it are of one drawing.
        guidance: the scale of the guidance.
        along: above 1, the guided error enters as `along` times the square of its weighted mean over the states of a
            drawing, which is the plain mean square where errors of different steps are independent.
        channels: [c, c], by which all errors are multiplied, see `picture_channels`.

    States whose steps are drawn more often than others count less, so that the mean is that of equal chances.
    """
    errors = (one - other for one, other in zip(guided(student, batch, guidance), wanted, strict=True))
    *single, both = (error if channels is None else mix_channels(error, channels) for error in errors)
    each = torch.stack([error.square() for error in single]).sum(0)
    if along == 1:
        return (batch.weight * (each + both.square()).mean((1, 2, 3))).mean()
    once, squared = batch.weight, batch.weight  # what a weight becomes whose term has it once, and squared
    if batch.share is not None:
        once, squared = batch.weight / batch.share, batch.weight / batch.share.sqrt()
    steps = (both * squared.view(-1, 1, 1, 1)).unflatten(0, (-1, along))
    of_each: Tensor = (once * each.mean((1, 2, 3))).mean()
    return of_each + along * steps.mean(1).square().mean()


def distil(
    student: MMDiT,
    teacher: MMDiT,
    states: States,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    rate: float = 4e-5,
    batch: int = 16,
    along: int = 1,
    seed: int = 0,
    done: float = 0.0,
    autocast: torch.dtype | None = None,
    recorded: bool = False,
    grown: float | None = 8.0,
) -> Iterator[Distilled]:
    """Train all parameters of the student that require gradients; the rate falls from `rate` to 0 as a cosine.

    Args:
        student: fake-quantized, see `quant.training.fake_quantize_`.
        teacher: the model that it was copied from.
        states: see `states_of`; on the models' device.
        steps, seconds: where the training ends; at least one is given.
        rate: of Adam. Codes are 6 to 12 % of a weight apart, and Adam moves each weight by about the rate in a step.
        batch: states in a step, each with and without its prompt.
        along: the number of states of each drawing in a step, see `guided_loss`.
        seed: of the order.
        done: the share that an earlier run has done, from 0 to below 1; the rate goes on from there.
        autocast: the dtype of the student's products and attention; None is that of its parameters. Codes of float8 are
            exact in every dtype.
        recorded: whether forward and backward are recorded in the first step as a CUDA graph, which later steps replay:
            small models wait for the CPU otherwise. Steps that are compared with eager ones, of which the first is one,
            need the memory of those, activations and gradients, beside the graph's. Seconds count from the end of the
            first step, less what it took, so that the rate does not jump where recording, or compiling the student's
            blocks, took long.
        grown: how many times the loss of the first steps a loss may be before the training ends; None never ends it.

    Yields:
        What each step tells, after it.

    Raises:
        ValueError: neither steps nor seconds are given, one is not above 0, `done` is not in [0, 1), `grown` is not
            above 1, nothing of the student requires gradients, or `along` does not divide the batch; or recording is
            wanted of a student that is not on a GPU.
        RuntimeError: the step cannot be recorded. No weight has changed.
        FloatingPointError: a loss or a gradient is not finite; the step and the first layer are named. No weight has
            changed in that step.
        DivergedError: the median loss of the last 50 steps is above `grown` times that of the first 10.
        RecordedError: a recorded step gives another loss or other gradients than an eager one of the same batch, for
            two batches; it is compared in steps 1, 2, 4, 8 and so on.
    """

    def loss(drawn: StateBatch) -> Tensor:
        wanted = wanted_of(teacher, drawn, states.guidance)
        # A graph must not read weights that autocast kept from before.
        with torch.autocast(drawn.x.device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            return guided_loss(student, wanted, drawn, states.guidance, along, states.channels)

    draw = partial(states.draw, batch, along=along, shares=states.shares(along))
    eps = torch.finfo(autocast or next(student.parameters()).dtype).eps
    given: dict[str, Any] = {"done": done, "recorded": recorded, "grown": grown, "eps": eps}
    yield from _fitted(student, draw, loss, steps, seconds, rate, seed, **given)


def distil_blocks(
    student: MMDiT,
    teacher: MMDiT,
    states: States,
    *,
    steps: int,
    rate: float = 4e-5,
    batch: int = 16,
    seed: int = 0,
    grown: float | None = 8.0,
) -> Iterator[Distilled]:
    """Train one block after the other, each to give the teacher's outputs for the inputs that the student has there.

    Only the parameters of one block have gradients at a time. Arguments are those of `distil`; `steps` are of a block.
    """
    for i, block in enumerate(student.joint_blocks):
        loss, draw = partial(_block_loss, student, teacher, i), partial(states.draw, batch)
        yield from _fitted(block, draw, loss, steps, None, rate, seed + i, block=i, grown=grown)


def _block_loss(student: MMDiT, teacher: MMDiT, i: int, drawn: StateBatch) -> Tensor:
    """The error of a block's outputs for the student's inputs, relative to their variance, summed over both streams."""
    with torch.no_grad():
        inputs, _ = _of_block(student, i, drawn)
        _, wanted = _of_block(teacher, i, drawn)
    pairs = zip(student.joint_blocks[i](*inputs), wanted, strict=True)
    return torch.stack([F.mse_loss(a.float(), b.float()) / b.float().var() for a, b in pairs if b is not None]).sum()


def _of_block(model: MMDiT, i: int, batch: StateBatch) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """What block i of a model reads and gives."""
    seen: list[tuple[Tensor, ...]] = []
    given: list[tuple[Tensor | None, ...]] = []
    block = model.joint_blocks[i]
    wanted = [
        Hook(block, "input", lambda _, args, __: seen.append(args)),
        Hook(block, "output", lambda _, __, ___, outputs: given.append(outputs)),
    ]
    with hooks(wanted):
        guided(model, batch, 1.0)
    return seen[0], given[0]


def _fitted(
    module: nn.Module,
    draw: Callable[[torch.Generator], StateBatch],
    loss_of: Callable[[StateBatch], Tensor],
    steps: int | None,
    seconds: float | None,
    rate: float,
    seed: int,
    *,
    done: float = 0.0,
    block: int | None = None,
    recorded: bool = False,
    grown: float | None = None,
    eps: float = 2**-23,
) -> Iterator[Distilled]:
    if steps is None and seconds is None:
        raise ValueError("distillation needs an end: give steps=, seconds=, or both")
    for name, end in (("steps", steps), ("seconds", seconds)):
        if end is not None and not end > 0:
            raise ValueError(f"distillation needs {name} above 0, got {end}")
    if not 0 <= done < 1:
        raise ValueError(
            f"done is the share of the training that an earlier run has done, from 0 to below 1; got {done}"
        )
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing of the student requires gradients: call quant.training.fake_quantize_ on it first")
    generator = torch.Generator(trained[0].device).manual_seed(seed)
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99), fused=trained[0].device.type == "cuda")
    start, step, share, setup = time.monotonic(), 0, done, 0.0
    gradients: Callable[[StateBatch], Tensor] = partial(eager_gradients, loss_of, trained)
    watch = _Watch(grown)
    while share < 1:
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * share)) / 2
        batch, apart = draw(generator), None
        if recorded and step == 0:
            gradients = RecordedGradients(loss_of, batch, trained)
        loss = gradients(batch)
        if recorded and (step + 1).bit_count() == 1:
            with suppress(RecordedError):  # whose frames hold gradients, and would while a second batch is compared
                apart = _check_recorded(step, loss, loss_of, trained, batch, eps=eps)
            if apart is None:  # by chance, see there; a graph that is wrong is wrong for other states too
                batch = draw(generator)
                loss = gradients(batch)
                apart = _check_recorded(step, loss, loss_of, trained, batch, eps=eps)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        if not bool(torch.isfinite(loss + norm)):
            raise FloatingPointError(_not_finite(module, loss, norm, step, block, partial(loss_of, batch)))
        watch(step, float(loss))
        optimizer.step()
        step += 1
        passed = time.monotonic() - start
        setup = passed if step == 1 else setup
        by_time = (passed - setup) / max(seconds - setup, 1e-3) if seconds else 0.0
        share = done + (1 - done) * min(1.0, max(by_time, step / steps if steps else 0.0))
        yield Distilled(step, share, loss, block, apart)


class _Watch:
    """Compares the median loss of the last steps with that of the first ones, in which the rate is still low.

    Of 2,000 runs of 400 steps whose losses are log-normal about one value, it ends none where sigma is 1, and 7 where
    sigma is 1.5.

    Args:
        grown: the factor that ends a training; None ends none.

    Raises:
        ValueError: the factor is not above 1.
    """

    first, last = 10, 50  # steps
    # A start below it counts as it: the mean square of rounding velocities, which are about 1, to bfloat16.
    least = 1e-6

    def __init__(self, grown: float | None) -> None:
        if grown is not None and not grown > 1:
            raise ValueError(f"grown is a factor above 1, or None, which ends no training; got {grown}")
        self.grown = grown
        self.losses: list[float] = []
        self.start = 0.0

    def __call__(self, step: int, loss: float) -> None:
        """Take the loss of a step.

        Raises:
            DivergedError: the median has grown by the factor.
        """
        self.losses = [*self.losses[1 - self.last :], loss]
        found = median(self.losses)
        if step < self.first:
            self.start = max(found, self.least)
        elif self.grown is not None and found > self.grown * self.start:
            raise DivergedError(
                f"step {step}: the median loss of the last {len(self.losses)} steps, {found:.4g}, is more than "
                f"{self.grown:g} times that of the first {self.first}, {self.start:.4g}: go on from weights of before "
                "with a lower rate, or give a larger grown="
            )


def _check_recorded(
    step: int,
    loss: Tensor,
    loss_of: Callable[[StateBatch], Tensor],
    trained: Sequence[Tensor],
    batch: StateBatch,
    *,
    eps: float = 2**-23,
) -> float:
    """Compare a recorded step with an eager one; returns how far apart the gradients are, see `_apart`.

    A graph that reads memory which is no longer its own, or wrong compiled code, gives numbers, but wrong ones.
    Compiled blocks round less often, so that codes flip. An eager pass repeats itself to the bit on a CPU and says
    nothing about how far that leads: for 2 and 8 states, gradients of the embedded model at the start of a training
    differ by 1.2 and 0.7 of their norm between bfloat16 and float32, and by 1.2 and 0.8 where latents are changed by a
    rounding to bfloat16 (0.4 by one to float32). Gradients of another batch of 8 differ by 0.8, and its loss by 21 %,
    which that rounding changes by 6 %. Where a bound is exceeded, eager passes of latents that are changed by a
    rounding therefore tell how far roundings lead, and twice the largest of them is no error. Few passes may give the
    same loss by chance: of 60 states one told less than 5 %, where the compiled step was 9 % apart, and four less than
    3.2 %, where it was 6.4 % apart; so `distil` asks a second batch before it ends.

    While the eager pass runs, the graph's memory still holds its own activations and gradients: the pass needs that of
    its activations, and of one more set of gradients, on top. (A second pass needs one set more.)

    Args:
        step: for the error.
        loss: of the recorded step, whose gradients the parameters have; they have them afterwards too.
        loss_of, trained, batch: see `eager_gradients`.
        eps: the relative size of a rounding.

    Raises:
        RecordedError: the losses differ by more than 5 %, or the gradients by more than half of their norm, and by more
            than twice what a rounding changes; or the norms of gradients that differ so by a factor above 3.
    """
    found = [parameter.grad for parameter in trained]

    def pass_of(some: StateBatch) -> tuple[float, list[Tensor | None]]:
        with torch.compiler.set_stance("force_eager"):
            again = float(eager_gradients(loss_of, trained, some))
        grads = [parameter.grad for parameter in trained]
        for parameter, grad in zip(trained, found, strict=True):
            parameter.grad = grad
        return again, grads

    again, grads = pass_of(batch)
    ratio = _size(found) / max(_size(grads), 1e-30)
    apart, off = _apart(found, grads), abs(float(loss) - again)
    # What is not finite in both is refused by the step itself.
    if apart > 0.5 or off > 0.05 * abs(again):
        spread = loss_spread = 0.0
        for seed in range(_NUDGES):
            nudged, others = pass_of(_nudged(batch, eps, seed))
            _, grads = pass_of(batch)
            spread, loss_spread = max(spread, _apart(others, grads)), max(loss_spread, abs(nudged - again))
        other = apart > max(0.5, 2 * spread) or (apart > 0.5 and not 1 / 3 < ratio < 3)
        if other or off > max(0.05 * abs(again), 2 * loss_spread):
            raise RecordedError(
                f"step {step}: the recorded graph gives the loss {float(loss):.4g} and an eager pass {again:.4g}; "
                f"their gradients differ by {apart:.2g} of the norm, by {spread:.2g} where latents are rounded, and "
                f"are {ratio:.2g} times as large: train with recorded=False, or without compiled blocks"
            )
    return apart


def _nudged(batch: StateBatch, eps: float, seed: int) -> StateBatch:
    """The batch with about half of the values of the latents larger by a rounding."""
    generator = torch.Generator(batch.x.device).manual_seed(seed)
    up = torch.rand(batch.x.shape, generator=generator, device=batch.x.device) < 0.5
    return batch._replace(x=batch.x * (1 + eps * up))


def _size(grads: Sequence[Tensor | None]) -> float:
    """The norm of all gradients together."""
    return float(torch.stack([one.norm() for one in grads if one is not None]).norm())


def _apart(ours: Sequence[Tensor | None], theirs: list[Tensor | None]) -> float:
    """The norm of the difference of two lists of gradients, relative to that of the second, which is used up.

    It is infinite where one list lacks a gradient that the other one has, unless that is zero.
    """
    rest, sizes = list[Tensor](), list[Tensor]()
    for place, one in enumerate(ours):
        other, theirs[place] = theirs[place], None
        if one is not None and other is not None:
            sizes.append(other.norm())
            rest.append((one - other).norm())
        elif (alone := other if one is None else one) is not None and bool(alone.any()):
            return math.inf
    if not rest:
        return 0.0
    return float(torch.stack(rest).norm() / torch.stack(sizes).norm().clamp(min=1e-30))


def _not_finite(
    module: nn.Module, loss: Tensor, norm: Tensor, step: int, block: int | None, again: Callable[[], object]
) -> str:
    """Why a step has no finite loss or gradient; the pass is run once more to find the first layer."""
    with nonfinite_layers(module) as names, repeating(), torch.no_grad():
        again()
    layer = f"the first layer with an output that is not finite is {names[0]}" if names else "all layers are finite"
    of = "" if block is None else f" of block {block}"
    return (
        f"step {step}{of}: the loss is {loss.item()} and the norm of the gradients {norm.item()}; {layer}. No weight "
        "has changed in this step: go on from the last saved state with a lower rate"
    )
