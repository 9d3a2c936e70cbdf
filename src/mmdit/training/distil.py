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
from functools import partial
from statistics import median
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.failures import nonfinite_layers
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.seeds import generators
from mmdit.runtime.hooks import Hook, hooks, repeating
from mmdit.training.recording import RecordedGradients, eager_gradients

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


class States(NamedTuple):
    """Latents of drawings at each of their steps, with the prompts.

    Attributes:
        x: [prompts, steps, c, h, w], before each step.
        sigma: [steps].
        weight: [steps], how far each step goes, relative to their mean: its error counts so much in the picture.
        context, pooled: of the prompts, [prompts, n, k] and [prompts, p].
        no_context, no_pooled: of the negative prompt, [1, n, k] and [1, p].
        guidance: the scale of the guidance that they were drawn with.
        velocities: of the teacher with the prompt and without it, [2, prompts, steps, c, h, w]; see `with_velocities`.
        channels: [c, c], by which errors are multiplied before they are squared; see `picture_channels`. None leaves
            them as they are.
        chance: [steps], how often `draw` takes each step along a drawing, relative to each other; None is alike.
    """

    x: Tensor
    sigma: Tensor
    weight: Tensor
    context: Tensor
    pooled: Tensor
    no_context: Tensor
    no_pooled: Tensor
    guidance: float
    velocities: Tensor | None = None
    channels: Tensor | None = None
    chance: Tensor | None = None

    def draw(self, size: int, generator: torch.Generator, along: int = 1, shares: Tensor | None = None) -> StateBatch:
        """Random prompts, each at `along` random steps, none of them twice; the generator is on the latents' device.

        Args:
            size: of the batch.
            generator: of prompts and steps.
            along: states of each drawing. Above 1, steps are drawn by their chances, and the batch says how often.
            shares: see `shares`, which depend on `along` alone; None computes them.

        Raises:
            ValueError: `along` does not divide `size`, or is above the number of steps.
        """
        (prompts, steps), device = self.x.shape[:2], self.x.device
        if not 1 <= along <= steps or size % along:
            raise ValueError(
                f"along={along}: expected a divisor of the batch, {size}, up to the {steps} steps of a drawing"
            )
        which = torch.randint(prompts, (size // along,), generator=generator, device=device).repeat_interleave(along)
        if along == 1:
            step = torch.randint(steps, (size,), generator=generator, device=device)
            return self._batch(which, step)
        step = _steps_along(self.chance, steps, size // along, along, generator, device).flatten()
        shares = self.shares(along) if shares is None else shares
        return self._batch(which, step)._replace(share=None if shares is None else shares[step])

    def shares(self, along: int) -> Tensor | None:
        """How often each step is drawn with these chances, relative to equal ones, [steps]; None without chances.

        Estimated from 4096 sets of steps, the same ones each time.
        """
        if self.chance is None or along == 1:
            return None
        steps, device = self.x.shape[1], self.x.device
        taken = _steps_along(self.chance, steps, 4096, along, torch.Generator(device).manual_seed(0), device)
        drawn = (taken.unsqueeze(-1) == torch.arange(steps, device=device)).sum((0, 1)).clamp(min=1)
        return drawn * steps / (4096 * along)

    def _batch(self, which: Tensor, step: Tensor) -> StateBatch:
        text = self.context[which], self.pooled[which]
        nothing = self.no_context.expand(len(which), -1, -1), self.no_pooled.expand(len(which), -1)
        wanted = None if self.velocities is None else self.velocities[:, which, step].float()
        x = self.x[which, step].float()
        return StateBatch(x, 1000 * self.sigma[step], self.weight[step], *text, *nothing, wanted)

    @torch.no_grad()
    def with_velocities(self, teacher: nn.Module, batch: int = 256) -> Self:
        """The same states with the teacher's velocities, so that training does not compute them again in each step."""
        parts = [torch.stack(guided(teacher, part, self.guidance)[:2]) for part in self.parts(batch)]
        return self._replace(velocities=torch.cat(parts, dim=1).unflatten(1, self.x.shape[:2]))

    def parts(self, batch: int, prompts: int | None = None) -> Iterator[StateBatch]:
        """Every state of the first `prompts` drawings (None: of all) in their order, so many at a time."""
        sizes = (len(self.x[:prompts]), self.x.shape[1])
        places = torch.cartesian_prod(*(torch.arange(n, device=self.x.device) for n in sizes))
        return (self._batch(*part.T) for part in places.split(batch))

    @torch.no_grad()
    def with_growth(self, teacher: nn.Module, rounded: nn.Module, prompts: int) -> Self:
        """The same states: errors of each step count, and are drawn, as much as they change the end of a drawing.

        An error grows where a drawing settles what goes where, and shrinks where later steps denoise it: white noise
        that is added to drawings of the embedded model becomes 2.5 times as large after the first step, and 0.3 times
        after the half. Here it is a rounded model's own error: the first drawings are drawn to their ends by Euler's
        steps of the teacher, with and without it in one step. Where it makes no error, it counts as not growing.

        Args:
            teacher: whose drawings they are.
            rounded: a model whose errors are typical.
            prompts: the number of drawings, of whose growths the median is taken.
        """
        sigma = torch.cat([self.sigma, self.sigma.new_zeros(1)])
        text = self.context[:prompts], self.pooled[:prompts]
        count = len(text[0])
        nothing = self.no_context.expand(count, -1, -1), self.no_pooled.expand(count, -1)

        def after(model: nn.Module, x: Tensor, i: int) -> Tensor:
            batch = StateBatch(x, 1000 * sigma[i].expand(count), self.weight[i].expand(count), *text, *nothing)
            return x + (sigma[i + 1] - sigma[i]) * guided(model, batch, self.guidance)[2]

        def change(error: Tensor) -> Tensor:
            mixed = error if self.channels is None else _mixed(error, self.channels)
            return mixed.square().mean((1, 2, 3)).sqrt()

        path, growths, changes = [self.x[:prompts, 0].float()], list[Tensor](), list[Tensor]()
        for i in range(len(self.sigma)):
            path.append(after(teacher, path[i], i))
        for i in range(len(self.sigma)):
            moved = after(rounded, path[i], i)
            error = change(moved - path[i + 1])
            for later in range(i + 1, len(self.sigma)):
                moved = after(teacher, moved, later)
            changes_of = change(moved - path[-1])
            changes.append(changes_of.median())
            growth = changes_of / error.clamp(min=1e-30)
            growths.append(torch.where(error > 0, growth, torch.ones_like(growth)).median())
        weight, chance = self.weight * torch.stack(growths), torch.stack(changes)
        return self._replace(weight=weight / weight.mean(), chance=chance / chance.mean())

    def ends(self, prompts: int) -> Tensor:
        """The latents in which the first drawings end, by a step of Euler's from their last states: [b, c, h, w].

        Raises:
            ValueError: the states lack the teacher's velocities, see `with_velocities`.
        """
        if self.velocities is None:
            raise ValueError("the ends of drawings are known by the teacher's velocities: call with_velocities first")
        with_prompt, without = self.velocities[:, :prompts, -1].float()
        *_, both = _three(with_prompt, without, self.guidance)
        return self.x[:prompts, -1].float() - self.sigma[-1] * both

    def to(self, device: torch.device | str) -> Self:
        """The same states on a device."""
        parts: dict[str, Any] = {key: part.to(device) for key, part in self._asdict().items() if hasattr(part, "to")}
        return self._replace(**parts)


def _steps_along(
    chance: Tensor | None, steps: int, count: int, along: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """`count` sets of `along` different steps, [count, along] (Efraimidis and Spirakis 2006: the largest u^(1/p))."""
    keys = torch.rand(count, steps, generator=generator, device=device)
    if chance is None:
        return keys.argsort(1)[:, :along]
    return (keys.log() / chance).argsort(1, descending=True)[:, :along]


class StateBatch(NamedTuple):
    """Latents [b, c, h, w] with a timestep, a weight, a prompt and a negative prompt each.

    `velocities` are the teacher's with the prompt and without it, [2, b, c, h, w], or None. `share` [b] is how often
    the step of each state is drawn, relative to equal chances; None is equal chances.
    """

    x: Tensor
    timestep: Tensor
    weight: Tensor
    context: Tensor
    pooled: Tensor
    no_context: Tensor
    no_pooled: Tensor
    velocities: Tensor | None = None
    share: Tensor | None = None


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
    return _three(with_prompt, without, guidance)


def _three(with_prompt: Tensor, without: Tensor, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    return with_prompt, without, without + guidance * (with_prompt - without)


@torch.no_grad()
def wanted_of(teacher: nn.Module, batch: StateBatch, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `guided` gives for the teacher, from the batch where it has the velocities."""
    if batch.velocities is None:
        return guided(teacher, batch, guidance)
    return _three(batch.velocities[0], batch.velocities[1], guidance)


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
    *single, both = (error if channels is None else _mixed(error, channels) for error in errors)
    each = torch.stack([error.square() for error in single]).sum(0)
    if along == 1:
        return (batch.weight * (each + both.square()).mean((1, 2, 3))).mean()
    once, squared = batch.weight, batch.weight  # what a weight becomes whose term has it once, and squared
    if batch.share is not None:
        once, squared = batch.weight / batch.share, batch.weight / batch.share.sqrt()
    steps = (both * squared.view(-1, 1, 1, 1)).unflatten(0, (-1, along))
    of_each: Tensor = (once * each.mean((1, 2, 3))).mean()
    return of_each + along * steps.mean(1).square().mean()


def _mixed(error: Tensor, channels: Tensor) -> Tensor:
    """The matrix times the channels of [b, c, h, w], in float32 also under autocast."""
    with torch.autocast(error.device.type, enabled=False):
        return torch.einsum("ij,bjhw->bihw", channels, error)


@torch.no_grad()
def picture_channels(
    decode: Callable[[Tensor], Tensor], latents: Tensor, *, floor: float = 0.1, size: float = 0.05, seed: int = 0
) -> Tensor:
    """How much an error of each channel of latents changes the picture, as a matrix [c, c] for `States.channels`.

    The mean square of an error times this matrix is, up to a factor and for small errors that are independent from cell
    to cell, the mean square of the change of the picture. The picture of a VAE may follow a few channels alone: for
    the embedded model two directions of 16 make 80 % of the change that noise of one size in all channels makes.

    Args:
        decode: latents [b, c, h, w] -> pictures.
        latents: a few that are typical.
        floor: the share that all channels have alike, from 0 to 1: the next steps read every channel.
        size: of the noise that is added to one channel after the other, relative to the spread of all latents.
        seed: of the noise.

    Returns:
        float32, symmetric; the squares of its entries add up to c.

    Raises:
        ValueError: the floor is outside of 0 to 1, or no channel changes the picture.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is a share from 0 to 1, got {floor}")
    count = latents.shape[1]
    generator = torch.Generator(latents.device).manual_seed(seed)
    noise = torch.randn(latents[:, :1].shape, generator=generator, device=latents.device, dtype=latents.dtype)
    base, step = decode(latents).float(), size * latents.std()
    changes = []
    for channel in range(count):
        moved = latents.clone()
        moved[:, channel : channel + 1] += step * noise
        changes.append((decode(moved).float() - base).flatten())
    counts = torch.stack([torch.stack([one @ other for other in changes]) for one in changes]).double()
    if not float(counts.trace()) > 0:
        raise ValueError("the picture changes with no channel of the latents, or is not finite")
    counts = (1 - floor) * counts * (count / counts.trace()) + floor * torch.eye(count, device=counts.device)
    values, vectors = torch.linalg.eigh(counts)
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()


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
        RecordedError: a recorded step gives another loss or other gradients than an eager one of the same batch, which
            is compared in steps 1, 2, 4, 8 and so on.
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
        batch = draw(generator)
        if recorded and step == 0:
            gradients = RecordedGradients(loss_of, batch, trained)
        loss = gradients(batch)
        compared = recorded and (step + 1).bit_count() == 1
        apart = _check_recorded(step, loss, loss_of, trained, batch, eps=eps) if compared else None
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
    which that rounding changes by 6 %. Where a bound is exceeded, an eager pass of latents that are changed by a
    rounding therefore tells how far roundings lead, and twice that is no error.

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
        nudged, others = pass_of(_nudged(batch, eps))
        _, grads = pass_of(batch)
        spread, loss_spread = _apart(others, grads), abs(nudged - again)
        other = apart > max(0.5, 2 * spread) or (apart > 0.5 and not 1 / 3 < ratio < 3)
        if other or off > max(0.05 * abs(again), 2 * loss_spread):
            raise RecordedError(
                f"step {step}: the recorded graph gives the loss {float(loss):.4g} and an eager pass {again:.4g}; "
                f"their gradients differ by {apart:.2g} of the norm, by {spread:.2g} where latents are rounded, and "
                f"are {ratio:.2g} times as large: train with recorded=False, or without compiled blocks"
            )
    return apart


def _nudged(batch: StateBatch, eps: float) -> StateBatch:
    """The batch with every second value of the latents larger by a rounding."""
    up = torch.arange(batch.x.numel(), device=batch.x.device).view_as(batch.x) % 2
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
