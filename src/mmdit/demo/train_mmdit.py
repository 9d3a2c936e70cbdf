"""Joint training of the transformer and the three text encoders on cached latents, wholly on the device."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmdit.checkpoints.load_pipeline import Components
from mmdit.demo.data import TokenTable, tokenize
from mmdit.demo.progress import save_whole
from mmdit.demo.run import Run
from mmdit.demo.trainee import T5Form, Trainee, compile_regions, graph_breaks, hurried, trainee_of
from mmdit.runtime.mesh import check_equal
from mmdit.training.ema import Ema
from mmdit.training.journal import mean_of
from mmdit.training.rates import Budget, Every, learning_rate, set_rate
from samplers.training import logit_normal, noised, shifted, velocity_loss

__all__ = [
    "Batch",
    "Batches",
    "Engine",
    "draw_form",
    "flow_loss",
    "make_optimizer",
    "mean_gradients",
    "mending_noise",
    "rehearse",
    "train_mmdit",
]

_STATE = "mmdit.pt"
_FORMS: tuple[T5Form, ...] = ("short", "long", "zeros", "omitted")
Halfway = Callable[[Components], object]


@dataclass(frozen=True)
class Batch:
    """Latents in the model's space, their noise, times, and token ids."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    tokens: TokenTable

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch, in order."""
        return [self.x0, self.noise, self.t, self.tokens.clip_l, self.tokens.clip_g, self.tokens.t5]

    @classmethod
    def like(cls, other: Batch) -> Batch:
        """Allocate tensors for batches of the same size."""
        x0, noise, t, *tokens = (tensor.clone() for tensor in other.tensors())
        return cls(x0, noise, t, TokenTable(*tokens))


class Batches:
    """Random batches of cached latents and captions, drawn where they lie.

    Args:
        latents: [scenes, 16, h, w].
        tokens: Token ids of scenes x `per_scene` captions.
        per_scene: captions of a scene.
        dropped: share of captions replaced by the empty one.
        shift: Shift of the sampled times.
        generator: on the device of the latents.
        mistakes: Latents of the same scenes with a mistake each, as `latents`, or None.
        mistaken: share of captioned latents at times from `mistaken_from` on that have the mistake.
    """

    def __init__(
        self,
        latents: Tensor,
        tokens: TokenTable,
        per_scene: int,
        dropped: float,
        shift: float,
        generator: torch.Generator,
        *,
        mistakes: Tensor | None = None,
        mistaken: float = 0.0,
        mistaken_from: float = 0.5,
    ) -> None:
        self.latents, self.tokens, self.per_scene = latents, tokens, per_scene
        self.mistakes, self.mistaken, self.mistaken_from = mistakes, mistaken, mistaken_from
        self.dropped, self.shift, self.generator = dropped, shift, generator
        self.empty = tokenize([""]).to(latents.device)

    def draw(self, size: int) -> Batch:
        """A batch of pairs, each with its own noise and time."""
        device, g = self.latents.device, self.generator
        scene = torch.randint(len(self.latents), (size,), generator=g, device=device)
        caption = scene * self.per_scene + torch.randint(self.per_scene, (size,), generator=g, device=device)
        drop = torch.rand(size, generator=g, device=device) < self.dropped
        x0 = self.latents[scene].float()
        noise = torch.randn(x0.shape, generator=g, device=device)
        t = shifted(logit_normal(size, generator=g), self.shift)
        if self.mistakes is not None:
            wrong = ~drop & (torch.rand(size, generator=g, device=device) < self.mistaken) & (t >= self.mistaken_from)
            noise = mending_noise(noise, x0, self.mistakes[scene].float(), t, wrong)
        return Batch(x0, noise, t, _replaced(self.tokens[caption], self.empty, drop))


def mending_noise(noise: Tensor, x0: Tensor, mistake: Tensor, t: Tensor, where: Tensor) -> Tensor:
    """The noise that, mixed into x0 at times t, gives what `noise` gives when it is mixed into `mistake`.

    The velocity that it leads to runs from there to x0: a model that learns it mends the mistake on the straight path.
    Elsewhere than `where` [b], it is the noise itself. All other shapes as in `samplers.training.noised`; t > 0.
    """
    level = t[:, None, None, None]
    return torch.where(where[:, None, None, None], noise + (1 - level) / level * (mistake - x0), noise)


def draw_form(rng: random.Random, run: Run, fraction: float) -> T5Form:
    """The form of T5's part in the next step; it is drawn once per step, so that there are few shapes."""
    recipe = run.recipe
    mix = asdict(recipe.mix if fraction < 1 - recipe.decay else recipe.late_mix)
    return rng.choices(_FORMS, [mix[form] for form in _FORMS])[0]


