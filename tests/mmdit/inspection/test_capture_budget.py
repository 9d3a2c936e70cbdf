"""What captures keep and for how long: budgets, files, stopping early, gradients."""

from dataclasses import replace

import pytest
import torch

import mmdit
from inspected import CONFIG, drawn, drawn_with, encoded, inputs, left_behind, model, untouched
from mmdit import MMDiT, reducers
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import write_tensors
from mmdit.inspection.budget import bytes_of
from mmdit.inspection.dry_run import Sizes, rehearse
from mmdit.inspection.hooks import selected
from mmdit.inspection.shapes import shape_of
from mmdit.inspection.views import shown

X = "joint_blocks.1.x_block"
POST = f"{X}.resid_post"


@pytest.fixture(scope="module")
def demo():
    return mmdit.Pipeline.demo()


CASES = {
    "whole": {},
    "branch": {"branch": "cond", "steps": [0, 2]},
    "dtype": {"dtype": torch.float16, "tokens": [1, 2, 3]},
    "word": {"branch": "cond", "tokens": "circle", "stream": "text"},
    "norm": {"reduce": reducers.norm()},
    "running": {"reduce": reducers.running(reducers.moments())},
}


@pytest.mark.parametrize("case", CASES)
def test_the_budget_is_exact_and_comes_before_the_first_pass(demo, case):
    passes = []
    points = ["joint_blocks.*.resid_post", "joint_blocks.0.*.mlp.post"]
    with mmdit.capture(demo, points, **CASES[case]) as seen:
        drawn(demo)
    assert seen.nbytes == sum(value.nbytes for value in seen.values())
    kept = [entry.value for name in seen for entry in seen.of(name).entries]
    assert seen.nbytes == sum(value.untyped_storage().nbytes() for value in kept)  # no view holds a whole tensor
    with mmdit.capture(demo, points, budget=seen.nbytes, **CASES[case]) as again:
        drawn(demo)
    assert again.nbytes == seen.nbytes
    demo.watchers.append(passes.append)
    try:
        with (
            pytest.raises(mmdit.BudgetError, match=rf"{len(seen)} points x \d steps; .* What fits: .*budget="),
            mmdit.capture(demo, points, budget=seen.nbytes - 1, **CASES[case]) as none,
        ):
            drawn(demo)
    finally:
        demo.watchers.clear()
    assert passes == []
    assert len(none) == 0


def test_nothing_is_forecast_without_a_budget(demo, monkeypatch):
    monkeypatch.setattr("mmdit.inspection.budget.rehearse", lambda *_: pytest.fail("a dry run"))
    with mmdit.capture(demo, POST, budget=None) as seen:
        drawn(demo)
    assert len(seen) == 1


