"""From prompts to rows of ids under the rules of each reference: units, cuts, chunk borders, token positions."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encoders import COMFYUI, DIFFUSERS, REFERENCE, TextRules, Tokenizers
from encoders.chunks import Reading, Rows, read, to_the_shorter
from full import in_full
from golden import recorded

GOLDEN = recorded("tokens")
EVERY = {"diffusers": DIFFUSERS, "comfyui": COMFYUI, "reference": REFERENCE}
CHUNKED_WORDS = replace(REFERENCE, long_clip="chunks", max_chunks=100)


@pytest.fixture
def tiny(tiny_tokenizers: Path) -> Tokenizers:
    return Tokenizers.from_folder(tiny_tokenizers)


def spelled(reading: Reading, tokenizer) -> list[str]:
    """The tokens of each chunk, joined by "|"; "_" marks the end of a word in CLIP and its beginning in T5."""
    names = [[tokenizer.backend.id_to_token(token.id) for token in chunk] for chunk in reading.chunks]
    return ["|".join(row).replace("</w>", "_").replace("▁", "_") for row in names]


def cuts(reading: Reading) -> list[tuple[str, str]]:
    return [(cut.limit, cut.text) for cut in reading.cuts]


# The recorded ids


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("row", GOLDEN["tokens"], ids=lambda row: row["text"][:20])
def test_ids_are_the_recorded_ones_under_every_rule(official: Tokenizers, name: str, row: dict):
    for tokenizer, wanted in ((official.clip_l, row["clip"]), (official.t5, row["t5"])):
        rows = Rows.of([read(row["text"], tokenizer, EVERY[name])], tokenizer, tokenizer.pad, 2)
        assert rows.ids() == [wanted + [tokenizer.pad] * (rows.length - len(wanted))]


def test_the_recorded_padding_of_clip_g_is_that_of_a_borrowed_tokenizer(official: Tokenizers):
    row = GOLDEN["padded_example"]
    readings = [read(row["text"], official.clip_l, COMFYUI)]
    assert Rows.of(readings, official.clip_l, 0, 77).ids() == [row["clip_g"]]
    assert Rows.of(readings, official.clip_l, official.clip_l.pad, 77).ids() == [row["clip_l"]]


@pytest.mark.parametrize("row", GOLDEN["comfy_weights"], ids=lambda row: row["text"])
def test_segments_are_tokenized_by_themselves(official: Tokenizers, row: dict):
    for tokenizer, ends in ((official.clip_l, slice(1, -1)), (official.t5, slice(0, -1))):
        (chunk,) = read(row["text"], tokenizer, COMFYUI).chunks
        wanted = [(index, weight) for text, weight in row["segments"] for index in tokenizer(text).ids[ends]]
        assert [token.id for token in chunk] == [index for index, _ in wanted]
        assert [token.weight for token in chunk] == pytest.approx([weight for _, weight in wanted])


# Weights


def test_weights_are_text_ignored_or_applied(tiny: Tokenizers):
    found = {name: read("(cat:1.5) a", tiny.clip_l, rules) for name, rules in EVERY.items()}
    assert spelled(found["diffusers"], tiny.clip_l) == ["(_|cat_|:_|1_|._|5_|)_|a_"]
    assert spelled(found["reference"], tiny.clip_l) == spelled(found["comfyui"], tiny.clip_l) == ["cat_|a_"]
    weights = {name: [token.weight for token in reading.chunks[0]] for name, reading in found.items()}
    assert weights == {"diffusers": [1.0] * 8, "reference": [1.0, 1.0], "comfyui": [1.5, 1.0]}


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e+308", "-1e+308", "1000.1", "-1001"])
def test_a_weight_out_of_range_is_refused_where_it_is_applied(tiny: Tokenizers, number: str):
    with pytest.raises(ValueError, match=f"'cat' .*from -1000 to 1000, got {re.escape(f'{float(number):g}')}"):
        read(f"a (cat:{number})", tiny.clip_l, COMFYUI)
    assert spelled(read(f"a (cat:{number})", tiny.clip_l, REFERENCE), tiny.clip_l) == ["a_|cat_"]


def test_brackets_in_brackets_reach_the_largest_weight(tiny: Tokenizers):
    nested = ["(" * depth + "cat" + ")" * depth for depth in (72, 73, 15_000)]
    (token,) = read(nested[0], tiny.clip_l, COMFYUI).chunks[0]
    assert token.weight == pytest.approx(1.1**72)
    for prompt in nested[1:]:
        with pytest.raises(ValueError, match=r"'cat' .*from -1000 to 1000"):
            read(prompt, tiny.clip_l, COMFYUI)
    assert read("(cat:-1000) (cat:1e3)", tiny.clip_l, COMFYUI).chunks[0][1].weight == 1000


# Long prompts of CLIP


@pytest.mark.parametrize(
    ("rules", "prompt", "wanted", "cut"),
    [
        # 73 tokens, then three: whole to the next chunk where they are a stretch or a word, else split
        (DIFFUSERS, "a " * 73 + "dog", ["a_" * 73 + "do"], "g"),
        (REFERENCE, "a " * 73 + "dog", ["a_" * 73], "dog"),
        (CHUNKED_WORDS, "a " * 73 + "dog", ["a_" * 73, "dog_"], None),
        (COMFYUI, "a " * 73 + "dog", ["a_" * 73 + "do", "g_"], None),
        (COMFYUI, "a " * 73 + "(dog:1)", ["a_" * 73, "dog_"], None),
        (COMFYUI, "a " * 72 + "(dog:1)", ["a_" * 72 + "dog_"], None),  # it just fits
        # seven tokens are moved, eight are split
        (COMFYUI, "a " * 70 + "(" + "d" * 7 + ":1)", ["a_" * 70, "d" * 7 + "_"], None),
        (COMFYUI, "a " * 70 + "(" + "d" * 8 + ":1)", ["a_" * 70 + "d" * 5, "ddd_"], None),
        (CHUNKED_WORDS, "a " * 70 + "d" * 7, ["a_" * 70, "d" * 7 + "_"], None),
        (CHUNKED_WORDS, "a " * 70 + "d" * 8, ["a_" * 70 + "d" * 5, "ddd_"], None),
        (REFERENCE, "a " * 70 + "d" * 8 + " cat", ["a_" * 70 + "d" * 5], "ddd cat"),
        # several chunks; a full one begins no other
        (COMFYUI, "a " * 160, ["a_" * 75, "a_" * 75, "a_" * 10], None),
        (COMFYUI, "a " * 150, ["a_" * 75, "a_" * 75], None),
        (REFERENCE, "a " * 75, ["a_" * 75], None),
    ],
)
def test_chunk_borders(tiny: Tokenizers, rules: TextRules, prompt: str, wanted: list[str], cut: str | None):
    reading = read(prompt, tiny.clip_l, rules)
    assert [row.replace("|", "") for row in spelled(reading, tiny.clip_l)] == wanted
    assert [(limit, text.strip()) for limit, text in cuts(reading)] == ([] if cut is None else [("77 tokens", cut)])


@pytest.mark.parametrize("word", ["d", "d" * 5, "d" * 30])
def test_chunks_of_any_length_hold_every_token_once(tiny: Tokenizers, word: str):
    prompt = " ".join(["a"] * 5 + [word] * 5)
    wanted = [token.id for token in read(prompt, tiny.clip_l, CHUNKED_WORDS).chunks[0]]
    for length in range(3, 12):
        chunks = read(prompt, tiny.clip_l, replace(CHUNKED_WORDS, clip_length=length)).chunks
        assert [token.id for chunk in chunks for token in chunk][: len(wanted)] == wanted
        assert all(0 < len(chunk) <= length - 2 for chunk in chunks)


def test_both_towers_read_as_many_chunks_as_the_shorter(tiny: Tokenizers):
    long, short = (read(prompt, tiny.clip_l, COMFYUI) for prompt in ("a " * 75 + "cat wow", "cat"))
    for pair in (to_the_shorter(long, short, 77), to_the_shorter(short, long, 77)[::-1]):
        assert [len(reading.chunks) for reading in pair] == [1, 1]
        assert cuts(pair[0]) == [("77 tokens, as the other tower does", "cat wow")]
        assert cuts(pair[1]) == []
    assert to_the_shorter(long, long, 77) == (long, long)


# Long prompts of T5


@pytest.mark.parametrize(
    ("rules", "words", "length", "cut"),
    [
        (DIFFUSERS, 255, 256, None),
        (DIFFUSERS, 257, 256, ("256 tokens", "cat cat")),
        (replace(DIFFUSERS, t5_length=9), 10, 9, ("9 tokens", "cat cat")),
        (COMFYUI, 3, 77, None),
        (COMFYUI, 400, 401, None),
        (REFERENCE, 3, 77, None),
        (REFERENCE, 58, 77, ("226 characters", "t cat")),
    ],
)
def test_t5_lengths(tiny: Tokenizers, rules: TextRules, words: int, length: int, cut: tuple[str, str] | None):
    reading = read(" ".join(["cat"] * words), tiny.t5, rules)
    rows = Rows.of([reading], tiny.t5, tiny.t5.pad, rules.t5_length)
    assert [len(row) for row in rows.ids()] == [rows.length] == [length]
    assert rows.tokens[0][-1].id == tiny.t5.eos
    assert cuts(reading) == ([] if cut is None else [cut])


def test_t5_keeps_more_than_its_least_length_after_a_cut_of_characters(tiny: Tokenizers):
    (chunk,) = read("a " * 300, tiny.t5, REFERENCE).chunks
    assert len(chunk) == 113


def test_characters_of_a_prompt_are_counted_before_its_brackets_are_read(tiny: Tokenizers):
    reading = read("(cat a:1.5)", tiny.t5, replace(REFERENCE, t5_characters=5))
    assert spelled(reading, tiny.t5)[0].endswith("|c|a|t")
    assert len(reading.chunks[0]) == len(tiny.t5("(cat ").ids) - 1
    assert cuts(reading) == [("5 characters", "a:1.5)")]
    assert read("a cat", tiny.clip_l, replace(REFERENCE, t5_characters=1)).cuts == []  # T5's, not CLIP's


# Units, rows and places


def test_words_are_units_without_their_spaces_and_line_feeds(tiny: Tokenizers):
    by_word = replace(CHUNKED_WORDS, clip_length=4)
    assert spelled(read("dog\na cat", tiny.clip_l, by_word), tiny.clip_l) == ["d|o", "g_|a_", "cat_"]
    whole = replace(COMFYUI, clip_length=4)
    assert spelled(read("a\ndog", tiny.clip_l, whole), tiny.clip_l) == ["a_|d", "o|g_"]
    assert spelled(read("a\ndo", tiny.clip_l, by_word), tiny.clip_l) == ["a_", "d|o_"]


def test_rows_of_prompts_of_different_lengths(tiny: Tokenizers):
    readings = [read(prompt, tiny.clip_l, COMFYUI) for prompt in ("cat", "a " * 80)]
    rows = Rows.of(readings, tiny.clip_l, 0, 77)
    bos, eos = tiny.clip_l.bos, tiny.clip_l.eos
    assert rows.chunks == 2
    assert rows.ids()[1] == [bos, eos] + [0] * 75
    assert [len(row) for row in rows.ids()] == [77] * 4
    readings = [read(prompt, tiny.t5, COMFYUI) for prompt in ("cat", "a " * 80)]
    assert [len(row) for row in Rows.of(readings, tiny.t5, 0, 77).ids()] == [81, 81]


def test_rows_with_weights_have_the_empty_prompt_at_their_end(tiny: Tokenizers):
    plain, one, two = (read(prompt, tiny.t5, COMFYUI) for prompt in ("cat", "(cat:1.0)", "a (cat:2) a"))
    assert len(Rows.of([plain, one], tiny.t5, 0, 4).ids()) == 2
    rows = Rows.of([plain, two], tiny.t5, 0, 4)
    assert rows.ids()[2:] == [[tiny.t5.eos, 0, 0, 0]]
    assert rows.weights() == [[1, 1, 1, 1], [1, 2, 1, 1]]


WORDS = ["a ", "cat", "(", ")", ":1.5)", "\\(", "\\)", "dog ", "\n", "\t", "[x]", "!", "wow!", " ", "BREAK", "\\"]


# The fixture is read only, so one for all examples is right.
@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(st.sampled_from(WORDS), max_size=60), name=st.sampled_from(list(EVERY)))
def test_every_token_knows_its_characters(tiny: Tokenizers, words: list[str], name: str):
    prompt = "".join(words)
    for tokenizer in (tiny.clip_l, tiny.t5):
        tokens = [token for chunk in read(prompt, tokenizer, EVERY[name]).chunks for token in chunk]
        assert [token.start for token in tokens] == sorted(token.start for token in tokens)
        for token in tokens:
            text = re.sub(r"</w>|▁", "", tokenizer.backend.id_to_token(token.id))
            source = prompt[token.start : token.stop].lower().strip()
            assert text in ("", "<unk>", source, re.sub(r"\\([()])", r"\1", source))


# Prompts of any length


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_is_read_up_to_a_bound(tiny: Tokenizers, name: str):
    rules = replace(EVERY[name], max_characters=100, t5_characters=None)
    for tokenizer in (tiny.clip_l, tiny.t5):
        whole = read("a " * 50, tokenizer, rules)
        assert whole == read("a " * 50, tokenizer, replace(EVERY[name], t5_characters=None))
        longer = read("a " * 50 + "dog", tokenizer, rules)
        assert longer.chunks == whole.chunks
        assert cuts(longer)[-1][1].endswith("a dog" if whole.cuts else "dog")
        assert longer.cuts[-1].limit == (whole.cuts[-1].limit if whole.cuts else "100 characters")
        assert len(longer.cuts) == 1
        assert read("a " * 50 + " " * 1000, tokenizer, rules) == whole


def test_chunks_and_tokens_that_no_reference_limits_have_a_bound(tiny: Tokenizers):
    fits, long = " ".join(["a"] * 16 * 75), " ".join(["a"] * 16 * 75 + ["cat"])
    assert len(read(fits, tiny.clip_l, COMFYUI).chunks) == 16
    assert cuts(read(fits, tiny.clip_l, COMFYUI)) == []
    assert len(read(long, tiny.clip_l, COMFYUI).chunks) == 16
    assert cuts(read(long, tiny.clip_l, COMFYUI)) == [("1232 tokens", "cat")]
    fits, long = " ".join(["a"] * 1023), " ".join(["a"] * 1023 + ["cat"])
    assert cuts(read(fits, tiny.t5, COMFYUI)) == []
    assert cuts(read(long, tiny.t5, COMFYUI)) == [("1024 tokens", "cat")]
    assert len(read(long, tiny.t5, COMFYUI).chunks[0]) == 1023
    assert len(read(long, tiny.t5, replace(COMFYUI, max_t5=5, t5_length=7)).chunks[0]) == 6


ENDLESS = {
    "letters": "a" * 10**6,
    "words": "a cat " * 160_000,
    "emoji": "\U0001f600" * 10**6,
    "spaces": " " * 10**6,
    "open": "(" * 10**6,
    "closed": ")" * 10**6,
    "nested": "(" * 500_000 + ")" * 500_000,
    "weights": "(a:1.2)" * 140_000,
    "inner numbers": "(a:" * 250_000 + "1)" * 250_000,
    "ligatures": "\ufdfa" * 10**6,
}


@pytest.mark.parametrize("prompt", ENDLESS.values(), ids=ENDLESS)
def test_a_million_characters_cost_no_more_than_reading_them(tiny: Tokenizers, prompt: str):
    started = time.process_time()
    for rules in in_full([*EVERY.values()], [COMFYUI]):  # the one that reads weights and cuts nothing off
        for tokenizer in (tiny.clip_l, tiny.t5):
            reading = read(prompt, tokenizer, rules)
            assert len(reading.chunks) <= 16
            assert max(map(len, reading.chunks)) <= 1023
            assert len(reading.cuts) <= 2
    assert time.process_time() - started < 20
