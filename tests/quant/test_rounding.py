"""Rounding by second moments: GPTQ equals its textbook form, no row is worse than nearest, biases take up the mean."""

import pytest
import torch
from torch import nn

from quant import Recipe, quantize_
from quant.observers import observe
from quant.quantize import snr
from quant.rounding import Moments, input_noise, round_by_moments, rounded_linear
from quant.scaling import from_codes, scale_of, to_codes
from quant.tensor import Float8Tensor

IN, OUT = 150, 6  # columns of two blocks, the second of them cut short


@pytest.fixture(scope="module")
def inputs():
    """1200 tokens whose channels share 20 directions, with a mean, float64 [1200, IN]."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(1200, 20, generator=g) @ torch.randn(20, IN, generator=g)
    return (shared + 0.3 * torch.randn(1200, IN, generator=g) + torch.linspace(-2, 2, IN)).double()


@pytest.fixture(scope="module")
def weight():
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


def second_of(x):
    return x.T @ x / len(x)


def nearest(weight, scale, format):
    return from_codes(to_codes(weight, scale, format), format)


def errors(numbers, weight, scale, second):
    """The mean square error of each output over inputs with these second moments, [out]."""
    rest = numbers.double() * scale - weight.double()
    return ((rest @ second) * rest).sum(1)


def scales(weight, format, *, rows):
    return scale_of(weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().amax(), format)


def textbook(units, second, format):
    """Algorithm 1 of GPTQ one column at a time: what is left of the inverse is found anew after each column."""
    damped = second + 1e-3 * second.diagonal().mean() * torch.eye(len(second))
    order = second.diagonal().argsort(descending=True, stable=True).tolist()
    left, made = units.double().clone(), torch.zeros_like(units, dtype=torch.float64)
    for done, column in enumerate(order):
        rest = order[done:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        made[:, column] = nearest(left[:, column].float(), torch.ones(()), format).double()
        error = (left[:, column] - made[:, column]) / inverse[0, 0]
        left[:, rest] -= torch.outer(error, inverse[0])
    return made


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_no_row_is_worse_than_nearest_rounding_and_numbers_are_codes(inputs, weight, format, rows):
    second, scale = second_of(inputs), scales(weight, format, rows=rows)
    numbers = round_by_moments(weight, scale, format, second)
    assert numbers.shape == weight.shape
    assert numbers.dtype == torch.float32
    assert torch.equal(nearest(numbers, torch.ones(()), format), numbers)
    plain = errors(nearest(weight, scale, format), weight, scale, second)
    ours = errors(numbers, weight, scale, second)
    assert (ours < plain).all()
    assert ours.sum() < 0.3 * plain.sum()  # 0.11 to 0.17 of it


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_uncorrelated_inputs_are_rounded_to_nearest(weight, format):
    scale = scales(weight, format, rows=True)
    for second in (torch.eye(IN), torch.diag(torch.linspace(0.1, 9, IN)), torch.zeros(IN, IN)):
        numbers = round_by_moments(weight, scale, format, second.double())
        assert torch.equal(numbers, nearest(weight, scale, format))


def test_without_sweeps_it_is_gptq(inputs, weight):
    second, scale = second_of(inputs), scales(weight, "e4m3", rows=True)
    numbers = round_by_moments(weight, scale, "e4m3", second, sweeps=0)
    expected = textbook(weight.double() / scale.double(), second, "e4m3")
    assert torch.equal(numbers.double(), expected)
    swept = round_by_moments(weight, scale, "e4m3", second, sweeps=2)
    before, after = (errors(one, weight, scale, second) for one in (numbers, swept))
    assert (after <= before * (1 + 1e-3)).all()  # it descends the damped form
    assert after.sum() < 0.95 * before.sum()


def test_where_gptq_is_worse_than_nearest_rounding_the_latter_stays():
    g = torch.Generator().manual_seed(5)
    second, weight = second_of(torch.randn(4, 3, generator=g).double()), torch.randn(500, 3, generator=g)
    form = second + 1e-3 * second.diagonal().mean() * torch.eye(3)
    scale = scales(weight, "e5m2", rows=False)
    plain = errors(nearest(weight, scale, "e5m2"), weight, scale, form)
    alone = errors(textbook(weight.double() / scale.double(), second, "e5m2"), weight, scale, form)
    ours = errors(round_by_moments(weight, scale, "e5m2", second, sweeps=0), weight, scale, form)
    assert (alone > 1.1 * plain).any()
    torch.testing.assert_close(ours, torch.minimum(alone, plain), rtol=1e-6, atol=1e-12)


def test_no_single_code_can_be_bettered_after_the_descent(inputs, weight):
    second, scale = second_of(inputs)[:40, :40], scales(weight[:, :40], "e4m3", rows=False)
    form = second + 1e-3 * second.diagonal().mean() * torch.eye(40)
    numbers = round_by_moments(weight[:, :40], scale, "e4m3", second, sweeps=30)
    least = errors(numbers, weight[:, :40], scale, form)
    for column in range(40):
        for factor in (0.89, 0.94, 1.06, 1.12):  # codes beside each
            other = numbers.clone()
            other[:, column] = nearest(factor * numbers[:, column], torch.ones(()), "e4m3")
            assert (errors(other, weight[:, :40], scale, form) >= least * (1 - 1e-6)).all()


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_the_noise_of_rounded_inputs_is_that_of_the_formula(format):
    size = 2.0 ** (8 * torch.rand(200_000, generator=torch.Generator().manual_seed(2)) - 4)  # log-uniform
    rest = from_codes(to_codes(size, torch.ones(()), format), format) - size
    assert float(rest.square().mean() / size.square().mean()) == pytest.approx(input_noise(format), rel=0.02)


def test_noise_of_the_inputs_is_weighed_in(inputs, weight):
    second, scale = second_of(inputs), scales(weight, "e4m3", rows=True)
    noise = 0.05 * second.diagonal()

    def with_noise(numbers):
        made = numbers.double() * scale
        return errors(numbers, weight, scale, second) + (made.square() * noise).sum(1)

    deaf = round_by_moments(weight, scale, "e4m3", second)
    ours = round_by_moments(weight, scale, "e4m3", second, noise=noise)
    assert (with_noise(ours) < with_noise(deaf)).all()
    best = weight.double() @ second @ torch.linalg.inv(second + torch.diag(noise))
    least = errors(best, weight, 1.0, second) + (best.square() * noise).sum(1)
    assert with_noise(ours).sum() < 1.1 * least.sum()  # rounding adds little to what noise leaves


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_with_noise_no_row_is_worse_than_the_rounded_weight(format):
    g = torch.Generator().manual_seed(5)
    worse = False
    for channels in (2, 3, 6):
        second, weight = (
            second_of(torch.randn(40, channels, generator=g).double()),
            torch.randn(400, channels, generator=g),
        )
        noise, scale = 0.004 * second.diagonal(), scales(weight, format, rows=False)
        form = second + 1e-3 * second.diagonal().mean() * torch.eye(channels)

        def of(numbers, scale=scale, weight=weight, form=form, noise=noise):
            made = numbers.double() * scale
            return errors(numbers, weight, scale, form) + (made.square() * noise).sum(1)

        plain = of(nearest(weight, scale, format))
        assert (of(round_by_moments(weight, scale, format, second, noise=noise)) <= plain * (1 + 1e-6)).all()
        target = weight.double() @ form @ torch.linalg.inv(form + torch.diag(noise))
        worse |= bool((of(nearest(target.float(), scale, format)) > plain * 1.01).any())
    assert worse  # rounding the shifted weight alone would not do


@pytest.mark.parametrize("biased", [True, False])
def test_inputs_with_a_mean_are_rounded_with_it(inputs, weight, biased):
    x = 0.3 * inputs + 3
    second, mean = second_of(x), x.mean(0)
    bias = torch.zeros(OUT) if biased else None
    recipe = Recipe(granularity="tensor", activation="static")
    static = float(x.abs().max()) / 448
    made, _ = rounded_linear(weight, bias, Moments(mean, second), recipe, input_scale=static)
    spread = second - torch.outer(mean, mean) if biased else second
    numbers = {
        rms: round_by_moments(weight, made.scale, "e4m3", spread, noise=input_noise("e4m3") * of.diagonal())
        for rms, of in (("whole", second), ("about the mean", spread))
    }
    assert torch.equal(made.dequantize(torch.float64), numbers["whole"].double() * made.scale.double())
    if biased:
        codes = from_codes(to_codes(x.float(), torch.tensor(static), "e4m3"), "e4m3").double() * static

        def error(found):
            rest = codes @ (found.double() * made.scale.double()).T - x @ weight.double().T
            return float((rest - rest.mean(0)).square().mean())

        assert error(numbers["whole"]) < 0.7 * error(numbers["about the mean"])


def broken(moments):
    """Moments, and what the error is about."""
    mean, second = moments
    yield Moments(mean, torch.full_like(second, float("nan"))), "not finite"
    yield Moments(mean, -second), "positive semidefinite"
    yield Moments(mean, second[:3, :3]), r"\[3, 3\]"
    yield Moments(mean, second[0]), rf"\[{IN}\]"
    yield Moments(mean[:3], second), r"\[3\]"
    yield Moments(mean * float("nan"), second), "mean"


def test_a_model_is_unchanged_where_moments_of_one_linear_are_refused(inputs):
    model = nn.Sequential(nn.Linear(IN, 4), nn.Linear(IN, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    good = Moments(inputs.mean(0), second_of(inputs))
    refused = [({"0": good, "1": bad}, f"'1'.*{told}") for bad, told in broken(good)]
    for moments, told in (*refused, ({"0": good, "1": good, "2": good}, "'2'"), ({"0": good}, "'1'")):
        with pytest.raises(ValueError, match=told):
            quantize_(model, "fp8", moments=moments)
        assert all(type(part.weight) is nn.Parameter for part in model)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(TypeError, match="list"):
        quantize_(model, "fp8", moments=[good, good])
    quantize_(model, "fp8", moments={"0": good, "1": good})
    assert all(isinstance(part.weight, Float8Tensor) for part in model)
    assert not torch.equal(model[1].bias, before["1.bias"])


def test_shared_and_computed_biases_are_refused(inputs):
    """Moments change biases, which another layer may read."""
    moments = dict.fromkeys(("0", "1"), Moments(inputs.mean(0), second_of(inputs)))
    tied, computed = (nn.Sequential(nn.Linear(IN, 4), nn.Linear(IN, 4)) for _ in range(2))
    tied.append(nn.LayerNorm(4))
    tied[2].bias = tied[1].bias
    nn.utils.parametrize.register_parametrization(computed[1], "bias", nn.Identity())
    for model, told in ((tied, "2.bias and 1.bias are one parameter"), (computed, "1.bias is no parameter")):
        with pytest.raises(ValueError, match=told):
            quantize_(model, "fp8", moments=moments)
        assert not any(isinstance(parameter, Float8Tensor) for parameter in model.parameters())
        quantize_(model, "fp8")  # changes no bias
        assert isinstance(model[1].weight, Float8Tensor)
    assert tied[2].bias is tied[1].bias


@pytest.mark.parametrize("recipe", [Recipe(granularity="tensor", activation="static"), Recipe(activation="none")])
def test_a_bias_takes_up_the_mean(inputs, weight, recipe):
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(3))
    moments = Moments(inputs.mean(0), second_of(inputs))
    static = 0.02 if recipe.activation == "static" else None
    made, shifted = rounded_linear(weight, bias, moments, recipe, input_scale=static)
    rest = inputs @ (made.dequantize(torch.float64) - weight.double()).T + (shifted - bias).double()
    assert rest.mean(0).abs().max() < 1e-5
    assert made.recipe == recipe
    assert made.dtype == weight.dtype
    moved = Moments(inputs.mean(0) + 9, second_of(inputs + 9))
    if recipe.activation == "none":  # what is added to all inputs is no business of the codes
        same, _ = rounded_linear(weight, bias, moved, recipe)
        assert torch.equal(same.dequantize(), made.dequantize())
    without, none = rounded_linear(weight, None, moments, recipe, input_scale=static)
    assert none is None
    rest = inputs @ (without.dequantize(torch.float64) - weight.double()).T
    assert rest.mean(0).abs().max() < 0.2 * rest.std(0).max()  # the codes hold it instead


def test_observed_moments_round_a_model_for_its_outputs(inputs):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(IN, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).bfloat16()
    x = inputs.bfloat16()
    with observe(model, second=True) as seen, torch.no_grad():
        wanted = model(x)
    moments = {name: one.moments for name, one in seen.items()}
    wide = x.double()
    torch.testing.assert_close(moments["0"].second, second_of(wide), rtol=1e-12, atol=0)
    close = []
    for given in (None, moments):
        torch.manual_seed(4)
        other = nn.Sequential(nn.Linear(IN, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).bfloat16()
        quantize_(other, "fp8-weight-only", moments=given)
        with torch.no_grad():
            close.append(snr(wanted, other(x)))
    assert close[1] > close[0] + 3  # dB
    with pytest.raises(ValueError, match="'2'"):
        quantize_(model, "fp8", moments={"0": moments["0"]})
    with observe(model) as seen, torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="second=True"):
        seen["0"].moments  # noqa: B018 # a property that raises


def test_refusals(weight):
    for second, told in ((torch.eye(3), r"\[3, 3\], 0 not finite"), (torch.full((IN, IN), float("nan")), "22500 not")):
        with pytest.raises(ValueError, match=told):
            round_by_moments(weight, torch.ones(()), "e4m3", second)
    for noise in (torch.ones(3), -torch.ones(IN), torch.full((IN,), float("inf"))):
        with pytest.raises(ValueError, match=rf"\[{IN}\]; got \[{len(noise)}\]"):
            round_by_moments(weight, torch.ones(()), "e4m3", torch.eye(IN), noise=noise)
