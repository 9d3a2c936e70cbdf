"""The training of ControlNets for the embedded model: hints, captions, what is scored, and a run of a few steps."""

import copy
import dataclasses
import random
import weakref

import pytest
import torch

from mmdit import CANNY_NET, MMDiT, Pipeline, load_controlnet
from mmdit.demo import bench_control
from mmdit.demo.bench_control import rows
from mmdit.demo.control_data import Data, depth_map, hints, make_data, scenes_of, vague_caption
from mmdit.demo.control_recipe import GPU, ControlRecipe
from mmdit.demo.control_step import STAGES, Stepper, Trainer, new_net
from mmdit.demo.evaluate_control import statements_of
from mmdit.demo.grammar import statements
from mmdit.demo.scenes import Scenes, render, sample
from mmdit.demo.score import check, parse_batch
from mmdit.demo.train_control import train
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.control_inputs import control_inputs, hint_rules, make_control
from mmdit.pipeline.image_inputs import PictureSize
from mmdit.pipeline.profiles import PROFILES
from mmdit.training.journal import Journal
from samplers.training import noised
from skips import SKIPS
from tiny_training import drawn_velocity


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


def test_edges_of_objects_as_bright_as_the_ground():
    """The gray value of a red star on brown is nearly that of the ground."""
    scenes = sample(1, 0)
    picture = torch.full((1, 3, 128, 128), 0.4)
    picture[:, 0, 40:80, 40:80], picture[:, 1, 40:80, 40:80] = 0.9, 0.4 - 0.5 * 0.299 / 0.587
    assert hints("canny", scenes, picture).sum() > 3 * 100


def test_small_crosses_and_rings_come_more_often():
    def share(scenes: Scenes) -> float:
        words = [one for scene in scenes.words() for one in scene.objects]
        return sum(one.shape in ("cross", "ring") and one.size == "small" for one in words) / len(words)

    assert share(scenes_of(ControlRecipe(scenes=400))) > 1.4 * share(sample(1200, 0))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(EMBEDDED, dtype=torch.float32)


@pytest.fixture(scope="module")
def transformer(pipe) -> MMDiT:
    return copy.deepcopy(pipe.transformer).bfloat16()


@pytest.fixture(scope="module")
def canny(pipe, tmp_path_factory) -> Data:
    return make_data(pipe, "canny", ControlRecipe(scenes=2), Journal(tmp_path_factory.mktemp("log"), quiet=True))


@pytest.mark.parametrize("profile", ["diffusers", "comfyui", "reference"])
def test_training_takes_the_hints_of_drawings(profile, pipe, canny):
    """Mean and spread of the hints' latents are those that a drawing in this profile gives the net."""
    rules = hint_rules(new_net("canny", pipe.transformer).config, PROFILES[profile])
    recipe = ControlRecipe(scenes=2, moves=0)
    given = canny.draw(rules, 64, recipe, torch.Generator().manual_seed(0))
    first = (given.x0 == canny.pictures[0]).flatten(1).all(1)
    trained = given.hint[first]

    scenes = scenes_of(recipe)[:1]
    hint = hints("canny", scenes, render(scenes))
    (one,) = control_inputs(new_net("canny", pipe.transformer), hint, config=pipe.transformer.config)
    torch.manual_seed(0)
    drawn = make_control(one, pipe.vae, PROFILES[profile], PictureSize(128, 128, cut=False), 32, twice=False).hint
    assert (trained.std(0).mean() > 0) == (drawn.std(0).mean() > 0) == (profile != "comfyui")
    torch.testing.assert_close(trained.std(0).mean(), drawn.std(0).mean(), rtol=0.1, atol=0)
    assert (trained.mean(0) - drawn.mean(0)).std() < 0.4 * drawn.mean(0).std()


@pytest.mark.parametrize("profile", ["diffusers", "comfyui", "reference"])
def test_training_computes_what_drawings_compute(profile, transformer, canny):
    """A net of two steps gives the same velocity in training and in a drawing."""
    rules = PROFILES[profile]
    trainer = Trainer(new_net("canny", transformer), transformer)
    optimizer = torch.optim.AdamW(trainer.net.parameters(), 1e-2)
    way = hint_rules(trainer.net.config, rules)
    batch = canny.draw(way, 2, ControlRecipe(), torch.Generator().manual_seed(1))
    batch = batch._replace(t=torch.full_like(batch.t, 0.75))
    x = noised(batch.x0, batch.noise, batch.t)
    for _ in range(2):
        optimizer.zero_grad()
        trainer.together(batch, rules).backward()
        optimizer.step()
    with torch.no_grad():
        found = trainer.velocity(batch, rules)
        net = copy.deepcopy(trainer.net).bfloat16()
        wanted = drawn_velocity(transformer, net, rules, batch, x)
        plain = transformer(x.bfloat16(), 1000 * batch.t, batch.context, batch.pooled.bfloat16()).float()
    moved = (wanted - plain).norm()
    assert moved > 0.2 * plain.norm()
    assert (found - wanted).norm() < 0.1 * moved  # bfloat16, and comfyui's timestep in bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"])
