"""Products with float8 weights: emulated and weight-only against a float64 formula, spellings, accuracy, refusals.

The formula takes codes and scales from `float8_law`, so that the only errors are the rounding of float32 sums and of
the result. Its bound is the standard one: a sum of k products errs by at most k * 2^-24 of the sum of their sizes.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from float8_law import DTYPES, FORMATS, codes_by_law, decoded, scale_by_law
from float8_recipes import RECIPES_OF_ALL, weight_of
from quant import matmul
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor
from refusals import refuses


def formula(x, weight, bias=None):
    """The product and a bound of the error of computing it in float32 and rounding it to x's dtype, both float64."""
    recipe, wide = weight.recipe, x.double().reshape(-1, x.shape[-1])
    w = decoded(weight.qdata, recipe.format) * weight.scale.double()
    if recipe.activation == "none":
        a, w = wide, w.float().to(x.dtype).double() if x.dtype != torch.float64 else w
    else:
        format, flat = recipe.activation_format, x.reshape(-1, x.shape[-1])
        scale = weight.input_scale
        if recipe.activation != "static":
            scale = scale_by_law(flat, format, "row" if recipe.activation == "token" else "tensor")
        a = decoded(codes_by_law(flat, scale, format), format) * scale.double()
    unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    y, size = a @ w.T, a.abs() @ w.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    info = torch.finfo(x.dtype)
    bound = (a.shape[1] + 4) * unit * size + info.eps * y.abs() + 2 * info.smallest_normal * info.eps
    return (each.reshape(*x.shape[:-1], len(w)) for each in (y, bound))


def check(x, weight, bias=None):
    y = F.linear(x, weight, bias)
    expected, bound = formula(x, weight, bias)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    finite = expected.abs() < torch.finfo(x.dtype).max
    assert ((y.double() - expected).abs() <= bound)[finite].all()
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_linear_is_the_formula(name, dtype):
    weight = weight_of(RECIPES_OF_ALL[name], 24, 40, dtype=dtype)
    for leading in ((), (1,), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)):
        for bias in (None, torch.randn(24, dtype=dtype)):
            check(torch.randn(*leading, 40).to(dtype), weight, bias)


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_sums_that_are_exact_in_float32_are_exact(name):
    """With small integers as codes and powers of two as scales, the result is exact."""
    recipe = RECIPES_OF_ALL[name]
    w, x = torch.randint(-3, 4, (16, 32)).float(), torch.randint(-3, 4, (9, 32)).float()
    largest = {"e4m3": 448.0, "e5m2": 57344.0}
    w[:, 0], x[:, 1] = largest[recipe.format], largest[recipe.activation_format]  # these set the scales
    w[:, 1], x[:, 0] = 0, 0
    weight = weight_of(recipe, values=w * 2.0**-5, input_scale=0.25)
    bias = torch.randint(-8, 8, (16,)).float()
    y = F.linear(x * 0.25, weight, bias)
    exact = x.double() @ w.double().T * 2.0**-7 + bias.double()
    assert torch.equal(y.double(), exact.float().double())


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_layouts_of_the_input(name):
    recipe = RECIPES_OF_ALL[name]
    weight, bias = weight_of(recipe, 16, 32), torch.randn(16)
    base = torch.randn(4, 32, 6)
    for x in (
        base.mT,
        base.mT[:, ::2],
        base[0].t(),
        torch.randn(32).expand(3, 5, 32),
        base.mT[1:2, 2:3],
        base.mT[..., 0, :],
    ):
        y = check(x, weight, bias)
        if recipe.activation != "none":  # there torch's own matmul takes another way
            assert torch.equal(y, F.linear(x.contiguous(), weight, bias))


