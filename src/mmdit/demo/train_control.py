"""Trains two ControlNets for the embedded model: `python -m mmdit.demo.train_control FOLDER --seconds 900`.

Scenes of `mmdit.demo.scenes` are drawn, their hints made (Canny edges, or a map that is the brighter the larger an
object is), and both encoded: pictures as the mode of the VAE's distribution, hints as drawings encode them. Each step
takes the rules of one profile of the pipeline (value range, sample or mean, positions, the last residual), so that a
net works in all of them. A net first learns to predict the picture from the hint alone, with a linear read-out in
place of the transformer; then its residuals are trained through the frozen transformer, on captions most of which leave
shapes and positions out. The state is saved every minute, and an interrupted run resumes from it. On a CPU, seconds are
those of the processor. On a GPU (`--device cuda`), which has a recipe of its own (`GPU`), they are those of the clock,
and steps are recorded as CUDA graphs; `mmdit.demo.bench_control` measures them. Both compute in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.vae import DiagonalGaussian
from mmdit.checkpoints.load import load_controlnet, model_in_memory
from mmdit.checkpoints.safetensors_io import write_tensors
from mmdit.checkpoints.write import METADATA, official
from mmdit.demo.captions import caption
from mmdit.demo.grammar import NUMBERS
from mmdit.demo.progress import save_whole
from mmdit.demo.scenes import SIZES, Scene, Scenes, render, sample
from mmdit.demo.shapes import SHAPES
from mmdit.embedded import EMBEDDED
from mmdit.models.controlnet import ControlKind, ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.pictures.edges import canny
from mmdit.pipeline.control import residuals_of, spread
from mmdit.pipeline.control_inputs import HintRules, hint_rules
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import PROFILES, Profile
from mmdit.runtime.precision import full_float32
from mmdit.training import control
from mmdit.training.blocks import compile_blocks
from mmdit.training.ema import Ema
from mmdit.training.journal import Journal, mean_of
from mmdit.training.rates import Every, learning_rate, set_rate
from mmdit.training.recording import RecordedGradients, eager_gradients
from samplers.training import logit_normal, noised, shifted

__all__ = [
    "GPU",
    "ControlRecipe",
    "Data",
    "Stepper",
    "depth_map",
    "encoded",
    "main",
    "net_file",
    "train",
    "trainer_of",
    "vague_caption",
]

KINDS: tuple[ControlKind, ...] = ("canny", "depth")
STAGES = ("alone", "together")  # each draws from a seed of its own
HARD = ("cross", "ring")  # shapes that, where they are small, the VAE blurs in hints
_TOKENS = 77  # of CLIP
_NEAREST = SIZES["large"][1]


@dataclass(frozen=True)
class ControlRecipe:
    """Every number of a run. Shares are of a net's time that is left after its pictures are encoded."""

    depth: int = 1  # blocks of a net
    mlp_dim: int | None = None  # width of the hidden layer of its MLPs; None is four times that of tokens
    scenes: int = 1024
    captions_per_scene: int = 2
    full_captions: float = 0.3  # share of captions that say shapes and positions too
    hard: float = (
        2.0  # how much each small object of a shape in `HARD` adds to the weight of a scene, which is 1 without
    )
    dropped: float = 0.1  # captions replaced by the empty one
    seed: int = 0
    alone_share: float = 0.25  # share of the first stage, which trains without the transformer
    alone_batch: int = 64
    batch: int = 32
    rate: float = 1.5e-3
    warmup: int = 40
    decay: float = 0.5
    ema: float = 0.99
    shift: float = 3.0
    moves: int = 4  # cells by which pictures and hints are shifted at most, with wraparound, which augments few scenes
    profiles: tuple[str, ...] = ("diffusers", "diffusers", "comfyui", "reference")  # each step takes one at random
    context_gradients: bool = False  # whether gradients also go through the text tokens of the transformer
    recorded: bool = False  # whether steps are recorded as CUDA graphs, one for each profile; needs a GPU
    compiled: bool = False  # whether blocks are compiled, which takes about a minute at the start
    keeps_data: bool = True  # whether encoded pictures are saved, so that a resumed run does not encode them again
    save_seconds: float = 60.0
    log_seconds: float = 20.0


