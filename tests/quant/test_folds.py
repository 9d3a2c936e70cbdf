"""Folds change no output; smoothing follows its formula; corrected biases cancel the mean error of rounding."""

import pytest
import torch
from torch import nn

from quant import folds
from quant.folds import Fold, Rows
from quant.tensor import Float8Tensor


class Modulated(nn.Module):
    """x * (1 + scale) + shift of an adaLN, the input of two Linears; one's output is the input of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.ada, self.one, self.two = nn.Linear(3, 8), nn.Linear(4, 6), nn.Linear(4, 5)
        self.proj = nn.Linear(6, 2)

    def forward(self, x, c):
        shift, scale = self.ada(c).chunk(2, dim=-1)
        read = x * (1 + scale) + shift
        return self.proj(self.one(read)), self.two(read)


FOLDS = (
    Fold((Rows("ada", 0, 4), Rows("ada", 4, 8, "gain")), ("one", "two")),
    Fold((Rows("one", 0, 6),), ("proj",)),
)


@pytest.fixture
def model() -> Modulated:
    torch.manual_seed(3)
    return Modulated().double()


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("what", ["scale", "mean"])
def test_a_fold_changes_the_tensor_and_not_the_output(model, fold, what):
    x, c = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    seen = []
    consumer = model.get_submodule(fold.consumers[0])
    consumer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    wanted = model(x, c)
    channels = consumer.in_features
    if what == "scale":
        factors = torch.rand(channels) + 0.5
        changed = folds.fold_scale(model.state_dict(), fold, factors)
    else:
        mean = seen[0].mean(0)
        changed = folds.fold_mean(model.state_dict(), fold, mean)
    model.load_state_dict(changed, strict=False)
    for found, expected in zip(model(x, c), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if what == "scale":
        torch.testing.assert_close(seen[1], seen[0] / factors, rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(seen[1].mean(0), torch.zeros_like(mean), rtol=0, atol=1e-12)
    named = {row.linear for row in fold.producers} | set(fold.consumers)
    assert {key.rpartition(".")[0] for key in changed} == named


def test_a_fold_leaves_the_state_that_it_was_given(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folds.fold_scale(model.state_dict(), FOLDS[0], torch.full((4,), 2.0))
    folds.fold_mean(model.state_dict(), FOLDS[0], torch.ones(4))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_smoothing_by_formula():
    amax, weight = torch.tensor([8.0, 1.0, 0.5, 0.0]), torch.tensor([[0.5, -2.0, 1.0, 1.0], [0.25, 1.0, -0.5, 0.0]])
    found = folds.smoothing(amax, [weight], 0.5)
    raw = (amax[:3] / weight.abs().amax(0)[:3]) ** 0.5
    torch.testing.assert_close(found[:3], raw / raw.log().mean().exp())
    assert float(found[3]) == 1.0  # a channel that is always zero does not change
    torch.testing.assert_close(folds.smoothing(amax, [weight[:1], weight[1:]], 0.5), found)
    assert torch.equal(folds.smoothing(torch.zeros(4), [weight]), torch.ones(4))


def test_smoothing_lowers_the_error_of_a_channel_that_sticks_out():
    torch.manual_seed(0)
    x, weight = torch.randn(256, 64), torch.randn(32, 64)
    x[:, 7] *= 30_000  # float8 has a wide range: only beyond it do the other channels lose bits
    weight[:, 7] /= 30_000

    def error(x, weight):
        codes = [Float8Tensor.quantize(part, granularity="tensor").dequantize() for part in (x, weight)]
        return float((codes[0] @ codes[1].t() - x @ weight.t()).norm())

    s = folds.smoothing(x.abs().amax(0), [weight])
    assert error(x / s, weight * s) < 0.7 * error(x, weight)


def test_corrected_biases_keep_the_mean_of_the_output():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4096, 32) + 3.0, torch.randn(16, 32), torch.randn(16)
    rounded = Float8Tensor.quantize(weight).dequantize()
    mean = x.mean(0)
    drift = ((x @ rounded.t() + bias) - (x @ weight.t() + bias)).mean(0).abs().max()
    found = folds.corrected_bias(bias, weight, rounded, mean)
    left = ((x @ rounded.t() + found) - (x @ weight.t() + bias)).mean(0).abs().max()
    assert float(left) < 1e-4 < float(drift) / 100
