"""Quantization-aware fine-tuning: the forward is that of float8, gradients are those of the formula, scales learn."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from encoders.precision import Linear as UpcastLinear
from float8_recipes import RECIPES_OF_ALL
from quant import Float8Tensor, quantize_
from quant.formats import LARGEST
from quant.scaling import from_codes, to_codes
from quant.training import FakeQuantizedLinear, fake_codes, fake_quantize_, fake_quantized, quantize_trained_


def model_of(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False)).to(dtype)


def scales_of(recipe):
    return {"0": 0.01, "2": torch.tensor(0.004)} if recipe.activation == "static" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_the_forward_is_that_of_the_float8_weights_before_and_after_training(name, dtype):
    recipe, model = RECIPES_OF_ALL[name], model_of(dtype)
    x = torch.randn(2, 5, 16).to(dtype)
    plain = copy.deepcopy(model)
    quantize_(plain, recipe, input_scales=scales_of(recipe))
    fake = fake_quantize_(model, recipe, input_scales=scales_of(recipe))
    assert list(fake) == ["0", "2"]
    near = {"atol": 0, "rtol": 0}
    torch.testing.assert_close(model(x), plain(x), **near)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(x).square().mean().backward()
    optimizer.step()
    trained = model(x).detach()
    assert not torch.equal(trained, plain(x)), "a step of this size changes codes"
    report = quantize_trained_(model)
    assert [layer.recipe for layer in report] == [recipe, recipe]
    assert all(type(model[i]) is nn.Linear and isinstance(model[i].weight, Float8Tensor) for i in (0, 2))
    torch.testing.assert_close(model(x).detach(), trained, **near)
    assert set(model.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_linears_of_text_encoders_upcast_before_and_after(name):
    recipe, x = RECIPES_OF_ALL[name], torch.randn(2, 5, 16)
    torch.manual_seed(0)
    model = nn.Sequential(UpcastLinear(16, 32), nn.GELU(), UpcastLinear(32, 16, bias=False)).bfloat16()
    plain = copy.deepcopy(model)
    quantize_(plain, recipe, input_scales=scales_of(recipe))
    fake_quantize_(model, recipe, input_scales=scales_of(recipe))
    assert torch.equal(model(x), plain(x))
    assert model(x).dtype == torch.float32
    quantize_trained_(model)
    assert type(model[0]) is type(model[2]) is UpcastLinear
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_training_goes_on_from_float8_weights(name):
    recipe, model = RECIPES_OF_ALL[name], model_of()
    x = torch.randn(2, 5, 16)
    quantize_(model, recipe, input_scales=scales_of(recipe))
    codes, plain = [model[i].weight.qdata.clone() for i in (0, 2)], model(x)
    fake = fake_quantize_(model, recipe)
    assert list(fake) == ["0", "2"]
    assert all(model[i].weight.requires_grad and model[i].weight.dtype == torch.float32 for i in (0, 2))
    torch.testing.assert_close(model(x), plain, atol=0, rtol=0)
    model(x).square().mean().backward()
    assert all(model[i].weight.grad.abs().sum() > 0 for i in (0, 2))
    quantize_trained_(model)
    assert all(
        torch.equal(model[i].weight.qdata.view(torch.uint8), codes[n].view(torch.uint8)) for n, i in ((0, 0), (1, 2))
    )
    torch.testing.assert_close(model(x), plain, atol=0, rtol=0)
    with pytest.raises(ValueError, match="give no input_scales"):
        fake_quantize_(model, recipe, input_scales={"0": 0.1})
    other = "fp8-e5m2" if recipe.format == "e4m3" else "fp8"
    with pytest.raises(ValueError, match="quantized already"):
        fake_quantize_(model, other)


def straight_through(x, scale, format):
    """s * q = s * (clamp(x / s) + r) with the remainder r of rounding held fixed, whose derivative is the rule's."""
    within = (x / scale).clamp(-LARGEST[format], LARGEST[format])
    rest = (from_codes(to_codes(x, scale, format), format, x.dtype) - within).detach()
    return scale * (within + rest)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_gradients_are_straight_through_for_values_and_those_of_learned_steps_for_scales(format, shape):
    torch.manual_seed(1)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    # The last row, or the largest values of all, are beyond the reach of their scale.
    scale = torch.full(shape, 1.1 / LARGEST[format], dtype=torch.float64).requires_grad_()
    g = torch.randn(3, 7, dtype=torch.float64)
    beyond = (x / scale).abs() > LARGEST[format]
    assert 0 < beyond.sum() < x.numel()
    ours = torch.autograd.grad((g * scale * fake_codes(x, scale, format)).sum(), (x, scale))
    wanted = torch.autograd.grad((g * straight_through(x, scale, format)).sum(), (x, scale))
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert not ours[0][beyond].any()
    torch.testing.assert_close(ours[0][~beyond], g[~beyond])