GPU = ControlRecipe(
    depth=2,
    mlp_dim=256,  # so that two blocks take less than 4 MB
    scenes=49_152,
    captions_per_scene=1,
    full_captions=0.1,
    dropped=0.15,  # guidance multiplies errors of the velocity without the caption, too
    alone_share=0.1,
    alone_batch=512,
    batch=512,
    warmup=500,
    decay=0.8,
    ema=0.9995,
    moves=0,
    context_gradients=True,
    profiles=("diffusers", "diffusers", "diffusers", "comfyui", "reference"),
    recorded=True,
    keeps_data=False,
)


def depth_map(scenes: Scenes) -> Tensor:
    """Pictures [b, 3, 128, 128] in [0, 1] of how near objects are: black ground, the largest object is white."""
    white = replace(
        scenes, tint=torch.zeros_like(scenes.tint), background_tint=torch.zeros_like(scenes.background_tint)
    )
    silhouettes = []
    for k in range(scenes.shape.shape[1]):
        alone = _only(white, k)
        there = (render(alone) - render(_none(alone))).abs().amax(1)  # b h w
        share = there / there.amax((1, 2), keepdim=True).clamp(min=1e-6)
        near = (0.3 + 0.7 * scenes.across[:, k] / _NEAREST) * (k < scenes.count)
        silhouettes.append(share * near[:, None, None])
    return torch.stack(silhouettes).amax(0)[:, None].expand(-1, 3, -1, -1)


def _only(scenes: Scenes, k: int) -> Scenes:
    """The scenes with their k-th object alone."""
    turned = {
        name: getattr(scenes, name).roll(-k, 1)
        for name in ("shape", "colour", "large", "across", "angle", "x", "y", "tint")
    }
    return replace(scenes, count=torch.ones_like(scenes.count), **turned)


def _none(scenes: Scenes) -> Scenes:
    return replace(scenes, count=torch.zeros_like(scenes.count))


