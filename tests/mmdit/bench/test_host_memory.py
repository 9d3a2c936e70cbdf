"""Host memory by stage: what malloc says, peaks within a stage, and the table."""

import gc
import time
from pathlib import Path

import pytest
import torch

from mmdit.bench.host_memory import Stage, _Watch, as_if_read, malloc, table
from mmdit.checkpoints.load import NoInitialValues
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from quant.quantize import kept, linears_of
from quant.recipe import RECIPES
from quant.tensor import Float8Tensor
from skips import SKIPS

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason=SKIPS["memory"])
SIZE = 80_000_000


@pytest.fixture
def quiet_memory():
    """Garbage of other tests is collected before the test, and none within it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("quiet_memory")
def test_malloc_tells_what_is_in_use():
    before, _ = malloc()
    if not before:
        pytest.skip(SKIPS["memory"])  # another C library than glibc
    blocks = [torch.ones(25_000) for _ in range(SIZE // 100_000)]
    assert malloc()[0] - before == pytest.approx(SIZE, rel=0.05)
    blocks.clear()
    used, kept = malloc()
    assert used - before < 0.05 * SIZE
    assert kept > 0


def test_a_stage_has_its_peak():
    def work():
        found = torch.ones(SIZE // 4)
        time.sleep(0.05)
        return float(found[0])

    watch = _Watch()
    row = watch("a stage", work)
    assert row.peak - row.anon > 0.9 * SIZE / 1e9
    assert row.modules > 100
    assert row.weights == 0


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_weights_as_if_a_file_was_read(recipe):
    config = MMDiTConfig(depth=2, hidden_size=32, head_dim=16, context_dim=48, pooled_dim=24, pos_embed_size=16)
    with torch.device("meta"), NoInitialValues():
        model = MMDiT(config)
    as_if_read(model, None if recipe is None else RECIPES[recipe], torch.float32)
    weights = {kept(name): linear.weight for name, linear in linears_of(model)}
    assert isinstance(weights[None], Float8Tensor) == (recipe is not None)
    assert {weight.recipe for weight in weights.values() if isinstance(weight, Float8Tensor)} <= {RECIPES.get(recipe)}
    velocity = model(torch.randn(1, 16, 8, 8), torch.ones(1), torch.randn(1, 5, 48), torch.ones(1, 24))
    assert float(velocity.std()) > 0.001
    assert not any(one.requires_grad for one in model.parameters())


def test_a_failed_stage_is_said_above_the_table():
    found = table([Stage("one", 1.0, 2.5, 3.0, weights=1.5), Stage("failed", failed="ValueError: no")])
    first, *rows = found.splitlines()
    assert first == "ValueError: no"
    assert "1.00" in rows[2]
    assert rows[3].count(" - ") == 10