PATTERN = "joint_blocks.1.attend.pattern"
WRONG_PARTS = {
    "head": (PATTERN, {"heads": [99]}, r"heads \[99\].* 4"),
    "key": (PATTERN, {"tokens": [9999]}, r"tokens \[9999\]"),
    "query": (PATTERN, {"queries": 9999}, r"queries \[9999\]"),
    "sample": (POST, {"samples": [1]}, r"samples \[1\].* 1"),
    "channel": (POST, {"channels": [256]}, r"channels \[256\].* 256"),
    "word": (PATTERN, {"tokens": "circel", "branch": "cond"}, "'circel'"),
    "mask": (POST, {"tokens": torch.ones(3, 3, dtype=torch.bool)}, r"\[3, 3\].* 64 tokens"),
    "reducer of a pattern": (POST, {"reduce": reducers.quadrants()}, "quadrants.*pattern"),
    "size": (POST, {"reduce": reducers.top_k(257)}, "top_k.257. of 256"),
    "axis": (PATTERN, {"reduce": reducers.mean("channel")}, "'channel'.*head, query, key"),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_a_part_that_does_not_exist_is_refused_before_the_first_pass(demo, case):
    passes, (point, wrong, said) = [], WRONG_PARTS[case]
    demo.watchers.append(passes.append)
    try:
        with pytest.raises(ValueError, match=said), mmdit.capture(demo, point, budget=None, steps=-1, **wrong):
            drawn(demo)
    finally:
        demo.watchers.clear()
    assert passes == []


def test_reducers_are_checked_without_warnings(demo, recwarn):
    running = reducers.running(reducers.moments())
    with mmdit.capture(demo, POST, budget=None, steps=0, branch="cond", reduce=running) as seen:
        drawn(demo, steps=1)
    assert seen[POST].shape[-2:] == (3, 256)
    assert len(recwarn) == 0


def test_a_reducer_that_needs_values_runs_without_a_budget(demo):
    largest = reducers.Reducer("largest", lambda value, _: (torch.tensor([[value.max().item()]]), ("one",)))
    with mmdit.capture(demo, POST, budget=None, steps=0, branch="cond", reduce=largest) as seen:
        drawn(demo)
    assert seen[POST].shape[-1] == 1


def test_shapes_are_those_of_a_dry_run():
    found = {}

    def note(target, passing, tracker):
        if target.point.layout != "pattern":
            found[target.name] = shown(target.point, passing).shape[1:]
            return
        _, heads, tokens, _ = passing.attention.q.shape
        found[target.name] = (heads, tokens, tokens)

    for config in (CONFIG, replace(CONFIG, mlp_dim=96, out_channels=8)):
        some = selected(MMDiT(config), "*")
        rehearse(some[0].model, some, Sizes(2, 4, 6, text_tokens=5), note)
        assert {one.name: shape_of(one.point, config, 5, 6) for one in some} == found


def test_the_budget_of_a_model_alone_comes_before_its_call():
    small, ran = model(), []
    small.joint_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with mmdit.capture(small, ["*resid_post", "*pattern"]) as seen:
        small(*inputs())
    with (
        pytest.raises(mmdit.BudgetError, match="the next call, of step 1"),
        mmdit.capture(small, ["*resid_post", "*pattern"], budget=seen.nbytes) as again,
    ):
        small(*inputs())
        small(*inputs())
    assert len(ran) == 2
    assert again.nbytes == seen.nbytes


@pytest.mark.parametrize(("budget", "wanted"), [("2 GB", 2 * 10**9), ("1.5kB", 1500), (7, 7), (None, None)])
def test_budgets_are_written_like_this(budget, wanted):
    assert bytes_of(budget) == wanted
    with pytest.raises(ValueError, match="budget must be a number of bytes"):
        bytes_of("much")


def test_to_disk_and_back(demo, tmp_path):
    path = tmp_path / "deep" / "seen.safetensors"
    keep = {
        "branch": "cond",
        "reduce": {"*pattern": reducers.quadrants(), "*mlp.post": reducers.running(reducers.moments())},
    }
    points = ["joint_blocks.0.attend.pattern", "joint_blocks.0.x_block.mlp.post", POST]
    with mmdit.capture(demo, points, **keep) as wanted:
        drawn(demo)
    with mmdit.capture(demo, points, to=path, **keep) as seen:
        drawn(demo)
        assert torch.equal(seen[POST], wanted[POST])  # already there
    assert [file.name for file in path.parent.iterdir()] == ["seen.safetensors"]
    for found in (seen, mmdit.load_capture(path)):
        assert list(found) == list(wanted)
        for name in wanted:
            one, other = found.labelled(name), wanted.labelled(name)
            assert torch.equal(one.values, other.values)
            assert (dict(one.axes), dict(one.notes)) == (dict(other.axes), dict(other.notes))
    with pytest.raises(FileExistsError, match="exists already"), mmdit.capture(demo, POST, to=path):
        pass
    mmdit_file = tmp_path / "model.safetensors"
    write_tensors(mmdit_file, {"a": LazyTensor.of(torch.zeros(1))})
    with pytest.raises(mmdit.CheckpointError, match="is not a capture"):
        mmdit.load_capture(mmdit_file)


def test_stop_after_the_last_wanted_point(demo):
    ran, later = [], demo.transformer.joint_blocks[2]
    handles = [later.register_forward_hook(lambda *_: ran.append("block")) for _ in (1,)]
    handles.append(demo.vae.decoder.register_forward_hook(lambda *_: ran.append("vae")))
    try:
        with mmdit.capture(demo, [POST, "joint_blocks.0.x_block.resid_pre"], steps=[0, 1], stop=True) as seen:
            drawn(demo, steps=6, output_type="pt")
            ran.append("after")
        assert ran == ["block"]  # of step 0; step 1 ends before it
        assert seen[POST].shape[:2] == (2, 2)
        with mmdit.capture(demo, POST, branch="cond", stop=True) as seen:
            drawn(demo, output_type="pt")
        assert seen.labelled(POST).labels("step") == (0, 1, 2)
        assert "vae" not in ran
        with mmdit.capture(demo.transformer, POST) as outer, mmdit.capture(demo.transformer, POST, stop=True):
            drawn(demo)
        assert len(outer.of(POST).entries) == 1
    finally:
        for handle in handles:
            handle.remove()
    assert left_behind(*demo.models.values()) == []


def test_gradients_are_those_of_autograd():
    small, given = model(), inputs()
    held = {}

    def hold(_, __, output):
        output[1].requires_grad_() if not output[1].requires_grad else None
        output[1].retain_grad()
        held["post"] = output[1]

    handle = small.joint_blocks[0].register_forward_hook(hold)
    small(*given).square().sum().backward()
    handle.remove()
    first, v = "joint_blocks.0.x_block.resid_post", f"{X}.attn.v"
    with mmdit.capture(small, [first, v], grad=True) as seen:
        out = small(*given)
    gradients = seen.gradients(out.square().sum())
    torch.testing.assert_close(gradients[first][0], held["post"].grad)
    assert torch.equal(out, small(*given))
    step = 1e-6
    with mmdit.patch(small, v, add=step, heads=1, tokens=2, channels=3, samples=0):
        moved = small(*given).square().sum()
    slope = (moved - out.square().sum()) / step
    torch.testing.assert_close(slope, gradients[v][0, 0, 1, 2, 3], rtol=1e-3, atol=1e-3)


def test_gradients_through_a_pipelines_steps(demo):
    cond = encoded(demo, "a red circle")
    with untouched(demo), mmdit.capture(demo, POST, grad=True, tokens=[4]) as seen:
        *_, last = demo.sample(cond, None, demo.noise(1), num_inference_steps=2, guidance_scale=1.0)
        gradients = seen.gradients(last.x.square().mean())
    assert gradients[POST].shape == (2, 1, 1, 1, 256)
    assert bool((gradients[POST].flatten(1).norm(dim=1) > 0).all())
    with pytest.raises(ValueError, match=r"runs without gradients: use pipe\.predict or pipe\.sample"):
        drawn_with(demo, "a red circle", POST, grad=True)
    with pytest.raises(ValueError, match="need a capture with grad=True"):
        drawn_with(demo, "a red circle", POST).gradients(last.x.sum())
    with pytest.raises(ValueError, match="grad=True keeps values as they pass"):
        drawn_with(demo, "a red circle", POST, grad=True, reduce=reducers.norm())
