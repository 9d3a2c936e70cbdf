"""Weights in prompts, as ComfyUI reads and applies them (`comfy/sd1_clip.py`).

`(text)` multiplies the weight by 1.1, nested each time anew; `(text:1.2)` sets it, whatever is around; `\\(` and `\\)`
are brackets of the text. `[text]` and `BREAK` mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_ESCAPED = "\0"  # stands for a bracket that is text while brackets are matched


class Segment(NamedTuple):
    """A stretch of a prompt that has one weight."""

    text: str  # without the backslashes of escapes
    weight: float
    at: Sequence[int]  # where each character of `text` starts in the prompt, and where the last one ends

    def words(self) -> Iterator[Segment]:
        """What is between spaces and line feeds."""
        for word in re.finditer(r"[^ \n]+", self.text):
            yield Segment(word.group(), self.weight, self.at[word.start() : word.end() + 1])


def plain_segment(prompt: str) -> Segment:
    """The whole prompt at weight 1, its brackets and backslashes as they are."""
    return Segment(prompt, 1.0, range(len(prompt) + 1))


def weighted_segments(prompt: str) -> list[Segment]:
    """The stretches of a prompt with their weights; brackets that match no other stay in the text.

    One that closes nothing makes the next opening one text too, for they are counted: "a) (b:2)" has no weight.
    """
    pieces = re.findall(r"\\[()]|.", prompt, flags=re.DOTALL)
    at = tuple(accumulate(map(len, pieces), initial=0))
    text = "".join(piece[-1] for piece in pieces)
    bare = "".join(piece if len(piece) == 1 else _ESCAPED for piece in pieces)
    return [Segment(text[start:stop], weight, at[start : stop + 1]) for start, stop, weight in _stretches(bare)]


def _stretches(text: str) -> Iterator[tuple[int, int, float]]:
    """Start, stop and weight of what is between brackets, in order."""
    waiting = [(0, len(text), 1.0, True)]  # the next one last; True: brackets in it are still to be matched
    while waiting:
        start, stop, weight, is_open = waiting.pop()
        if is_open:
            items = [(*item, weight, False) for item in _items(text, start, stop)]
            waiting += reversed(items)
        elif text[start] == "(" and text[stop - 1] == ")":
            waiting.append((*_inside(text, start + 1, stop - 1, weight), True))
        else:
            yield start, stop, weight


def _items(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The outermost brackets with what they hold, and what is before, between and after them."""
    depth, first = 0, start
    for i in range(start, stop):
        if text[i] == "(":
            if depth == 0 and i > first:
                yield first, i
                first = i
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                yield first, i + 1
                first = i + 1
    if first < stop:
        yield first, stop


def _inside(text: str, start: int, stop: int, weight: float) -> tuple[int, int, float]:
    """What a bracket holds without its number, and the weight there."""
    colon = text.rfind(":", start, stop)
    if colon > start:
        try:
            return start, colon, float(text[colon + 1 : stop])
        except ValueError:  # a colon of the text
            pass
    return start, stop, weight * 1.1


def weighted(
    z: Float[Tensor, "b n d"], empty: Float[Tensor, "n d"], weights: Float[Tensor, "b n"]
) -> Float[Tensor, "b n d"]:
    """(z - empty) w + empty for each token, computed in float32 at least; a token of weight 1 stays as it is.

    Args:
        z: an encoder's output.
        empty: the same encoder's output for the empty prompt, as long.
        weights: one for each token.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    w, base = weights.to(wide).to(z.device).unsqueeze(-1), empty.to(wide)
    return torch.where(w == 1, z, ((z.to(wide) - base) * w + base).to(z.dtype))