def vague_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that says colours, number and background, and neither shapes nor positions."""
    colours = [one.colour for one in scene.objects]
    rng.shuffle(colours)
    groups = [(colour, colours.count(colour)) for colour in dict.fromkeys(colours)]
    noun = rng.choice(("shape", "object"))
    things = [f"{NUMBERS[n - 1]} {colour} {noun}s" if n > 1 else f"a {colour} {noun}" for colour, n in groups]
    return f"{' and '.join(things)} on a {scene.background} background"


def hints(kind: ControlKind, scenes: Scenes, pictures: Tensor) -> Tensor:
    """The hints [b, 3, h, w] in [0, 1] of scenes and their pictures.

    Edges are those of any colour channel, with low thresholds, because some objects are as bright as their background.
    """
    if kind == "depth":
        return depth_map(scenes)
    channels = pictures.flatten(0, 1)[..., None].expand(-1, -1, -1, 3)
    with full_float32():  # the shorter mantissa of TF32 moves edges
        edges = canny(channels, 0.05, 0.1)[..., 0]
    return edges.unflatten(0, pictures.shape[:2]).amax(1, keepdim=True).expand(-1, 3, -1, -1)


class Batch(NamedTuple):
    """The inputs of one training step."""

    x0: Tensor  # latents [b, 16, h, w], in model space
    noise: Tensor
    t: Tensor  # [b], from 0 to 1
    hint: Tensor  # latents [b, 16, h, w]
    context: Tensor
    pooled: Tensor


@dataclass
class Data:
    """Latents in model space, and the texts of captions."""

    pictures: Tensor  # [scenes, 16, h, w]
    hints: dict[str, tuple[Tensor, Tensor]]  # mean and std of the hints' distribution, by `HintRules.values`
    context: Tensor  # [captions, tokens, width]
    pooled: Tensor
    empty: tuple[Tensor, Tensor]

    def draw(self, rules: HintRules, size: int, recipe: ControlRecipe, g: torch.Generator) -> Batch:
        """A batch, drawn where the data lie; picture and hint are shifted by whole cells."""
        device = g.device
        scene = torch.randint(len(self.pictures), (size,), generator=g, device=device)
        texts = len(self.context) // len(self.pictures)
        text = scene * texts + torch.randint(texts, (size,), generator=g, device=device)
        drop = torch.rand(size, generator=g, device=device) < recipe.dropped
        context = torch.where(drop[:, None, None], self.empty[0], self.context[text])
        pooled = torch.where(drop[:, None], self.empty[1], self.pooled[text])
        found = DiagonalGaussian(*(part[scene].float() for part in self.hints[rules.values]))
        x0, hint = self.pictures[scene].float(), found.sample(g) if rules.sampled else found.mode()
        if recipe.moves:
            reach = recipe.moves
            move = torch.randint(-reach, reach + 1, (2,), generator=g, device=device).tolist()
            x0, hint = x0.roll(move, (2, 3)), hint.roll(move, (2, 3))
        noise = torch.randn(x0.shape, generator=g, device=device)
        t = shifted(logit_normal(size, generator=g), recipe.shift)
        return Batch(x0, noise, t, hint, context, pooled)

    def to(self, device: torch.device) -> Data:
        """The same data on a device."""
        hints = {values: (mean.to(device), std.to(device)) for values, (mean, std) in self.hints.items()}
        empty = self.empty[0].to(device), self.empty[1].to(device)
        return Data(self.pictures.to(device), hints, self.context.to(device), self.pooled.to(device), empty)


def scenes_of(recipe: ControlRecipe) -> Scenes:
    """The scenes of a run, drawn so that those with small crosses and rings come more often."""
    found = sample(3 * recipe.scenes, recipe.seed)
    there = torch.arange(found.shape.shape[1]) < found.count[:, None]
    shape = torch.stack([found.shape == SHAPES.index(name) for name in HARD]).any(0)
    hard = (there & shape & ~found.large).sum(1)
    g = torch.Generator().manual_seed(recipe.seed)
    return found[torch.multinomial(1 + recipe.hard * hard, recipe.scenes, generator=g)]


@torch.no_grad()
def make_data(pipe: Pipeline, kind: ControlKind, recipe: ControlRecipe, journal: Journal) -> Data:
    """Draw, describe and encode the scenes of a run."""
    scenes = scenes_of(recipe)
    rng = random.Random(recipe.seed)
    captions = [
        caption(scene, rng) if rng.random() < recipe.full_captions else vague_caption(scene, rng)
        for scene in scenes.words()
        for _ in range(recipe.captions_per_scene)
    ]
    context, pooled = encoded(pipe, captions)
    empty = encoded(pipe, [""])
    config = control.new_config(pipe.transformer, 1, kind)
    ways = {way.values: way for way in (hint_rules(config, PROFILES[name]) for name in recipe.profiles)}
    vae = copy.deepcopy(pipe.vae).to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents: list[Tensor] = []
    found: dict[str, list[DiagonalGaussian]] = {values: [] for values in ways}
    batch = 32 if pipe.device.type == "cpu" else 512
    for i in range(0, recipe.scenes, batch):
        some = scenes[i : i + batch].to(pipe.device)
        pictures = render(some)
        drawn = hints(kind, some, pictures)
        latents.append(vae.encode(_shaped(2 * pictures - 1)).mode().contiguous().half())
        for values, way in ways.items():
            found[values].append(way.distribution(vae, _shaped(drawn)))
    journal.say(f"{kind}: {recipe.scenes} scenes and {len(captions)} captions, first {captions[0]!r}")
    return Data(
        torch.cat(latents),
        {
            values: (_joined([one.mean for one in all_]), _joined([one.std for one in all_]))
            for values, all_ in found.items()
        },
        context,
        pooled,
        empty,
    )


def encoded(pipe: Pipeline, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The CLIP tokens of captions, and their pooled vectors; the embedded model also knows captions without T5.

    T5's part is computed in its shorter form, since it is not used.
    """
    distinct = list(dict.fromkeys(captions))
    place = {caption: i for i, caption in enumerate(distinct)}
    pieces = [pipe.encode(distinct[i : i + 256], max_sequence_length=_TOKENS) for i in range(0, len(distinct), 256)]
    of = torch.tensor([place[caption] for caption in captions], device=pipe.device)
    context = torch.cat([piece.context[:, :_TOKENS] for piece in pieces]).bfloat16()
    return context[of], torch.cat([piece.pooled for piece in pieces])[of]


def _shaped(pictures: Tensor) -> Tensor:
    return pictures.bfloat16().contiguous(memory_format=torch.channels_last)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.contiguous().half() for part in parts])


