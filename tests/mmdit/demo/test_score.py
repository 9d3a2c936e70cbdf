"""The scorer against the truth: drawn scenes, captions of other scenes, noise, blur, and pictures that are wrong."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from full import FULL
from mmdit.demo import captions, scenes, score, vision
from mmdit.demo.grammar import KINDS, Statement, What
from mmdit.demo.scenes import Scene, SceneObject
from mmdit.demo.shapes import BACKGROUNDS, COLOURS, SHAPES

COUNT = 300 if FULL else 100


@cache
def batch():
    return scenes.sample(COUNT, 21)


@cache
def truth():
    return [score.symbolic(scene) for scene in batch().words()]


@cache
def pictures():
    return scenes.render(batch())


@cache
def texts():
    return [some[0] for some in captions.training_captions(batch(), 1, seed=2)]


def noisy(pictures: Tensor) -> Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + 0.02 * noise).clamp(0, 1)


def blurred(pictures: Tensor) -> Tensor:
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def halved_and_doubled(pictures: Tensor) -> Tensor:
    return F.interpolate(F.interpolate(pictures, scale_factor=0.5, mode="area"), scale_factor=2.0, mode="bilinear")


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda pictures: pictures,
    "noise": noisy,
    "blur and noise": lambda pictures: noisy(blurred(pictures)),
    "half resolution": halved_and_doubled,
}


@cache
def parsed_after(damage: str) -> list[score.Parsed]:
    return score.parse_batch(DAMAGES[damage](pictures()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_verdicts_are_the_truth_on_own_and_on_other_captions(damage: str) -> None:
    parsed = parsed_after(damage)
    for shift in (0, 1, 7):
        agree: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        holds = []
        for i, found in enumerate(parsed):
            for s in score.statements(texts()[(i + shift) % len(texts())]):
                holds.append(score.check(s, truth()[i]))
                agree[s.kind].append(score.check(s, found) == holds[-1])
        for kind, verdicts in agree.items():
            assert len(verdicts) > 0.4 * COUNT, kind
            assert sum(verdicts) / len(verdicts) >= 0.99, (kind, shift)
        assert all(holds) if shift == 0 else sum(holds) < 0.25 * len(holds)


@pytest.mark.parametrize("damage", DAMAGES)
def test_objects_are_found_where_they_are(damage: str) -> None:
    parsed = parsed_after(damage)
    names = [sorted((o.shape, o.colour, o.size) for o in p.objects) for p in parsed]
    true_names = [sorted((o.shape, o.colour, o.size) for o in t.objects) for t in truth()]
    assert sum(a == b for a, b in zip(names, true_names, strict=True)) >= 0.99 * len(names)
    assert [p.background for p in parsed] == [t.background for t in truth()]
    for found, true in zip(parsed, truth(), strict=True):
        for o in found.objects:
            nearest = min(true.objects, key=lambda t: abs(t.x - o.x) + abs(t.y - o.y))
            # A tilted triangle's box is not centred where the triangle turns: up to 3 px for a large one.
            assert max(abs(nearest.x - o.x), abs(nearest.y - o.y)) < 4.0
            assert nearest.across == pytest.approx(o.across, rel=0.08)
            assert o.box[0] <= o.x <= o.box[2]
            assert o.box[1] <= o.y <= o.box[3]


def test_the_reader_never_sees_the_prompt_and_pictures_do_not_see_each_other() -> None:
    assert list(inspect.signature(score.parse).parameters) == ["picture"]
    together = score.parse_batch(pictures()[:70])  # more than one chunk
    for i in (0, 31, 69):
        alone = score.parse(pictures()[i])
        assert [o.shape for o in alone.objects] == [o.shape for o in together[i].objects]
        assert alone.objects[0].fit == pytest.approx(together[i].objects[0].fit, abs=1e-5)


TWO = Scene(
    "white",
    (SceneObject("circle", "red", "small", 64.0, 30.0, 25.0), SceneObject("square", "blue", "large", 60.0, 90.0, 42.0)),
)
PROMPT = "a small red circle above a large blue square on a white background. there are two shapes. one red circle"
CIRCLE, SQUARE = TWO.objects
WRONG: dict[str, tuple[Scene, set[str]]] = {
    "another shape": (replace(TWO, objects=(replace(CIRCLE, shape="star"), SQUARE)), {"circle"}),
    "another colour": (replace(TWO, objects=(replace(CIRCLE, colour="green"), SQUARE)), {"red circle"}),
    "another size": (replace(TWO, objects=(CIRCLE, replace(SQUARE, size="small", across=25.0))), {"large blue square"}),
    "swapped places": (
        replace(TWO, objects=(replace(CIRCLE, y=100.0), replace(SQUARE, y=40.0))),
        {"red circle above blue square"},
    ),
    "side by side": (
        replace(TWO, objects=(replace(CIRCLE, x=20.0), replace(SQUARE, x=90.0, y=50.0))),
        {"red circle above blue square"},
    ),
    "colours swapped": (
        replace(TWO, objects=(replace(CIRCLE, colour="blue"), replace(SQUARE, colour="red"))),
        {"red circle", "blue square"},
    ),
    "one more": (
        replace(TWO, objects=(*TWO.objects, replace(CIRCLE, x=108.0, y=40.0))),
        {"exactly 2 shape", "exactly 1 red circle"},
    ),
    "one less": (replace(TWO, objects=(SQUARE,)), {"circle", "red circle", "exactly 2 shape", "small red circle"}),
    "another background": (replace(TWO, background="beige"), {"background: beige"}),
}


def test_the_right_picture_fulfils_everything() -> None:
    verdict = score.score(scenes.render(scenes.from_words([TWO]))[0], PROMPT)
    assert all(verdict.values())
    assert {s.kind for s in verdict} == set(KINDS)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_picture_fails_exactly_what_is_wrong(wrong: str) -> None:
    scene, _ = WRONG[wrong]
    verdict = score.score(noisy(scenes.render(scenes.from_words([scene])))[0], PROMPT)
    truth = {s: score.check(s, score.symbolic(scene)) for s in score.statements(PROMPT)}
    assert verdict == truth
    failed = {str(s).split(": ")[1] for s, holds in verdict.items() if not holds}
    if wrong == "another background":
        assert failed == {"white"}
    else:
        assert WRONG[wrong][1] <= failed
        assert "white" not in failed
    assert any(verdict.values())


@pytest.mark.parametrize("ground", BACKGROUNDS)
def test_every_shape_and_colour_is_read_on_every_background(ground: str) -> None:
    wanted = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    drawn = [Scene(ground, (SceneObject(s, c, "small", 40.3, 70.6, 23.0),)) for s, c in wanted]
    for (shape, colour), found in zip(
        wanted, score.parse_batch(noisy(scenes.render(scenes.from_words(drawn)))), strict=True
    ):
        assert found.background == ground
        assert [(o.shape, o.colour, o.size) for o in found.objects] == [(shape, colour, "small")]


def test_empty_pictures_show_nothing() -> None:
    for name, rgb in BACKGROUNDS.items():
        plain = torch.tensor(rgb)[:, None, None].expand(3, 128, 128)
        assert score.parse(noisy(plain[None])[0]) == score.Parsed(name, ())


def test_specks_and_halos_are_no_objects() -> None:
    picture = scenes.render(scenes.from_words([TWO]))[0]
    expected = [(o.shape, o.colour) for o in score.parse(picture).objects]
    red = torch.tensor(COLOURS["red"])[:, None, None]
    picture[:, 10:15, 10:15] = red  # 25 pixels
    picture[:, 5:6, 40:120] = red  # a scratch
    picture[:, 112:114, 40:84] = torch.tensor(COLOURS["pink"])[:, None, None]  # a shadow below the square
    assert [(o.shape, o.colour) for o in score.parse(picture).objects] == expected
    picture[:, 20:40, 100:120] = red  # large enough to be counted: the limit is a limit
    assert [(o.shape, o.colour) for o in score.parse(picture).objects] == [
        *expected[:1],
        ("circle", "red"),
        ("square", "red"),
    ]


def test_blobs_are_objects_of_no_shape() -> None:
    picture = scenes.render(scenes.from_words([replace(TWO, objects=())]))[0]
    picture[:, 30:50, 20:80] = torch.tensor(COLOURS["green"])[:, None, None]  # a bar
    (found,) = score.parse(picture).objects
    assert found.shape == vision.UNKNOWN
    assert found.fit < vision.MIN_FIT
    verdict = score.score(picture, "one shape, a green square on white")
    assert {str(s): holds for s, holds in verdict.items()} == {
        "count: exactly 1 shape": True,
        "shape: square": False,
        "colour: green square": False,
        "background: white": True,
    }


def test_touching_objects_of_two_colours_stay_two() -> None:
    touching = replace(TWO, objects=(replace(CIRCLE, y=57.0), SQUARE))  # edges meet at 69.5 and 69
    found = score.parse(scenes.render(scenes.from_words([touching]))[0])
    assert [(o.shape, o.colour) for o in found.objects] == [("square", "blue"), ("circle", "red")]


def test_relations_need_two_objects_and_the_longer_axis() -> None:
    ring = score.Found("ring", "red", "small", 50.0, 50.0, 24.0, (38.0, 38.0, 62.0, 62.0), 1.0)
    above = Statement("relation", What("ring"), 1, "above", What("ring"))
    assert not score.check(above, score.Parsed("white", (ring,)))
    assert score.check(above, score.Parsed("white", (ring, replace(ring, y=90.0))))
    for right, down, relation in ((3, 30, "above"), (30, 3, "left of"), (-30, 20, "right of"), (5, -30, "below")):
        assert score.relation_between(ring, replace(ring, x=50.0 + right, y=50.0 + down)) == relation


def test_accuracies_are_by_kind_and_averaged_over_kinds() -> None:
    shape, ground = Statement("shape", What("star")), Statement("background", background="white")
    verdicts = [{shape: True, ground: True}, {shape: False, ground: True}, {shape: False}, {shape: False}]
    by_kind = score.accuracies(verdicts)
    assert by_kind == {"shape": (0.25, 4), "background": (1.0, 2)}
    assert score.macro_average(by_kind) == 0.625
    with pytest.raises(ValueError, match="nothing was scored"):
        score.macro_average({})


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
        score.score_batch(pictures()[:2], ["a star on white"])
    with pytest.raises(ValueError, match="unknown kind 'mood'"):
        score.check(Statement("mood"), truth()[0])
    with pytest.raises(ValueError, match="unknown word 'sad'"):
        score.score(pictures()[0], "a sad star")
