"""Reducers against the same done to the whole value, and patterns row by row against dense ones."""

import pytest
import torch

import mmdit.inspection.attention
from inspected import PATCHES, TEXT, inputs, model
from mmdit import capture, reducers

POST, PATTERN = "joint_blocks.1.x_block.resid_post", "joint_blocks.1.attend.pattern"


@pytest.fixture(scope="module")
def small():
    return model()


@pytest.fixture
def in_rows(monkeypatch):
    """Attention patterns come in blocks of two rows."""
    whole = mmdit.inspection.attention.pattern_rows
    row = 2 * 2 * (TEXT + PATCHES) * 8  # bytes: samples, heads, keys
    monkeypatch.setattr(reducers, "pattern_rows", lambda *given: whole(*given, limit=2 * row))


def reduced(small, point, reducer, **settings):
    with capture(small, point, reduce=reducer, **settings, budget=None) as seen:
        small(*inputs())
    with capture(small, point, budget=None) as whole:
        small(*inputs())
    return seen.labelled(point), whole[point][0]


def test_of_a_stream(small):
    found, value = reduced(small, POST, reducers.norm())
    torch.testing.assert_close(found.values[0], value.norm(dim=-1))
    assert found.dims == ("step", "sample", "token")
    found, _ = reduced(small, POST, reducers.mean("token", "channel"))
    torch.testing.assert_close(found.values[0], value.mean((1, 2)))
    found, _ = reduced(small, POST, reducers.max_abs())
    assert torch.equal(found.values[0], value.abs().amax(1))
    found, _ = reduced(small, POST, reducers.moments())
    count, mean, variance = found.values[0].unbind(1)
    assert bool((count == PATCHES).all())
    torch.testing.assert_close(mean, value.mean(1))
    torch.testing.assert_close(variance, value.var(1, correction=0))
    assert found.labels("moment") == ("count", "mean", "variance")
    found, _ = reduced(small, POST, reducers.histogram([-1.0, 0.0, 2.0]))
    wanted = [(value <= -1), (value > -1) & (value <= 0), (value > 0) & (value <= 2), value > 2]
    assert torch.equal(found.values[0], torch.stack([one.flatten(1).sum(1) for one in wanted], dim=1))
    assert found.labels("bin")[1] == (-1.0, 0.0)
    found, _ = reduced(small, POST, reducers.top_k(3), dtype=torch.float16)
    values, places = value.topk(3)
    assert torch.equal(found.sel(part="place").values[0], places.float())
    assert torch.equal(found.sel(part="value").values[0], values.float())
    found, _ = reduced(small, POST, reducers.chain(reducers.norm(), reducers.mean("token")))
    torch.testing.assert_close(found.values[0], value.norm(dim=-1).mean(-1))


@pytest.mark.usefixtures("in_rows")
def test_of_a_pattern_row_by_row(small):
    found, pattern = reduced(small, PATTERN, reducers.entropy())
    torch.testing.assert_close(found.values[0], -(pattern * pattern.log()).sum(-1))
    found, _ = reduced(small, PATTERN, reducers.mean("head"))
    torch.testing.assert_close(found.values[0], pattern.mean(1))
    found, _ = reduced(small, PATTERN, reducers.mean("query"))
    torch.testing.assert_close(found.values[0], pattern.mean(2))
    found, _ = reduced(small, PATTERN, reducers.top_k(2))
    assert torch.equal(found.sel(part="place").values[0], pattern.topk(2).indices.float())
    found, _ = reduced(small, PATTERN, reducers.histogram([0.01, 0.1]))
    assert torch.equal(found.values[0].sum(1), torch.tensor([2 * (TEXT + PATCHES) ** 2] * 2))
    found, _ = reduced(small, PATTERN, reducers.max_abs("head"))
    torch.testing.assert_close(found.values[0], pattern.amax((2, 3)))
    found, _ = reduced(small, PATTERN, reducers.moments("key"))
    torch.testing.assert_close(found.values[0][:, 1], pattern.mean((1, 2)))
    torch.testing.assert_close(found.values[0][:, 2], pattern.transpose(2, 3).flatten(1, 1).var((1, 3), correction=0))
    found, _ = reduced(small, PATTERN, reducers.quadrants())
    for i, (rows, columns) in enumerate(
        (slice(*rows), slice(*columns)) for rows in ((0, TEXT), (TEXT, None)) for columns in ((0, TEXT), (TEXT, None))
    ):
        torch.testing.assert_close(found.values[0][..., i], pattern[:, :, rows, columns].sum(-1).mean(-1))
    torch.testing.assert_close(found.values[0][..., :2].sum(-1), torch.ones(2, 2).double())


@pytest.mark.usefixtures("in_rows")
def test_narrowed_patterns_are_reduced(small):
    with capture(small, PATTERN, budget=None) as whole:
        small(*inputs())
    part = {"queries": [1, TEXT + 2, TEXT], "tokens": [0, TEXT + 1], "heads": 1}
    with capture(small, PATTERN, reduce=reducers.quadrants(), **part, budget=None) as seen:
        small(*inputs())
    p = whole[PATTERN][0, :, 1:]
    wanted = [p[:, :, 1, 0], p[:, :, 1, TEXT + 1], p[:, :, [TEXT + 2, TEXT], 0].mean(-1)]
    torch.testing.assert_close(seen[PATTERN][0][..., :3], torch.stack(wanted, dim=-1))


@pytest.mark.usefixtures("in_rows")
def test_reducers_that_need_all_rows_say_so(small):
    for reducer, said in (
        (reducers.norm("query"), "needs all rows of an attention pattern"),
        (reducers.chain(reducers.mean("query"), reducers.norm("key")), "it must come last"),
        (reducers.norm("token"), "there is no 'token' to reduce in"),
    ):
        with pytest.raises(ValueError, match=said):
            reduced(small, PATTERN, reducer)
    with pytest.raises(ValueError, match="quadrants are of an attention pattern"):
        reduced(small, "joint_blocks.1.x_block.attn.z", reducers.quadrants())
    with pytest.raises(ValueError, match="results of entropy do not join"):
        reducers.running(reducers.entropy())
    with pytest.raises(ValueError, match="edges must be a list of rising numbers"):
        reducers.histogram([1.0, 1.0])


@pytest.mark.parametrize("name", ["max_abs", "moments", "histogram"])
def test_running_ones_are_those_of_everything(small, name):
    made = {"max_abs": reducers.max_abs, "moments": reducers.moments, "histogram": lambda: reducers.histogram([0.0])}
    with (
        capture(small, POST, reduce=reducers.running(made[name]())) as seen,
        capture(small, POST, budget=None) as whole,
    ):
        for seed in range(3):
            small(*inputs(seed))
    rows = whole[POST].flatten(0, 2)
    if name == "max_abs":
        assert torch.equal(seen[POST], rows.abs().amax(0))
    elif name == "moments":
        torch.testing.assert_close(seen[POST][1], rows.mean(0))
        torch.testing.assert_close(seen[POST][2], rows.var(0, correction=0))
        assert float(seen[POST][0, 0]) == len(rows)
    else:
        assert seen[POST].tolist() == [int((rows <= 0).sum()), int((rows > 0).sum())]
    assert len(seen.of(POST).entries) == 1
