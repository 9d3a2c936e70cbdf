"""Natural mistakes end in an error that says what to write."""

import numpy as np
import pytest
import torch

import mmdit
from inspected import inputs, left_behind, model
from mmdit import reducers
from mmdit.inspection import plots
from refusals import refuses

POST, Z = "joint_blocks.1.x_block.resid_post", "joint_blocks.1.x_block.attn.z"


@pytest.fixture(scope="module")
def small():
    return model()


def entered(context):
    with context:
        pass


@pytest.mark.parametrize("wrong", [reducers.norm, "norm", "nrom"], ids=["function", "name", "misspelt"])
def test_a_reducer_without_its_parentheses(small, wrong):
    said = ("reduce=", "mmdit.reducers.norm(...)")
    refuses(lambda: entered(mmdit.capture(small, POST, reduce=wrong)), *said, error=TypeError)
    refuses(lambda: entered(mmdit.capture(small, POST, reduce={"*": wrong})), *said, error=TypeError)


def test_a_function_in_place_of_a_reducer(small):
    wrong = lambda value: value.norm()  # noqa: E731
    refuses(lambda: entered(mmdit.capture(small, POST, reduce=wrong)), "quadrants", "Reducer(", error=TypeError)
    kept = {"*.nothing": reducers.norm()}
    refuses(lambda: entered(mmdit.capture(small, POST, reduce=kept)), "*.nothing", error=ValueError)


@pytest.mark.parametrize(
    ("call", "wrong", "near"),
    [
        (lambda small: mmdit.capture(small, POST, step=1), "step", "steps"),
        (lambda small: mmdit.patch(small, POST, sclae=2.0), "sclae", "scale"),
        (lambda small: mmdit.concept_tokens(small, torch.ones(2, 48), block=1), "block", "blocks"),
        (lambda small: mmdit.attention_maps(small, direktion="i2t"), "direktion", "direction"),
        (lambda small: mmdit.points(small, hight=64), "hight", "height"),
        (lambda small: mmdit.sweep(small, Z, lambda: 0.0, ablaet="zero"), "ablaet", "ablate"),
    ],
    ids=["capture", "patch", "concept_tokens", "attention_maps", "points", "sweep"],
)
def test_a_misspelt_argument(small, call, wrong, near):
    refuses(lambda: call(small), repr(wrong), near, error=TypeError)
    assert left_behind(small) == []


def test_what_a_patch_may_give(small):
    plain, at = small(*inputs()), {"heads": [0], "samples": [1]}
    with mmdit.patch(small, Z, scale=0.5, **at):
        half = small(*inputs())
    for apply in (lambda z: z * 0.5, lambda z: np.asarray(z) * 0.5):
        with mmdit.patch(small, Z, apply=apply, **at):
            assert torch.equal(small(*inputs()), half)
    with mmdit.patch(small, Z, apply=lambda z: None):
        assert torch.equal(small(*inputs()), plain)
    with mmdit.patch(small, Z, apply=lambda z: "half"):
        refuses(lambda: small(*inputs()), Z, "str", error=TypeError)


def test_a_sweep_of_what_is_no_number(small):
    refuses(lambda: mmdit.sweep(small, Z, object, scale=1.0), "run()", "object", error=TypeError)
    results = iter([torch.ones(2), torch.ones(3)])
    refuses(
        lambda: mmdit.sweep(small, "joint_blocks.[01].x_block.attn.z", lambda: next(results), scale=1.0),
        *("[2]", "[3]"),
        error=ValueError,
    )


def test_keys_are_completed(small):
    with mmdit.capture(small, [POST, Z], budget=None) as seen:
        small(*inputs())
    assert seen._ipython_key_completions_() == [Z, POST]


def test_plots_of_what_is_no_array():
    refuses(lambda: plots.layer_step_grid([["a"]], label="x"), "values", "list", error=ValueError)
    refuses(lambda: plots.layer_step_grid([[1.0], [1.0, 2.0]], label="x"), "values", error=ValueError)
