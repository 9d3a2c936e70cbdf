"""Captions are true, readable and varied; held-out combinations stay out of training; the reader refuses the rest."""

import random
import re
from functools import cache
from typing import Any

import pytest

from mmdit.demo import captions, scenes
from mmdit.demo.captions import HELD_OUT
from mmdit.demo.grammar import KINDS, OPPOSITE, RELATIONS, WORDS, Statement, What, statements
from mmdit.demo.scenes import SceneObject
from mmdit.demo.score import check, symbolic
from mmdit.demo.shapes import COLOURS, SHAPES


@cache
def words_of_batch() -> Any:
    return scenes.sample(400, 11).words()


@cache
def written() -> list[list[str]]:
    return captions.training_captions(scenes.sample(400, 11), 4, seed=1)


@cache
def claims_of_batch() -> list[list[tuple[Statement, ...]]]:
    return [[statements(text) for text in texts] for texts in written()]


def held_out_links(prompt: str, both_ways: bool) -> int:
    """Count stated relations that are held out."""
    found = 0
    for s in statements(prompt):
        if s.kind == "relation" and s.what and s.other and s.relation:
            found += (s.what.shape, s.what.colour, s.relation) in HELD_OUT
            found += both_ways and (s.other.shape, s.other.colour, OPPOSITE[s.relation]) in HELD_OUT
    return found


def test_every_statement_of_every_caption_is_true() -> None:
    for scene, claims in zip(words_of_batch(), claims_of_batch(), strict=True):
        false = [str(s) for claim in claims for s in claim if not check(s, symbolic(scene))]
        assert not false, scene


def test_statements_of_another_scene_are_often_false() -> None:
    verdicts = [
        check(s, symbolic(scene))
        for scene, claims in zip(words_of_batch(), claims_of_batch()[1:] + claims_of_batch()[:1], strict=True)
        for s in claims[0]
    ]
    assert sum(verdicts) / len(verdicts) < 0.25


def test_captions_state_at_least_three_things_of_every_kind() -> None:
    claims = [claim for claims in claims_of_batch() for claim in claims]
    assert min(map(len, claims)) >= 3
    for kind in KINDS:
        assert sum(any(s.kind == kind for s in claim) for claim in claims) > 0.2 * len(claims), kind
    counts = {s.count for claim in claims for s in claim if s.kind == "count"}
    assert counts == {1, 2, 3, 4}
    assert {s.relation for claim in claims for s in claim if s.kind == "relation"} == set(RELATIONS)


def test_captions_name_every_object() -> None:
    for scene, claims in zip(words_of_batch(), claims_of_batch(), strict=True):
        kinds = {What(o.shape, o.colour) for o in scene.objects}
        for claim in claims:
            assert {s.what for s in claim if s.kind == "colour" and s.what and s.what.shape} == kinds, claim


def test_wording_varies_and_uses_the_whole_vocabulary() -> None:
    texts = [text for texts in written() for text in texts]
    assert len(set(texts)) > 0.98 * len(texts)
    used = set(re.findall("[a-z]+", " ".join(texts).lower()))
    assert set(WORDS) - used == set()
    assert 0.1 < sum(text[0].isupper() for text in texts) / len(texts) < 0.5
    assert max(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts) <= 75  # CLIP has 77 places, two of them taken


def test_training_never_states_a_held_out_combination_and_held_out_prompts_always_do() -> None:
    assert sum(held_out_links(text, both_ways=True) for texts in written() for text in texts) == 0
    for seed in (0, 1):
        assert min(held_out_links(p, both_ways=False) for p in captions.prompts(150, seed, held_out=True)) >= 1
        plain = captions.prompts(150, seed, held_out=False)
        assert sum(held_out_links(p, both_ways=True) for p in plain) == 0
        assert sum("relation" in [s.kind for s in statements(p)] for p in plain) > 50


def test_held_out_combinations_are_one_in_ten_and_fixed_for_ever() -> None:
    total = len(SHAPES) * len(COLOURS) * len(RELATIONS)
    assert 0.06 < len(HELD_OUT) / total < 0.14
    assert {shape for shape, _, _ in HELD_OUT} == set(SHAPES)
    assert {relation for _, _, relation in HELD_OUT} == set(RELATIONS)
    assert len(HELD_OUT) == 21
    assert sorted(HELD_OUT)[:2] == [("circle", "red", "above"), ("cross", "blue", "right of")]


