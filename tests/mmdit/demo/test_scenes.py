"""Scenes keep their promises (sizes, gaps, colours, seeds), and pictures show what the tensors say."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmdit.demo import scenes
from mmdit.demo.mistakes import mistaken
from mmdit.demo.scenes import Scene, SceneObject, Scenes
from mmdit.demo.shapes import BACKGROUNDS, COLOURS, SHAPES, coverage, palette, signed_distance, unit_area


def boxes(batch: Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """Half extents of the boxes of tilted shapes [b, 4], and their middles."""
    half = batch.across / 2 * (batch.angle.cos() + batch.angle.sin().abs())
    return half, batch.x, batch.y


def one(shape: str, across: float = 24.0, x: float = 64.0, y: float = 64.0) -> Scenes:
    size = "small" if across < 32 else "large"
    return scenes.from_words([Scene("black", (SceneObject(shape, "green", size, x, y, across),))])


def test_objects_keep_apart_and_inside() -> None:
    batch = scenes.sample(3000, 0)
    half, x, y = boxes(batch)
    exists = torch.arange(4) < batch.count[:, None]
    for low in (x - half, y - half, 128 - x - half, 128 - y - half):
        assert low[exists].min() >= scenes.MARGIN - 1e-4
    for a in range(4):
        for b in range(a):
            both = exists[:, a]
            apart = torch.maximum((x[:, a] - x[:, b]).abs(), (y[:, a] - y[:, b]).abs()) - half[:, a] - half[:, b]
            assert apart[both].min() >= scenes.GAP - 1e-4
            assert apart[both].min() < scenes.GAP + 1  # the bound is used, so the test could have failed


def test_every_kind_is_drawn() -> None:
    batch = scenes.sample(3000, 1)
    exists = torch.arange(4) < batch.count[:, None]
    for values, n in ((batch.shape[exists], len(SHAPES)), (batch.colour[exists], len(COLOURS))):
        share = torch.bincount(values, minlength=n) / len(values)
        assert (share - 1 / n).abs().max() < 0.25 / n
    assert (torch.bincount(batch.background) / 3000 - 1 / 6).abs().max() < 0.04
    assert torch.bincount(batch.count).shape == (5,)
    assert batch.large[exists].float().mean() == pytest.approx(0.5, abs=0.03)
    for large, name in ((False, "small"), (True, "large")):
        across = batch.across[exists & (batch.large == large)]
        assert scenes.SIZES[name][0] <= across.min() < across.max() <= scenes.SIZES[name][1]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equal_objects_to_count_occur(count: int) -> None:
    groups = [[(o.shape, o.colour) for o in scene.objects] for scene in scenes.sample(3000, 2).words()]
    assert sum(any(group.count(kind) == count for kind in group) for group in groups) > 30


def test_a_seed_gives_the_same_scenes_and_pictures() -> None:
    first, again, other = (scenes.sample(20, seed) for seed in (3, 3, 4))
    assert torch.equal(scenes.render(first), scenes.render(again))
    assert not torch.equal(scenes.render(first), scenes.render(other))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(scenes.sample(20, generator).x, first.x)
    assert torch.equal(scenes.render(first)[5:7], scenes.render(first[5:7]))


def test_pictures_are_rgb_with_the_colours_of_the_scene() -> None:
    batch = scenes.sample(200, 5)
    pictures = scenes.render(batch)
    assert pictures.shape == (200, 3, 128, 128)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    ground = (palette(BACKGROUNDS)[batch.background] + batch.background_tint).clamp(0, 1)
    assert torch.allclose(pictures[:, :, 0, 0], ground, atol=1e-6)
    paint = (palette(COLOURS)[batch.colour] + batch.tint).clamp(0, 1)
    ring = SHAPES.index("ring")
    for i in range(200):
        for k in range(int(batch.count[i])):
            pixel = pictures[i, :, int(batch.y[i, k]), int(batch.x[i, k])]
            expected = ground[i] if batch.shape[i, k] == ring else paint[i, k]
            assert torch.allclose(pixel, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_smallest_object_is_at_least_22_pixels_across(shape: str) -> None:
    drawn = scenes.render(one(shape, across=scenes.SIZES["small"][0]))[0, 1] > 0.3
    width, height = (int(drawn.any(dim).sum()) for dim in (0, 1))
    assert max(width, height) >= 22
    assert max(width, height) <= 24
    assert min(width, height) >= 20


def test_areas_are_the_closed_forms() -> None:
    arm, hole = 0.34, 0.52
    outer = 1 / math.sin(math.radians(72))
    expected = {
        "circle": math.pi,
        "square": 4,
        "triangle": 2,
        "diamond": 2,
        "star": 5 * outer**2 * 0.45 * math.sin(math.radians(36)),
        "cross": 2 * 2 * 2 * arm - (2 * arm) ** 2,
        "ring": math.pi * (1 - hole**2),
    }
    assert {shape: unit_area(shape) for shape in SHAPES} == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_distances(shape: str) -> None:
    """The gradient has length 1 near the edge, and the shape touches the sides of its box without leaving it."""
    point = (torch.rand(2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2).clone()
    point.requires_grad_()
    distance = signed_distance(shape, point[0], point[1])
    (slope,) = torch.autograd.grad(distance.sum(), point)
    assert torch.allclose(slope.norm(dim=0), torch.ones(4000, dtype=torch.float64), atol=1e-9)
    axis = torch.linspace(-1.2, 1.2, 961, dtype=torch.float64)
    inside = signed_distance(shape, axis[None, :], axis[:, None]) <= 0
    spans = [axis[inside.any(dim)] for dim in (0, 1)]
    assert all(float(s.abs().max()) <= 1 + 1e-9 for s in spans)
    assert float(spans[0].max()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_antialiasing_keeps_the_area_wherever_the_object_is(shape: str) -> None:
    for shift in (0.0, 0.25, 0.5, 0.8):
        picture = scenes.render(one(shape, 40.0, 60 + shift, 64 - shift))[0, 1]
        low, high = picture.min(), COLOURS["green"][1]
        assert float(((picture - low) / (high - low)).sum()) == pytest.approx(unit_area(shape) * 400, rel=0.01)


def test_tilt_turns_the_object() -> None:
    plain = one("square", 40.0)
    tilted = replace(plain, angle=plain.angle + scenes.TILT)
    width = [int((scenes.render(s)[0, 1] > 0.3).any(0).sum()) for s in (plain, tilted)]
    assert width[0] == 40
    assert width[1] == pytest.approx(40 * (math.cos(scenes.TILT) + math.sin(scenes.TILT)), abs=1.5)


def test_shapes_and_colours_are_well_apart() -> None:
    axis = (torch.arange(23) - 11.0) / 11.5
    masks = [coverage(shape, axis[None, :], axis[:, None], 11.5) for shape in SHAPES]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert torch.minimum(a, b).sum() / torch.maximum(a, b).sum() < 0.8
    colours = torch.cat([palette(COLOURS), palette(BACKGROUNDS)])
    apart = torch.cdist(colours, colours) + 9 * torch.eye(len(colours))
    # Two tints of 0.03 a channel move two colours by at most 0.104 towards each other.
    assert apart.min() > 3 * 2 * scenes.TINT * math.sqrt(3)
    assert not COLOURS.keys() & BACKGROUNDS.keys()


def test_words_say_what_the_tensors_hold_and_lead_back() -> None:
    batch = scenes.sample(50, 6)
    words = batch.words()
    assert [len(scene.objects) for scene in words] == batch.count.tolist()
    back = scenes.from_words(words)
    for name in ("shape", "colour", "large", "x", "y", "across"):
        exists = torch.arange(4) < batch.count[:, None]
        assert torch.equal(getattr(back, name)[exists], getattr(batch, name)[exists])
    assert torch.equal(back.background, batch.background)
    assert back.words() == words


def test_bad_arguments_are_named() -> None:
    assert len(scenes.sample(0, 0)) == 0
    with pytest.raises(ValueError, match="not be negative, got -1"):
        scenes.sample(-1, 0)
    with pytest.raises(ValueError, match="unknown name 'hexagon'; known: circle, square"):
        one("hexagon")
    with pytest.raises(ValueError, match="at most 4 objects"):
        scenes.from_words([Scene("white", scenes.sample(1, 0).words()[0].objects * 5)])


def test_a_mistake_contradicts_the_caption_of_its_scene() -> None:
    """Every scene has a mistake: another colour or shape, an object missing or too many, or two colours swapped."""
    right = scenes.sample(400, 17)
    wrong = mistaken(right, torch.Generator().manual_seed(1))
    kinds: Counter[str] = Counter()
    for one, other in zip(right.words(), wrong.words(), strict=True):
        if len(other.objects) < len(one.objects):
            kinds["missing"] += 1
            assert set(other.objects) < set(one.objects)
            continue
        if len(other.objects) > len(one.objects):
            kinds["extra"] += 1
            *same, twin = other.objects
            assert tuple(same) == one.objects
            assert any(replace(each, x=twin.x, y=twin.y) == twin for each in same)
            continue
        pairs = [(a, b) for a, b in zip(one.objects, other.objects, strict=True) if a != b]
        assert all(replace(a, shape=b.shape, colour=b.colour) == b for a, b in pairs)
        changed = [(a.shape != b.shape, a.colour != b.colour) for a, b in pairs]
        if len(changed) == 2:
            assert Counter(a.colour for a, _ in pairs) == Counter(b.colour for _, b in pairs)
        kinds[str(changed)] += 1
    assert kinds["[(False, True)]"] > 160
    assert kinds["[(True, False)]"] > 40
    assert min(kinds["missing"], kinds["extra"], kinds["[(False, True), (False, True)]"]) > 15
    assert set(kinds) == {"missing", "extra", "[(False, True)]", "[(True, False)]", "[(False, True), (False, True)]"}


def test_an_extra_object_is_apart_from_the_others() -> None:
    """The twin keeps the distance from boxes and the border that `sample` keeps."""
    right = scenes.sample(300, 18)
    wrong = mistaken(right, torch.Generator().manual_seed(2))
    more = (wrong.count > right.count).nonzero()[:, 0].tolist()
    assert more
    half = wrong.across / 2 * (wrong.angle.cos() + wrong.angle.sin().abs())
    for i in more:
        new = int(wrong.count[i]) - 1
        for at in (wrong.x[i], wrong.y[i]):
            assert at[new] - half[i, new] >= scenes.MARGIN
            assert at[new] + half[i, new] <= scenes.SIDE - scenes.MARGIN
        away = torch.stack([wrong.x[i] - wrong.x[i, new], wrong.y[i] - wrong.y[i, new]]).abs().amax(0)
        assert (away >= half[i] + half[i, new] + scenes.GAP)[:new].all()
