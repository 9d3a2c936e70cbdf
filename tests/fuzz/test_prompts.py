"""Generated prompts: brackets as a slow reading finds them, and rows of bounded size under any rules.

MMDIT_FUZZ_SECONDS sets how long each test draws prompts; a prompt that failed once belongs into REGRESSIONS.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from encoders import COMFYUI, DIFFUSERS, REFERENCE, TextRules, Tokenizers
from encoders.chunks import Rows, read
from encoders.weighting import weighted_segments
from fuzzing import SECONDS
from mmdit.embedded import EMBEDDED

FEWEST = 50  # prompts of a test, however slow the machine
PIECES = (
    *(
        "(",
        ")",
        "((",
        "))",
        "(a",
        ":1.2)",
        ":",
        "1.5",
        ":-2)",
        ":nan)",
        ":1e308)",
        "(:",
        ":)",
        "\\(",
        "\\)",
        "\\",
        "\0",
    ),
    *("a", "red circle ", "and the ", " ", "\n", "\t", "\r\n", "\u3000", "!", "7", "x" * 40, "\u00e9", "e\u0301"),
    *("\u0301" * 9, "\U0001f600", "\ufdfa", "\u200b", "\u202e", "\ufeff", "\U000e0041", "漢字", "\u03a3", "\u0130"),
    *("<|endoftext|>", "<|startoftext|>", "</s>", "<pad>", "<extra_id_0>", "BREAK", "[x]", "embedding:x"),
)
REGRESSIONS = (
    "((a)",
    "a) (b:2)",
    "(" * 1500 + "a" + ")" * 1500,
    "(" * 20_000,
    ")" * 20_000,
    "b" * 20_000,
    "\U0001f600" * 100_000,
    "a" * 10**6,
    "(a:1e308)",
    "(a:nan)",
    "(a:inf)",
)


def prompts() -> Iterator[str]:
    """The prompts that failed once, then new ones until the time is over."""
    yield from REGRESSIONS
    end, seed = time.monotonic() + SECONDS, 0
    while seed < FEWEST or time.monotonic() < end:
        r = random.Random(seed)
        weights = [r.random() ** 3 for _ in PIECES]
        yield "".join(r.choices(PIECES, weights, k=r.randrange(r.choice((4, 40, 400)))))
        seed += 1


def slowly(text: str, weight: float = 1.0) -> list[tuple[str, float]]:
    """Stretches and weights of a text with "\\1" and "\\2" for escaped brackets, by recursion over its characters."""
    items, depth, first = [], 0, 0
    for i, char in enumerate(text):
        if char == "(":
            if depth == 0:
                items.append(text[first:i])
                first = i
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                items.append(text[first : i + 1])
                first = i + 1
    found = []
    for item in filter(None, [*items, text[first:]]):
        if not (item[0] == "(" and item[-1] == ")"):
            found.append((item.replace("\1", "(").replace("\2", ")"), weight))
            continue
        inner, colon, number = item[1:-1].rpartition(":")
        try:
            found += slowly(inner, float(number)) if colon and inner else slowly(item[1:-1], weight * 1.1)
        except ValueError:
            found += slowly(item[1:-1], weight * 1.1)
    return found


def test_brackets_are_those_of_a_slow_reading() -> None:
    for prompt in prompts():
        if len(prompt) < 400 and not {"\1", "\2"} & set(prompt):
            found = [(segment.text, segment.weight) for segment in weighted_segments(prompt)]
            wanted = slowly(prompt.replace("\\(", "\1").replace("\\)", "\2"))
            assert repr(found) == repr(wanted), repr(prompt)


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return Tokenizers.from_folder(EMBEDDED)


def rules_of(prompt: str) -> TextRules:
    """Rules that a prompt's own characters choose."""
    r = random.Random(prompt[:100])
    rules = r.choice((DIFFUSERS, COMFYUI, REFERENCE))
    return replace(
        rules, clip_length=r.choice((3, 9, 77)), t5_length=r.choice((2, 5, 256)), split_words=r.random() < 0.3
    )


def test_rows_have_a_bound_and_tokens_their_places(tokenizers: Tokenizers) -> None:
    assert tokenizers.clip_l and tokenizers.t5
    for prompt in prompts():
        rules, began = rules_of(prompt), time.process_time()
        for tokenizer, length in ((tokenizers.clip_l, rules.clip_length), (tokenizers.t5, rules.t5_length)):
            try:
                reading = read(prompt, tokenizer, rules)
            except ValueError as error:
                assert "weight" in str(error) and rules.weights == "applied", repr(prompt[:200])
                assert len(str(error)) < 2000
                continue
            rows = Rows.of([reading], tokenizer, tokenizer.pad, length)
            assert rows.length <= (length if tokenizer is tokenizers.clip_l else max(length, rules.max_t5))
            assert len(rows.tokens) <= rules.max_chunks
            assert {len(row) for row in rows.ids()} == {rows.length}
            places = [(token.start, token.stop) for chunk in reading.chunks for token in chunk]
            assert places == sorted(places, key=lambda place: place[0]), repr(prompt[:200])
            assert all(0 <= start <= stop <= len(prompt) for start, stop in places), repr(prompt[:200])
            assert all(prompt.endswith(cut.text) or rules.t5_characters for cut in reading.cuts)
        assert time.process_time() - began < 5, repr(prompt[:200])
