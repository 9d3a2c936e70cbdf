"""Whether words point at their objects: `python -m mmdit.bench.localise --prompts 200`.

The embedded model draws prompts while `mmdit.attention_maps` watches their colour and shape words. The objects that
such a word means are found in the drawn picture. A word points at them where more of its map lies inside of them than
their share of the picture: the table gives share of map / share of area, 1 for a map that knows nothing of the word.
The same ratio for the other objects tells "points at its object" from "points at objects".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.bench.metrics import bootstrap
from mmdit.demo.captions import prompts as make_prompts
from mmdit.demo.evaluate import MAIN, SEED, draw
from mmdit.demo.grammar import plural
from mmdit.demo.shapes import COLOURS, SHAPES
from mmdit.demo.vision import masks, parse
from mmdit.inspection import plots
from mmdit.inspection.attention import Direction
from mmdit.inspection.attention_maps import AttentionMaps, attention_maps
from mmdit.inspection.words import Encoder, words_of
from mmdit.pipeline.pipeline import Pipeline
from mmdit.utils import markdown_table, write_text

DIRECTIONS: tuple[Direction, ...] = ("i2t", "t2i")
ENCODERS: tuple[Encoder, ...] = ("all", "clip", "t5")
KINDS = ("colour", "shape")
EXAMPLE = (
    "a large red circle above a large blue star and a small green square, on a white background",
    ("red", "circle", "blue", "star", "green", "square"),
    7,
)
_NOUNS = {form: shape for shape in SHAPES for form in (shape, plural(shape))}


class Place(NamedTuple):
    """How much of a patch belongs to the objects that a word means, and to the others: [rows, columns] each."""

    own: Tensor
    others: Tensor


@dataclass(frozen=True)
class Shares:
    """Measurements of one word in one picture.

    Shares of maps are [directions, encoders, blocks + 1]; the last block index is the mean map. Shares of the other
    objects are NaN where there are none.
    """

    prompt: int
    kind: str
    area: float
    inside: Tensor
    others_area: float
    inside_others: Tensor


@dataclass(frozen=True)
class Row:
    """A line of the table: share of map / share of area with the interval of 95 %, words of all prompts together."""

    direction: str
    encoder: str
    block: str
    kind: str
    own: tuple[float, float, float]
    others: tuple[float, float, float]
    words: int
    area: float  # share of the picture that the objects of a word cover, the mean


def means(word: str) -> tuple[str, str] | None:
    """What a word says of an object: ("colour", "red"), ("shape", "circle"); None where it says neither."""
    word = word.lower()
    if word in COLOURS:
        return "colour", word
    return ("shape", _NOUNS[word]) if word in _NOUNS else None


def places(picture: Tensor, words: Sequence[str], grid: tuple[int, int]) -> dict[str, Place]:
    """By word, where the objects of its colour or shape are in a picture [3, h, w]; without words that have none."""
    objects, pixels = parse(picture).objects, masks(picture)
    found = {}
    for word in words:
        said = means(word)
        own = [said is not None and getattr(one, said[0]) == said[1] for one in objects]
        if any(own):
            both = (pixels[torch.tensor(own) == side].any(0) for side in (True, False))
            found[word] = Place(*(F.adaptive_avg_pool2d(mask.float()[None], grid)[0] for mask in both))
    return found


def shares_of(maps: AttentionMaps, sample: int, prompt: int, word: str, place: Place) -> Shares:
    """Where the maps of a word lie, the mean over all passes."""
    every = torch.stack(
        [
            torch.stack([maps.word(word, encoder=e, direction=d)[:, :, sample].mean(0) for e in maps.encoders])
            for d in maps.directions
        ]
    ).double()  # directions encoders blocks rows columns
    every = torch.cat([every, every.mean(2, keepdim=True)], dim=2)
    total = every.sum((-1, -2))
    inside, others = ((every * mask).sum((-1, -2)) / total for mask in (place.own, place.others))
    said = means(word)
    assert said is not None
    others_area = float(place.others.mean())
    unknown = torch.full_like(others, float("nan"))
    return Shares(prompt, said[0], float(place.own.mean()), inside, others_area, others if others_area else unknown)


def localise(pipe: Pipeline, texts: Sequence[str], *, steps: int, batch: int) -> Iterator[Shares]:
    """Draw the prompts, each from the noise of its number, and measure every colour and shape word that was drawn."""
    setting = replace(MAIN, steps=steps)
    for first in range(0, len(texts), batch):
        some = texts[first : first + batch]
        said = {i: [word for word in words_of(text) if means(word)] for i, text in enumerate(some)}
        every = list(dict.fromkeys(word for words in said.values() for word in words))
        with attention_maps(pipe, every, direction=DIRECTIONS, encoder=ENCODERS, quadrants=False) as maps:
            (pictures,) = draw(pipe, some, range(first, first + len(some)), setting, len(some))
        for i, picture in enumerate(pictures.float() / 255):
            for word, place in places(picture, said[i], maps.grid).items():
                yield shares_of(maps, i, first + i, word, place)


def rows_of(found: Sequence[Shares]) -> list[Row]:
    """The table, by direction, encoder, block ("all": the mean map of all blocks) and kind of word."""
    if not found:
        raise ValueError("no object that a prompt names was found in any picture")
    blocks = [*range(found[0].inside.shape[-1] - 1), "all"]
    rows = []
    for d, direction in enumerate(DIRECTIONS):
        for e, encoder in enumerate(ENCODERS):
            for b, block in enumerate(blocks):
                for kind in KINDS:
                    some = [one for one in found if one.kind == kind]
                    own = [(one.prompt, float(one.inside[d, e, b]), one.area) for one in some]
                    others = [
                        (one.prompt, float(one.inside_others[d, e, b]), one.others_area)
                        for one in some
                        if one.others_area
                    ]
                    area = sum(one.area for one in some) / max(1, len(some))
                    rows.append(Row(direction, encoder, str(block), kind, _ratio(own), _ratio(others), len(some), area))
    return rows


def _ratio(items: Sequence[tuple[int, float, float]]) -> tuple[float, float, float]:
    """Share of map / share of area of all words together, and its interval; prompts are what is drawn again."""
    if not items:
        return (float("nan"),) * 3
    numbers = {prompt: place for place, prompt in enumerate(dict.fromkeys(item[0] for item in items))}
    sums = torch.zeros(len(numbers), 2, dtype=torch.float64)
    for prompt, inside, area in items:
        sums[numbers[prompt]] += torch.tensor([inside, area], dtype=torch.float64)

    def ratio(indices: Tensor) -> float:
        inside, area = sums[indices].sum(0)
        return float(inside / area)

    return ratio(torch.arange(len(sums))), *bootstrap(ratio, len(sums))


def markdown(rows: Sequence[Row]) -> str:
    """The table, a line for each direction, encoder and block."""
    cells = []
    table = {(row.direction, row.encoder, row.block, row.kind): row for row in rows}
    for direction, encoder, block in dict.fromkeys(key[:3] for key in table):
        both = [table[direction, encoder, block, kind] for kind in KINDS]
        values = [
            f"{value:.2f} ({low:.2f} to {high:.2f})" for row in both for value, low, high in (row.own, row.others)
        ]
        cells.append((direction, encoder, block, *values))
    titles = ("direction", "tokens", "block", "colour words", "other objects", "shape words", "other objects")
    lines = markdown_table(titles, cells)
    some = [table["i2t", "all", "all", kind] for kind in KINDS]
    counts = [f"{row.words} {row.kind} words, whose objects cover {100 * row.area:.1f} %" for row in some]
    lines += ["", "Share of map / share of area with intervals of 95 %, prompts drawn again.", f"{'; '.join(counts)}."]
    return "\n".join(lines)


def sheet(pipe: Pipeline, prompt: str, words: Sequence[str], seed: int, path: Path) -> None:
    """Draw a prompt, and save its picture with the maps of some words: a line for each block, and one for their mean.

    Args:
        pipe: the embedded model.
        prompt: the prompt to draw.
        words: Words of the prompt whose maps are shown.
        seed: Seed of the noise.
        path: Where the PNG is written.
    """
    with attention_maps(pipe, words) as maps:
        picture = pipe(prompt, seed=seed, output_type="np").images[0]
    side = picture.shape[0]
    lines = {f"block {block}": block for block in maps.blocks} | {"all blocks": None}
    found = {
        f"{word}, {name}": maps.upsampled(word, side, side, block=block, smooth=False)
        for name, block in lines.items()
        for word in words
    }
    figure = plots.heat_maps(picture, found, columns=len(words), title=prompt)
    figure.savefig(path, dpi=70)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mmdit.bench.localise", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="of held-out combinations")
    parser.add_argument("--steps", type=int, default=MAIN.steps)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    parser.add_argument("--picture", type=Path, help="instead, save a PNG of one prompt and the maps of its words")
    args = parser.parse_args(arguments)
    pipe = Pipeline.demo(device=args.device)
    if args.picture is not None:
        sheet(pipe, *EXAMPLE, args.picture)
        return 0
    texts = make_prompts(args.prompts, SEED, held_out=True)
    with torch.no_grad():
        rows = rows_of(list(localise(pipe, texts, steps=args.steps, batch=args.batch)))
    if args.output is not None:
        write_text(args.output, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(markdown(rows))  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
