"""What ControlNets of the embedded model are worth: `python -m mmdit.demo.evaluate_control NET.safetensors ...`.

Scenes that no training saw are drawn from their hint alone: the caption says colours, number and background, and leaves
shapes and positions out. The pictures are read by `mmdit.demo.score`. Reported is the share of the scenes' statements
about shapes (an object of this shape exists) and positions (two objects have this relation) that hold.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch

from mmdit.checkpoints.load import load_controlnet
from mmdit.demo.captions import clear_relation
from mmdit.demo.control_data import hints, vague_caption
from mmdit.demo.grammar import Statement, What
from mmdit.demo.scenes import Scene, render, sample
from mmdit.demo.score import accuracies, check, parse_batch
from mmdit.embedded import CANNY_NET, DEPTH_NET, EMBEDDED
from mmdit.models.controlnet import ControlNet
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import PROFILES

__all__ = ["evaluate_control", "main", "statements_of"]

SEED = 20_261_128  # seed of the scenes, which no training uses


def statements_of(scene: Scene) -> Iterator[Statement]:
    """Yield statements about a scene: each shape exists; the relation of two objects whose shapes each occur once."""
    shapes = [one.shape for one in scene.objects]
    for shape in dict.fromkeys(shapes):
        yield Statement("shape", What(shape=shape))
    for one, other in permutations([thing for thing in scene.objects if shapes.count(thing.shape) == 1], 2):
        if (relation := clear_relation(one, other)) is not None:
            yield Statement("relation", What(shape=one.shape), relation=relation, other=What(shape=other.shape))


@torch.no_grad()
def evaluate_control(
    pipe: Pipeline,
    net: ControlNet | None,
    count: int = 256,
    *,
    steps: int = 12,
    guidance: float = 4.5,
    batch: int = 32,
    t5_tokens: int | None = None,
) -> dict[str, tuple[float, int]]:
    """The share of statements that hold, and their number, by kind ("shape", "relation").

    Args:
        pipe: the embedded model.
        net: None draws from the captions alone, for comparison.
        count: drawings.
        steps, guidance: of each.
        batch: drawings at a time.
        t5_tokens: number of T5 tokens; None is the profile's number.
    """
    scenes, rng = sample(count, SEED), random.Random(SEED)
    verdicts = []
    for i in range(0, count, batch):
        some = scenes[i : i + batch]
        words = some.words()
        pictures = render(some)
        given: dict[str, Any] = {}
        if net is not None:
            assert net.config.kind is not None
            given = {"controlnet": net, "control_image": hints(net.config.kind, some, pictures)}
        drawn = pipe(
            [vague_caption(scene, rng) for scene in words],
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=t5_tokens,
            seed=list(range(i, i + len(words))),
            output_type="pt",
            **given,
        ).images
        parsed = parse_batch((drawn.float().cpu() * 255).round() / 255)
        verdicts += [
            {one: check(one, found) for one in statements_of(scene)} for scene, found in zip(words, parsed, strict=True)
        ]
    return accuracies(verdicts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: prints a Markdown table, a row for each profile, guidance and net."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("nets", type=Path, nargs="*", help="ControlNets of the embedded model (default: the shipped)")
    parser.add_argument("--without", action="store_true", help="a row of drawings from the captions alone, too")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.5])
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=["diffusers"])
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="of which model (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    nets: list[Path | None] = [None] if options.without else []
    nets += options.nets or [CANNY_NET, DEPTH_NET]
    columns = ("net", "profile", "guidance", "shape", "relation", "statements", "seconds")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")  # noqa: T201
    for profile, guidance, path in product(options.profiles, options.guidance, nets):
        print(_row(options, profile, guidance, path), flush=True)  # noqa: T201


def _row(options: argparse.Namespace, profile: str, guidance: float, path: Path | None) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    started = time.monotonic()
    given: dict[str, Any] = {"device": options.device, "dtype": torch.float32, "profile": profile}
    pipe = Pipeline.from_pretrained(options.model, **given)
    pipe.transformer.bfloat16()  # far faster on processors with bfloat16 matrix units; the VAE stays in float32
    net = None if path is None else load_controlnet(path, device=options.device, dtype=torch.bfloat16)
    found = evaluate_control(pipe, net, options.count, steps=options.steps, guidance=guidance)
    shares = " | ".join(f"{100 * found[kind][0]:.1f} %" for kind in ("shape", "relation"))
    counts = " + ".join(str(found[kind][1]) for kind in ("shape", "relation"))
    name = "none" if path is None else path.stem
    return f"| {name} | {profile} | {guidance:g} | {shares} | {counts} | {time.monotonic() - started:.0f} |"


if __name__ == "__main__":
    main()
