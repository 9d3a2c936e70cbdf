"""What `observe` counts, against numpy; it changes nothing and leaves nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from quant.observers import Observed, observe


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


def test_statistics_are_those_of_all_rows_together():
    batches = [torch.randn(3, 5, 6), torch.randn(7, 6) * 4 + 1, torch.randn(0, 6)]
    seen = Observed(6, torch.device("cpu"))
    for batch in batches:
        seen.add(batch)
    rows = np.concatenate([batch.reshape(-1, 6).numpy() for batch in batches]).astype(np.float64)
    assert seen.rows == len(rows) == 22
    np.testing.assert_allclose(seen.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(seen.rms, np.sqrt((rows**2).mean(0)), rtol=1e-6)
    np.testing.assert_array_equal(seen.channel_amax, np.abs(rows).max(0).astype(np.float32))
    assert float(seen.amax) == np.abs(rows).max().astype(np.float32)


@pytest.mark.parametrize("share", [1.0, 37.0, 50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentiles_to_two_percent(share):
    x = torch.randn(4000, 6) * torch.logspace(-6, 6, 6)
    x[:500, 0] = 0
    seen = Observed(6, torch.device("cpu"))
    seen.add(x)
    wanted = np.percentile(x.abs().numpy(), share, method="inverted_cdf")
    found = float(seen.percentile(share))
    assert wanted <= found * (1 + 1e-6)
    assert found <= wanted * 2 ** (1 / 32) * (1 + 1e-6) or wanted == 0
    assert found <= float(seen.amax)


def test_observing_changes_no_bit_and_leaves_no_hook():
    net, x = model(), torch.randn(9, 6)
    wanted = net(x)
    with observe(net) as seen:
        assert torch.equal(net(x), wanted)
    assert list(seen) == ["0", "2"]
    assert seen["0"].rows == 9
    np.testing.assert_allclose(seen["2"].mean, nn.functional.gelu(net[0](x)).mean(0).detach(), rtol=1e-5)
    net(x)
    assert seen["0"].rows == 9
    assert not any(part._forward_pre_hooks for part in net)


def test_an_error_inside_leaves_no_hook():
    net = model()
    with pytest.raises(ValueError, match="the input of '0': 2 of 12 values are not finite"), observe(net):
        net(torch.tensor([[1.0, float("nan"), 2.0, float("inf"), 0.0, 0.0]] * 1 + [[0.0] * 6]))
    assert not any(part._forward_pre_hooks for part in net)


def test_what_matches_nothing():
    with pytest.raises(ValueError, match=r"'x.\*' matches none of 2 Linears"), observe(model(), "x.*"):
        pass


@pytest.mark.parametrize("share", [0.0, -1.0, 100.5])
def test_what_is_no_percentile(share):
    with pytest.raises(ValueError, match="a percentile is above 0 and at most 100"):
        Observed(2, torch.device("cpu")).percentile(share)