def test_every_spelling_of_the_product():
    recipe = Recipe()
    q, x, bias = weight_of(recipe, 16, 32), torch.randn(5, 32), torch.randn(16)
    y, with_bias, t = F.linear(x, q), F.linear(x, q, bias), q.t()
    layer = nn.Linear(32, 16)
    layer.weight, layer.bias = nn.Parameter(q), nn.Parameter(bias)
    for found in (
        F.linear(x, weight=q),
        F.linear(input=x, weight=q, bias=None),
        x @ t,
        x.matmul(t),
        x.matmul(other=t),
        torch.matmul(x, t),
        torch.matmul(input=x, other=t),
        torch.mm(x, mat2=t),
        x.mm(t),
        x @ q.T,
        x @ q.mT,
        (q @ x.t()).t(),
        torch.mm(q, x.t()).t(),
        torch.stack([x[i] @ t for i in range(5)]),
        torch.stack([q @ x[i] for i in range(5)]),
        torch.stack([torch.mv(q, vec=x[i]) for i in range(5)]),
        torch.stack([q.mv(x[i]) for i in range(5)]),
        (q @ x.t()[None])[0].t(),
        torch.bmm(x[None], mat2=t.unsqueeze(0))[0],
        x[None].bmm(t[None])[0],
        (x[None] @ t[None, None])[0, 0],
        (x.view(1, 5, 32) @ t)[0],
    ):
        assert torch.equal(found, y)
    for found in (
        layer(x),
        F.linear(x, q, bias=bias),
        torch.addmm(bias, x, t),
        torch.addmm(input=bias, mat1=x, mat2=t, beta=1, alpha=1),
        bias.addmm(x, t),
    ):
        assert torch.equal(found, with_bias)
    table = torch.randn(5, 16)
    assert torch.equal(torch.addmm(table, x, t, beta=0.5, alpha=2), 2 * y + 0.5 * table)
    assert torch.equal(torch.addmm(torch.full((16,), math.nan), x, t, beta=0), y)
    other = weight_of(recipe, 5, 32)
    assert torch.equal(F.linear(other, q), F.linear(other.dequantize(), q))
    assert torch.equal(other @ t, F.linear(other.dequantize(), q))
    plain = torch.randn(7, 32)
    assert torch.equal(F.linear(q, plain, plain[:, 0]), F.linear(q.dequantize(), plain, plain[:, 0]))


STACKS = {  # [5, 8] and [3, 5, 8] plain, [3, 4, 8] float8
    "bmm": lambda x, xs, v, w: torch.bmm(xs, w.mT),
    "bmm, float8 first": lambda x, xs, v, w: torch.bmm(w, xs.mT),
    "@": lambda x, xs, v, w: xs @ w.mT,
    "float8 @": lambda x, xs, v, w: w @ xs.mT,
    "matrix @": lambda x, xs, v, w: x @ w.mT,
    "@ matrix": lambda x, xs, v, w: w @ x.t(),
    "vector @": lambda x, xs, v, w: v @ w.mT,
    "@ vector": lambda x, xs, v, w: w @ v,
    "one of stack": lambda x, xs, v, w: xs[:1] @ w.mT,
    "float8 one": lambda x, xs, v, w: xs @ w[1:2].mT,
    "more stacks": lambda x, xs, v, w: xs.expand(2, 3, 5, 8) @ w.mT,
    "float8 more stacks": lambda x, xs, v, w: xs @ w.view(3, 1, 4, 8).mT,
    "float8 matrix @": lambda x, xs, v, w: w[0] @ xs.mT,
    "empty": lambda x, xs, v, w: xs[:0] @ w[:0].mT,
}


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("name", STACKS)
def test_products_of_stacks(name, granularity):
    recipe = Recipe("e4m3", granularity, "none")
    w = Float8Tensor.quantize(torch.randn(3, 4, 8, dtype=torch.float64), recipe=recipe)
    x, xs, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 8), (3, 5, 8), (8,)))
    found, wanted = STACKS[name](x, xs, v, w), STACKS[name](x, xs, v, w.dequantize())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    rounded = w._replace(recipe=Recipe("e4m3", granularity, "tensor"))
    found = STACKS[name](x, xs, v, rounded)
    assert found.numel() == 0 or (found - wanted).norm() < 0.06 * wanted.norm()