def test_gradcheck_where_codes_do_not_move():
    """Beyond the reach of a scale, codes stay the largest one, and the rule is the true derivative."""
    x = torch.tensor([500.0, -700.0, 1e4], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: s * fake_codes(x, s, "e4m3"), (x, scale))


def test_codes_for_a_compiler_and_their_gradients_are_the_plain_ones(monkeypatch):
    for shape, dtype in (((), torch.float32), ((4, 1), torch.bfloat16)):
        g = torch.Generator().manual_seed(0)
        x = (300 * torch.randn(6, 4, generator=g)).to(dtype).T.requires_grad_(True)
        scale = (0.5 + torch.rand(shape, generator=g)).requires_grad_(True)
        grad = torch.randn(4, 6, generator=g).to(dtype)
        found = []
        for compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
            codes = fake_codes(x, scale, "e4m3")
            found.append((codes, *torch.autograd.grad(codes, (x, scale), grad)))
            assert ("quant_fake_codes" in type(codes.grad_fn).__name__) == compiling
        for ours, wanted in zip(*found, strict=True):
            assert wanted.any()
            torch.testing.assert_close(ours, wanted)
        with FakeTensorMode() as mode:
            told = torch.ops.quant.fake_codes(mode.from_tensor(x), mode.from_tensor(scale), "e4m3")
        assert (told.dtype, told.stride()) == (found[1][0].dtype, found[1][0].stride())


@pytest.mark.parametrize(
    ("train", "weights", "scales"), [("weights", True, False), ("scales", False, True), ("both", True, True)]
)
def test_what_trains(train, weights, scales):
    model = model_of()
    fake = fake_quantize_(model, "fp8-static", input_scales={"0": 0.01, "2": 0.004}, train=train)
    model(torch.randn(4, 16)).square().mean().backward()
    for linear in fake.values():
        assert (linear.weight.grad is not None) == weights
        assert (linear.weight_growth.grad is not None) == (linear.input_growth.grad is not None) == scales
        assert linear.weight_scale > 0


def test_learned_scales_lessen_the_error_of_a_scale_that_is_far_too_large():
    """Codes near zero are coarse; scales that learn move values back to where float8 is fine."""
    model, x = model_of(seed=3), torch.randn(64, 16)
    wanted = model(x).detach()
    fake_quantize_(model, "fp8-static", input_scales={"0": 300.0, "2": 300.0}, train="scales")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad and p.ndim == 0], lr=0.2)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.1 * errors[0]
    quantize_trained_(model)
    assert float(model[0].weight.input_scale) < 100.0


def test_refusals():
    with pytest.raises(ValueError, match="no fake-quantized"):
        quantize_trained_(model_of())
    with pytest.raises(TypeError, match="Linear itself"):
        fake_quantize_(nn.Linear(4, 4))
    with pytest.raises((ValueError, TypeError), match="biases"):
        fake_quantize_(model_of(), "fp8", train="biases")
    model = model_of()
    fake_quantize_(model, "fp8")
    with pytest.raises(ValueError, match="'0'"):
        fake_quantize_(model, "fp8")
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="2: 1 of 512"):
        quantize_trained_(model)
    assert all(isinstance(linear, FakeQuantizedLinear) for linear in fake_quantized(model).values())
    assert len(fake_quantized(model)) == 2


def test_shared_weights_are_refused():
    """Each Linear would have scales of its own for one weight."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    for select in (None, "0"):
        with pytest.raises(ValueError, match=r"(0|2).weight and (0|2).weight are one parameter"):
            fake_quantize_(model, "fp8", select)
        assert not fake_quantized(model)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    fake = fake_quantize_(model, "fp8")
    fake["2"].weight = fake["0"].weight
    with pytest.raises(ValueError, match=r"0.weight and 2.weight are one parameter"):
        quantize_trained_(model)
    assert len(fake_quantized(model)) == 3
