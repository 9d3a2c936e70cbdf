"""Prompts to rows of token ids under `TextRules`: what is tokenized by itself, what is cut, where a chunk ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from encoders.rules import TextRules
from encoders.tokenize import CLIPTokenizer, T5Tokenizer
from encoders.weighting import Segment, plain_segment, weighted_segments

MAX_WEIGHT = 1000.0  # larger weights make the context overflow float16, and from about 1e38 on float32
_WHOLE_WORD = 8  # tokens from which on a word may be split between two chunks (R other_impls.py, C comfy/sd1_clip.py)


class Token(NamedTuple):
    """A token id, the characters `prompt[start:stop]` that it stands for (none for BOS and EOS), and its weight."""

    id: int
    start: int = 0
    stop: int = 0
    weight: float = 1.0


class Cut(NamedTuple):
    """A part of a prompt that an encoder does not read."""

    limit: str  # how much the encoder reads, such as "77 tokens"
    text: str  # the text after that


class Reading(NamedTuple):
    """What an encoder reads of a prompt."""

    prompt: str
    chunks: list[list[Token]]  # at least one; without BOS, EOS and padding
    cuts: list[Cut]

    def first(self, count: int, limit: str) -> Reading:
        """Keep the first `count` chunks; the others, if there are any, become a cut with this `limit`."""
        lost = next((token for chunk in self.chunks[count:] for token in chunk), None)
        cuts = [] if lost is None else [Cut(limit, self.prompt[lost.start :])]
        return Reading(self.prompt, self.chunks[:count], self.cuts + cuts)


def read(prompt: str, tokenizer: CLIPTokenizer | T5Tokenizer, rules: TextRules) -> Reading:
    """Tokenize a prompt for the encoder of a tokenizer: one chunk or more for CLIP, one for T5.

    Time and memory are bounded by `rules.max_characters`, whatever the length of the prompt.

    Raises:
        ValueError: the rules apply weights, and one is no number from -1000 to 1000.
    """
    text = prompt[: rules.max_characters]
    reading = (_read_clip if isinstance(tokenizer, CLIPTokenizer) else _read_t5)(text, tokenizer, rules)
    rest = prompt[len(text) :]
    if not rest.strip():
        return reading
    limit, cut = reading.cuts.pop() if reading.cuts else (f"{rules.max_characters} characters", "")
    return reading._replace(cuts=[*reading.cuts, Cut(limit, cut + rest)])


def to_the_shorter(one: Reading, other: Reading, length: int) -> tuple[Reading, Reading]:
    """Cut the readings of the two CLIP towers to equally many chunks, of `length` tokens each."""
    count = min(len(one.chunks), len(other.chunks))
    limit = f"{count * length} tokens, as the other tower does"
    return one.first(count, limit), other.first(count, limit)


@dataclass(frozen=True)
class Rows:
    """Readings of a batch of prompts as rows of ids, `chunks` of them for each prompt.

    A prompt of fewer chunks gets empty ones at its end, and T5 is padded to the longest prompt. The references encode
    one prompt at a time; to get exactly their numbers for prompts of different lengths, encode them one at a time.
    """

    tokens: list[list[Token]]  # with BOS and EOS, without padding; one list per row
    empty: list[Token]  # the row of the empty prompt
    chunks: int
    length: int
    pad: int

    @classmethod
    def of(cls, readings: Sequence[Reading], tokenizer: CLIPTokenizer | T5Tokenizer, pad: int, length: int) -> Rows:
        """Put BOS and EOS around each chunk, and pad all rows to `length` or to the longest row."""
        head = [Token(tokenizer.bos)] if isinstance(tokenizer, CLIPTokenizer) else []
        count = max(len(reading.chunks) for reading in readings)
        chunks = [chunk for one in readings for chunk in one.chunks + [[]] * (count - len(one.chunks))]
        rows = [[*head, *chunk, Token(tokenizer.eos)] for chunk in chunks]
        return cls(rows, [*head, Token(tokenizer.eos)], count, max(length, *map(len, rows)), pad)

    @property
    def has_weights(self) -> bool:
        """Whether any weight differs from 1."""
        return any(token.weight != 1 for row in self.tokens for token in row)

    def ids(self) -> list[list[int]]:
        """Token ids [rows, length]; where there are weights, the empty prompt is one more row at the end."""
        rows = [*self.tokens, self.empty] if self.has_weights else self.tokens
        return [[token.id for token in row] + [self.pad] * (self.length - len(row)) for row in rows]

    def weights(self) -> list[list[float]]:
        """Weights of the tokens [rows, length], without a row for the empty prompt."""
        return [[token.weight for token in row] + [1.0] * (self.length - len(row)) for row in self.tokens]

    def placed(self, prompt: int) -> list[tuple[int, Token]]:
        """The tokens of one prompt, each with its position in the prompt's rows put one after another."""
        rows = self.tokens[prompt * self.chunks : (prompt + 1) * self.chunks]
        return [(i * self.length + j, token) for i, row in enumerate(rows) for j, token in enumerate(row)]


def _read_clip(prompt: str, tokenizer: CLIPTokenizer | T5Tokenizer, rules: TextRules) -> Reading:
    groups = _groups(prompt, tokenizer, rules)
    if rules.long_clip == "cut":
        groups = [_joined(groups)]
    reading = Reading(prompt, _packed(groups, rules.clip_length - 2), [])
    count = rules.max_chunks if rules.long_clip == "chunks" else 1
    return reading.first(count, f"{count * rules.clip_length} tokens")


def _read_t5(prompt: str, tokenizer: CLIPTokenizer | T5Tokenizer, rules: TextRules) -> Reading:
    text = prompt[: rules.t5_characters]
    cuts = [] if text == prompt else [Cut(f"{rules.t5_characters} characters", prompt[len(text) :])]
    tokens = _joined(_groups(text, tokenizer, rules))
    length = max(rules.t5_length, rules.max_t5) if rules.long_t5 == "keep" else rules.t5_length
    return Reading(text, _packed([tokens], length - 1), cuts).first(1, f"{length} tokens")


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
    """The stretches of a prompt that are tokenized by themselves."""
    segments = [plain_segment(prompt)] if rules.weights == "literal" else weighted_segments(prompt)
    if rules.weights == "ignored":
        segments = [segment._replace(weight=1.0) for segment in segments]
    for text, weight, _ in segments:
        if not abs(weight) <= MAX_WEIGHT:  # nor is nan
            raise ValueError(
                f"the weight of {shortened(text)} in the prompt must be a number from {-MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}, got {weight:g}; each pair of brackets without a number multiplies by 1.1"
            )
    return (word for segment in segments for word in segment.words()) if rules.split_words else segments


def _packed(groups: Iterable[list[Token]], room: int) -> list[list[Token]]:
    """Fill chunks of at most `room` tokens; a group of less than 8 that does not fit goes to the next chunk whole."""
    chunks: list[list[Token]] = [[]]
    for group in groups:
        done = 0
        while len(group) - done > (free := room - len(chunks[-1])):
            if len(group) - done >= min(_WHOLE_WORD, room + 1):
                chunks[-1] += group[done : done + free]
                done += free
            chunks.append([])
        chunks[-1] += group[done:]
    return chunks


def _joined(groups: Iterable[list[Token]]) -> list[Token]:
    return [token for group in groups for token in group]


def shortened(text: str, most: int = 200) -> str:
    """A text in quotes for a message: its first `most` characters, and how many follow."""
    return repr(text) if len(text) <= most else f"{text[:most]!r} and {len(text) - most} more characters"
