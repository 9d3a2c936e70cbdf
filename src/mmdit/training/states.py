"""The states that a distillation learns from: the latents of drawings, and how much an error in each of them counts.

`states_of` draws prompts by the teacher. An error counts as much as the VAE's decoder shows it (`picture_channels`)
and as much as it grows until the end of a drawing (`States.with_growth`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.seeds import generators


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
        some = self._replace(context=self.context[:prompts], pooled=self.pooled[:prompts])

        def change(error: Tensor) -> Tensor:
            weighed = error if self.channels is None else mix_channels(error, self.channels)
            return weighed.square().mean((1, 2, 3)).sqrt()

        path, growths, changes = [self.x[:prompts, 0].float()], list[Tensor](), list[Tensor]()
        for i in range(len(self.sigma)):
            path.append(some.after(teacher, path[i], i))
        for i in range(len(self.sigma)):
            moved = some.after(rounded, path[i], i)
            error = change(moved - path[i + 1])
            for later in range(i + 1, len(self.sigma)):
                moved = some.after(teacher, moved, later)
            changes_of = change(moved - path[-1])
            changes.append(changes_of.median())
            growth = changes_of / error.clamp(min=1e-30)
            growths.append(torch.where(error > 0, growth, torch.ones_like(growth)).median())
        weight, chance = self.weight * torch.stack(growths), torch.stack(changes)
        return self._replace(weight=weight / weight.mean(), chance=chance / chance.mean())

    @torch.no_grad()
    def after(self, model: nn.Module, x: Tensor, i: int) -> Tensor:
        """Latents of every prompt, [prompts, c, h, w], after step i of a model, which is Euler's."""
        count, sigma = len(self.context), torch.cat([self.sigma, self.sigma.new_zeros(1)])
        nothing = self.no_context.expand(count, -1, -1), self.no_pooled.expand(count, -1)
        at = (1000 * sigma[i].expand(count), self.weight[i].expand(count))
        batch = StateBatch(x, *at, self.context, self.pooled, *nothing)
        return x + (sigma[i + 1] - sigma[i]) * guided(model, batch, self.guidance)[2]

    def drawn(self, model: nn.Module) -> Tensor:
        """The latents in which a model's own drawings of the prompts end, from the same noise: [prompts, c, h, w]."""
        x = self.x[:, 0].float()
        for i in range(len(self.sigma)):
            x = self.after(model, x, i)
        return x

    def split(self, prompts: int) -> tuple[States, States]:
        """The states of the first drawings, and those of the last `prompts`.

        Raises:
            ValueError: one of the two would have no drawings.
        """
        count = len(self.x)
        if not 0 < prompts < count:
            raise ValueError(f"a split of {count} drawings needs 1 to {count - 1} in its second part, got {prompts}")

        def part(of: slice) -> States:
            velocities = None if self.velocities is None else self.velocities[:, of]
            return self._replace(x=self.x[of], context=self.context[of], pooled=self.pooled[of], velocities=velocities)

        return part(slice(None, count - prompts)), part(slice(count - prompts, None))

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


def mix_channels(error: Tensor, channels: Tensor) -> Tensor:
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
