"""Prompt weights: recorded results, trees of brackets written and read back, and properties of any text."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.weighting import plain_segment, weighted, weighted_segments
from golden import recorded

ANY = st.text("(()))\\:1.5[]ab \n", max_size=40) | st.text(max_size=40)
LEAVES = st.text("ab,[]() \n\\é", min_size=1, max_size=6).filter(lambda text: not text.endswith("\\"))
WEIGHTS = st.none() | st.floats(-9, 9)
TREES = st.recursive(LEAVES, lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=4), WEIGHTS), max_leaves=9)


def read(prompt: str) -> list[tuple[str, float]]:
    return [(segment.text, segment.weight) for segment in weighted_segments(prompt)]


@pytest.mark.parametrize("row", recorded("tokens")["comfy_weights"], ids=lambda row: row["text"])
def test_the_recorded_weights(row):
    found = read(row["text"])
    assert [text for text, _ in found] == [text for text, _ in row["segments"]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in row["segments"]])


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("", []),
        ("()", []),
        ("a (:1.5) b", [("a ", 1), (":1.5", 1.1), (" b", 1)]),  # nothing to weigh before the colon
        ("(a:1.2:1.3)", [("a:1.2", 1.3)]),
        ("(a: 2 )(b:1e1)", [("a", 2), ("b", 10)]),
        ("((a:2))((b):2)", [("a", 2), ("b", 2.2)]),  # a number holds for its own bracket, 1.1 for those inside
        ("(a:1.2\\))", [("a:1.2)", 1.1)]),
        ("\\\\(a)", [("\\(a)", 1)]),
        ("a) (b:2)", [("a) (b:2)", 1)]),
        ("a)((b)", [("a)(", 1), ("b", 1.1)]),
        ("((a)", [("(a", 1.1)]),
        ("x (a", [("x ", 1), ("(a", 1)]),
    ],
)
def test_weights_by_hand(prompt, segments):
    assert read(prompt) == [(text, pytest.approx(weight)) for text, weight in segments]


def written(node) -> str:
    if isinstance(node, str):
        return node.replace("(", "\\(").replace(")", "\\)")
    inner, weight = node
    return "(" + "".join(map(written, inner)) + ("" if weight is None else f":{weight!r}") + ")"


def meant(node, weight: float) -> list[tuple[str, float]]:
    if isinstance(node, str):
        return [(node, weight)]
    inner, own = node
    return [part for one in inner for part in meant(one, weight * 1.1 if own is None else own)]


def merged(parts: list[tuple[str, float]], borders: list[bool]) -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for (text, weight), is_new in zip(parts, borders, strict=True):
        out = [*out, (text, weight)] if is_new or not out else [*out[:-1], (out[-1][0] + text, weight)]
    return out


def starts(node, after_text: bool) -> tuple[list[bool], bool]:
    """Whether each leaf begins a segment, which it does unless it follows a leaf; and whether a leaf is last."""
    if isinstance(node, str):
        return [not after_text], True
    found, last = [], False
    for one in node[0]:
        more, last = starts(one, last)
        found += more
    return found, False


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(TREES, max_size=5))
def test_brackets_written_are_read_back(trees):
    prompt = "".join(map(written, trees))
    whole, last = [], False
    for tree in trees:
        more, last = starts(tree, last)
        whole += more
    wanted = merged([part for tree in trees for part in meant(tree, 1.0)], whole)
    assert read(prompt) == [(text, pytest.approx(weight)) for text, weight in wanted]


@settings(max_examples=500, deadline=None, derandomize=True)
@given(ANY)
def test_any_text_is_read_and_every_character_known_by_its_place(prompt):
    segments = weighted_segments(prompt)
    for segment in segments:
        assert len(segment.at) == len(segment.text) + 1
        sources = [prompt[a:b] for a, b in itertools.pairwise(segment.at)]
        assert all(source in (char, "\\" + char) for source, char in zip(sources, segment.text, strict=True))
    ends = [0, *(end for segment in segments for end in (segment.at[0], segment.at[-1])), len(prompt)]
    assert ends == sorted(ends)
    between = [prompt[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True)]
    assert all(re.fullmatch(r"(?:[()]|:[^():]*\))*", part) for part in between), (
        "only brackets and numbers are left out"
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.text("ab:[]1 \n\\", max_size=5) | st.sampled_from(["\\(", "\\)"]), max_size=12))
def test_without_brackets_the_text_is_the_prompt_without_escapes(parts):
    prompt = "".join(parts)
    assert "".join(segment.text for segment in weighted_segments(prompt)) == re.sub(r"\\([()])", r"\1", prompt)
    assert {segment.weight for segment in weighted_segments(prompt)} <= {1.0}


def test_deep_nesting_is_no_recursion():
    (found,) = weighted_segments("(" * 1500 + "a" + ")" * 1500)
    assert found.text == "a"
    assert found.weight == pytest.approx(1.1**1500)


def test_a_plain_segment_is_the_prompt():
    text, weight, at = plain_segment("(a\\)")
    assert (text, weight, list(at)) == ("(a\\)", 1.0, [0, 1, 2, 3, 4])


def test_words_are_between_spaces_and_line_feeds():
    (segment,) = weighted_segments("\\(a \n b\tc")
    assert [(word.text, list(word.at)) for word in segment.words()] == [("(a", [0, 2, 3]), ("b\tc", [6, 7, 8, 9])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weighted_is_the_formula(dtype):
    z, empty = torch.randn(2, 5, 3, dtype=torch.float64), 1000 * torch.randn(5, 3, dtype=torch.float64)
    z, empty = z.to(dtype), empty.to(dtype)
    weights = torch.tensor([[1.0, 1.3, 0.0, -2.0, 1.0], [0.5, 1.0, 1.0, 1.1, 1.0]])
    found = weighted(z, empty, weights)
    assert found.dtype == dtype
    for row, token in itertools.product(range(2), range(5)):
        w = float(weights[row, token])
        exact = empty[token].double() + w * (z[row, token].double() - empty[token].double())
        if w == 1:
            assert torch.equal(found[row, token], z[row, token])
        else:
            torch.testing.assert_close(
                found[row, token].double(), exact, rtol=1e-7 if dtype == torch.float64 else 2**-8, atol=1e-7
            )
