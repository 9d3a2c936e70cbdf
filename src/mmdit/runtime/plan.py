"""A plan that keeps a drawing within a memory budget: what stays on the device, what takes turns, what is streamed.

The planner is a pure function of sizes in bytes. A drawing has stages, one per text encoder, "steps" and "vae", and a
plan says for each of them what is on the device. The means have an order, see `RUNGS`; the planner uses the first ones
that are enough, and as little as possible of the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

RUNGS = (
    "everything stays on the device",
    "text encoders, VAE and ControlNets by turns",
    "T5 streamed block by block",
    "adaLN weights visited once per drawing",
    "blocks of the transformer streamed",
    "VAE in tiles",
)
TURNS, STREAMED_T5, VISITED, STREAMED, TILED = range(1, 6)
SLOTS = 2  # streamed blocks that are on the device at a time: one computes while the next one arrives
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: str | int | float, argument: str = "memory") -> int:
    """Bytes of a budget such as "8GB", "7.5 GiB" or a number of bytes; GB is 1e9 bytes, GiB is 2**30.

    Raises:
        ValueError: it is not a size, or the size is not finite or below one byte.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([kmgt]?i?)b?\s*", str(value), re.IGNORECASE)
    unit = found and _UNITS.get(found[2].lower())
    size = float(found[1]) * unit if found and unit is not None else 0.0
    if isinstance(value, bool) or not 1 <= size < float("inf"):
        raise ValueError(f"{argument} must be a size such as '8GB' or '7.5GiB', got {value!r}")
    return int(size)


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of the weights of one model.

    Args:
        rest: what is on the device whenever the model computes.
        blocks: matrices of each block, which can be streamed, in the order in which the blocks run.
        modulation: adaLN matrices of each block, which are needed only to compute the modulation table.
    """

    rest: int
    blocks: tuple[int, ...] = ()
    modulation: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.rest + sum(self.blocks) + sum(self.modulation)

    def in_steps_of(self, step: int) -> ModelBytes:
        """The same where each part takes a multiple of so many bytes."""

        def rounded(size: int) -> int:
            return -(-size // step) * step

        return ModelBytes(rounded(self.rest), tuple(map(rounded, self.blocks)), tuple(map(rounded, self.modulation)))


@dataclass(frozen=True)
class Activations:
    """Bytes of everything that is not a weight, at the peak of each stage.

    Args:
        text: by text encoder.
        step: a step of the transformer, with the ControlNets that act in it.
        decode: the VAE on whole pictures.
        tiles: the VAE in tiles, by the side of a tile in pixels.
        table: the modulation of all steps, which is kept while they run.
        graph: CUDA graphs of a step, which are kept where the transformer never moves. Where it moves between drawings
            only, each of them records one of its own, whose memory takes the place of a step's activations.
        kept: embeddings and latents.
        reserve: what the process takes of the device beside tensors: its context and the workspaces of libraries.
    """

    text: Mapping[str, int] = field(default_factory=dict)
    step: int = 0
    decode: int = 0
    tiles: Mapping[int, int] = field(default_factory=dict)
    table: int = 0
    graph: int = 0
    kept: int = 0
    reserve: int = 0


@dataclass(frozen=True)
class Stage:
    """What one stage has on the device.

    Attributes:
        name: the component that computes; "steps" is the transformer.
        weights, activations: bytes.
        streamed: blocks of the model that computes which arrive while it computes.
        here: blocks of the transformer that are on the device all the time.
        rest_here: whether the transformer's other weights are on the device.
        tile: side of the VAE's tiles in pixels; None is whole pictures.
    """

    name: str
    weights: int
    activations: int
    streamed: tuple[int, ...] = ()
    here: tuple[int, ...] = ()
    rest_here: bool = True
    tile: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes on the device at the peak of the stage."""
        return self.weights + self.activations


class TooLittleMemory(MemoryError):  # noqa: N818 # it says what there is too little of
    """No plan keeps a drawing within the budget.

    Attributes:
        budget, smallest: bytes that are given, and the bytes of the smallest budget that works.
    """

    def __init__(self, message: str, budget: int, smallest: int) -> None:
        super().__init__(message)
        self.budget, self.smallest = budget, smallest


