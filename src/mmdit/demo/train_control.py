"""Trains two ControlNets for the embedded model: `python -m mmdit.demo.train_control FOLDER --seconds 900`.

Scenes of `mmdit.demo.scenes` are drawn, their hints made (Canny edges, or a map that is the brighter the larger an
object is), and both encoded. A net first learns to predict the picture from the hint alone, with a linear read-out in
place of the transformer; then its residuals are trained through the frozen transformer, on captions that leave shapes
and positions out. The net for depth starts from the one for edges. The state is saved every minute, and an
interrupted run resumes from it. On one core, seconds are those of the processor; on a GPU (`--device cuda`), which
has a recipe of its own, they are those of the clock. Both compute in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders import VAE
from mmdit.checkpoints.load import load_controlnet, model_in_memory
from mmdit.checkpoints.safetensors_io import write_tensors
from mmdit.checkpoints.write import METADATA, official
from mmdit.demo.captions import caption
from mmdit.demo.grammar import NUMBERS
from mmdit.demo.progress import save_whole
from mmdit.demo.scenes import SIZES, Scene, Scenes, render, sample
from mmdit.embedded import EMBEDDED
from mmdit.models.controlnet import ControlKind, ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.pictures.edges import canny
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.precision import full_float32
from mmdit.training import control
from mmdit.training.ema import Ema
from mmdit.training.journal import Journal, mean_of
from mmdit.training.rates import Every, learning_rate, set_rate
from samplers.training import logit_normal, noised, shifted

__all__ = ["GPU", "ControlRecipe", "depth_map", "main", "net_file", "train", "vague_caption"]

KINDS: tuple[ControlKind, ...] = ("canny", "depth")
_STATE, _DATA = "control.pt", "data.pt"
STAGES = ("alone", "canny", "depth")  # each draws from a seed of its own
_NEAREST = SIZES["large"][1]


@dataclass(frozen=True)
class ControlRecipe:
    """Every number of a run. Shares are of the processor's time that is left after the pictures are encoded."""

    scenes: int = 1024
    captions_per_scene: int = 2
    full_captions: float = 0.3  # share of captions that say shapes and positions too
    dropped: float = 0.1  # captions replaced by the empty one
    seed: int = 0
    alone_share: float = 0.18  # share of the first stage, which trains without the transformer
    canny_share: float = 0.52
    alone_batch: int = 64
    batch: int = 32
    rate: float = 1.5e-3
    warmup: int = 40
    decay: float = 0.5
    ema: float = 0.99
    shift: float = 3.0
    moves: int = 4  # cells by which pictures and hints are shifted at most, with wraparound, which augments few scenes
    without_last: float = 0.5  # share of steps without a residual after the last block, which diffusers leaves out
    save_seconds: float = 60.0
    log_seconds: float = 20.0