class Trainer:
    """A net in training, beside the frozen transformer.

    Args:
        net: float32.
        transformer: bfloat16.
        context_gradients: whether gradients also go through the transformer's text tokens; without, a step of training
            takes two thirds of the time.
    """

    def __init__(self, net: ControlNet, transformer: MMDiT, *, context_gradients: bool = False) -> None:
        self.net, self.transformer, self.context_gradients = net, transformer, context_gradients
        width, patch = net.config.hidden_size, net.config.patch_size
        self.reader = nn.Linear(width, 16 * patch**2).to(transformer.pos_embed.device)

    def residuals(self, batch: Batch, x: Tensor, profile: Profile) -> list[Tensor]:
        """The residuals of noised latents, as drawings in a profile compute them."""
        # A CUDA graph must not read weights that autocast kept from before.
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return residuals_of(
                self.net,
                self.transformer,
                profile,
                x.bfloat16(),
                1000 * batch.t,
                batch.context,
                batch.pooled,
                batch.hint,
            )

    def alone(self, batch: Batch, profile: Profile) -> Tensor:
        """The loss of the first stage: the picture's latent, read from what the last block gives."""
        seen: list[Tensor] = []
        block = self.net.transformer_blocks[-1]
        hook = block.register_forward_hook(lambda _, args, out: seen.append(out[1]))
        try:
            self.residuals(batch, noised(batch.x0, batch.noise, batch.t), profile)
        finally:
            hook.remove()
        said = self.transformer.unpatchify(self.reader(seen[0].float()), *batch.x0.shape[2:])
        return F.mse_loss(said, batch.x0)

    def together(self, batch: Batch, profile: Profile) -> Tensor:
        """The velocity loss with the net's residuals."""
        return F.mse_loss(self.velocity(batch, profile), batch.noise - batch.x0)

    def velocity(self, batch: Batch, profile: Profile) -> Tensor:
        """The velocity, float32 [b, c, h, w]."""
        model, x = self.transformer, noised(batch.x0, batch.noise, batch.t)
        residuals = self.residuals(batch, x, profile)
        places = spread(profile, self.net, model.config.depth)
        c = model.t_embedder(1000 * batch.t) + model.y_embedder(batch.pooled.bfloat16())
        image = model.x_embedder(x.bfloat16()) + model.cropped_pos_embed(*x.shape[2:])
        context = model.context_embedder(batch.context)
        for block, place in zip(model.joint_blocks, places, strict=True):
            context, image = block(context if self.context_gradients else context.detach(), image, c)
            image = image if place is None else image + residuals[place].bfloat16()
        return model.unpatchify(model.final_layer(image, c), *x.shape[2:]).float()

    def loss(self, stage: str, profile: Profile, batch: Batch) -> Tensor:
        """The loss of a stage."""
        return self.alone(batch, profile) if stage == "alone" else self.together(batch, profile)

    def compile(self) -> None:
        """Compile all blocks."""
        compile_blocks([*self.transformer.joint_blocks, *self.net.transformer_blocks])


def new_net(kind: ControlKind, transformer: MMDiT, depth: int = 1, mlp_dim: int | None = None) -> ControlNet:
    """A net for the embedded model, whose residuals are 0."""
    return control.new_net(transformer, depth, kind, mlp_dim)


def train(
    folder: Path,
    seconds: float,
    recipe: ControlRecipe | None = None,
    *,
    device: str = "cpu",
    model: Path = EMBEDDED,
    start_from: Path | None = None,
    kinds: Sequence[ControlKind] = KINDS,
) -> dict[ControlKind, Path]:
    """Train the nets one after the other; returns their files, in official names.

    Args:
        folder: of states, log and nets.
        seconds: for all nets together, of the processor on a CPU, of the clock on a GPU.
        recipe: None is the device's.
        device: of the training.
        model: the folder of the model that the nets are for.
        start_from: a folder of nets of an earlier run, which are trained further without the first stage.
        kinds: of the hints; one net each.
    """
    recipe = recipe or (ControlRecipe() if device == "cpu" else GPU)
    run = _Run(folder, recipe, Journal(folder), time.process_time if device == "cpu" else time.monotonic)
    pipe = Pipeline.from_pretrained(model, device=device, dtype=torch.float32)
    return {kind: run.train(pipe, kind, seconds / len(kinds), start_from) for kind in kinds}


