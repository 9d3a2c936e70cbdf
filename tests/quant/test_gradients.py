"""Products with float8 weights: gradients reach activations and biases, and torch.compile makes one graph of them.

Graph and autograd stages only: inductor needs a C++ compiler, which a machine may lack.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from float8_recipes import RECIPES_OF_ALL, weight_of
from full import in_full
from mmdit.models.lora import beside
from quant import matmul
from quant.matmul import linear
from quant.recipe import Recipe
from quant.scaling import from_codes, scale_of, to_codes, values_of


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_gradients_are_those_of_the_widened_weight(name, bias):
    q = weight_of(RECIPES_OF_ALL[name], 16, 32, dtype=torch.float64)
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    b = torch.randn(16, dtype=torch.float64, requires_grad=True) if bias else None
    into = [x, b] if bias else [x]
    grad = torch.randn(2, 3, 16, dtype=torch.float64)
    found = torch.autograd.grad(F.linear(x, q, b), into, grad)
    expected = torch.autograd.grad(F.linear(x, q.dequantize(), b), into, grad)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
    assert (F.linear(x.detach(), q, b).requires_grad, F.linear(x.detach(), q).requires_grad) == (bias, False)


def test_gradients_reach_what_needs_them_only():
    q, x, bias = weight_of(Recipe(), 16, 32), torch.randn(5, 32), torch.randn(16)
    for of_x, of_bias in ((True, False), (False, True)):
        one, two = x.clone().requires_grad_(of_x), bias.clone().requires_grad_(of_bias)
        F.linear(one, q, two).sum().backward()
        assert (one.grad is not None, two.grad is not None) == (of_x, of_bias)
    assert q.grad is None
    layer = nn.Linear(32, 16)
    layer.weight = nn.Parameter(q)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((16,), 5.0))


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_codes_are_kept_for_the_backward_pass_and_no_dequantized_weight(name):
    q, x = weight_of(RECIPES_OF_ALL[name], 16, 32), torch.randn(5, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        F.linear(x, q, torch.zeros(16)).sum().backward()
    assert {tensor.data_ptr() for tensor in kept} == {q.qdata.data_ptr(), q.scale.data_ptr()}


def test_no_dequantized_weight_is_made_for_a_bias_alone(monkeypatch):
    q, bias = weight_of(Recipe(), 16, 32), torch.randn(16, requires_grad=True)
    monkeypatch.setattr(matmul, "values_of", lambda *args: pytest.fail("dequantized"))
    F.linear(torch.randn(2, 3, 32), q, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((16,), 6.0))


def test_gradients_by_other_ways():
    q, x = weight_of(Recipe(), 16, 32), torch.randn(5, 32, requires_grad=True)

    def loss(x):
        return F.linear(x, q).square().sum()

    (plain,) = torch.autograd.grad(loss(x), x)
    (again,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    assert torch.equal(plain, again)
    assert torch.equal(plain, torch.func.grad(loss)(x.detach()))
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)  # straight through: that of the dequantized weight
    w = q.dequantize()
    torch.testing.assert_close(second, (2 * w.t() @ w).sum(0).expand(5, 32), rtol=1e-4, atol=1e-4)


# Compiling.


class Net(nn.Module):
    def __init__(self, recipe, dtype=torch.float32):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64, dtype=dtype), nn.Linear(64, 16, bias=False, dtype=dtype)
        for layer in (self.a, self.b):
            layer.weight = nn.Parameter(weight_of(recipe, values=layer.weight.detach(), dtype=dtype))

    def forward(self, x):
        return self.b(F.gelu(self.a(x))) + x @ self.a.weight[:16].t()


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda call, **options: torch.compile(call, fullgraph=True, backend="aot_eager", **options)
    torch._dynamo.reset()


BOTH = [(name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in RECIPES_OF_ALL]
TRAINED = ("fp8", "fp8-weight-only", "fp8-static", "fp8-tensor")  # compiled in float32 by the next test


@pytest.mark.parametrize(("name", "dtype"), in_full(BOTH, [one for one in BOTH if one[1] == torch.bfloat16]))
def test_a_compiled_module_is_the_module(compiled, name, dtype):
    net = Net(RECIPES_OF_ALL[name], dtype)
    fast = compiled(net)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(3, 32, dtype=dtype)
            assert torch.equal(fast(x), net(x))
            with torch.compiler.set_stance("fail_on_recompile"):
                fast(torch.randn(3, 32, dtype=dtype))


COMPILED = {name: RECIPES_OF_ALL[name] for name in TRAINED}
COMPILED["e5m2 gradient"] = Recipe(gradient="e5m2")


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_module_trains_what_is_around_it(compiled, name):
    net = Net(COMPILED[name]).train()
    fast, x = compiled(net), torch.randn(3, 32)
    grads = []
    for call in (fast, net):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append((leaf.grad, net.a.bias.grad))
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its)
    with torch.compiler.set_stance("fail_on_recompile"):
        fast(torch.randn(3, 32, requires_grad=True)).sum().backward()


def test_compiled_with_any_batch(compiled):
    net = Net(Recipe())
    fast = compiled(net, dynamic=True)
    with torch.no_grad():
        fast(torch.randn(3, 32))
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (2, 7, 8):
                x = torch.randn(batch, 32)
                assert torch.equal(fast(x), net(x))


def test_compiled_beside_modules(compiled):
    q, x, bias = weight_of(Recipe(), 16, 32), torch.randn(3, 32), torch.randn(16)

    def call(x, q, bias):
        parts = torch.cat(q.chunk(2)).float().split(8)
        return F.linear(x, parts[0]), torch.addmm(bias, x, q.t()), F.linear(x.half(), q.half()), x @ q.clone().T

    for mine, its in zip(compiled(call)(x, q, bias), call(x, q, bias), strict=True):
        assert torch.equal(mine, its)
    parts = (q.qdata, q.scale, None, bias, q.recipe, q.dtype)
    assert torch.equal(compiled(linear)(x, *parts), linear(x, *parts))


def test_compiled_under_autocast(compiled):
    net = Net(Recipe())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x = torch.randn(3, 32)
        assert torch.equal(compiled(net)(x), net(x))
        assert net(x).dtype == torch.bfloat16


# Gradients in float8.


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_e5m2_are_those_of_the_rounded_gradient(name, dtype):
    recipe = replace(RECIPES_OF_ALL[name], gradient="e5m2")
    q = weight_of(recipe, 16, 32, dtype=dtype)
    x, grad = torch.randn(2, 3, 32, dtype=dtype, requires_grad=True), torch.randn(2, 3, 16, dtype=dtype)
    (found,) = torch.autograd.grad(F.linear(x, q), x, grad)
    wide = torch.promote_types(dtype, torch.float32)
    rows = grad.to(wide if dtype == torch.float16 else dtype)
    rows = rows * q.scale.t().to(rows.dtype) if q.scale.ndim else rows
    scale = scale_of(rows.abs().amax(), "e5m2")
    rounded = values_of(to_codes(rows, scale, "e5m2"), scale, "e5m2", wide)
    weight = from_codes(q.qdata, recipe.format, wide) * (1 if q.scale.ndim else q.scale.to(wide))
    torch.testing.assert_close(found, (rounded @ weight).to(dtype))
    plain = torch.autograd.grad(F.linear(x, q.dequantize()), x, grad)[0].double()
    assert (found.double() - plain).norm() < 0.1 * plain.norm(), "two bits of mantissa leave 5 %"
    (of_bias,) = torch.autograd.grad(F.linear(x, q, b := torch.zeros(16, dtype=dtype, requires_grad=True)), b, grad)
    assert torch.equal(of_bias, grad.reshape(-1, 16).sum(0))


@pytest.mark.parametrize("gradient", ["full", "e5m2"])
def test_an_adapter_beside_a_float8_weight_trains_under_recomputation(gradient):
    """Adapters on both sides of a product get the gradients of the dequantized weights, or in E5M2 nearly these."""
    torch.manual_seed(0)
    model, plain = (Net(replace(Recipe(), gradient=gradient), torch.float64) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    for net in (model, plain):
        down = nn.Parameter(torch.ones(2, 32, dtype=torch.float64))
        beside(net, "a", factors=(down, torch.full((64, 2), 0.1, dtype=torch.float64))).down = down
    for name in ("a", "b"):
        layer = plain.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    x = torch.randn(5, 32, dtype=torch.float64)
    activation = x.clone()  # keeps both forwards alike but for the roundings of activations
    found = torch.autograd.grad(checkpoint(model, activation, use_reentrant=False).sum(), model.a.down)[0]
    expected = torch.autograd.grad(plain(activation).sum(), plain.a.down)[0]
    assert (found - expected).norm() < (0.05 if gradient == "full" else 0.15) * expected.norm()


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_gradcheck_of_the_product(name, monkeypatch):
    """With activations that are not rounded, the product is linear, and its gradient the true one."""
    q = weight_of(replace(RECIPES_OF_ALL[name], activation="none", backend="auto"), 4, 6, dtype=torch.float64)
    x, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6), (4,)))
    assert torch.autograd.gradcheck(lambda x, bias: F.linear(x, q, bias), (x, bias))
    monkeypatch.setattr(matmul, "PIECE", 8)
    assert torch.autograd.gradcheck(lambda x, bias: F.linear(x, q, bias), (x, bias))
