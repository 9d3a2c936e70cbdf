"""Natural mistakes end in an error that says what to write."""

import numpy as np
import pytest
import torch

import mmdit
from inspected import inputs, left_behind, model
from mmdit import reducers
from mmdit.inspection import plots
from mmdit.inspection.addresses import checked_tokens, whole_numbers
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


MASK = torch.tensor([True, False, True, False])


@pytest.mark.parametrize("wrong", [[0.9], 1.5, "12", MASK, MASK.tolist(), MASK.numpy(), torch.tensor([0.5])], ids=repr)
def test_numbers_of_an_address_are_whole_numbers(wrong):
    """A mask or a fraction was read as the numbers 0 and 1, so that other heads were changed than were meant."""
    refuses(lambda: whole_numbers("heads", wrong), "heads", error=TypeError)
    if not isinstance(wrong, str) and getattr(wrong, "dtype", None) not in (torch.bool, np.bool_):
        refuses(lambda: checked_tokens("queries", wrong), "queries", error=TypeError)


def test_numbers_of_an_address_may_be_numpys_and_torchs():
    given = (np.int64(1), np.array([1, 2]), torch.tensor([3]), range(2), slice(2), None)
    assert [whole_numbers("heads", one) for one in given] == [1, [1, 2], [3], [0, 1], slice(2), None]
    assert torch.equal(checked_tokens("tokens", MASK.numpy()), MASK)
    assert checked_tokens("tokens", ["red", np.int64(3)]) == ["red", 3]
    refuses(lambda: checked_tokens("tokens", ["red", 0.5]), "tokens", error=TypeError)
    refuses(lambda: mmdit.Address(sigmas=(0.5, float("nan"))), "sigmas", error=ValueError)


def test_words_and_numbers_of_other_contexts(small):
    at = mmdit.Word("red", "t5")
    refuses(lambda: entered(mmdit.attention_maps(small, [at])), "Word", "encoder=", error=TypeError)
    refuses(lambda: entered(mmdit.attention_maps(small, blocks=slice(0, 1))), "blocks", error=TypeError)
    refuses(lambda: entered(mmdit.concept_tokens(small, torch.ones(2, 48), blocks=[0.5])), "blocks", error=TypeError)
    empty = {"heads": []}
    refuses(lambda: mmdit.sweep(small, Z, lambda: 0.0, over=empty, ablate="zero"), "heads", error=ValueError)
    refuses(lambda: reducers.chain(reducers.norm(), torch.mean), error=TypeError)
    refuses(reducers.chain, "one reducer", error=ValueError)
    assert left_behind(small) == []


@pytest.mark.parametrize(
    "wrong", [lambda v, _: v.mean(-1), lambda v, _: (v.mean(), ()), lambda v, _: (v, ("token",))], ids=range(3)
)
def test_a_reducer_of_ones_own_gives_names_of_its_dimensions(small, wrong):
    with (
        pytest.raises(TypeError, match="'mine' gave"),
        mmdit.capture(small, POST, reduce=reducers.Reducer("mine", wrong)),
    ):
        small(*inputs())
    assert left_behind(small) == []


def test_points_of_a_module_that_was_replaced_are_named():
    other = model()
    stream = other.joint_blocks[1].x_block
    stream.mlp = torch.nn.Sequential(stream.mlp)
    for context in (mmdit.capture(other, "*.x_block.mlp.pre"), mmdit.patch(other, "*.1.x_block.mlp.post", scale=0.5)):
        refuses(lambda context=context: entered(context), "joint_blocks.1.x_block.mlp.fc", error=ValueError)
    assert left_behind(other) == []
    with mmdit.capture(other, "joint_blocks.0.x_block.mlp.pre") as seen:
        other(*inputs())
    assert seen
