"""The training of ControlNets for the embedded model: hints, captions, what is scored, and a run of a few steps."""

import random

import torch

from mmdit import load_controlnet
from mmdit.demo.evaluate_control import statements_of
from mmdit.demo.grammar import statements
from mmdit.demo.scenes import render, sample
from mmdit.demo.score import check, parse_batch
from mmdit.demo.train_control import ControlRecipe, depth_map, hints, train, vague_caption


def test_hints():
    """Depth is brighter where an object is larger, and black on the ground; edges surround the same objects."""
    scenes = sample(8, 3)
    depth, edges = depth_map(scenes), hints("canny", scenes, render(scenes))
    assert depth.shape == edges.shape == (8, 3, 128, 128)
    for i, scene in enumerate(scenes.words()):
        at = {one.across: float(depth[i, 0, int(one.y), int(one.x)]) for one in scene.objects if one.shape != "ring"}
        bright = [at[across] for across in sorted(at)]
        assert bright == sorted(bright)
        assert all(0.5 < value <= 1 for value in bright)
        assert float(depth[i, 0, 0, 0]) == 0
        assert edges[i, 0].sum() > 40


def test_captions_say_neither_shapes_nor_positions():
    rng = random.Random(0)
    for scene in sample(40, 1).words():
        said = statements(vague_caption(scene, rng))
        assert {one.kind for one in said} <= {"colour", "count", "background", "shape"}
        assert not any(one.what is not None and one.what.shape for one in said)
        assert {one.background for one in said if one.kind == "background"} == {scene.background}


def test_a_true_picture_fulfils_what_is_scored():
    scenes = sample(24, 5)
    for scene, found in zip(scenes.words(), parse_batch(render(scenes)), strict=True):
        claims = list(statements_of(scene))
        assert {one.kind for one in claims} <= {"shape", "relation"}
        assert all(check(one, found) for one in claims)


def test_a_run_and_going_on(tmp_path):
    """The nets are files that load; a run that is started again goes on with the pictures of the first."""
    recipe = ControlRecipe(scenes=2, batch=2, alone_batch=2)
    first = train(tmp_path, 0.0, recipe)
    assert {kind: load_controlnet(path).config.kind for kind, path in first.items()} == {
        "canny": "canny",
        "depth": "depth",
    }
    state = torch.load(tmp_path / "control.pt")
    assert not load_controlnet(first["canny"]).controlnet_blocks[0].weight.any(), "no step was done"
    train(tmp_path, state["done"] + 2.0, recipe)
    assert torch.load(tmp_path / "control.pt")["begun"] == state["begun"]
    assert load_controlnet(first["canny"]).controlnet_blocks[0].weight.any()
    assert all(path.stat().st_size <= 4 * 2**20 for path in first.values())
