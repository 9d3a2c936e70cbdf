"""Errors of the fast forward and of the plain one against float64, at full depth: `mmdit bench errors`.

Weights are random, rounded to the dtype of the models. The exact forward has the same weights and computes in float64;
it widens one block at a time, so that it needs little memory. The model is drawn with Euler's method and guidance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.bench.random_models import MODELS, check_names, check_size, fill, quantized, recipe_of
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.plain_kernels import spread
from mmdit.runtime.rows import Rows
from mmdit.utils import markdown_table
from samplers import sigmas

LIMIT = 1.1  # of the plain forward's error
GUIDANCE = 4.5
Velocity = Callable[[Tensor, float], Tensor]  # (latents, timestep) -> velocity; both branches of the guidance


class Pair(NamedTuple):
    """Relative errors of the plain and of the fast forward."""

    plain: float
    fast: float

    @property
    def ratio(self) -> float:
        """The fast forward's error in units of the plain one's."""
        return self.fast / self.plain


@dataclass(frozen=True)
class Errors:
    """The errors of one dtype or recipe."""

    name: str
    blocks: tuple[Pair, ...]  # of what each block adds to both streams, from exact inputs
    velocity: Pair  # of one pass through the whole model
    latent: Pair  # after all steps

    @property
    def worst(self) -> float:
        """The largest ratio."""
        return max(one.ratio for one in (*self.blocks, self.velocity, self.latent))


class _Inputs(NamedTuple):
    """The text of both branches, [2, n, k] and [2, p], and the noise to start from, [1, c, h, w]."""

    context: Tensor
    pooled: Tensor
    noise: Tensor


@torch.no_grad()
def errors(
    model: str = "large",
    recipes: Sequence[str] = ("fp8", "fp8-static"),
    *,
    size: int | None = 512,
    text: int = 333,
    steps: int = 8,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Errors]:
    """Measure the errors in 16 bits and with each recipe.

    Args:
        model: one of `MODELS`.
        recipes: names as in `mmdit.bench.step.bench`.
        size: side of the picture in pixels; None is the model's default.
        text: number of text tokens.
        steps: Euler steps of a drawing.
        device, dtype: the device and dtype of the models.

    Raises:
        ValueError: an unknown name.
    """
    check_names((model,), MODELS)
    for name in recipes:
        recipe_of(name)
    config, cells = MODELS[model], check_size(model, size) // 8
    with torch.device("meta"):
        made = MMDiT(config)
    fill(made.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    inputs = _Inputs(
        draw(2, text, config.context_dim), draw(2, config.pooled_dim), draw(1, config.in_channels, cells, cells)
    )
    exact = _Exact(made, inputs)
    latent = _drawn(exact, inputs.noise.double(), steps)
    kept: list[tuple[Tensor, Tensor]] = []
    velocity = exact(inputs.noise.double().expand(2, -1, -1, -1), 500.0, kept)
    for recipe in (None, *recipes):
        rounded = made
        if recipe is not None:
            rounded = copy.deepcopy(made)
            quantized(rounded, recipe)
        name = recipe or str(dtype).removeprefix("torch.")
        yield _errors_of(name, made, rounded, inputs, (velocity, latent), kept, steps)
        del rounded


def table(found: Sequence[Errors]) -> str:
    """Errors beside float64, and their ratios."""
    rows = []
    for one in found:
        ratios = [block.ratio for block in one.blocks]
        worst = max(range(len(ratios)), key=ratios.__getitem__)
        pairs = [cell for pair in (one.velocity, one.latent) for cell in _cells(pair)]
        rows.append((one.name, f"{ratios[worst]:.3f} ({worst})", f"{median(ratios):.3f}", *pairs))
    return "\n".join(markdown_table(_TITLES, rows))


_TITLES = (
    *("", "worst block", "median block", "velocity, plain", "fast", "ratio"),
    *("final latent, plain", "fast", "ratio"),
)


def _cells(pair: Pair) -> tuple[str, str, str]:
    return f"{pair.plain:.2e}", f"{pair.fast:.2e}", f"{pair.ratio:.3f}"


class _Exact:
    """The model's forward in float64, from its weights as they are; one module is widened at a time."""

    def __init__(self, model: MMDiT, inputs: _Inputs) -> None:
        self.model, self.inputs = model, inputs

    def __call__(self, latents: Tensor, timestep: float, kept: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """The velocity; `kept` gets what each block reads, in the model's dtype."""
        model, sides = self.model, latents.shape[2:]
        c = self.conditioning(timestep)
        x = _wide(model.x_embedder)(latents) + model.cropped_pos_embed(*sides).double()
        context = _wide(model.context_embedder)(self.inputs.context.double())
        for block in model.joint_blocks:
            if kept is not None:
                kept.append((context.to(model.pos_embed.dtype), x.to(model.pos_embed.dtype)))
            context, x = _wide(block)(context, x, c)
        return model.unpatchify(_wide(model.final_layer)(x, c), *sides)

    def conditioning(self, timestep: float) -> Tensor:
        """The conditioning vector of both branches."""
        pooled = self.inputs.pooled.double()
        level = torch.full((len(pooled),), timestep, dtype=torch.float32, device=pooled.device)
        return _wide(self.model.t_embedder)(level) + _wide(self.model.y_embedder)(pooled)


def _wide(module: nn.Module) -> Any:
    return copy.deepcopy(module).double()


def _drawn(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """The latent after guided Euler steps on the schedule `normal`, in the dtype of the noise."""
    levels = sigmas("normal", steps, shift=3.0).tolist()
    x = noise
    for level, following in pairwise(levels):
        cond, uncond = velocity(x.expand(2, -1, -1, -1), 1000 * level).to(x.dtype)
        x = x + (following - level) * (uncond + GUIDANCE * (cond - uncond))
    return x


def _errors_of(
    name: str,
    made: MMDiT,
    rounded: MMDiT,
    inputs: _Inputs,
    wanted: tuple[Tensor, Tensor],
    kept: Sequence[tuple[Tensor, Tensor]],
    steps: int,
) -> Errors:
    """The errors of the rounded model's two forwards.

    Args:
        name: the dtype or recipe.
        made, rounded: the model before and after its weights are quantized.
        inputs: the text and the noise.
        wanted: the exact velocity and the exact final latent.
        kept: what each block reads.
        steps: Euler steps of a drawing.
    """
    fast = Accelerated(rounded)
    fast.begin()

    def plainly(latents: Tensor, timestep: float) -> Tensor:
        level = torch.full((2,), timestep, dtype=torch.float32, device=latents.device)
        return rounded(latents.to(inputs.context.dtype), level, inputs.context, inputs.pooled)

    def quickly(latents: Tensor, timestep: float) -> Tensor:
        return fast.velocity(latents, timestep, [inputs.context], [inputs.pooled])

    velocity, latent = wanted
    noise, start = inputs.noise.expand(2, -1, -1, -1), inputs.noise.float()
    found = Errors(
        name,
        tuple(_of_block(i, made, rounded, fast, inputs, read) for i, read in enumerate(kept)),
        Pair(*(_error(one(noise, 500.0), velocity) for one in (plainly, quickly))),
        Pair(*(_error(_drawn(one, start, steps), latent) for one in (plainly, quickly))),
    )
    fast.close()
    return found


def _of_block(
    i: int, made: MMDiT, rounded: MMDiT, fast: Accelerated, inputs: _Inputs, read: tuple[Tensor, Tensor]
) -> Pair:
    """The errors of what a block adds to what it read."""
    context, x = read
    level = torch.full((2,), 500.0, dtype=torch.float32, device=x.device)
    exact = _wide(made.joint_blocks[i])(context.double(), x.double(), _Exact(made, inputs).conditioning(500.0))
    plain = rounded.joint_blocks[i](context, x, rounded.t_embedder(level) + rounded.y_embedder(inputs.pooled))
    quick = _by_fast_block(i, fast, inputs, context, x)
    before = [one.double().flatten(0, 1) for one in read]
    wanted, *found = (_added(streams, before) for streams in (exact, plain, quick))
    return Pair(*(_error(one, wanted) for one in found))


def _by_fast_block(
    i: int, fast: Accelerated, inputs: _Inputs, context: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Both streams after a block of the fast forward, rounded as the residual stream is, [rows, d] each."""
    forward = fast.fast
    rows = Rows(len(x), context.shape[1], x.shape[1])
    stream = torch.cat([context.flatten(0, 1), x.flatten(0, 1)])
    vectors = forward.table(torch.tensor([500.0], device=x.device), inputs.pooled)[0]
    left, stream, updates = forward.blocks[i](stream, rows, vectors, [], forward.kernels, forward.attention)
    wide = stream.float()
    for update in updates:
        wide = wide + spread(vectors, update.gate, left).float() * update.value.float()
    after = wide.to(stream.dtype)
    return (after[: left.split] if left.text else None), after[left.split :]


def _added(streams: tuple[Tensor | None, Tensor], before: Sequence[Tensor]) -> Tensor:
    """What was added to both streams, or to those that are left, as one vector."""
    parts = [
        after.double().reshape(old.shape) - old for after, old in zip(streams, before, strict=True) if after is not None
    ]
    return torch.cat([part.flatten() for part in parts])


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
