"""Metrics of pictures against closed forms and slow definitions."""

import math
import pickle
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdit import load_vae
from mmdit.bench import fp8_quality
from mmdit.bench.metrics import bootstrap, features, frechet_distance, psnr, ssim
from mmdit.cli.app import main
from mmdit.demo.scenes import render, sample
from mmdit.embedded import EMBEDDED


def test_psnr_by_definition():
    a, b = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    wanted = [10 * math.log10(1 / float((x - y).double().square().mean())) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), wanted, rtol=1e-6)
    assert float(psnr(a, a)[0]) == math.inf


def test_ssim_by_definition():
    a = torch.rand(1, 3, 13, 14)
    b = (a + 0.1 * torch.randn(a.shape)).clamp(0, 1)
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for x, y in zip(a[0].double().numpy(), b[0].double().numpy(), strict=True):
        for i in range(3):
            for j in range(4):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                c = (window * (p - mp) * (q - mq)).sum()
                top = (2 * mp * mq + 1e-4) * (2 * c + 9e-4)
                values.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert float(ssim(a, b)[0]) == pytest.approx(np.mean(values), abs=1e-10)
    assert float(ssim(a, a)[0]) == pytest.approx(1.0, abs=1e-12)


def test_frechet_distance_of_normal_sets():
    """Of normals with means m and diagonal deviations s: |m - m'|^2 + |s - s'|^2."""
    torch.manual_seed(0)
    n = torch.randn(20_000, 5, dtype=torch.float64)
    n = (n - n.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(n.T.cov())).T  # exactly white
    s, t = torch.tensor([1.0, 2, 3, 0.5, 0]).double(), torch.tensor([2.0, 2, 1, 0.5, 1]).double()
    m = torch.tensor([0.3, 0, -1, 0, 2]).double()
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    wanted = float(m.square().sum() + (s - t).square().sum())
    assert frechet_distance((n * s) @ turn, (n * t + m) @ turn) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(n, n) == pytest.approx(0, abs=1e-9)


def test_features_tell_quarters_apart():
    vae, pictures = load_vae(EMBEDDED, dtype=torch.float32), render(sample(3, 1))
    found = features(vae, pictures)
    assert found.shape == (3, 64)
    latent = vae.encode(2 * pictures - 1).mode()
    assert torch.allclose(
        found.unflatten(1, (16, 2, 2))[:, :, 0, 1], latent[:, :, :8, 8:].mean((2, 3)).double(), atol=1e-5
    )


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    torch.manual_seed(0)
    covered = 0
    for k in range(100):
        x = torch.randn(60) + 2
        low, high = bootstrap(lambda i, x=x: float(x[i].mean()), 60, times=200, seed=k)
        covered += low <= 2 <= high
    assert 85 <= covered <= 100
    same = torch.arange(50.0)
    assert bootstrap(lambda i: float(same[i].mean() / same[i].mean()), 50, times=20) == (1.0, 1.0)


class AsInAProcess(Executor):
    """Calls go through pickle, as those of a pool of processes do, and run here: a process takes seconds to start."""

    def submit(self, call, /, *args, **kwargs):
        done = Future()
        called, given = pickle.loads(pickle.dumps((call, args)))
        done.set_result(pickle.loads(pickle.dumps(called(*given, **kwargs))))
        return done


def test_the_table_of_recipes(tmp_path, capsys, monkeypatch, few_tokens):
    """Small numbers, every kind of column: what is not quantized is equal to itself, float8 is near and not equal."""
    monkeypatch.setattr(fp8_quality, "MAIN", replace(fp8_quality.MAIN, t5="77"))
    monkeypatch.setattr(fp8_quality, "workers", lambda count: nullcontext(AsInAProcess()) if count == 1 else None)
    monkeypatch.setattr(fp8_quality, "bootstrap", lambda *given, times: bootstrap(*given, times=times // 20))
    few = ["--prompts", "2", "--seeds", "1", "--pictures", "2", "--batch", "2", "--calibration", "1", "--workers", "1"]
    rows = ["--rows", "0", "4", "6", "--dtype", "float32", "--device", "cpu", "--steps", "3"]
    assert main(["bench", "quality", *few, *rows, "--output", str(tmp_path)]) == 0
    table = (tmp_path / "fp8_quality.md").read_text().splitlines()
    assert "| not quantized " in table[2]
    same = "1.000 (1.000 to 1.000)"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:5]]
    assert cells[0][2:] == [same, "inf", "1.0000", "inf", same]
    assert all(math.inf not in (float(cell) for cell in row.split("|")[4:7]) for row in table[3:5])
    assert "static + mean folding" in table[4]
    assert "of 29" in capsys.readouterr().out