class Largest(TorchDispatchMode):
    """The largest number of values in a tensor of 16 bits or more that operations made."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.is_floating_point() and found.dtype.itemsize > 1:
            self.values = max(self.values, found.numel())
        return found


@pytest.mark.parametrize("as_bytes", [False, True], ids=["float8", "bytes"])
@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_no_dequantized_copy_of_a_whole_weight_is_made(name, as_bytes, monkeypatch):
    """Without a native matmul, large weights are multiplied in pieces, and small ones at once."""
    weight, bias = weight_of(RECIPES_OF_ALL[name], 48, 32, input_scale=0.05), torch.randn(48)
    weight = weight._replace(qdata=weight.qdata.view(torch.uint8)) if as_bytes else weight
    x = torch.randn(2, 5, 32, requires_grad=True)
    whole = F.linear(x, weight, bias)
    (whole_grad,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(matmul, "PIECE", 500)  # 15 rows, or 10 columns
    check(x.detach(), weight, bias)
    check(x.detach().bfloat16(), weight.bfloat16(), bias.bfloat16())
    with Largest() as largest:
        found = F.linear(x, weight, bias)
        (grad,) = torch.autograd.grad(found.square().sum(), x)
    assert 480 <= largest.values <= 500
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-5, atol=1e-4)
    assert F.linear(x[:, :0], weight, bias).shape == (2, 0, 48)


def test_products_of_stacks_that_do_not_fit():
    w, x = Float8Tensor.quantize(torch.randn(3, 4, 8)), torch.randn(2, 5, 8)
    for call, said in (
        (lambda: x @ w.mT, "[2, 5, 8]"),
        (lambda: torch.bmm(x, w.mT), "[2, 5, 8]"),
        (lambda: torch.bmm(x, w[0].t()), "[8, 4]"),
        (lambda: torch.mv(w[0], x[0]), "[5, 8]"),
        (lambda: torch.mm(x, w[0].t()), "[2, 5, 8]"),
        (lambda: torch.randn(3, 5, 7) @ w.mT, "[5, 7]"),
    ):
        refuses(call, said, error=ValueError)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_embedding_gives_dequantized_rows(granularity):
    q, ids = Float8Tensor.quantize(torch.randn(7, 4).half(), granularity=granularity), torch.tensor([[3, 1], [6, 3]])
    layer = nn.Embedding(7, 4, padding_idx=0)
    layer.weight = nn.Parameter(q)
    for found in (F.embedding(ids, q), F.embedding(ids.int(), q), layer(ids)):
        assert type(found) is torch.Tensor
        assert found.dtype == torch.float16
        assert torch.equal(found, q.dequantize()[ids])


def test_scales_along_the_sum_are_never_taken_out():
    """The weight is square, so that its shape does not reveal a wrong axis."""
    q, x = weight_of(Recipe(activation="none"), 16, 16), torch.randn(5, 16)
    stack = Float8Tensor.quantize(torch.randn(16, 16, 16))
    for call in (
        lambda: F.linear(x, q.t()),
        lambda: x @ q,
        lambda: q.t() @ x.t(),
        lambda: torch.addmm(x[0], x, q),
        lambda: F.linear(x, stack.transpose(1, 2)[3]),
        lambda: F.linear(x, stack.transpose(0, 2)[3]),
        lambda: F.linear(x, stack.permute(2, 0, 1)[3].t()),
    ):
        refuses(call, "run along its sum", error=ValueError)
    for part in (q[:, 2:9], q.t().t(), q[3:7], stack[3], stack.transpose(0, 1)[:, 3]):
        check(x[:, : part.shape[1]], part)
    one = weight_of(Recipe("e4m3", "tensor", "none"), 16, 16)
    assert torch.equal(x @ one, F.linear(x, one.dequantize().t()))


extremes = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(-(2.0**-126), 2.0**-126, width=32),
    st.sampled_from([0.0, -0.0, 1e30, -1e30, 1e-30, 3.4028234e38, 2.0**-149]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    x=st.lists(extremes, min_size=12, max_size=12),
    w=st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8),
    rows=st.integers(0, 3),
    name=st.sampled_from([name for name in RECIPES_OF_ALL if RECIPES_OF_ALL[name].activation != "none"]),
)
def test_activations_at_the_extremes(x, w, rows, name):
    """Empty, one row, all zero, subnormal and huge."""
    weight = weight_of(RECIPES_OF_ALL[name], values=torch.tensor(w).reshape(2, 4))
    check(torch.tensor(x).reshape(3, 4)[:rows], weight)


def test_scales_are_multiplied_in_an_order_that_does_not_overflow():
    weight = weight_of(Recipe(), values=torch.full((4, 64), 1e-3))
    torch.testing.assert_close(F.linear(torch.full((2, 64), 1e38), weight), torch.full((2, 4), 6.4e36))


# Values that are not finite.


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_activations_that_are_not_finite(name, value):
    recipe = RECIPES_OF_ALL[name]
    w = torch.rand(8, 16) + 0.5
    weight, x = weight_of(recipe, values=w, input_scale=0.5), torch.rand(4, 16)
    clean = F.linear(x, weight)
    x[1, 2] = value
    y = F.linear(x, weight)
    others = torch.tensor([0, 2, 3])
    if recipe.activation == "static" and not math.isnan(value):  # as the largest number of its sign
        largest = {"e4m3": 448.0, "e5m2": 57344.0}[recipe.activation_format]
        assert torch.equal(y, F.linear(x.clamp(-largest * 0.5, largest * 0.5), weight))
        assert y.isfinite().all()
    elif recipe.activation == "none" and not math.isnan(value):  # as in a plain layer
        assert (y[1] == value).all()
    else:
        assert y[1].isnan().all()
    if recipe.activation == "tensor":  # the scale of all is that of the worst
        assert y.isnan().all()
    else:
        assert torch.equal(y[others], clean[others])


# Accuracy. Theory for a normal distribution: the rounding of a number with m bits of mantissa has a relative noise of
# 2^-2m / 12 times the mean of 1 / mantissa^2, so 31.55 dB for m = 3 and 25.6 dB for m = 2 once the scale is right.


def snr(signal, found):
    signal = signal.double()
    return float(10 * torch.log10(signal.square().sum() / (signal - found.double()).square().sum()))


@pytest.mark.parametrize(("format", "theory"), [("e4m3", 31.55), ("e5m2", 25.6)])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_of_weights(dtype, granularity, format, theory):
    values = torch.randn(512, 1024).to(dtype)
    assert abs(snr(values, Float8Tensor.quantize(values, format, granularity).dequantize()) - theory) < 0.3


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "row x tensor", "fp8-static"])
def test_noise_of_products(name):
    x, w = torch.randn(512, 512), torch.randn(512, 512)
    weight = weight_of(RECIPES_OF_ALL[name], values=w, input_scale=float(x.abs().max() / 448))
    assert abs(snr(x.double() @ w.double().T, F.linear(x, weight)) - 28.5) < 0.3


# Dtypes.


def test_operands_that_do_not_fit():
    q, x = weight_of(Recipe(), 16, 32), torch.randn(5, 32)
    for call, *said in (
        (lambda: F.linear(x.half(), q), "the input is torch.float16", "torch.float32"),
        (lambda: F.linear(x, q.bfloat16()), "the input is torch.float32", "torch.bfloat16"),
        (lambda: F.linear(torch.randn(4, 16), q), "[4, 16]", "[16, 32]"),
        (lambda: F.linear(torch.randn(4, 64), q), "[4, 64]", "[16, 32]"),
        (lambda: F.linear(torch.randn(64), q), "[64]", "[16, 32]"),
        (lambda: F.linear(torch.tensor(1.0), q), "shape []"),
        (lambda: F.linear(x, q, torch.randn(16).half()), "the bias is [16], torch.float16", "[16], torch.float32"),
        (lambda: F.linear(x, q, torch.randn(1)), "the bias is [1], torch.float32"),
        (lambda: F.linear(x, q[3]), "is a matrix, got shape [32]"),
        (lambda: F.linear(x, weight_of(Recipe(), 2, 16, 32)), "is a matrix, got shape [2, 16, 32]"),
        (lambda: F.linear(x, Float8Tensor.quantize(torch.ones(16, 32), recipe=RECIPES["fp8-static"])), "input scales"),
        (lambda: F.linear(x, weight_of(replace(Recipe(), backend="native"), 16, 32)), "'native'", "on cpu"),
    ):
        refuses(call, *said, error=ValueError)
    for call, *said in (
        (lambda: F.linear(x, torch.randn(16, 32), Float8Tensor.quantize(torch.randn(16))), "as bias"),
        (lambda: F.linear(x, q, Float8Tensor.quantize(torch.randn(16))), "as bias"),
    ):
        refuses(call, *said, error=NotImplementedError)


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_autocast_is_that_of_a_plain_layer(name):
    q, bias = weight_of(RECIPES_OF_ALL[name], 16, 32), torch.randn(16)
    x = torch.randn(5, 32)
    low = q.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for each in (x, x.bfloat16(), x.half()):
            y = F.linear(each, q, bias)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(y, F.linear(each.bfloat16(), low, bias.bfloat16()))
            assert y.dtype == F.linear(each, torch.randn(16, 32)).dtype == torch.bfloat16
        assert F.linear(x.double(), q.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert F.linear(x, q, bias).dtype == torch.float32


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_sums_do_not_overflow_under_autocast(name):
    """Sums of 2048 products of codes exceed the largest float16."""
    q, x = weight_of(RECIPES_OF_ALL[name], 16, 2048).half(), torch.randn(5, 2048).half()
    with torch.autocast("cpu", torch.float16):
        y = F.linear(x, q)
    assert y.isfinite().all()
    assert torch.equal(y, F.linear(x, q))


def test_inference_mode_and_no_grad():
    q, x = weight_of(Recipe(), 16, 32), torch.randn(5, 32, requires_grad=True)
    y = F.linear(x, q)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for found in (F.linear(x, q), x @ q.t(), (q @ x.t()).t()):
                assert torch.equal(found, y)
                assert not found.requires_grad


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_multiply_like_float8(format):
    for activation, granularity in (("none", "row"), ("token", "row"), ("static", "tensor")):
        q = weight_of(Recipe(format, granularity, activation, format), 16, 32)
        stored = Float8Tensor(q.qdata.view(torch.uint8), q.scale, q.input_scale, q.recipe, q.dtype)
        x = torch.randn(5, 32, requires_grad=True)
        mine, its = F.linear(x, stored), F.linear(x, q)
        assert torch.equal(mine, its)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (mine, its)))
