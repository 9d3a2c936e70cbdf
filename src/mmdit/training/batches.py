"""Batches: which samples, in which order, with which noise and times; all of it a function of the seed and the step.

Nothing here has a state, so that a run that goes on from a checkpoint draws what it would have drawn, and several
processes draw their shares of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmdit.training.config import Timesteps, TrainingConfig
from samplers import training as flow


class Sample(NamedTuple):
    """A picture and its caption, encoded."""

    mean: Tensor  # of the latent's distribution, in model space, [c, h, w]
    std: Tensor | None  # None: the latent is the mean
    context: Tensor  # [n, context_dim]
    pooled: Tensor  # [pooled_dim]
    hint: Tensor | None = None  # latents of the hint, or the mean of their distribution, [c, h, w]
    hint_std: Tensor | None = None  # None: the hint is the mean


@runtime_checkable
class Samples(Protocol):
    """Encoded training data."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """The shape of each latent; samples of one shape can share a batch."""

    @property
    def empty(self) -> tuple[Tensor, Tensor]:
        """Context [n, context_dim] and pooled vector [pooled_dim] of the empty caption."""

    def read(self, index: int) -> Sample:
        """One sample."""


@dataclass(frozen=True)
class InMemory:
    """Samples in memory."""

    samples: Sequence[Sample]
    empty: tuple[Tensor, Tensor]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each latent."""
        return [tuple(one.mean.shape) for one in self.samples]

    def read(self, index: int) -> Sample:
        """One sample."""
        return self.samples[index]


class Batch(NamedTuple):
    """The inputs of one forward pass, and what its output is compared with."""

    x0: Tensor  # latents in model space, [b, c, h, w]
    noise: Tensor  # [b, c, h, w]
    t: Tensor  # times in [0, 1], [b]
    context: Tensor  # [b, n, context_dim]
    pooled: Tensor  # [b, pooled_dim]
    hint: Tensor | None = None  # [b, c, h, w]


class Draws(NamedTuple):
    """The random numbers of one pass, for the batch of all processes together."""

    t: Tensor  # [b]
    noise: Tensor  # [b, c, h, w]
    latent: Tensor  # noise of the latents' own distribution, [b, c, h, w]
    dropped: Tensor  # captions that are replaced by the empty one, bool [b]
    hint: Tensor  # noise of the hints' own distribution, [b, c, h, w]


