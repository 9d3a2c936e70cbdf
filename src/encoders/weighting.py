"""Weights in prompts, as ComfyUI reads and applies them (`comfy/sd1_clip.py`).

`(text)` multiplies the weight of a text by 1.1, once more for each bracket around it. `(text:1.2)` sets the weight,
whatever brackets are around it. `\\(` and `\\)` are brackets of the text. `[text]` and `BREAK` have no meaning.
Reading takes time and memory in proportion to the length of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_ESCAPED = "\0"  # replaces brackets that are text while brackets are matched
_TOKEN = re.compile("[():]")


class Segment(NamedTuple):
    """A stretch of a prompt that has one weight."""

    text: str  # without the backslashes of escapes
    weight: float
    at: Sequence[int]  # where each character of `text` starts in the prompt, and where the last one ends

    def words(self) -> Iterator[Segment]:
        """Split the segment at spaces and line feeds, which belong to no word."""
        for word in re.finditer(r"[^ \n]+", self.text):
            yield Segment(word.group(), self.weight, self.at[word.start() : word.end() + 1])


def plain_segment(prompt: str) -> Segment:
    """Give the whole prompt weight 1; its brackets and backslashes are text."""
    return Segment(prompt, 1.0, range(len(prompt) + 1))


def weighted_segments(prompt: str) -> list[Segment]:
    """Split a prompt into the stretches of one weight; a bracket without a partner stays in the text.

    A closing bracket without a partner also makes the next opening bracket text, because ComfyUI counts depth and lets
    it become negative: "a) (b:2)" has no weight.
    """
    pieces = re.findall(r"\\[()]|.", prompt, flags=re.DOTALL)
    at = tuple(accumulate(map(len, pieces), initial=0))
    text = "".join(piece[-1] for piece in pieces)
    bare = "".join(piece if len(piece) == 1 else _ESCAPED for piece in pieces)
    return [Segment(text[start:stop], weight, at[start : stop + 1]) for start, stop, weight in _stretches(bare)]


class _Brackets(NamedTuple):
    """The brackets of a text, by position."""

    closing: dict[int, int]  # of an opening bracket, its partner
    colon: dict[int, int]  # of a closing bracket, the colon before it with neither bracket nor colon between
    text: set[int]  # opening brackets that are text because a closing one came too early

    @classmethod
    def of(cls, text: str) -> _Brackets:
        """Match all brackets of a text in one pass."""
        found, waiting, early, before = cls({}, {}, set()), list[int](), 0, -1
        for token in _TOKEN.finditer(text):
            i = token.start()
            if text[i] == "(" and early:
                found.text.add(i)
                early -= 1
            elif text[i] == "(":
                waiting.append(i)
            elif text[i] == ")":
                if before >= 0 and text[before] == ":":
                    found.colon[i] = before
                if waiting:
                    found.closing[waiting.pop()] = i
                else:
                    early += 1
            before = i
        return found


def _stretches(text: str) -> Iterator[tuple[int, int, float]]:
    """Yield start, stop and weight of each stretch, in order."""
    brackets = _Brackets.of(text)
    waiting = [(0, len(text), 1.0, True)]  # the next one is last; True: brackets in it are still to be read
    while waiting:
        start, stop, weight, is_open = waiting.pop()
        if is_open:
            items = [(*item, weight, False) for item in _items(text, brackets, start, stop)]
            waiting += reversed(items)
        elif text[start] == "(" and text[stop - 1] == ")":
            waiting.append((*_inside(text, brackets, start + 1, stop - 1, weight), True))
        else:
            yield start, stop, weight


def _items(text: str, brackets: _Brackets, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the outermost brackets with what they hold, and the text before, between and after them.

    An opening bracket whose partner is outside begins an item that reaches to the end.
    """
    first = at = start
    while (opening := text.find("(", at, stop)) >= 0:
        at = opening + 1
        if opening in brackets.text:
            continue
        if opening > first:
            yield first, opening
        closing = brackets.closing.get(opening, stop)
        if closing >= stop:
            yield opening, stop
            return
        yield opening, closing + 1
        first = at = closing + 1
    if first < stop:
        yield first, stop


def _inside(text: str, brackets: _Brackets, start: int, stop: int, weight: float) -> tuple[int, int, float]:
    """Start and stop of what a bracket holds without its number, and the weight there; `stop` closes the bracket."""
    colon = brackets.colon.get(stop, -1)
    number = _number(text[colon + 1 : stop]) if colon > start else None
    if number is None:  # a colon that is there belongs to the text
        return start, stop, weight * 1.1
    return start, colon, number


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def weighted(
    z: Float[Tensor, "b n d"], empty: Float[Tensor, "n d"], weights: Float[Tensor, "b n"]
) -> Float[Tensor, "b n d"]:
    """Compute (z - empty) w + empty for each token, in float32 or wider; a token of weight 1 stays as it is.

    Args:
        z: Output of an encoder for a batch of prompts.
        empty: Output of the same encoder for the empty prompt, padded to the same length.
        weights: The weight of each token.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    w, base = weights.to(wide).to(z.device).unsqueeze(-1), empty.to(wide)
    return torch.where(w == 1, z, ((z.to(wide) - base) * w + base).to(z.dtype))