def flow_loss(trainee: Trainee, batch: Batch, form: T5Form) -> Tensor:
    """The plain velocity loss."""
    predicted = trainee(noised(batch.x0, batch.noise, batch.t), batch.t, batch.tokens, form)
    return velocity_loss(predicted, batch.x0, batch.noise)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    grads: list[Tensor | None]


class Engine:
    """Forward and backward of a run's models, compiled and optimized as the run says.

    Args:
        run: its `compiled` and `quick`; "graphs" needs a GPU.
        parts: the float32 weights that an optimizer changes. Call `refresh` after it did.
        backend: The backend of torch.compile.
    """

    def __init__(self, run: Run, parts: Components, backend: str = "inductor") -> None:
        self.run, self.trainee = run, trainee_of(parts)
        self.narrow, self.captures = "bf16" in run.quick, "graphs" in run.quick and run.device.type == "cuda"
        self.working = copy.deepcopy(self.trainee).bfloat16() if self.narrow else self.trainee
        hurried(self.working, run.quick)
        self.regions = compile_regions(self.working, [kind for kind in run.compiled if kind != "vae"], backend)
        self.masters: list[Tensor] = list(self.trainee.parameters())
        self.weights: list[Tensor] = list(self.working.parameters())
        self._batch: Batch | None = None  # what graphs read
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # of all recordings
        self._captured: dict[T5Form, _Captured] = {}

    def gradients(self, batch: Batch, form: T5Form) -> Tensor:
        """Set the gradients of the masters, None where a form does not use one; returns the loss."""
        if self.captures and form not in self._captured:
            self._capture(batch, form)
        if self.captures:
            captured = self._captured[form]
            assert self._batch is not None, "made by the first capture"
            for into, value in zip(self._batch.tensors(), batch.tensors(), strict=True):
                into.copy_(value)
            captured.graph.replay()
            loss, grads = captured.loss.clone(), captured.grads
        else:
            loss, grads = self._run(batch, form)
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master weights to the working weights."""
        if self.narrow:
            torch._foreach_copy_(self.weights, self.masters)

    def _run(self, batch: Batch, form: T5Form) -> tuple[Tensor, list[Tensor | None]]:
        with nullcontext() if self.narrow else self.run.autocast():
            loss = flow_loss(self.working, batch, form)
        grads: list[Tensor | None] = list(torch.autograd.grad(loss, self.weights, allow_unused=True))
        if self.narrow:
            wide = [None if g is None else torch.empty_like(p) for g, p in zip(grads, self.masters, strict=True)]
            torch._foreach_copy_([w for w in wide if w is not None], [g for g in grads if g is not None])
            grads = wide
        return loss.detach(), grads

    def _capture(self, batch: Batch, form: T5Form) -> None:
        """Run twice, so that all is compiled and tuned, then record; without graphs from here on where that fails."""
        started = time.monotonic()
        self._batch = self._batch or Batch.like(batch)
        for _ in range(2):
            self._run(self._batch, form)
        graph = torch.cuda.CUDAGraph()
        try:
            # Torch's own is on the GPU that was the current one at the first recording of the process.
            self._stream = self._stream or torch.cuda.Stream(self.run.device)
            with torch.cuda.device(self.run.device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                loss, grads = self._run(self._batch, form)
        except RuntimeError as error:
            self.captures = False
            self._captured.clear()
            self.run.journal.say(f"!!! NO CUDA GRAPH OF {form}, GOING ON WITHOUT: {error} !!!")
            return
        # Graphs run one after the other, so they share memory: what one leaves is read before the next starts. Torch
        # gives memory of the pool again only to the stream that had it.
        self._pool = graph.pool()
        self._captured[form] = _Captured(graph, loss, grads)
        took, gib = time.monotonic() - started, torch.cuda.max_memory_allocated(self.run.device) / 2**30
        self.run.journal.row("captured", form=form, took=took, peak_gib=gib)


def make_optimizer(trainee: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); weights of linears decay a little, embeddings, norms and biases do not."""
    decayed = {id(m.weight) for m in trainee.modules() if isinstance(m, torch.nn.Linear)}
    some = [p for p in trainee.parameters() if id(p) in decayed]
    rest = [p for p in trainee.parameters() if id(p) not in decayed]
    groups = [{"params": some, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def mean_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace the gradients by their mean over all processes, in one collective.

    A parameter without a gradient has none on any process.
    """
    used = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in used if p.grad is not None])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        p.grad = part.view_as(p)


def rehearse(run: Run, engine: Engine) -> None:
    """Compile the regions of the run and log the time of a step of every form, on noise and without an update.

    It runs first, so that a failure to compile or to fit in memory shows in the first minutes.
    """
    size, side = run.recipe.batch, engine.trainee.transformer.config.sample_size or 16
    latents = torch.randn(size, 16, side, side, device=run.device)
    tokens = tokenize(["a red circle above a blue square"]).to(run.device)[torch.zeros(size, dtype=torch.long)]
    batches = Batches(latents, tokens, 1, 0.0, run.recipe.shift, run.generator(4))
    for form in _FORMS:
        started = [time.monotonic()]
        for _ in range(5):
            engine.gradients(batches.draw(size), form)
            run.synchronize()
            started.append(time.monotonic())
        first, ms = started[1] - started[0], 250 * (started[5] - started[1])
        made = {"regions": engine.regions, "breaks": graph_breaks()}
        run.journal.row("rehearsal", form=form, first_seconds=first, ms=ms, **made)
    engine.trainee.zero_grad(set_to_none=True)


def train_mmdit(
    run: Run,
    batches: Batches,
    engine: Engine,
    averaged: Components,
    seconds: float,
    *,
    checked: Halfway,
    saved: Halfway,
) -> None:
    """Train the engine's models, resumed from the state folder where it has a state.

    `averaged` holds their average whenever `checked` (once) or `saved` (every two minutes) is called. Of several
    processes, each draws its own batches, gradients are averaged, and the first one logs, checks and saves.
    """
    recipe, trainee, into = run.recipe, engine.trainee, trainee_of(averaged)
    ema, optimizer = Ema(trainee, recipe.ema), make_optimizer(trainee)
    first, done = _resume(run, trainee, ema, optimizer)
    if run.world > 1:
        check_equal({"step": first, "weights": [float(p.detach().norm()) for p in engine.masters]}, "training")
    engine.refresh()
    rng, losses, ahead = random.Random(recipe.seed + first), [], done < recipe.check_at
    budget, log = Budget(seconds, recipe.steps, done, run.clock), Every(recipe.log_seconds)
    save, export = Every(recipe.save_seconds), Every(recipe.export_seconds)
    since = time.monotonic()
    for step, fraction in budget.rounds(first):
        form = draw_form(rng, run, fraction)
        rate = learning_rate(fraction, step - first, peak=recipe.rate, warmup=recipe.warmup, decay=recipe.decay)
        losses.append(_step(run, engine, optimizer, batches.draw(recipe.batch), form, rate))
        ema.update()
        if run.rank == 0 and (step < first + 2 or log.due()):
            run.synchronize()
            ms = 1000 * (time.monotonic() - since) / len(losses)
            run.journal.row("mmdit", step=step, done=fraction, ms=ms, loss=mean_of(losses), rate=rate, form=form)
            losses = []
            if save.due():
                _save(run, trainee, ema, optimizer, step + 1, fraction)
            if ahead and fraction >= recipe.check_at:
                ahead = False
                ema.write_to(into)
                checked(averaged)
            if export.due():
                ema.write_to(into)
                saved(averaged)
            since = time.monotonic()  # checks and saves are not part of a step's time
    ema.write_to(into)
    if run.rank == 0:
        _save(run, trainee, ema, optimizer, step + 1, 1.0)


def _step(
    run: Run, engine: Engine, optimizer: torch.optim.Optimizer, batch: Batch, form: T5Form, rate: float
) -> Tensor:
    set_rate(optimizer, rate)
    loss = engine.gradients(batch, form)
    if run.world > 1:
        mean_gradients(engine.masters)
    torch.nn.utils.clip_grad_norm_(engine.masters, run.recipe.clip)
    optimizer.step()
    engine.refresh()
    return loss


def _save(run: Run, trainee: Trainee, ema: Ema, optimizer: torch.optim.Optimizer, step: int, fraction: float) -> None:
    state = {"trainee": trainee.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
    save_whole(state | {"step": step, "fraction": fraction}, run.folder / _STATE)


def _resume(run: Run, trainee: Trainee, ema: Ema, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """(first step, share of the time done)."""
    if not (path := run.folder / _STATE).exists():
        return 0, 0.0
    state: dict[str, Any] = torch.load(path, map_location=run.device)
    trainee.load_state_dict(state["trainee"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    run.journal.say(f"transformer: going on from step {state['step']}, {state['fraction']:.0%} done")
    return state["step"], state["fraction"]


def _replaced(tokens: TokenTable, empty: TokenTable, where: Tensor) -> TokenTable:
    pairs = ((vars(tokens)[name], vars(empty)[name]) for name in ("clip_l", "clip_g", "t5"))
    return TokenTable(*(torch.where(where[:, None], other, one) for one, other in pairs))