@dataclass
class _Run:
    """What the nets of a run share."""

    folder: Path
    recipe: ControlRecipe
    journal: Journal
    ticks: Callable[[], float]

    def train(self, pipe: Pipeline, kind: ControlKind, seconds: float, start_from: Path | None) -> Path:
        """Train one net, or go on with it; returns its file."""
        torch.manual_seed(self.recipe.seed)
        state, clock = self.state(kind)
        data = self.data(pipe, kind, state, clock).to(pipe.device)
        left = max(seconds - state["begun"], 1e-3)  # for the stages
        trainer = trainer_of(pipe, kind, self.recipe, start_from)
        if "net" in state:
            trainer.net.load_state_dict(state["net"])
        start, before, file = 0.0, (clock() - state["begun"]) / left, net_file(self.folder, kind)
        for stage, end in (("alone", 0.0 if start_from else self.recipe.alone_share), ("together", 1.0)):
            if before < end or (stage == "together" and not file.exists()):
                rounds = _rounds(lambda: (clock() - state["begun"]) / left, start, end)
                _stage(trainer, stage, kind, data, rounds, _Keeper(state, self.file(kind, "state"), clock, self))
            start = end
        return write_net(trainer.net, kind, self.folder)

    def file(self, kind: ControlKind, what: str) -> Path:
        """The file of a net's state or data."""
        return self.folder / f"{kind}_{what}.pt"

    def state(self, kind: ControlKind) -> tuple[dict[str, Any], Callable[[], float]]:
        """The state of a net, and the clock of its seconds over all runs."""
        path, started = self.file(kind, "state"), self.ticks()
        state: dict[str, Any] = torch.load(path, map_location="cpu") if path.exists() else {"done": 0.0}
        earlier: float = state["done"]
        return state, lambda: earlier + self.ticks() - started

    def data(self, pipe: Pipeline, kind: ControlKind, state: dict[str, Any], clock: Callable[[], float]) -> Data:
        """The data of a net, saved where the recipe says so; `begun` in the state is the clock's seconds for them."""
        path = self.file(kind, "data")
        if path.exists():
            state.setdefault("begun", 0.0)
            return Data(**torch.load(path, map_location="cpu"))
        data = make_data(pipe, kind, self.recipe, self.journal)
        if self.recipe.keeps_data:
            save_whole(vars(data), path)
        trained = state["done"] - state.get("begun", 0.0)  # by earlier runs, whose data were not saved
        state |= {"begun": clock() - trained, "done": clock()}
        save_whole(state, self.file(kind, "state"))
        return data


def _rounds(share: Callable[[], float], start: float, end: float) -> Iterator[tuple[int, float]]:
    step = 0
    while (now := share()) < end:
        yield step, max(0.0, (now - start) / (end - start))
        step += 1


@dataclass
class _Keeper:
    """Saves the net in training at regular intervals."""

    state: dict[str, Any]
    path: Path
    clock: Callable[[], float]
    run: _Run

    def keep(self, net: nn.Module, stage: str) -> None:
        """Write everything that is needed to resume the run."""
        weights = {name: tensor.cpu().clone() for name, tensor in net.state_dict().items()}
        self.state |= {"net": weights, "stage": stage, "done": self.clock()}
        save_whole(self.state, self.path)


class Stepper:
    """Training steps of one stage; on a GPU, each profile has a CUDA graph of its own, because their rules differ.

    Args:
        trainer: the net in training.
        stage: one of `STAGES`.
        data: on the net's device.
        recipe: its numbers of a step.
    """

    def __init__(self, trainer: Trainer, stage: str, data: Data, recipe: ControlRecipe) -> None:
        self.trainer, self.stage, self.data, self.recipe = trainer, stage, data, recipe
        alone = stage == "alone"
        self.size = recipe.alone_batch if alone else recipe.batch
        self.weights = [*trainer.net.parameters(), *(trainer.reader.parameters() if alone else ())]
        device = self.weights[0].device
        self.generator = torch.Generator(device).manual_seed(recipe.seed + 1 + STAGES.index(stage))
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
        self.ema = Ema(trainer.net, recipe.ema)
        self._graphs: dict[str, RecordedGradients[Batch]] = {}

    def step(self, profile: Profile, rate: float) -> Tensor:
        """Train on one batch by the rules of a profile; returns the loss.

        Raises:
            RuntimeError: the step cannot be recorded.
        """
        batch = self.data.draw(hint_rules(self.trainer.net.config, profile), self.size, self.recipe, self.generator)
        loss = self._gradients(batch, profile)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.ema.update()
        return loss

    def _gradients(self, batch: Batch, profile: Profile) -> Tensor:
        loss_of = partial(self.trainer.loss, self.stage, profile)
        if not self.recipe.recorded:
            return eager_gradients(loss_of, self.weights, batch)
        if profile.name not in self._graphs:
            self._graphs[profile.name] = RecordedGradients(loss_of, batch, self.weights)
        return self._graphs[profile.name](batch)


