"""What is counted when pictures are edited, with a stand-in for the model that knows the answer."""

import random
from types import SimpleNamespace

import torch

from mmdit import Pipeline
from mmdit.bench import edits
from mmdit.demo.scenes import from_words, render, sample
from mmdit.demo.score import check, parse_batch


def test_a_mask_leaves_the_other_objects_out():
    batch = sample(12, 3)
    chosen = edits.different(batch)
    assert chosen
    pictures = render(batch)
    for i in chosen:
        scene = batch.words()[i]
        alone = render(batch[torch.tensor([i])])
        assert torch.equal(alone[0], pictures[i])
        for place, one in enumerate(scene.objects):
            mask = edits.free_of(scene, place)
            assert mask[int(one.y), int(one.x)] == 1
            assert all(mask[int(other.y), int(other.x)] == 0 for other in scene.objects if other is not one)
            near = edits.free_of(scene, place, edits.Redraw(reach=4.0))
            assert torch.equal(near, near * mask)
            assert near[int(one.y), int(one.x)] == 1
            assert near.sum() <= (one.across * 1.14 + 9) ** 2


def test_claims_hold_of_a_scene_and_not_of_another():
    scenes = [scene for scene in sample(40, 4).words() if len(scene.objects) == 2][:4]
    rng = random.Random(0)
    for scene in scenes:
        new, place = edits.recoloured(scene, rng)
        before, after = parse_batch(render(from_words([scene, new])))
        about_it, about_rest = (edits.claims(new, [i], ground=True) for i in (place, 1 - place))
        assert all(check(one, after) for one in about_it + about_rest)
        assert all(check(one, before) for one in about_rest)
        assert not all(check(one, before) for one in about_it)


class Unchanged(Pipeline):
    """A model that returns the given picture."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        pass

    def __call__(self, texts, *, image, **how):
        return SimpleNamespace(images=torch.stack(image))


def test_recolour_counts():
    """What returns the given picture keeps the others and draws nothing new, however it is drawn."""
    ways = [edits.REDRAW, edits.Redraw(sampler="euler_ancestral", strength=0.8, reach=8.0)]
    rows = list(edits.recolour(Unchanged(), 4, ways))
    assert [row[:6] for row in rows] == [
        ["euler", 0.7, 4.5, 20, 3.0, None],
        ["euler_ancestral", 0.8, 4.5, 20, 3.0, 8.0],
    ]
    for row in rows:
        count, others, new, *kept = row[6:]
        assert (count, others, kept) == (4, "100.0%", [others, new])
        assert float(new.rstrip("%")) < 75
