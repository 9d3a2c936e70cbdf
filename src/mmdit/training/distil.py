"""Distillation without pictures: a transformer that computes in float8 learns what the one in 16 bits computes.

    states = states_of(pipe, prompts)                   # latents that the teacher meets when it draws the prompts
    student = copy.deepcopy(pipe.transformer)
    quant.training.fake_quantize_(student, "fp8-static", input_scales=scales)
    for found in distil(student, pipe.transformer, states, steps=1000):
        print(found)                                    # the loss, step by step
    quant.training.quantize_trained_(student)           # ends in float8

`distil` compares the guided velocities, which is what a drawing follows. `distil_blocks` trains one block after the
other on the outputs of the teacher's block, so that only one block has gradients and states of an optimizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.seeds import generators
from mmdit.runtime.hooks import Hook, hooks

__all__ = ["Distilled", "States", "distil", "distil_blocks", "guided", "guided_loss", "states_of"]


class States(NamedTuple):
    """Latents of drawings at each of their steps, with the prompts.

    Attributes:
        x: [prompts, steps, c, h, w], before each step.
        sigma: [steps].
        weight: [steps], how far each step goes, relative to their mean: its error counts so much in the picture.
        context, pooled: of the prompts, [prompts, n, k] and [prompts, p].
        no_context, no_pooled: of the negative prompt, [1, n, k] and [1, p].
        guidance: the scale of the guidance that they were drawn with.
    """

    x: Tensor
    sigma: Tensor
    weight: Tensor
    context: Tensor
    pooled: Tensor
    no_context: Tensor
    no_pooled: Tensor
    guidance: float

    def draw(self, size: int, generator: torch.Generator) -> StateBatch:
        """Random prompts, each at a random step; the generator is on the device of the latents."""
        prompts, steps = self.x.shape[:2]
        which = torch.randint(prompts, (size,), generator=generator, device=self.x.device)
        step = torch.randint(steps, (size,), generator=generator, device=self.x.device)
        text = self.context[which], self.pooled[which]
        nothing = self.no_context.expand(size, -1, -1), self.no_pooled.expand(size, -1)
        return StateBatch(self.x[which, step].float(), 1000 * self.sigma[step], self.weight[step], *text, *nothing)

    def to(self, device: torch.device | str) -> Self:
        """The same states on a device."""
        parts: dict[str, Any] = {key: part.to(device) for key, part in self._asdict().items() if key != "guidance"}
        return self._replace(**parts)


class StateBatch(NamedTuple):
    """Latents [b, c, h, w] with a timestep, a weight, a prompt and a negative prompt each."""

    x: Tensor
    timestep: Tensor
    weight: Tensor
    context: Tensor
    pooled: Tensor
    no_context: Tensor
    no_pooled: Tensor


class Distilled(NamedTuple):
    """What a step of distillation tells."""

    step: int  # the number of steps that are done
    share: float  # of the training that is done
    loss: Tensor
    block: int | None  # the block that is trained; None for all at once


@torch.no_grad()
def states_of(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    seed: int = 0,
    batch: int = 16,
) -> States:
    """Draw the prompts, and keep the latent before every step, on the pipeline's device in its dtype.

    Args:
        pipe: the teacher.
        prompts: similar to those that will be drawn.
        num_inference_steps, guidance_scale, max_sequence_length: as they will be drawn; None is the profile's.
        seed: of the first drawing; the others have the seeds that follow it.
        batch: drawings at a time.

    Raises:
        ValueError: there are no prompts.
    """
    if not prompts:
        raise ValueError("distillation needs prompts to draw; got none")
    nothing = pipe.encode([""], max_sequence_length=max_sequence_length)
    guidance = pipe.profile.guidance_scale if guidance_scale is None else guidance_scale
    found, read = list[Tensor](), []
    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        text = pipe.encode(some, max_sequence_length=max_sequence_length)
        drawn_by = generators([seed + first + i for i in range(len(some))], None, len(some))
        noise = pipe.noise(count=len(some), generator=drawn_by)
        given: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance}
        steps = list(pipe.sample(text, nothing.repeat(len(some)) if guidance > 1 else None, noise, **given))
        found.append(torch.stack([noise, *(step.x for step in steps[:-1])], dim=1))
        read.append(text)
    levels = pipe.sigmas(num_inference_steps).to(found[0].device, torch.float32)
    far = levels[:-1] - levels[1:]
    context, pooled = torch.cat([text.context for text in read]), torch.cat([text.pooled for text in read])
    texts = (context, pooled, nothing.context, nothing.pooled)
    return States(torch.cat(found), levels[:-1], far / far.mean(), *texts, guidance)


def guided(model: nn.Module, batch: StateBatch, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """The velocity with the prompt, without it, and the guided one, each [b, c, h, w] in float32; one call."""
    dtype = next(model.parameters()).dtype
    pairs = ((batch.x, batch.x), (batch.context, batch.no_context), (batch.pooled, batch.no_pooled))
    x, context, pooled = (torch.cat(pair).to(dtype) for pair in pairs)
    both = model(x, batch.timestep.repeat(2), context, pooled).float()
    with_prompt, without = both.chunk(2)
    return with_prompt, without, without + guidance * (with_prompt - without)


def guided_loss(
    student: nn.Module, wanted: tuple[Tensor, Tensor, Tensor], batch: StateBatch, guidance: float
) -> Tensor:
    """The weighted mean square of the error of the guided velocity, plus those of the two that it is made of."""
    errors = [(one - other).square() for one, other in zip(guided(student, batch, guidance), wanted, strict=True)]
    return (batch.weight * torch.stack(errors).sum(0).mean((1, 2, 3))).mean()


def distil(
    student: MMDiT,
    teacher: MMDiT,
    states: States,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    rate: float = 4e-5,
    batch: int = 16,
    seed: int = 0,
    done: float = 0.0,
) -> Iterator[Distilled]:
    """Train all parameters of the student that require gradients; the rate falls from `rate` to 0 as a cosine.

    Args:
        student: fake-quantized, see `quant.training.fake_quantize_`.
        teacher: the model that it was copied from.
        states: see `states_of`; on the models' device.
        steps, seconds: where the training ends; at least one is given.
        rate: of Adam. Codes are 6 to 12 % of a weight apart, and Adam moves each weight by about the rate in a step.
        batch: states in a step, each with and without its prompt.
        seed: of the order.
        done: the share that an earlier run has done; the rate goes on from there.

    Yields:
        What each step tells, after it.

    Raises:
        ValueError: neither steps nor seconds are given, one is not above 0, or nothing of the student requires
            gradients.
    """

    def loss(states_drawn: StateBatch) -> Tensor:
        with torch.no_grad():
            wanted = guided(teacher, states_drawn, states.guidance)
        return guided_loss(student, wanted, states_drawn, states.guidance)

    yield from _fitted(
        student.parameters(), lambda g: loss(states.draw(batch, g)), steps, seconds, rate, seed, done=done
    )


def distil_blocks(
    student: MMDiT,
    teacher: MMDiT,
    states: States,
    *,
    steps: int,
    rate: float = 4e-5,
    batch: int = 16,
    seed: int = 0,
) -> Iterator[Distilled]:
    """Train one block after the other, each to give the teacher's outputs for the inputs that the student has there.

    Only the parameters of one block have gradients at a time. Arguments are those of `distil`; `steps` are of a block.
    """
    for i, block in enumerate(student.joint_blocks):
        loss = partial(_block_loss, student, teacher, states, i, batch)
        yield from _fitted(block.parameters(), loss, steps, None, rate, seed + i, block=i)


def _block_loss(
    student: MMDiT, teacher: MMDiT, states: States, i: int, batch: int, generator: torch.Generator
) -> Tensor:
    """The error of a block's outputs for the student's inputs, relative to their variance, summed over both streams."""
    drawn = states.draw(batch, generator)
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
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[torch.Generator], Tensor],
    steps: int | None,
    seconds: float | None,
    rate: float,
    seed: int,
    *,
    done: float = 0.0,
    block: int | None = None,
) -> Iterator[Distilled]:
    if steps is None and seconds is None:
        raise ValueError("distillation needs an end: give steps=, seconds=, or both")
    for name, end in (("steps", steps), ("seconds", seconds)):
        if end is not None and not end > 0:
            raise ValueError(f"distillation needs {name} above 0, got {end}")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing of the student requires gradients: call quant.training.fake_quantize_ on it first")
    generator = torch.Generator(trained[0].device).manual_seed(seed)
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99))
    start, step, share = time.monotonic(), 0, done
    while share < 1:
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * share)) / 2
        loss = loss_of(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        by_time = (time.monotonic() - start) / seconds if seconds else 0.0
        share = done + (1 - done) * min(1.0, max(by_time, step / steps if steps else 0.0))
        yield Distilled(step, share, loss.detach(), block)
