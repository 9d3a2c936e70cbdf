"""`bench quality` with accelerated pipelines: a row of its own beside each row, from the same noise."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mmdit.bench import fp8_quality


def test_rows_of_the_fast_forward(tmp_path, monkeypatch, few_tokens):
    monkeypatch.setattr(fp8_quality, "workers", lambda count: ThreadPoolExecutor(1))
    monkeypatch.setattr(fp8_quality, "bootstrap", lambda statistic, count, **_: (statistic(torch.arange(count)), 2.0))
    monkeypatch.setattr(fp8_quality, "inner_snr", lambda *_: (120.0, {}))
    few = {"prompts": 1, "seeds": 1, "pictures": 2, "steps": 1, "calibration": 1, "batch": 2, "dtype": torch.float32}
    found = list(fp8_quality.run(tmp_path, rows=(0,), fast=True, processes=1, **few))
    plain, fast = json.loads((tmp_path / "fp8_quality.json").read_text())
    assert [plain["name"], fast["name"]] == [one.name for one in found] == ["not quantized", "not quantized, fast"]
    assert fast["block_snr"] is None
    assert plain["block_snr"] == 120
    assert fast["psnr"] > 50
    assert abs(fast["accuracy"] - plain["accuracy"]) <= 1
    for one in (plain, fast):
        assert one["accuracy_interval"][0] == pytest.approx(one["accuracy"])
        assert one["frechet_ratio"][1] == one["frechet_ratio"][0]
    lines = (tmp_path / "fp8_quality.md").read_text().splitlines()
    assert [line.split("|")[6].strip() for line in lines[2:]][1] == "-"
    assert f"({100 * plain['accuracy']:.1f} to 200.0)" in lines[2].split("|")[2]
