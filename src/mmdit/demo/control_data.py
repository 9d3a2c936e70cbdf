"""What ControlNets of the embedded model learn from: scenes, their hints and captions, encoded, in random batches.

Pictures are the mode of the VAE's distribution; hints are encoded as drawings encode them. Canny edges are those of any
colour channel, and a depth map is the brighter, the larger an object is. Most captions leave shapes and positions out.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from encoders.vae import DiagonalGaussian
from mmdit.demo.captions import caption
from mmdit.demo.control_recipe import ControlRecipe
from mmdit.demo.grammar import NUMBERS
from mmdit.demo.scenes import SIZES, Scene, Scenes, render, sample
from mmdit.demo.shapes import SHAPES
from mmdit.models.controlnet import ControlKind
from mmdit.pictures.edges import canny
from mmdit.pipeline.control_inputs import HintRules, hint_rules
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import PROFILES
from mmdit.runtime.precision import full_float32
from mmdit.training import control
from mmdit.training.journal import Journal
from samplers.training import logit_normal, shifted

__all__ = ["Batch", "Data", "depth_map", "encoded", "hints", "make_data", "scenes_of", "vague_caption"]

HARD = ("cross", "ring")  # shapes that, where they are small, the VAE blurs in hints
_TOKENS = 77  # of CLIP
_NEAREST = SIZES["large"][1]


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
