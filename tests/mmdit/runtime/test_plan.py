"""The memory planner on random models, sizes and budgets: it keeps the budget, and uses its means in their order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdit.runtime.plan import (
    RUNGS,
    STREAMED,
    STREAMED_T5,
    TILED,
    TURNS,
    VISITED,
    Activations,
    ModelBytes,
    TooLittleMemory,
    parse_bytes,
    plan,
    smallest,
    spread,
)

size = st.integers(0, 1000)


@st.composite
def works(draw):
    """Bytes of the models of a pipeline as (rest, blocks, adaLN), and of the activations of a drawing."""
    depth = draw(st.integers(1, 7))
    each = st.lists(size, min_size=depth, max_size=depth)
    models = {"transformer": (draw(size), tuple(draw(each)), tuple(draw(each))), "vae": (draw(size),)}
    for name in draw(st.sets(st.sampled_from(["clip_l", "clip_g", "controlnet"]))):
        models[name] = (draw(size),)
    if draw(st.booleans()):
        models["t5"] = (draw(size), tuple(draw(st.lists(size, max_size=5))))
    text = {name: draw(size) for name in models}
    tiles = {side: draw(size) for side in draw(st.sets(st.sampled_from([256, 128])))}
    more = {name: draw(size) for name in ("step", "decode", "table", "graph", "kept", "reserve")}
    return models, {"text": text, "tiles": tiles, **more}


def built(work):
    models, activations = work
    return {name: ModelBytes(*parts) for name, parts in models.items()}, Activations(**activations)


def test_parts_take_multiples_of_what_an_allocator_takes_at_a_time():
    assert ModelBytes(1, (10, 11), (0, 29)).in_steps_of(10) == ModelBytes(10, (10, 20), (0, 30))


@settings(max_examples=60)
@given(works(), st.integers(1, 12000))
def test_the_sum_never_exceeds_the_budget_and_it_refuses_only_what_cannot_be(raw, budget):
    work = built(raw)
    least = smallest(*work).sum
    try:
        found = plan(budget, *work)
    except TooLittleMemory as error:
        assert budget < least == error.smallest
        return
    assert least <= found.sum <= budget
    assert found.sum == max(stage.bytes for stage in found.stages)
    assert plan(least, *work).sum == least if least else True


@settings(max_examples=60)
@given(works(), st.integers(1, 12000))
def test_means_are_used_in_their_order_and_as_little_as_possible(raw, budget):
    work = built(raw)
    try:
        found = plan(budget, *work)
    except TooLittleMemory:
        return
    used = {
        STREAMED_T5: any(one.streamed for one in found.stages if one.name != "steps"),
        STREAMED: bool(found.streamed) or len({one.here for one in found.stages}) > 1,
        TILED: found.tile is not None,
    }
    assert all(rung <= found.rung for rung, is_used in used.items() if is_used)
    assert found.turns == (found.rung >= TURNS)
    assert found.visited == (found.rung >= VISITED)
    if found.rung:  # the means before it, in full, are not enough: no plan of the rung before fits
        assert _least_of_rung(work, found.rung - 1) > budget
    if found.visited:
        assert found.stage("steps").bytes == _steps_with(work, found, len(found.streamed)), "counted once more"
    shorter = len(found.streamed) - 1
    if shorter > 2:  # one streamed block fewer does not fit
        assert _steps_with(work, found, shorter) > budget


def _least_of_rung(work, rung):
    from mmdit.runtime.plan import _Planner

    return max(stage.bytes for stage in _Planner(*work).smallest(rung))


def _steps_with(work, found, count):
    """The bytes of a step with so many streamed blocks, counted here once more."""
    models, act = work
    blocks = models["transformer"].blocks
    moving = spread(count, len(blocks)) if count else ()
    slots = 2 * max((blocks[i] for i in moving), default=0)
    weights = models["transformer"].rest + sum(b for i, b in enumerate(blocks) if i not in moving) + slots
    net = models["controlnet"].total if "controlnet" in models else 0
    visit = 2 * max(models["transformer"].modulation) if len(blocks) > 1 else models["transformer"].modulation[0]
    working = max(act.step + act.table, visit + 2 * act.table)
    graph = act.graph if found.rung < STREAMED else 0
    return weights + net + working + act.kept + act.reserve + graph


def test_budgets_of_the_official_model():
    """SD3.5-Large in FP8 with T5-XXL at 1024 x 1024, in round numbers: more means for less memory."""
    block, g = 24 * 2432 * 2432, 10**9
    models = {
        "clip_l": ModelBytes(g // 4),
        "clip_g": ModelBytes(int(1.39 * g)),
        "t5": ModelBytes(int(0.27 * g), (int(0.193 * g),) * 24),
        "transformer": ModelBytes(int(0.3 * g), (block,) * 38, (block,) * 38),
        "vae": ModelBytes(int(0.17 * g)),
    }
    act = Activations({}, int(0.55 * g), int(2.55 * g), {256: int(0.7 * g)}, int(0.09 * g), reserve=int(0.7 * g))
    rungs = [plan(gb * g, models, act).rung for gb in (24, 16, 12, 8, 4, 3)]
    assert rungs == [0, STREAMED_T5, VISITED, STREAMED, STREAMED, TILED]
    four = plan(4 * g, models, act)
    assert 20 < len(four.streamed) < 30
    assert {b - a for a, b in zip(four.streamed, four.streamed[1:], strict=False)} <= {1, 2}, "evenly spaced"
    assert "of 38 blocks of the transformer" in str(four)
    assert f"budget {4:.2f} GB" in repr(four)
    with pytest.raises(TooLittleMemory, match=r"'[0-9.]+GB'") as refused:
        plan(g, models, act)
    assert plan(refused.value.smallest, models, act).sum <= refused.value.smallest
    assert len(RUNGS) == TILED + 1


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("8GB", 8 * 10**9),
        ("7.5 GiB", int(7.5 * 2**30)),
        (1000, 1000),
        ("900mb", 9 * 10**8),
        ("1e9", 10**9),
        (1e16, 10**16),
    ],
)
def test_sizes_are_read(given, found):
    assert parse_bytes(given) == found


@pytest.mark.parametrize("given", ["8 apples", "", "-1GB", "0", "GB", True, "8GBB", "1e999GB", "1e308TB"])
def test_other_sizes_are_refused(given):
    with pytest.raises(ValueError, match="memory must be a size"):
        parse_bytes(given)
