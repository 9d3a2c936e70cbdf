"""How well pictures are edited: `python -m mmdit.bench.edits --scenes 64`, on the embedded model.

    recolour    one object of a scene is drawn anew in another colour, by the mask and with keep_outside; the mask
                leaves out the other objects; a row for every combination of the given samplers, strengths and so on
    strength    scenes are drawn anew with the prompt of another scene: what is kept, what is drawn
    hires       prompts are drawn at 128 x 128, and again at 256 x 256 by a second pass
    inversion   scenes are inverted to noise and drawn again from it

Scenes are those of `mmdit.demo.scenes`, drawn by the computer; pictures are read by `mmdit.demo.score`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.bench.metrics import psnr
from mmdit.demo.captions import caption, inventory, prompts
from mmdit.demo.grammar import Statement, statements
from mmdit.demo.scenes import Scene, SceneObject, Scenes, render, sample
from mmdit.demo.score import accuracies, check, parse_batch, score_batch
from mmdit.demo.shapes import COLOURS
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.hires import Hires
from mmdit.pipeline.invert import Inverter
from mmdit.pipeline.pipeline import Pipeline
from mmdit.utils import markdown_table

SEED = 20_260_118
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Redraw:
    """How one object is drawn anew; the defaults are what the documentation recommends.

    `margin` is how many pixels stay around the boxes of the other objects, and `reach` how many pixels around its own
    box the object may take; without it, all that is free.
    """

    sampler: str = "euler"
    strength: float = 0.7
    guidance: float = 4.5
    steps: int = 20
    margin: float = 3.0
    reach: float | None = None


REDRAW = Redraw()


def free_of(scene: Scene, place: int, how: Redraw = REDRAW, side: int = 128) -> Tensor:
    """The mask [side, side] in which one object may be drawn: everything but the boxes of the others, and a margin."""
    found = torch.ones(side, side) if how.reach is None else _box(scene.objects[place], how.reach, side)
    for one in (one for i, one in enumerate(scene.objects) if i != place):
        found = found * (1 - _box(one, how.margin, side))
    return found


def _box(one: SceneObject, margin: float, side: int) -> Tensor:
    """1 in the box of an object and so many pixels around it, [side, side]."""
    half = one.across / 2 * 1.14 + margin  # a box tilted by 8 degrees is 1.13 times as wide
    rows, columns = ((torch.arange(side) + 0.5 - middle).abs() <= half for middle in (one.y, one.x))
    return (rows[:, None] & columns).float()


def different(scenes: Scenes) -> list[int]:
    """The scenes of two objects or more, no two of which share shape and colour."""
    found = [[(one.shape, one.colour) for one in scene.objects] for scene in scenes.words()]
    return [i for i, kinds in enumerate(found) if 1 < len(kinds) == len(set(kinds))]


def recoloured(scene: Scene, rng: random.Random) -> tuple[Scene, int]:
    """The scene with one object in a colour that no object has, and which object."""
    place = rng.randrange(len(scene.objects))
    colour = rng.choice([name for name in COLOURS if name not in {one.colour for one in scene.objects}])
    objects = list(scene.objects)
    objects[place] = replace(objects[place], colour=colour)
    return Scene(scene.background, tuple(objects)), place


def claims(scene: Scene, places: Sequence[int], *, ground: bool) -> list[Statement]:
    """What a caption of some objects of a scene states about each of them, and of the background."""
    texts = [f"a {one.size} {one.colour} {one.shape}" for one in (scene.objects[i] for i in places)]
    found = [one for text in texts for one in statements(text)]
    return found + ([Statement("background", background=scene.background)] if ground else [])


def drawn(pipe: Pipeline, texts: Sequence[str], each: Callable[[slice], dict[str, Any]], **how: Any) -> Tensor:
    """Pictures of prompts, [b, 3, h, w] rounded to 8 bits, a few at once; `each` gives what goes with some of them."""
    found = []
    at_once = 16 if pipe.device.type == "cpu" else 128
    for first in range(0, len(texts), at_once):
        part = slice(first, first + at_once)
        seeds = list(range(first, first + len(texts[part])))
        pictures = pipe(list(texts[part]), seed=seeds, output_type="pt", progress=False, **how, **each(part)).images
        found.append((pictures.float().cpu() * 255).round() / 255)
    return torch.cat(found)


@dataclass(frozen=True)
class Recolouring:
    """Scenes, each with one object that is to have another colour."""

    pictures: Tensor  # [n, 3, h, w], before
    pairs: list[tuple[Scene, int]]  # the scene that is wanted, and which object is new

    @classmethod
    def of(cls, scenes: int) -> Recolouring:
        every = sample(8 * scenes, SEED)
        batch, rng = every[torch.tensor(different(every)[:scenes])], random.Random(SEED)
        return cls(render(batch), [recoloured(scene, rng) for scene in batch.words()])

    def redrawn(self, pipe: Pipeline, how: Redraw) -> tuple[Tensor, Tensor]:
        """The pictures drawn anew, and their masks, [n, 1, h, w]; the boxes of a scene are the same in any colour."""
        masks = torch.stack([free_of(*pair, how) for pair in self.pairs])
        found = drawn(
            pipe,
            [inventory(scene) for scene, _ in self.pairs],
            lambda part: {"image": list(self.pictures[part]), "mask_image": list(masks[part])},
            sampler=how.sampler,
            strength=how.strength,
            guidance_scale=how.guidance,
            num_inference_steps=how.steps,
        )
        return found, masks.unsqueeze(1)

    def shares(self, found: Tensor) -> list[str]:
        """The shares of statements about the other objects and the background, and about the new object, that hold."""
        others, new = [], []
        for (scene, place), parsed in zip(self.pairs, parse_batch(found), strict=True):
            rest = [i for i in range(len(scene.objects)) if i != place]
            others += [check(one, parsed) for one in claims(scene, rest, ground=True)]
            new += [check(one, parsed) for one in claims(scene, [place], ground=False)]
        return [f"{_share(others):.1%}", f"{_share(new):.1%}"]


def recolour(pipe: Pipeline, scenes: int, ways: Sequence[Redraw] = (REDRAW,), **how: Any) -> Iterator[list[Any]]:
    """The share of statements about the other objects, and about the new one, that hold after it was drawn anew."""
    del how
    work = Recolouring.of(scenes)
    for way in ways:
        whole, inside = work.redrawn(pipe, way)
        kept = inside * whole + (1 - inside) * work.pictures
        yield [*astuple(way), len(work.pairs), *work.shares(whole), *work.shares(kept)]


def strength(pipe: Pipeline, scenes: int, ways: Sequence[Redraw], **how: Any) -> Iterator[list[Any]]:
    """What is kept of scenes, and what is drawn of the prompts of others, by strength."""
    del ways
    batch, rng = sample(scenes, SEED + 1), random.Random(SEED + 1)
    pictures, texts = render(batch), [caption(scene, rng) for scene in batch.words()]
    others = texts[1:] + texts[:1]
    with torch.no_grad():
        coded = pipe.decode(pipe.encode_image(list(pictures))).float().cpu()
    kept, new = (_share_of(score_batch(coded, said)) for said in (texts, others))
    yield ["0: the VAE alone", len(texts), f"{kept:.1%}", f"{new:.1%}"]
    for value in STRENGTHS:
        found = drawn(pipe, others, lambda part: {"image": list(pictures[part])}, strength=value, **how)
        kept, new = (_share_of(score_batch(found, said)) for said in (texts, others))
        yield [f"{value:g}", len(texts), f"{kept:.1%}", f"{new:.1%}"]


def hires(pipe: Pipeline, scenes: int, ways: Sequence[Redraw], **how: Any) -> Iterator[list[Any]]:
    """What is drawn of prompts, without and with a second pass to twice the size; read at 128 x 128."""
    del ways
    texts = prompts(scenes, SEED + 2, held_out=False)
    passes: dict[str, Hires | None] = {"none": None}
    half = Hires(scale=2.0, filter="lanczos", space="pixel")
    for one in (Hires(scale=2.0, filter="bislerp"), half, replace(half, strength=0.1)):
        passes[f"{one.space}, {one.filter}, strength {one.strength:g}"] = one
    for name, second in passes.items():
        found = drawn(pipe, texts, lambda part: {}, hires=second, **how)
        small = F.interpolate(found, size=(128, 128), mode="area")
        yield [name, f"{found.shape[3]} x {found.shape[2]}", len(texts), f"{_share_of(score_batch(small, texts)):.1%}"]


def inversion(pipe: Pipeline, scenes: int, ways: Sequence[Redraw], **how: Any) -> Iterator[list[Any]]:
    """How close a scene is to its redrawing from the noise that inversion found."""
    del how, ways
    batch, rng = sample(scenes, SEED + 3), random.Random(SEED + 3)
    pictures, texts = render(batch), [caption(scene, rng) for scene in batch.words()]
    cond = pipe.encode(texts)
    runs: tuple[tuple[Inverter, int], ...] = (("euler", 10), ("euler", 28), ("heun", 10), ("heun", 28))
    for sampler, steps in runs:
        found = pipe.invert(list(pictures), texts, num_inference_steps=steps, sampler=sampler, progress=False)
        again: dict[str, Any] = {"sigmas": found.falling, "sampler": sampler, "guidance_scale": 1.0, "add_noise": False}
        with torch.no_grad():
            *_, last = pipe.sample(cond, None, found.latents, **again)
            wanted, got = (pipe.decode(one).float() for one in (found.image, last.x))
        error = float((last.x - found.image).norm() / found.image.norm())
        yield [
            sampler,
            steps,
            len(texts),
            f"{error:.4f}",
            f"{float(psnr(got, wanted).mean()):.1f}",
            f"{float(found.latents.std()):.2f}",
        ]


TASKS: dict[str, tuple[Callable[..., Iterator[list[Any]]], list[str]]] = {
    "recolour": (
        recolour,
        [*REDRAW.__dataclass_fields__, "scenes", "others, background", "new object", "others, kept", "new, kept"],
    ),
    "strength": (strength, ["strength", "scenes", "statements kept", "statements of the prompt"]),
    "hires": (hires, ["second pass", "size", "prompts", "statements of the prompt"]),
    "inversion": (
        inversion,
        ["sampler", "steps", "scenes", "error of the latent", "PSNR, dB", "deviation of the noise"],
    ),
}


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def _share_of(verdicts: Sequence[dict[Statement, bool]]) -> float:
    """The share of all statements that hold."""
    by_kind = accuracies(verdicts)
    return sum(share * count for share, count in by_kind.values()) / sum(count for _, count in by_kind.values())


def main() -> int:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=64, help="pictures of each row")
    parser.add_argument("--steps", type=int, nargs="+", default=[REDRAW.steps])
    parser.add_argument("--guidance", type=float, nargs="+", default=[REDRAW.guidance])
    for name, what in (("sampler", str), ("strength", float), ("margin", float), ("reach", float)):
        parser.add_argument(
            f"--{name}",
            type=what,
            nargs="+",
            default=[getattr(REDRAW, name)],
            help="of recolour (default: %(default)s)",
        )
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--profile", default="comfyui")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="model folder (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.task != ["recolour"] and len(options.steps) + len(options.guidance) > 2:
        parser.error("several --steps or --guidance are rows of recolour; give --task recolour")
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    pipe = Pipeline.from_pretrained(options.model, device=options.device, dtype=dtype, profile=options.profile)
    ways = [
        Redraw(*one) for one in itertools.product(*(getattr(options, name) for name in REDRAW.__dataclass_fields__))
    ]
    how = {"num_inference_steps": options.steps[0], "guidance_scale": options.guidance[0]}
    for name in options.task:
        task, head = TASKS[name]
        start, rows = time.monotonic(), []
        for row in task(pipe, options.scenes, ways, **how):
            sys.stderr.write(f"{name}: {', '.join(map(str, row))} ({time.monotonic() - start:.0f} s)\n")
            rows.append(row)
        sys.stdout.write("\n".join(markdown_table(head, rows)) + "\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