@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("stage", STAGES)
def test_recorded_steps_train_as_eager_ones(stage, transformer, canny):
    """Profiles take turns; the recording of one does not disturb that of another."""
    losses = []
    for recorded in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(
            new_net("canny", transformer, 2).cuda(), copy.deepcopy(transformer).cuda().requires_grad_(False)
        )
        recipe = ControlRecipe(scenes=2, batch=8, alone_batch=8, moves=0, recorded=recorded)
        stepper = Stepper(trainer, stage, canny.to(torch.device("cuda")), recipe)
        losses.append([float(stepper.step(profile, 1e-3)) for _ in range(4) for profile in PROFILES.values()])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert len(set(losses[1])) > 10  # an empty graph gives one loss again and again


def test_a_batch_without_finite_gradients_is_left_out(transformer, canny):
    """One such batch would make all weights NaN."""
    trainer = Trainer(new_net("canny", transformer), transformer)
    stepper = Stepper(trainer, "together", canny, ControlRecipe(scenes=2, batch=2, moves=0))
    stepper.step(PROFILES["diffusers"], 1e-3)
    assert int(stepper.left_out) == 0
    stepper.data = dataclasses.replace(canny, pictures=torch.full_like(canny.pictures, torch.inf))
    assert not torch.isfinite(stepper.step(PROFILES["diffusers"], 1e-3))
    assert int(stepper.left_out) == 1
    assert all(torch.isfinite(weight).all() for weight in trainer.net.parameters())
    stepper.data = canny
    assert torch.isfinite(stepper.step(PROFILES["diffusers"], 1e-3))


def test_the_recipe_for_a_gpu_is_that_of_the_shipped_nets(transformer):
    found = new_net("canny", transformer, GPU.depth, GPU.mlp_dim).config
    assert found == load_controlnet(CANNY_NET).config


def test_the_measured_steps_are_those_of_a_training(pipe, monkeypatch):
    """All gradients are finite, losses are those of a trained net, and nothing of a way is left at the next one."""
    steppers, left = weakref.WeakSet(), []

    def begin(device):
        start_peak(device)
        left.append(len(steppers))

    def stepper(*given):
        made = Stepper(*given)
        steppers.add(made)
        return made

    start_peak = bench_control._start_peak
    monkeypatch.setattr(bench_control, "_start_peak", begin)
    monkeypatch.setattr(bench_control, "Stepper", stepper)
    found = list(rows(pipe, "canny", dataclasses.replace(GPU, batch=1, recorded=False), ["eager", "recorded"], 1))
    assert [row[:2] for row in found] == [*(("eager", name) for name in PROFILES), ("recorded", "failed")]
    for _, _, _, _, loss, left_out, _ in found[:-1]:
        assert float(loss) < 0.2
        assert left_out == "0"
    assert "cpu" in found[-1][2]
    assert left == [0, 0]


def test_the_peak_is_that_of_the_device_since_the_way_began(monkeypatch):
    peaks, device = {0: 2**34, 1: 2**31}, torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: peaks[getattr(device, "index", 0)])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update({device.index: 0}))
    assert bench_control._gib(device) == 2
    bench_control._start_peak(device)
    assert bench_control._gib(device) == 0


def test_a_run_and_going_on(tmp_path):
    """The nets are files that load; a run that is started again goes on with the pictures of the first."""
    recipe = ControlRecipe(scenes=2, batch=2, alone_batch=2)
    first = train(tmp_path, 0.0, recipe)
    assert {kind: load_controlnet(path).config.kind for kind, path in first.items()} == {
        "canny": "canny",
        "depth": "depth",
    }
    state = torch.load(tmp_path / "canny_state.pt")
    assert not load_controlnet(first["canny"]).controlnet_blocks[0].weight.any(), "no step was done"
    train(tmp_path, state["done"] + 1.5, recipe, kinds=["canny"])
    assert torch.load(tmp_path / "canny_state.pt")["begun"] == state["begun"]
    trained = load_controlnet(first["canny"])
    assert trained.controlnet_blocks[0].weight.any()
    assert not load_controlnet(first["depth"]).controlnet_blocks[0].weight.any()
    assert all(path.stat().st_size <= 4 * 2**20 for path in first.values())
    further = train(tmp_path / "further", 0.0, recipe, kinds=["canny"], start_from=tmp_path)
    assert torch.equal(
        load_controlnet(further["canny"]).controlnet_blocks[0].weight, trained.controlnet_blocks[0].weight
    )