def order(shapes: Sequence[tuple[int, ...]], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch: samples of one shape each, shuffled; the last batch of a shape is filled up from it."""
    generator = generator_of(seed, "order", epoch)
    batches = []
    for shape in sorted(set(shapes)):
        members = [i for i, one in enumerate(shapes) if one == shape]
        shuffled = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        count = -(-len(shuffled) // size) * size
        filled = (shuffled * -(-count // len(shuffled)))[:count]
        batches += [filled[i : i + size] for i in range(0, count, size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def members_at(shapes: Sequence[tuple[int, ...]], size: int, seed: int, place: int) -> list[int]:
    """The samples of the pass number `place`, counted from 0 over all epochs."""
    length = sum(-(-list(shapes).count(shape) // size) for shape in set(shapes))
    return order(shapes, size, seed, place // length)[place % length]


def draw(config: TrainingConfig, shift: float, shape: Sequence[int], place: int) -> Draws:
    """The random numbers of the pass number `place`, float32 on the CPU.

    Args:
        config: the density of the times, the share of dropped captions and the seed.
        shift: the shift of the times towards noise.
        shape: of the latents, [b, c, h, w].
        place: the number of the pass.
    """
    generator = generator_of(config.seed, "draw", place)
    t = flow.shifted(_TIMES[config.timesteps](config, shape[0], generator), shift)
    noise = torch.randn(tuple(shape), generator=generator)
    latent = torch.randn(tuple(shape), generator=generator)
    dropped = torch.rand(shape[0], generator=generator) < config.caption_dropout
    return Draws(t, noise, latent, dropped, torch.randn(tuple(shape), generator=generator))


def batch_at(
    samples: Samples,
    config: TrainingConfig,
    shift: float,
    place: int,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """The share of process `rank` of the batch of the pass number `place`; latents and noise have `dtype`.

    Raises:
        ValueError: there are no samples, one has other shapes than `Sample` says, or only some have hints.
    """
    if not samples.shapes:
        raise ValueError("there are no samples to train on: samples.shapes is empty")
    size = config.batch_size * world
    members = members_at(samples.shapes, size, config.seed, place)
    draws = draw(config, shift, (size, *samples.shapes[members[0]]), place)
    share = slice(rank * config.batch_size, (rank + 1) * config.batch_size)
    read = [_checked(i, samples.read(i), samples.shapes[i]) for i in members[share]]
    t, noise, latent, dropped, drawn = (part[share] for part in draws)
    x0 = [_latent(one, latent[i], config) for i, one in enumerate(read)]
    texts = [samples.empty if dropped[i] else (one.context, one.pooled) for i, one in enumerate(read)]
    hints = [_sampled(one.hint, one.hint_std, drawn[i]) for i, one in enumerate(read) if one.hint is not None]
    if 0 < len(hints) < len(read):
        raise ValueError(
            f"{len(read) - len(hints)} of {len(read)} samples of a batch have no hint: give all one, or none"
        )

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)).to(device, dtype)

    return Batch(
        stacked(x0),
        noise.to(device, dtype),
        t.to(device, torch.promote_types(dtype, torch.float32)),
        stacked([context for context, _ in texts]),
        stacked([pooled for _, pooled in texts]),
        stacked(hints) if hints else None,
    )


def _checked(index: int, sample: Sample, shape: tuple[int, ...]) -> Sample:
    """The sample, whose shapes would else broadcast against those of the noise."""
    hint, hint_std = sample.hint, sample.hint_std
    found: list[tuple[str, Tensor | None, bool]] = [
        ("mean, [c, h, w],", sample.mean, len(shape) == 3 and sample.mean.shape == shape),
        ("std, [c, h, w],", sample.std, sample.std is None or sample.std.shape == shape),
        ("context, [n, context_dim],", sample.context, sample.context.ndim == 2),
        ("pooled, [pooled_dim],", sample.pooled, sample.pooled.ndim == 1),
        ("hint, [c, h, w],", hint, hint is None or (hint.ndim == 3 and hint.shape[1:] == shape[1:])),
        ("hint_std, [c, h, w],", hint_std, hint_std is None or (hint is not None and hint_std.shape == hint.shape)),
    ]
    for name, given, fits in found:
        if given is not None and not fits:
            raise ValueError(
                f"sample {index}: {name} has shape {list(given.shape)}, and samples.shapes says {list(shape)} for its "
                "latent; a sample has no batch dimension"
            )
    return sample


def _latent(sample: Sample, noise: Tensor, config: TrainingConfig) -> Tensor:
    return _sampled(sample.mean, None if config.latents == "mode" else sample.std, noise)


def _sampled(mean: Tensor, std: Tensor | None, noise: Tensor) -> Tensor:
    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    return mean if std is None else mean + std.to(mean.dtype) * noise


def generator_of(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator on the CPU for one purpose of one epoch or pass; other seeds and numbers give unrelated ones."""
    digest = sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


_TIMES: Final[dict[Timesteps, Callable[[TrainingConfig, int, torch.Generator], Tensor]]] = {
    "logit_normal": lambda config, n, g: flow.logit_normal(n, config.logit_mean, config.logit_std, g),
    "mode": lambda config, n, g: flow.mode(n, config.mode_scale, g),
    "cosmap": lambda config, n, g: flow.cosmap(n, g),
    "uniform": lambda config, n, g: flow.uniform(n, g),
}