@dataclass(frozen=True)
class MemoryPlan:
    """What is on the device in each stage of a drawing.

    Attributes:
        budget: bytes; None is no limit.
        models: bytes of each model's weights, by component.
        activations: bytes of what is not a weight.
        rung: the last of `RUNGS` that is used.
        stages: the stages in the order in which they run.
    """

    budget: int | None
    models: Mapping[str, ModelBytes]
    activations: Activations
    rung: int
    stages: tuple[Stage, ...]

    @property
    def sum(self) -> int:
        """Bytes at the peak of the stage that takes most."""
        return max(stage.bytes for stage in self.stages)

    @property
    def turns(self) -> bool:
        """Whether text encoders, VAE and ControlNets are on the device only while they compute."""
        return self.rung >= TURNS

    @property
    def visited(self) -> bool:
        """Whether adaLN weights are on the device only while the modulation table is computed."""
        return self.rung >= VISITED

    @property
    def stays(self) -> bool:
        """Whether the blocks of the transformer never move, so that graphs may record where they are."""
        return self.rung < STREAMED

    @property
    def records(self) -> bool:
        """Whether the steps of a drawing may be graphs, because no block moves between them."""
        return not self.streamed

    @property
    def streamed(self) -> tuple[int, ...]:
        """Blocks of the transformer that are streamed in every step."""
        return self.stage("steps").streamed

    @property
    def tile(self) -> int | None:
        """Side of the VAE's tiles in pixels; None is whole pictures."""
        return self.stage("vae").tile

    def stage(self, name: str) -> Stage:
        """The stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)

    def streams(self) -> str:
        """What is streamed or takes turns, in a few words."""
        if not self.turns:
            return "nothing"
        found = []
        for stage in self.stages:
            if stage.streamed:
                blocks = len(self.models["transformer" if stage.name == "steps" else stage.name].blocks)
                found.append(f"{len(stage.streamed)} of {blocks} blocks of {_TITLES.get(stage.name, stage.name)}")
        found += ["adaLN"] if self.visited else []
        found += [f"VAE tiles of {self.tile}"] if self.tile else []
        return ", ".join(found) or "encoders by turns"

    def __str__(self) -> str:
        """One line per part and stage, the sum and the budget."""
        lines = [f"memory plan: {RUNGS[self.rung]}; streamed: {self.streams()}"]
        lines += [f"  {name}: {_gb(model.total)} of weights" for name, model in self.models.items()]
        for stage in self.stages:
            parts = f"{_gb(stage.weights)} of weights + {_gb(stage.activations)} of activations"
            lines.append(f"  stage {stage.name}: {parts} = {_gb(stage.bytes)}")
        budget = "no budget" if self.budget is None else f"budget {_gb(self.budget)}"
        reserve = f", of which {_gb(self.activations.reserve)} are the context and workspaces of libraries"
        return "\n".join([*lines, f"  sum: {_gb(self.sum)}{reserve}; {budget}"])

    __repr__ = __str__


_TITLES = {"steps": "the transformer", "t5": "T5"}


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def plan(budget: int | None, models: Mapping[str, ModelBytes], activations: Activations) -> MemoryPlan:
    """The first means that are enough, and as little as possible of the last one.

    Args:
        budget: bytes; None is no limit.
        models: the weights by component; "transformer" and "vae" are needed, "t5" may be streamed.
        activations: what else is on the device.

    Raises:
        TooLittleMemory: no means are enough; the error has the sum and the smallest budget.
    """
    planner = _Planner(models, activations)
    for rung in range(len(RUNGS)):
        if found := planner.least(rung, budget):
            return MemoryPlan(budget, models, activations, rung, found)
    assert budget is not None, "everything fits without a budget"
    least = smallest(models, activations)
    raise TooLittleMemory(
        f"a budget of {_gb(budget)} is too small: the smallest plan takes {_sum_of(least)}; give at least "
        f"{size_word(least.sum)!r}, smaller pictures, fewer at once, or weights in fewer bits (quant='fp8')",
        budget,
        least.sum,
    )


def smallest(models: Mapping[str, ModelBytes], activations: Activations) -> MemoryPlan:
    """The plan that takes least, whatever it costs in time; its sum is the smallest budget that works."""
    planner = _Planner(models, activations)
    found = [MemoryPlan(None, models, activations, rung, planner.smallest(rung)) for rung in range(len(RUNGS))]
    return min(found, key=lambda one: one.sum)


def _sum_of(found: MemoryPlan) -> str:
    stage = max(found.stages, key=lambda one: one.bytes)
    return (
        f"{_gb(stage.bytes)} in the stage {stage.name}: {_gb(stage.weights)} of weights + "
        f"{_gb(stage.activations)} of activations, of which {_gb(found.activations.reserve)} reserve"
    )


def size_word(size: int) -> str:
    """A size of at least so many bytes, as an argument spells it: "8.1GB"."""
    unit, name = (10**7, "GB") if size >= 10**8 else (10**4, "MB")
    return f"{-(-size // unit) / 100:g}{name}"


def spread(count: int, blocks: int) -> tuple[int, ...]:
    """The numbers of `count` blocks, evenly spaced, so that the others compute while a streamed one arrives."""
    return tuple((2 * i + 1) * blocks // (2 * count) for i in range(count))


class _Own(NamedTuple):
    """A way in which the model of a stage can be on the device."""

    weights: int
    activations: int
    streamed: tuple[int, ...] = ()
    tile: int | None = None


class _Planner:
    """The ways in which each stage can run; the choices of a rung use as little of the later means as they can."""

    def __init__(self, models: Mapping[str, ModelBytes], activations: Activations) -> None:
        self.models, self.activations = models, activations
        self.transformer = models["transformer"]
        self.encoders = [name for name in models if name not in ("transformer", "vae", "controlnet")]

    def least(self, rung: int, budget: int | None) -> tuple[Stage, ...]:
        """For each stage the first choice that fits; empty where a stage has none."""

        def first(choices: Iterable[Stage]) -> Stage | None:
            return next((stage for stage in choices if budget is None or stage.bytes <= budget), None)

        steps = first(self._steps(rung))
        if steps is None:
            return ()
        found = [steps if name == "steps" else first(self._other(name, rung, steps)) for name in self._names()]
        return tuple(stage for stage in found if stage is not None) if None not in found else ()

    def smallest(self, rung: int) -> tuple[Stage, ...]:
        """For each stage the choice that takes least."""

        def least(choices: Iterable[Stage]) -> Stage:
            return min(choices, key=lambda stage: stage.bytes)

        steps = least(self._steps(rung))
        names = self._names()
        return tuple(steps if name == "steps" else least(self._other(name, rung, steps)) for name in names)

    def _names(self) -> list[str]:
        """The stages, in the order in which they run."""
        return [*self.encoders, "steps", "vae"]

    def _steps(self, rung: int) -> Iterator[Stage]:
        act, net = self.activations, self.models.get("controlnet", ModelBytes(0))
        working = act.step
        if rung >= VISITED:  # two blocks' adaLN weights at a time make the table, when no step's activations are there
            working = max(act.step + act.table, _slots(self.transformer.modulation) + 2 * act.table)
        working += self._kept(rung)
        for streamed in _streamings(len(self.transformer.blocks) if rung >= STREAMED else 0):
            here = tuple(i for i in range(len(self.transformer.blocks)) if i not in streamed)
            slots = _slots([self.transformer.blocks[i] for i in streamed])
            weights = self._transformer(rung, here) + slots + net.total + self._others(rung, "controlnet")
            yield Stage("steps", weights, working, streamed, here)

    def _other(self, name: str, rung: int, steps: Stage) -> Iterator[Stage]:
        """The ways in which a stage can run beside the weights of the steps, of which the last blocks may leave."""
        aways = range(len(steps.here) + 2 if rung >= STREAMED else 1)
        own = self._own(name, rung)
        # Tiles are a later means than blocks that leave, T5's streaming is an earlier one.
        ways = [(one, away) for away in aways for one in own]
        if name == "vae":
            ways = [(one, away) for one in own for away in aways]
        for one, away in ways:
            here = steps.here[: len(steps.here) - away] if away else steps.here
            rest_here = away <= len(steps.here)
            beside = self._transformer(rung, here) if rest_here else 0
            weights = one.weights + beside + self._others(rung, name)
            working = one.activations + self._kept(rung)
            yield Stage(name, weights, working, one.streamed, here if rest_here else (), rest_here, one.tile)

    def _own(self, name: str, rung: int) -> list[_Own]:
        """The ways in which the model that computes can be there."""
        act = self.activations
        model = self.models[name]
        if name == "vae":
            tiles = sorted(act.tiles, reverse=True) if rung >= TILED else []
            whole = _Own(model.total, act.decode)
            return [whole, *(_Own(model.total, act.tiles[tile], tile=tile) for tile in tiles)]
        found = []
        for streamed in _streamings(len(model.blocks) if rung >= STREAMED_T5 else 0):
            moving = [model.blocks[i] for i in streamed]
            weights = model.total - sum(moving) + _slots(moving)
            found.append(_Own(weights, act.text.get(name, 0), streamed))
        return found

    def _others(self, rung: int, name: str) -> int:
        """Weights that are on the device beside the transformer and the model of the stage."""
        if rung >= TURNS:
            return 0
        return sum(model.total for key, model in self.models.items() if key not in ("transformer", name))

    def _transformer(self, rung: int, here: Iterable[int]) -> int:
        """Weights of the transformer with these of its blocks."""
        adaln = 0 if rung >= VISITED else sum(self.transformer.modulation)
        return self.transformer.rest + adaln + sum(self.transformer.blocks[i] for i in here)

    def _kept(self, rung: int) -> int:
        """What is on the device in every stage, with graphs where they are kept from drawing to drawing."""
        act = self.activations
        return act.reserve + act.kept + (act.graph if rung < STREAMED else 0)


def _streamings(blocks: int) -> Iterator[tuple[int, ...]]:
    """Which blocks may be streamed, fewest first; up to `SLOTS` of them would take as much memory as if they stayed."""
    yield ()
    for count in range(SLOTS + 1, blocks + 1):
        yield spread(count, blocks)


def _slots(sizes: Iterable[int]) -> int:
    """Memory for the largest of the blocks, twice."""
    sizes = list(sizes)
    return max(sizes, default=0) * min(SLOTS, len(sizes))