def test_prompts_repeat_with_the_seed() -> None:
    first = captions.prompts(40, 7, held_out=True)
    assert len(first) == 40
    assert first == captions.prompts(60, 7, held_out=True)[:40]
    assert first != captions.prompts(40, 8, held_out=True)
    assert captions.prompts(0, 7, held_out=False) == []
    with pytest.raises(ValueError, match="not be negative, got -2"):
        captions.prompts(-2, 7, held_out=True)


def test_held_out_caption_needs_a_scene_that_shows_one() -> None:
    rng = random.Random(0)
    texts = [captions.held_out_caption(scene, rng) for scene in words_of_batch()]
    assert 60 < sum(text is not None for text in texts) < 260
    assert all(text is None or held_out_links(text, both_ways=False) for text in texts)
    assert all(text is None for text, s in zip(texts, words_of_batch(), strict=True) if len(s.objects) == 1)


@pytest.mark.parametrize(
    ("right", "down", "relation"),
    [
        (0.0, -40.0, "above"),
        (20.0, -40.0, "above"),
        (0.0, 40.0, "below"),
        (-40.0, 20.0, "left of"),
        (40.0, -20.0, "right of"),
        (30.0, -40.0, None),
        (0.0, -15.0, None),
    ],
)
def test_only_clear_relations_are_stated(right: float, down: float, relation: str | None) -> None:
    subject = SceneObject("circle", "red", "small", 64 + right, 64 + down, 24.0)
    other = SceneObject("star", "blue", "small", 64.0, 64.0, 24.0)
    assert captions.clear_relation(subject, other) == relation
    assert captions.clear_relation(other, subject) == (OPPOSITE[relation] if relation else None)


RED_CIRCLE, BLUE_STAR = What("circle", "red"), What("star", "blue")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "a small red circle above a blue star on a white background",
            [
                Statement("shape", What("circle")),
                Statement("colour", RED_CIRCLE),
                Statement("size", What("circle", "red", "small")),
                Statement("shape", What("star")),
                Statement("colour", BLUE_STAR),
                Statement("relation", RED_CIRCLE, 1, "above", BLUE_STAR),
                Statement("background", background="white"),
            ],
        ),
        (
            "Two big red circles; the backdrop is GREY!",
            [
                Statement("shape", What("circle")),
                Statement("colour", RED_CIRCLE),
                Statement("size", What("circle", "red", "large"), 2),
                Statement("count", What("circle", "red", "large"), 2),
                Statement("background", background="gray"),
            ],
        ),
        (
            "There are 3 shapes. The star is to the left of the circle. the star is blue",
            [
                Statement("count", What(), 3),
                Statement("shape", What("star")),
                Statement("shape", What("circle")),
                Statement("relation", What("star"), 1, "left of", What("circle")),
                Statement("colour", BLUE_STAR),
            ],
        ),
        (
            "one blue object against navy",
            [
                Statement("colour", What(None, "blue")),
                Statement("count", What(None, "blue"), 1),
                Statement("background", background="navy"),
            ],
        ),
    ],
)
def test_statements_of_known_prompts(prompt: str, expected: list[Statement]) -> None:
    assert list(statements(prompt)) == expected
    assert statements(re.sub(r"[^\w\s]", "", prompt).upper()) == tuple(expected)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red circel on white", "unknown word 'circel'.*nearest known words: circle"),
        ("xyzzy", "unknown word 'xyzzy'.*known words: a, an, the"),
        ("a white circle", "'white' is a background colour, not that of 'circle'"),
        ("a circle on a red background", "expected a background colour .*got 'red'"),
        ("the background is blue", "expected a background colour .*got 'blue'"),
        ("a circle on a square", "expected a background colour .*got 'square'"),
        ("red circles", "number and noun do not agree at 'circles'"),
        ("two circle", "number and noun do not agree at 'circle'"),
        ("a red and blue circle", "expected a shape, got 'and'"),
        ("a circle above", "'above' needs an object after it, not 'the end'"),
        ("two circles above a star", "'above' is read between single objects only"),
        ("a circle above a star and below a ring", "did not expect 'below'"),
        ("above a star", "did not expect 'above'"),
        ("a picture of", "states nothing"),
        ("", "states nothing"),
    ],
)
def test_what_cannot_be_read_is_refused(prompt: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        statements(prompt)


def test_statements_read_well() -> None:
    texts = [str(s) for s in statements("two small red circles and a star above a blue ring on black")]
    assert texts == [
        "shape: circle",
        "colour: red circle",
        "size: small red circle x 2",
        "count: exactly 2 small red circle",
        "shape: star",
        "shape: ring",
        "colour: blue ring",
        "relation: star above blue ring",
        "background: black",
    ]
