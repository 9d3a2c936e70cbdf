"""Host memory by stage: what malloc says, peaks within a stage, and the table."""

import gc
import time
from pathlib import Path

import pytest
import torch

from mmdit.bench.host_memory import Stage, _Watch, malloc, table
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


def test_a_failed_stage_is_said_above_the_table():
    found = table([Stage("one", 1.0, 2.5, 3.0, weights=1.5), Stage("failed", failed="ValueError: no")])
    first, *rows = found.splitlines()
    assert first == "ValueError: no"
    assert "1.00" in rows[2]
    assert rows[3].count(" - ") == 10
