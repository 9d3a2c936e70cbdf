"""The context tokens of a word of the prompt, found by the characters that each token came from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from encoders import Conditioning, TokenSpan

Encoder = Literal["all", "clip", "t5"]
ENCODERS: dict[Encoder, tuple[str, ...]] = {
    "all": ("clip_l", "clip_g", "t5"),
    "clip": ("clip_l", "clip_g"),
    "t5": ("t5",),
}
SPECIAL = ("<bos>", "<eos>", "<pad>")  # special tokens, which belong to no word


class WordError(ValueError):
    """A word has no token; the message lists the words that have tokens."""


def words_of(prompt: str) -> list[str]:
    """The words of a prompt as they are written, each once, in their order."""
    found: dict[str, str] = {}
    for word in re.findall(r"\w+", prompt):
        found.setdefault(word.lower(), word)
    return list(found.values())


def token_positions(read: Conditioning, sample: int, word: str, encoder: Encoder = "all") -> list[int]:
    """The positions in the context of all tokens of a word, lowest first; none where the prompt does not have it.

    Args:
        read: the conditioning that `pipe.encode` returned.
        sample: number of the prompt.
        word: one or several words of the prompt, in upper or lower case, at all their occurrences; "word#2" for the
            second occurrence; or one of `SPECIAL`. Padding is the rest of an encoder's tokens (without T5, all tokens).
        encoder: "clip", "t5" or "all"; CLIP-L and CLIP-G share positions.

    Raises:
        WordError: the conditioning was given as embeddings, which do not tell about words.
    """
    _check_prompts(read)
    if word in SPECIAL:
        return sorted(set(_special(word, read.spans[sample], encoder, read.context.shape[1])))
    places = _occurrences(word, read.prompts[sample])
    spans = [span for span in read.spans[sample] if span.encoder in ENCODERS[encoder] and span.start < span.stop]
    return sorted({one.position for one in spans for start, stop in places if one.start < stop and one.stop > start})


def check_words(read: Conditioning, words: Sequence[str], encoder: Encoder = "all") -> None:
    """Raise WordError for a word that no prompt has, or that has no token of an encoder."""
    for word in words:
        _check_prompts(read)
        if any(token_positions(read, i, word, encoder) for i in range(len(read.prompts))):
            continue
        if any(_occurrences(word, prompt) for prompt in read.prompts):
            raise WordError(f"{word!r} is in the prompt, but no token of {encoder!r} stands for it: it was cut")
        known = list(dict.fromkeys(word for prompt in read.prompts for word in words_of(prompt)))
        near = difflib.get_close_matches(word, known, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise WordError(f"{word!r} is not in the prompt, whose words are {', '.join(known)}{hint}")


def _check_prompts(read: Conditioning) -> None:
    if not read.prompts:
        raise WordError(
            "the context was given as embeddings, which do not say which token stands for which word; "
            "give prompts, or ask for no words"
        )


def _occurrences(word: str, prompt: str) -> list[tuple[int, int]]:
    """The characters [start, stop) of each requested occurrence of a word in a prompt."""
    found = list(_found(word, prompt))
    numbered = re.fullmatch(r"(.+)#([1-9]\d*)", word)
    if found or numbered is None:
        return found
    number = int(numbered[2])
    return list(_found(numbered[1], prompt))[number - 1 : number]


def _found(word: str, prompt: str) -> Iterator[tuple[int, int]]:
    if not word.strip():
        raise WordError(f"{word!r} is no word")
    before, after = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
    for match in re.finditer(before + re.escape(word) + after, prompt, re.IGNORECASE):
        yield match.span()


def _special(word: str, spans: Sequence[TokenSpan], encoder: Encoder, length: int) -> Iterator[int]:
    """The positions of special tokens: CLIP has BOS and EOS in each chunk, T5 has EOS; the rest is padding."""
    first_t5 = min((span.position for span in spans if span.encoder == "t5"), default=length)
    if word == "<pad>":
        taken = {span.position for span in spans}
        lowest, highest = first_t5 if encoder == "t5" else 0, first_t5 if encoder == "clip" else length
        yield from (position for position in range(lowest, highest) if position not in taken)
        return
    for name in ENCODERS[encoder]:
        ends = [span.position for span in spans if span.encoder == name and span.start == span.stop]
        if name == "t5":
            yield from ends if word == "<eos>" else ()
        else:
            yield from ends[0 if word == "<bos>" else 1 :: 2]


class Mix(NamedTuple):
    """The assignment of text tokens to words, in one prompt."""

    tokens: Tensor  # their positions in the context, [m]
    counts: Tensor  # [words, m]: 1 where a token stands for the word; NaN in the row of a word without tokens

    def shares(self) -> Tensor:
        """[words, m] with rows that sum to 1."""
        return self.counts / self.counts.sum(1, keepdim=True)


def mixed(positions: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype) -> Mix:
    """The tokens of these words, and the assignment of each token to a word."""
    tokens = sorted({position for one in positions for position in one})
    rows = [[float(token in one) if one else float("nan") for token in tokens] for one in positions]
    counts = torch.tensor(rows, dtype=dtype, device=device).reshape(len(positions), len(tokens))
    return Mix(torch.tensor(tokens, dtype=torch.long, device=device), counts)
