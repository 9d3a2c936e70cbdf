"""`bench errors`: at full depth the fast forward is as near to float64 as the plain one."""

import pytest
import torch

from mmdit.bench import errors
from mmdit.bench.random_models import MODELS
from mmdit.cli.app import main
from mmdit.models.config import MMDiTConfig
from mmdit.runtime.fast import FastBlock
from skips import SKIPS

FEW = ["--size", "64", "--text", "5", "--steps", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def tiny(monkeypatch):
    found = MMDiTConfig(3, 64, 48, 24, 8, head_dim=16, sample_size=8, dual_attention_blocks=(0,))
    monkeypatch.setitem(MODELS, "demo", found)


def test_the_errors_of_a_small_model(tiny, capsys):
    assert main(["bench", "errors", "--model", "demo", "--quant", "fp8", *FEW]) in (0, 1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["float32", "fp8"]
    for row in rows:
        assert float(row[2]) == pytest.approx(1, abs=0.3)
        assert all(float(row[i]) == pytest.approx(1, abs=0.3) for i in (5, 8))
    in_full, in_float8 = (float(row[3]) for row in rows)
    assert in_full < 1e-5 < in_float8 < 0.3


def test_a_forward_that_is_further_off_is_found(tiny, monkeypatch):
    own = FastBlock.__call__

    def broken(self, x, rows, *rest):
        left, x, updates = own(self, x, rows, *rest)
        return left, x, [update._replace(value=1.01 * update.value) for update in updates]

    monkeypatch.setattr(FastBlock, "__call__", broken)
    few = {"size": 64, "text": 5, "steps": 2, "device": "cpu", "dtype": torch.float32}
    (found,) = errors.errors("demo", [], **few)
    assert min(block.ratio for block in found.blocks) > errors.LIMIT
    assert found.velocity.ratio > errors.LIMIT
    assert found.latent.ratio > errors.LIMIT
    assert main(["bench", "errors", "--model", "demo", "--quant", *FEW]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"])
@pytest.mark.parametrize("model", ["large", "medium"])
def test_full_depth_is_as_exact_as_the_plain_forward(model):
    for found in errors.errors(model, ["fp8", "fp8-static"], size=512, steps=4):
        assert found.worst <= errors.LIMIT, found
