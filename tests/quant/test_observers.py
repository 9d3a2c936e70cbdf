"""The statistics of `observe` against numpy; it changes no output and leaves no hook."""

from contextlib import nullcontext, suppress
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from torch import nn

from device_double import LiveBytes
from quant import observers
from quant.observers import Observed, observe
from skips import SKIPS
from waiting import no_waiting


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


def test_pieces_of_an_input_are_counted_like_all_of_it(monkeypatch):
    x = torch.randn(3, 7, 6)
    whole, parts = (Observed(6, torch.device("cpu"), second=True) for _ in range(2))
    whole.add(x)
    monkeypatch.setattr(observers, "PIECE", 25)  # four rows at a time
    parts.add(x)
    assert parts.rows == whole.rows == 21
    assert torch.equal(parts.channel_amax, whole.channel_amax)
    assert torch.equal(parts._counts, whole._counts)
    torch.testing.assert_close(parts.mean, whole.mean)
    for one, other in zip(parts.moments, whole.moments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    x[2, 6, 5] = torch.nan
    with pytest.raises(ValueError, match="1 of 126 "):
        parts.add(x)
    assert parts.rows == 21


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_counting_takes(monkeypatch, dtype):
    """Plans of memory rely on both numbers: what is kept, and what is taken meanwhile, however large the input is."""
    monkeypatch.setattr(observers, "PIECE", 2**16)
    x = torch.randn(2**9, 2**9).to(dtype)
    with LiveBytes() as live:
        seen = Observed(2**9, x.device)
        kept = live.live
        seen.add(x)
    assert kept == seen.nbytes
    assert 0.7 * observers.ADDING * 2**16 < live.peak - kept <= observers.ADDING * 2**16


@pytest.mark.parametrize("large", [1e4, 1e38])
def test_sums_are_in_float64(large):
    """In float32 a small mean is lost among large values that cancel, and sums and squares of the largest overflow."""
    batches = [large * (-1) ** i + torch.randn(64, 3) * (large / 1e6) for i in range(100)]
    seen = Observed(3, torch.device("cpu"))
    for batch in batches:
        seen.add(batch)
    rows = torch.cat(batches).double()
    torch.testing.assert_close(seen.mean, rows.mean(0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.rms, rows.square().mean(0).sqrt().float(), rtol=1e-6, atol=0)


def spread() -> torch.Tensor:
    x = torch.randn(4000, 6) * torch.logspace(-6, 6, 6)
    x[:500, 0] = 0
    return x


READ = {
    "spread": spread,
    "huge": lambda: 1e13 + 9e13 * torch.rand(2000, 6),
    "largest": lambda: torch.full((50, 6), torch.finfo(torch.float32).max),
    "tiny": lambda: 1e-37 * torch.rand(2000, 6),
    "powers of two": lambda: 2.0 ** torch.arange(-120, 120).reshape(-1, 6),
    "mostly zero": lambda: torch.randn(2000, 6) * (torch.rand(2000, 6) > 0.9),
    "zero": lambda: torch.zeros(10, 6),
}


@pytest.mark.parametrize("share", [1.0, 37.0, 50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("read", READ)
def test_percentiles_are_not_too_small_and_nearly_right(read, share):
    x = READ[read]()
    seen = Observed(6, torch.device("cpu"))
    seen.add(x)
    wanted = float(x.abs().flatten().sort().values[ceil(Fraction(str(share)) * x.numel() / 100) - 1])
    found = float(seen.percentile(share))
    assert wanted <= found <= min(wanted * (1 + 1 / 64) + (0 if wanted == 0 else 2**-132), float(x.abs().max()))


def test_what_is_not_finite_in_float32():
    with pytest.raises(ValueError, match="1 of 6 values are not finite"):
        Observed(6, torch.device("cpu")).add(torch.tensor([1e300, 0, 0, 0, 0, 0], dtype=torch.float64))


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


def test_inputs_given_by_keyword_are_counted():
    net, x = model(), torch.randn(9, 6)
    with observe(net) as seen:
        net[0](input=x)
    assert seen["0"].rows == 9
    assert torch.equal(seen["0"].channel_amax, x.abs().amax(0))


def test_what_is_compiled_is_refused():
    part, whole = model(), model()
    part[2].compile(backend="eager")
    for net, name in ((part, "2"), (torch.compile(whole, backend="eager"), "the module")):
        with pytest.raises(ValueError, match=rf"{name} is compiled \(torch.compile\)"), observe(net):
            pass


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


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"])]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])


@DEVICES
def test_a_device_counts_what_numpy_counts_and_nobody_waits_for_it(device):
    batches = [spread().to(device) for _ in range(2)]
    seen = Observed(6, torch.device(device), second=True)
    seen.add(batches[0])  # libraries set themselves up
    with no_waiting(device):
        seen.add(batches[1])
    values = torch.cat(batches).cpu()
    pattern = values.abs().flatten().numpy().view(np.int32).astype(np.int64)
    wanted = np.bincount(-(-pattern // 2**17), minlength=len(seen._counts))
    np.testing.assert_array_equal(seen._counts.cpu(), wanted)
    assert torch.equal(seen.channel_amax.cpu(), values.abs().amax(0))
    wide = values.double()
    torch.testing.assert_close(seen.moments.second.cpu(), wide.T @ wide / len(wide))


READINGS = {
    "amax": lambda seen: seen.amax,
    "channel_amax": lambda seen: seen.channel_amax,
    "mean": lambda seen: seen.mean,
    "rms": lambda seen: seen.rms,
    "moments": lambda seen: seen.moments,
    "percentile": lambda seen: seen.percentile(50.0),
}


NOT_FINITE = pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
ON_A_GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])


def with_a_bad(value, device):
    bad = torch.ones(2, 6, device=device)
    bad[1, 2] = value
    return bad


@NOT_FINITE
def test_a_cpu_refuses_what_is_not_finite_and_counts_nothing_of_it(value):
    seen, wanted = (Observed(6, torch.device("cpu"), second=True) for _ in range(2))
    good = [torch.ones(1, 6), 2 * torch.ones(3, 6)]
    for x in good:
        wanted.add(x)
    seen.add(good[0])
    with pytest.raises(ValueError, match="1 of 12 values are not finite"):
        seen.add(with_a_bad(value, "cpu"))
    seen.add(good[1])
    assert seen.rows == 4
    for read in READINGS.values():
        torch.testing.assert_close(read(seen), read(wanted), rtol=0, atol=0)


@NOT_FINITE
@ON_A_GPU
def test_no_statistic_of_what_is_not_finite_is_read(device, value):
    seen = Observed(6, torch.device(device), second=True)
    seen.add(torch.ones(1, 6, device=device))
    seen.add(with_a_bad(value, device))
    for read in READINGS.values():
        with pytest.raises(ValueError, match="1 of 18 values are not finite"):
            read(seen)


@ON_A_GPU
@pytest.mark.parametrize("fails", [False, True])
def test_the_layer_is_named_at_the_end_where_nobody_waits(device, fails):
    net = model().to(device)
    with pytest.raises(ValueError, match="the input of '0': 1 of 6 values are not finite"), observe(net):
        with suppress(ValueError):
            net(torch.tensor([[1.0, float("nan"), 2.0, 0.0, 0.0, 0.0]], device=device))
        if fails:
            raise FloatingPointError("a drawing is not finite")
    assert not any(part._forward_pre_hooks for part in net)


def test_a_cpu_goes_on_after_a_bad_input_and_another_error_keeps_its_own_words():
    net, good = model(), torch.ones(2, 6)
    with observe(net) as seen:
        for x in (good, with_a_bad(float("nan"), "cpu"), good):
            with nullcontext() if x is good else pytest.raises(ValueError, match="the input of '0': 1 of 12"):
                net(x)
    assert [one.rows for one in seen.values()] == [4, 4]
    with pytest.raises(FloatingPointError, match="a drawing"), observe(net):
        with suppress(ValueError):
            net(with_a_bad(float("nan"), "cpu"))
        raise FloatingPointError("a drawing is not finite")
