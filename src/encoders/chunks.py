"""Prompts to rows of token ids under `TextRules`: what is tokenized by itself, what is cut, where a chunk ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from encoders.rules import TextRules
from encoders.tokenize import CLIPTokenizer, T5Tokenizer
from encoders.weighting import Segment, plain_segment, weighted_segments

_WHOLE_WORD = 8  # tokens from which on a word may be split between two chunks (R other_impls.py, C comfy/sd1_clip.py)


class Token(NamedTuple):
    """An id, the characters `prompt[start:stop]` that it stands for (none for both ends), and its weight."""

    id: int
    start: int = 0
    stop: int = 0
    weight: float = 1.0


class Cut(NamedTuple):
    """What was not read: up to which limit text was, in words, and the text after it."""

    limit: str
    text: str


class Reading(NamedTuple):
    """What an encoder reads of a prompt."""

    prompt: str
    chunks: list[list[Token]]  # at least one; without ends and padding
    cuts: list[Cut]

    def first(self, count: int, limit: str) -> Reading:
        """The first chunks; the rest, if there is one, is a cut."""
        lost = [token for chunk in self.chunks[count:] for token in chunk]
        cuts = [Cut(limit, self.prompt[lost[0].start :])] if lost else []
        return Reading(self.prompt, self.chunks[:count], self.cuts + cuts)


def read(prompt: str, tokenizer: CLIPTokenizer | T5Tokenizer, rules: TextRules) -> Reading:
    """What an encoder with this tokenizer reads of a prompt: one chunk or more of CLIP, one of T5.

    Raises:
        ValueError: a weight is to be applied that is not finite.
    """
    return (_read_clip if isinstance(tokenizer, CLIPTokenizer) else _read_t5)(prompt, tokenizer, rules)


def to_the_shorter(one: Reading, other: Reading, length: int) -> tuple[Reading, Reading]:
    """As many chunks, of `length` tokens, of one tower as of the other."""
    count = min(len(one.chunks), len(other.chunks))
    limit = f"{count * length} tokens, as the other tower does"
    return one.first(count, limit), other.first(count, limit)


@dataclass(frozen=True)
class Rows:
    """Readings of a batch of prompts as rows of ids, `chunks` of them for each prompt.

    A prompt of fewer chunks has empty ones at its end, and T5 is padded to the longest prompt: the references encode
    one prompt at a time, and so does who wants exactly their numbers for prompts of different lengths.
    """

    tokens: list[list[Token]]  # with ends, without padding; one list per row
    empty: list[Token]  # the row of the empty prompt
    chunks: int
    length: int
    pad: int

    @classmethod
    def of(cls, readings: Sequence[Reading], tokenizer: CLIPTokenizer | T5Tokenizer, pad: int, length: int) -> Rows:
        """Put ends around each chunk and fill up to `length`, or to the longest."""
        head = [Token(tokenizer.bos)] if isinstance(tokenizer, CLIPTokenizer) else []
        count = max(len(reading.chunks) for reading in readings)
        chunks = [chunk for one in readings for chunk in one.chunks + [[]] * (count - len(one.chunks))]
        rows = [[*head, *chunk, Token(tokenizer.eos)] for chunk in chunks]
        return cls(rows, [*head, Token(tokenizer.eos)], count, max(length, *map(len, rows)), pad)

    @property
    def has_weights(self) -> bool:
        """Whether any weight is not 1."""
        return any(token.weight != 1 for row in self.tokens for token in row)

    def ids(self) -> list[list[int]]:
        """[rows, length]; where there are weights, with one more row, the empty prompt's."""
        rows = [*self.tokens, self.empty] if self.has_weights else self.tokens
        return [[token.id for token in row] + [self.pad] * (self.length - len(row)) for row in rows]

    def weights(self) -> list[list[float]]:
        """[rows, length]."""
        return [[token.weight for token in row] + [1.0] * (self.length - len(row)) for row in self.tokens]

    def placed(self, prompt: int) -> list[tuple[int, Token]]:
        """The tokens of a prompt, each with its place among all of its rows."""
        rows = self.tokens[prompt * self.chunks : (prompt + 1) * self.chunks]
        return [(i * self.length + j, token) for i, row in enumerate(rows) for j, token in enumerate(row)]


def _read_clip(prompt: str, tokenizer: CLIPTokenizer | T5Tokenizer, rules: TextRules) -> Reading:
    groups = _groups(prompt, tokenizer, rules)
    if rules.long_clip == "cut":
        groups = [_joined(groups)]
    reading = Reading(prompt, _packed(groups, rules.clip_length - 2), [])
    return reading if rules.long_clip == "chunks" else reading.first(1, f"{rules.clip_length} tokens")


def _read_t5(prompt: str, tokenizer: CLIPTokenizer | T5Tokenizer, rules: TextRules) -> Reading:
    text = prompt[: rules.t5_characters]
    cuts = [] if text == prompt else [Cut(f"{rules.t5_characters} characters", prompt[len(text) :])]
    tokens = _joined(_groups(text, tokenizer, rules))
    if rules.long_t5 == "keep":
        return Reading(text, [tokens], cuts)
    return Reading(text, _packed([tokens], rules.t5_length - 1), cuts).first(1, f"{rules.t5_length} tokens")


def _groups(prompt: str, tokenizer: CLIPTokenizer | T5Tokenizer, rules: TextRules) -> list[list[Token]]:
    """The tokens of each stretch of the prompt that is tokenized by itself."""
    head = 1 if isinstance(tokenizer, CLIPTokenizer) else 0
    groups = []
    for text, weight, at in _units(prompt, rules):
        tokens = tokenizer.encode(text)
        inner = list(zip(tokens.ids, tokens.offsets, strict=True))[head:-1]
        groups.append([Token(index, at[start], at[stop], weight) for index, (start, stop) in inner])
    return groups


def _units(prompt: str, rules: TextRules) -> Iterable[Segment]:
    segments = [plain_segment(prompt)] if rules.weights == "literal" else weighted_segments(prompt)
    if rules.weights == "ignored":
        segments = [segment._replace(weight=1.0) for segment in segments]
    for text, weight, _ in segments:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {text!r} in the prompt must be a finite number, got {weight}")
    return (word for segment in segments for word in segment.words()) if rules.split_words else segments


def _packed(groups: Iterable[list[Token]], room: int) -> list[list[Token]]:
    """Chunks of at most `room` tokens; a group of less than 8 that does not fit goes to the next chunk whole."""
    chunks: list[list[Token]] = [[]]
    for group in groups:
        rest = group
        while len(rest) > (free := room - len(chunks[-1])):
            if len(rest) >= min(_WHOLE_WORD, room + 1):
                chunks[-1] += rest[:free]
                rest = rest[free:]
            chunks.append([])
        chunks[-1] += rest
    return chunks


def _joined(groups: Iterable[list[Token]]) -> list[Token]:
    return [token for group in groups for token in group]
