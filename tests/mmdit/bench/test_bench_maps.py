"""The bench of maps runs the model that is asked for and compares the outputs; times themselves are not tested."""

import pytest
import torch

from mmdit.bench import maps
from mmdit.bench.maps import cost
from mmdit.cli.app import main

MODEL = ["--model", "demo", "--device", "cpu", "--dtype", "float32"]
FEW = ["bench", "maps", *MODEL, "--steps", "2", "--rounds", "1", "--size", "64"]


def test_costs_are_measured(capsys):
    assert main([*FEW, "--text", "100", "--words", "3", "--blocks", "0", "2"]) == 0
    said = capsys.readouterr().out
    assert "equal bit by bit" in said
    assert "fused (kernel 1, 116 keys)" in said
    assert "for 2 steps" in said


def test_what_is_kept():
    few = {"steps": 2, "rounds": 1, "size": 64, "text": 100, "device": "cpu", "dtype": torch.float32}
    found = cost("demo", words=3, directions=("i2t", "t2i"), quadrants=False, **few)
    assert found.kept_bytes == 2 * 2 * 4 * 3 * 16 * 4  # directions, steps, blocks, words, patches, bytes
    assert found.equal
    assert found.ratio > 0
    with pytest.raises(ValueError, match="at least 87 tokens, got 80"):
        cost("demo", words=5, **few | {"text": 80})


def test_a_changed_output_is_told(monkeypatch, capsys):
    plain = maps._measured
    runs = []

    def drifting(*arguments):
        runs.append(plain(*arguments))
        runs[-1].outputs[-1].add_(len(runs) * 1e-6)
        return runs[-1]

    monkeypatch.setattr(maps, "_measured", drifting)
    assert main([*FEW, "--text", "100"]) == 1
    assert "DIFFER" in capsys.readouterr().out