GPU = ControlRecipe(
    scenes=24_576,
    captions_per_scene=1,
    alone_share=0.08,
    canny_share=0.52,
    alone_batch=512,
    batch=512,
    warmup=200,
    ema=0.999,
    moves=0,
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

    The thresholds of edges are low, because some colours are nearly as bright as their background.
    """
    if kind == "depth":
        return depth_map(scenes)
    with full_float32():  # the shorter mantissa of TF32 moves edges
        return canny(pictures.permute(0, 2, 3, 1), 0.05, 0.1).permute(0, 3, 1, 2)


@dataclass
class Data:
    """Latents in model space, and the texts of captions."""

    pictures: Tensor  # [scenes, 16, h, w]
    hints: dict[ControlKind, Tensor]
    context: Tensor  # [captions, tokens, width]
    pooled: Tensor
    empty: tuple[Tensor, Tensor]

    def draw(self, kind: ControlKind, size: int, recipe: ControlRecipe, g: torch.Generator) -> Batch:
        """A batch, drawn where the data lie; picture and hint are shifted by whole cells."""
        device = g.device
        scene = torch.randint(len(self.pictures), (size,), generator=g, device=device)
        texts = len(self.context) // len(self.pictures)
        text = scene * texts + torch.randint(texts, (size,), generator=g, device=device)
        drop = torch.rand(size, generator=g, device=device) < recipe.dropped
        context = torch.where(drop[:, None, None], self.empty[0], self.context[text])
        pooled = torch.where(drop[:, None], self.empty[1], self.pooled[text])
        x0, hint = self.pictures[scene].float(), self.hints[kind][scene].float()
        if recipe.moves:
            reach = recipe.moves
            move = torch.randint(-reach, reach + 1, (2,), generator=g, device=device).tolist()
            x0, hint = x0.roll(move, (2, 3)), hint.roll(move, (2, 3))
        noise = torch.randn(x0.shape, generator=g, device=device)
        t = shifted(logit_normal(size, generator=g), recipe.shift)
        return Batch(x0, noise, t, hint, context, pooled)

    def to(self, device: torch.device) -> Data:
        """The same data on a device."""
        hints = {kind: hint.to(device) for kind, hint in self.hints.items()}
        empty = self.empty[0].to(device), self.empty[1].to(device)
        return Data(self.pictures.to(device), hints, self.context.to(device), self.pooled.to(device), empty)


@dataclass
class Batch:
    """The inputs of one training step."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    hint: Tensor
    context: Tensor
    pooled: Tensor


@torch.no_grad()
def make_data(pipe: Pipeline, recipe: ControlRecipe, journal: Journal) -> Data:
    """Draw, describe and encode the scenes of a run."""
    scenes = sample(recipe.scenes, recipe.seed)
    rng = random.Random(recipe.seed)
    captions = [
        caption(scene, rng) if rng.random() < recipe.full_captions else vague_caption(scene, rng)
        for scene in scenes.words()
        for _ in range(recipe.captions_per_scene)
    ]
    pieces = [pipe.encode(captions[i : i + 256]) for i in range(0, len(captions), 256)]
    empty = pipe.encode("")
    short = slice(0, 77)  # the tokens of CLIP; the embedded model also knows captions without T5
    vae = pipe.vae.to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents: dict[str, list[Tensor]] = {"picture": [], **{kind: [] for kind in KINDS}}
    batch = 32 if pipe.device.type == "cpu" else 512
    for i in range(0, recipe.scenes, batch):
        some = scenes[i : i + batch].to(pipe.device)
        drawn = render(some)
        for name, pictures in (("picture", drawn), *((kind, hints(kind, some, drawn)) for kind in KINDS)):
            latents[name].append(_encoded(vae, pictures))
    journal.say(f"{recipe.scenes} scenes and {len(captions)} captions, first {captions[0]!r}")
    joined = {name: torch.cat(parts) for name, parts in latents.items()}
    context = torch.cat([piece.context[:, short] for piece in pieces]).bfloat16()
    return Data(
        joined.pop("picture"),
        {kind: joined[kind] for kind in KINDS},
        context,
        torch.cat([piece.pooled for piece in pieces]),
        (empty.context[:, short].bfloat16(), empty.pooled),
    )


def _encoded(vae: VAE, pictures: Tensor) -> Tensor:
    shaped = (2 * pictures - 1).bfloat16().contiguous(memory_format=torch.channels_last)
    return vae.encode(shaped).mode().contiguous().half()


class Trainer:
    """A net in training, beside the frozen transformer."""

    def __init__(self, net: ControlNet, transformer: MMDiT, recipe: ControlRecipe) -> None:
        self.net, self.recipe = net, recipe
        self.transformer = transformer
        width, patch = net.config.hidden_size, net.config.patch_size
        self.reader = nn.Linear(width, 16 * patch**2).to(transformer.pos_embed.device)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The noised latents, the timesteps, and the tokens that the net gets."""
        x = noised(batch.x0, batch.noise, batch.t)
        tokens = self.transformer.x_embedder(x.bfloat16()) + self.transformer.cropped_pos_embed(*x.shape[2:])
        return x, 1000 * batch.t, tokens

    def residuals(self, batch: Batch, x: Tensor, timestep: Tensor, tokens: Tensor) -> list[Tensor]:
        """Return the residuals that the net adds."""
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x, timestep, batch.context, batch.pooled, batch.hint, tokens.float())

    def alone(self, batch: Batch) -> Tensor:
        """The loss of the first stage: the picture's latent, read from what the last block gives."""
        seen: list[Tensor] = []
        block = self.net.transformer_blocks[-1]
        hook = block.register_forward_hook(lambda _, args, out: seen.append(out[1]))
        try:
            self.residuals(batch, *self.inputs(batch))
        finally:
            hook.remove()
        said = self.transformer.unpatchify(self.reader(seen[0].float()), *batch.x0.shape[2:])
        return F.mse_loss(said, batch.x0)

    def together(self, batch: Batch, last: bool) -> Tensor:
        """The velocity loss with the net's residuals; no gradient goes through the text, which saves a third."""
        model = self.transformer
        x, timestep, tokens = self.inputs(batch)
        (residual,) = self.residuals(batch, x, timestep, tokens)
        c = model.t_embedder(timestep) + model.y_embedder(batch.pooled.bfloat16())
        image, context = tokens, model.context_embedder(batch.context)
        for i, block in enumerate(model.joint_blocks):
            context, image = block(context.detach(), image, c)
            if last or i < len(model.joint_blocks) - 1:
                image = image + residual.bfloat16()
        velocity = model.unpatchify(model.final_layer(image, c), *x.shape[2:]).float()
        return F.mse_loss(velocity, batch.noise - batch.x0)


def new_net(kind: ControlKind, transformer: MMDiT) -> ControlNet:
    """A net of one block for the embedded model, whose residual is 0."""
    return control.new_net(transformer, 1, kind)


def train(
    folder: Path,
    seconds: float,
    recipe: ControlRecipe | None = None,
    *,
    device: str = "cpu",
    model: Path = EMBEDDED,
    start_from: Path | None = None,
) -> dict[ControlKind, Path]:
    """Train both nets; returns their files, in official names.

    Args:
        folder: of states, log and nets.
        seconds: of the processor on a CPU, of the clock on a GPU.
        recipe: None is the device's.
        device: of the training.
        model: the folder of the model that the nets are for.
        start_from: a folder of nets of an earlier run, which are trained further without the first stage.
    """
    recipe = recipe or (ControlRecipe() if device == "cpu" else GPU)
    journal, ticks = Journal(folder), time.process_time if device == "cpu" else time.monotonic
    started = ticks()
    torch.manual_seed(recipe.seed)
    pipe = Pipeline.from_pretrained(model, device=device, dtype=torch.float32)
    state: dict[str, Any] = (
        torch.load(folder / _STATE, map_location="cpu") if (folder / _STATE).exists() else {"done": 0.0}
    )
    earlier: float = state["done"]  # seconds of runs before this one

    def clock() -> float:
        return earlier + ticks() - started

    if not (folder / _DATA).exists():
        save_whole(vars(make_data(pipe, recipe, journal)), folder / _DATA)
        state |= {"begun": clock(), "done": clock()}
        save_whole(state, folder / _STATE)
    data, begun = Data(**torch.load(folder / _DATA, map_location="cpu")).to(pipe.device), float(state.get("begun", 0.0))
    left = max(seconds - begun, 1e-3)  # for the three stages
    transformer = pipe.transformer.bfloat16().requires_grad_(False)
    ends = {"alone": 0.0 if start_from else recipe.alone_share, "canny": recipe.alone_share + recipe.canny_share}
    start, found, before = 0.0, dict[ControlKind, Path](), (clock() - begun) / left
    for stage, end in (*ends.items(), ("depth", 1.0)):
        kind: ControlKind = "depth" if stage == "depth" else "canny"
        if before >= end and (stage == "alone" or net_file(folder, kind).exists()):  # an earlier run ended this stage
            found |= {kind: net_file(folder, kind)} if stage != "alone" else {}
            start = end
            continue
        trainer = Trainer(new_net(kind, transformer).to(pipe.device), transformer, recipe)
        if "net" in state and (start_from is None or state["stage"] == stage):
            trainer.net.load_state_dict(state["net"])
        elif start_from is not None:
            given = load_controlnet(net_file(start_from, kind), dtype=torch.float32)
            trainer.net.load_state_dict(given.state_dict())
        rounds = _rounds(lambda: (clock() - begun) / left, start, end)
        _stage(trainer, stage, kind, data, rounds, _Keeper(state, folder / _STATE, clock, journal, recipe))
        if stage != "alone":
            found[kind] = write_net(trainer.net, kind, folder)
        start = end
    return found


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
    journal: Journal
    recipe: ControlRecipe

    def keep(self, net: nn.Module, stage: str) -> None:
        """Write everything that is needed to resume the run."""
        weights = {name: tensor.cpu().clone() for name, tensor in net.state_dict().items()}
        self.state |= {"net": weights, "stage": stage, "done": self.clock()}
        save_whole(self.state, self.path)


def _stage(
    trainer: Trainer, stage: str, kind: ControlKind, data: Data, rounds: Iterator[tuple[int, float]], keeper: _Keeper
) -> None:
    """Train one stage; at its end the net holds its average."""
    recipe, net = keeper.recipe, trainer.net
    alone = stage == "alone"
    weights = [*net.parameters(), *(trainer.reader.parameters() if alone else ())]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.01)
    ema, losses = Ema(net, recipe.ema), list[Tensor]()
    log, save = Every(recipe.log_seconds), Every(recipe.save_seconds)
    device = next(net.parameters()).device
    g, rng = torch.Generator(device).manual_seed(recipe.seed + 1 + STAGES.index(stage)), random.Random(recipe.seed)
    for step, fraction in rounds:
        rate = learning_rate(fraction, step, peak=recipe.rate, warmup=recipe.warmup, decay=recipe.decay)
        set_rate(optimizer, rate)
        batch = data.draw(kind, recipe.alone_batch if alone else recipe.batch, recipe, g)
        last = rng.random() >= recipe.without_last
        loss = trainer.alone(batch) if alone else trainer.together(batch, last)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        ema.update()
        losses.append(loss.detach())
        if log.due():
            keeper.journal.row(stage, step=step, done=fraction, loss=mean_of(losses), rate=rate)
            losses = []
        if save.due():
            keeper.keep(net, stage)
    ema.write_to(net)
    keeper.keep(net, stage)


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
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    given = {"device": options.device, "model": options.model, "start_from": options.start_from}
    train(options.folder, options.seconds, **given)


if __name__ == "__main__":
    main()