def _stage(
    trainer: Trainer, stage: str, kind: ControlKind, data: Data, rounds: Iterator[tuple[int, float]], keeper: _Keeper
) -> None:
    """Train one stage; at its end the net holds its average."""
    recipe, losses, rng = keeper.run.recipe, list[Tensor](), random.Random(keeper.run.recipe.seed)
    stepper = Stepper(trainer, stage, data, recipe)
    log, save, since = Every(recipe.log_seconds), Every(recipe.save_seconds), time.monotonic()
    for step, fraction in rounds:
        rate = learning_rate(fraction, step, peak=recipe.rate, warmup=recipe.warmup, decay=recipe.decay)
        losses.append(stepper.step(PROFILES[rng.choice(recipe.profiles)], rate))
        if log.due():
            loss, ms = mean_of(losses), 1000 * (time.monotonic() - since) / len(losses)
            keeper.run.journal.row(f"{kind} {stage}", step=step, done=fraction, ms=ms, loss=loss, rate=rate)
            losses, since = [], time.monotonic()
        if save.due():
            keeper.keep(trainer.net, stage)
    stepper.ema.write_to(trainer.net)
    keeper.keep(trainer.net, stage)


def trainer_of(pipe: Pipeline, kind: ControlKind, recipe: ControlRecipe, start_from: Path | None = None) -> Trainer:
    """A net on the pipeline's device beside a frozen copy of its transformer, as the recipe says.

    Args:
        pipe: whose transformer the net is for.
        kind: of the hints.
        recipe: its numbers about the net, and whether blocks are compiled.
        start_from: a folder of nets; the net has the weights of the one of its kind, grown where the recipe says so.
    """
    transformer = copy.deepcopy(pipe.transformer).bfloat16().requires_grad_(False)
    net = new_net(kind, transformer, recipe.depth, recipe.mlp_dim)
    if start_from is not None:
        control.grow(load_controlnet(net_file(start_from, kind), dtype=torch.float32), net)
    trainer = Trainer(net.to(pipe.device), transformer, context_gradients=recipe.context_gradients)
    if recipe.compiled:
        trainer.compile()
    return trainer


def net_file(folder: Path, kind: ControlKind) -> Path:
    """The file of a net in a folder of nets."""
    return folder / f"controlnet_{kind}.safetensors"


def write_net(net: ControlNet, kind: ControlKind, folder: Path) -> Path:
    """Write a net in float16 under official names."""
    stored = model_in_memory("controlnet", copy.deepcopy(net).cpu())
    half = replace(stored, tensors={key: lazy.as_dtype(torch.float16) for key, lazy in stored.tensors.items()})
    path = net_file(folder, kind)
    write_tensors(path, official(half, "comfyui"), METADATA)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where states, log and nets are written")
    parser.add_argument("--seconds", type=float, default=900.0, help="in all: of the processor, or a GPU's clock")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="of which model (default: %(default)s)")
    parser.add_argument("--start-from", type=Path, help="a folder of nets of an earlier run, to train them further")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of the hints (default: all)")
    parser.add_argument("--depth", type=int, help="blocks of a net (default: the recipe's)")
    parser.add_argument("--mlp-dim", type=int, help="width of the hidden layers of their MLPs (default: the recipe's)")
    parser.add_argument("--compiled", action="store_true", help="compile blocks, which takes about a minute")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    names = ("depth", "mlp_dim", "compiled")
    chosen = {name: value for name in names if (value := getattr(options, name))}
    recipe = replace(ControlRecipe() if options.device == "cpu" else GPU, **chosen)
    given = {name: getattr(options, name) for name in ("device", "model", "start_from", "kinds")}
    train(options.folder, options.seconds, recipe, **given)


if __name__ == "__main__":
    main()
