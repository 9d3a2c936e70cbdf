"""Taps: pass every stage of a run through a function that may keep, measure or replace the value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.checkpoints.components import Component
from mmdit.runtime.hooks import Hook, hooks

# (name of the stage, its value with the batch first) -> what the pipeline goes on with
Tap = Callable[[str, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]
Argument = int | str  # an argument of a module's call, by position or keyword


class Job(NamedTuple):
    """The picture that both pipelines draw."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    sampler: str | None  # the sampler of our pipelines; None is that of each profile
    height: int
    width: int
    looked: frozenset[int]  # steps whose blocks are looked into


class Modules(NamedTuple):
    """The modules of a pipeline that are tapped, under the names of the official files on both sides."""

    encoders: Mapping[Component, nn.Module]
    transformer: nn.Module
    latent: Argument  # the argument of the transformer's call, as are the three that follow
    timestep: Argument
    context: Argument
    pooled: Argument
    embedders: Mapping[str, nn.Module]
    blocks: nn.ModuleList  # each gives (context or None, x)
    x: Argument  # the argument of a block's call
    vector: Argument  # likewise: the embedded timestep + pooled text
    final: nn.Module
    decoder: nn.Module
    decoder_parts: Mapping[str, nn.Module]


@dataclass
class Run:
    """The progress of a run, from which the names of stages are made."""

    tap: Tap
    job: Job
    prompt: str = ""  # "prompt" or "negative", while it is encoded
    step: int = 0
    tokens: dict[Component, int] = field(default_factory=dict)  # in a row that an encoder reads of this prompt
    branches: dict[str, Tensor] = field(default_factory=dict)  # the contexts of "uncond" and "cond"
    batch: list[str] = field(default_factory=list)  # which branch each row of the transformer's batch is

    def named(self, name: str) -> Change:
        """Return a function that passes a value through the tap under this name."""
        return lambda value: self.tap(name, value)

    def of_text(self, name: str) -> Change:
        """Tap under the name and the prompt that is being encoded."""
        return lambda value: self.tap(f"{self.prompt} {name}", value)

    def in_step(self, name: str) -> Change:
        """Tap under the name and the step, if this step is looked into."""
        return lambda value: self.tap(f"step {self.step} {name}", value) if self.step in self.job.looked else value

    def ids(self, encoder: Component) -> Change:
        """Tap the token ids of an encoder, and record their number."""

        def change(ids: Tensor) -> Tensor:
            ids = self.tap(f"{self.prompt} {encoder} tokens", ids)
            self.tokens[encoder] = ids.shape[1]
            return ids

        return change

    def contexts(self, context: Tensor) -> Tensor:
        """Tap the context that the transformer gets, and record the branch of each row."""
        context = self.in_step("input context")(context)
        known = [(branch, of_prompt[0].to(context)) for branch, of_prompt in self.branches.items()]
        self.batch = [next((branch for branch, one in known if torch.equal(one, row)), "other") for row in context]
        return context

    def velocity(self, value: Tensor) -> Tensor:
        """Tap the transformer's output of every step, each branch by itself."""
        branches = zip(self.batch, value.split(1), strict=True)
        return torch.cat([self.tap(f"step {self.step} velocity {branch}", row) for branch, row in branches])


@contextmanager
def tapped(modules: Modules, run: Run) -> Iterator[None]:
    """Within the context, pass the stages of all calls through the run's tap; all hooks are removed at the end."""
    with hooks(_hooks(modules, run)):
        yield


@contextmanager
def restored_attributes(owner: object) -> Iterator[None]:
    """Restore the attributes of an object at the end: those that were set inside vanish or get their old value back."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        for name in vars(owner).keys() - before.keys():
            delattr(owner, name)
        for name, value in before.items():
            if vars(owner).get(name, owner) is not value:  # no attribute of an object is the object itself
                setattr(owner, name, value)


def _hooks(modules: Modules, run: Run) -> Iterator[Hook]:
    for name, encoder in modules.encoders.items():
        yield from _encoder_hooks(name, encoder, run)
    yield _before(modules.transformer, modules.timestep, run.named("timesteps"))
    yield _before(modules.transformer, modules.latent, run.in_step("input latent"))
    yield _before(modules.transformer, modules.context, run.contexts)
    yield _before(modules.transformer, modules.pooled, run.in_step("input pooled"))
    for what, module in modules.embedders.items():
        yield _after(module, run.in_step(what))
    yield _before(modules.blocks[0], modules.x, run.in_step("patches + position"))
    yield _before(modules.blocks[0], modules.vector, run.in_step("timestep + pooled"))
    for i, block in enumerate(modules.blocks):
        yield _after(block, run.in_step(f"block {i} context"), run.in_step(f"block {i} x"))
    yield _after(modules.final, run.in_step("final_layer"))
    yield _after(modules.transformer, run.velocity)
    yield _before(modules.decoder, 0, run.named("vae latent"))
    for what, module in modules.decoder_parts.items():
        yield _after(module, run.named(f"vae {what}"))


def _encoder_hooks(name: Component, encoder: nn.Module, run: Run) -> Iterator[Hook]:
    layers = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))
    yield _before(encoder, 0, run.ids(name))
    yield _before(layers[0], 0, run.of_text(f"{name} embedding"))
    for i, layer in enumerate(layers):
        yield _after(layer, run.of_text(f"{name} layer {i}"))


def _before(module: nn.Module, argument: Argument, change: Change) -> Hook:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(argument, str):
            return args, kwargs | {argument: change(kwargs[argument])}
        return (*args[:argument], change(args[argument]), *args[argument + 1 :]), kwargs

    return Hook(module, "input", hook)


def _after(module: nn.Module, *changes: Change) -> Hook:
    """One change for each of the first tensors of the output; None passes."""

    def hook(_: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> Any:
        if isinstance(output, Tensor):
            return changes[0](output)
        parts = zip(output, changes, strict=False)
        return (*(part if part is None else change(part) for part, change in parts), *output[len(changes) :])

    return Hook(module, "output", hook, first=True)  # before those of transformers, which collect outputs
