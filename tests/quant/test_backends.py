"""The choice of the backend, and the arguments that the native one passes to torch; no GPU is needed.

The native backend runs with a stand-in for `torch._scaled_mm` that checks operands as torch's kernels do (2.11 to 2.13:
torch/_meta_registrations.py `_check_scaled_mm_sizes`, aten/src/ATen/native/cuda/ScaledBlas.cpp) and multiplies in
float64; torch's own registration for fake CUDA tensors checks them too.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from float8_law import TORCH, decoded
from quant import matmul
from quant.matmul import backend_of
from quant.quantize import report
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor
from refusals import refuses

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TENSOR = RECIPES["fp8-tensor"]
E5M2 = "e5m2"


def pretend(monkeypatch, major, minor):
    gpu = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(matmul, "_CAPABILITIES", {})


@pytest.fixture
def hopper(monkeypatch):
    pretend(monkeypatch, 9, 0)


@pytest.mark.parametrize(
    ("recipe", "device", "dtype", "shape", "runs", "why"),
    [
        (Recipe(), CUDA, BF16, (32, 64), "native", "float8 matmul"),
        (RECIPES["fp8-static"], CUDA, BF16, (32, 64), "native", "float8 matmul"),
        (TENSOR, CUDA, FP16, (32, 64), "native", "float8 matmul"),
        (TENSOR, CUDA, FP32, (32, 64), "native", "float8 matmul"),
        (replace(TENSOR, format=E5M2), CUDA, BF16, (32, 64), "native", "float8 matmul"),
        (replace(TENSOR, activation_format=E5M2), CUDA, BF16, (32, 64), "native", "float8 matmul"),
        (Recipe(activation_format=E5M2), CUDA, BF16, (32, 64), "native", "float8 matmul"),
        (RECIPES["fp8-weight-only"], CUDA, BF16, (32, 64), "dequantized", "weight-only"),
        (RECIPES["fp8-weight-only"], CPU, FP64, (3, 5), "dequantized", "weight-only"),
        (replace(Recipe(), backend="emulated"), CUDA, BF16, (32, 64), "emulated", "asked for"),
        (Recipe(), CPU, BF16, (32, 64), "emulated", "no float8 matmul on cpu"),
        (Recipe(), torch.device("mps"), BF16, (32, 64), "emulated", "no float8 matmul on mps"),
        (Recipe(), CUDA, BF16, (40, 64), "emulated", "[40, 64] is not in multiples of 16"),
        (Recipe(), CUDA, BF16, (32, 72), "emulated", "[32, 72] is not in multiples of 16"),
        (Recipe(), CUDA, BF16, (0, 64), "emulated", "[0, 64]"),
        (Recipe(), CUDA, BF16, (64, 0), "emulated", "[64, 0]"),
        (Recipe(), CUDA, FP16, (32, 64), "emulated", "scales per row do not give torch.float16"),
        (Recipe(), CUDA, FP32, (32, 64), "emulated", "scales per row do not give torch.float32"),
        (TENSOR, CUDA, FP64, (32, 64), "emulated", "do not give torch.float64"),
        (Recipe(format=E5M2), CUDA, BF16, (32, 64), "emulated", "E5M2 weights, scale per row"),
        (replace(TENSOR, format=E5M2, activation_format=E5M2), CUDA, BF16, (32, 64), "emulated", "e5m2 input"),
        (replace(Recipe(), backend="native"), CUDA, BF16, (32, 64), "native", "float8 matmul"),
        (replace(Recipe(), backend="native"), CPU, BF16, (32, 64), "refused", "no float8 matmul on cpu"),
        (replace(Recipe(), backend="native"), CUDA, BF16, (32, 72), "refused", "multiples of 16"),
    ],
)
def test_the_backend_depends_on_device_shape_and_recipe(hopper, recipe, device, dtype, shape, runs, why):
    found = backend_of(recipe, device, dtype, shape)
    assert found[0] == runs
    assert why in found[1]


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), "emulated"), ((8, 9), "native"), ((12, 0), "native")])
def test_the_backend_depends_on_compute_capability(monkeypatch, capability, runs):
    pretend(monkeypatch, *capability)
    found = backend_of(Recipe(), CUDA, BF16, (32, 64))
    assert found[0] == runs
    assert (str(capability) in found[1]) == (runs == "emulated")


# The stand-in.


def scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    float8, (m, k), n = tuple(TORCH.values()), a.shape, b.shape[1]
    assert m and k % 16 == n % 16 == 0
    assert a.dtype in float8
    assert b.dtype in float8
    assert (a.dtype, b.dtype) != (TORCH["e5m2"],) * 2
    assert (a.stride(), b.stride()) == ((k, 1), (1, k))  # row-major, column-major
    assert scale_a.dtype == scale_b.dtype == FP32
    if scale_a.numel() > 1 or scale_b.numel() > 1 or scale_a.ndim:
        assert (scale_a.shape, scale_b.shape) == ((m, 1), (1, n))
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert out_dtype == BF16
        assert b.dtype == TORCH["e4m3"]
    assert out_dtype in (BF16, FP16, FP32)
    if bias is not None:
        assert out_dtype != FP32
        assert (bias.dtype, bias.shape) == (out_dtype, (n,))
    wide = (decoded(x, "e4m3" if x.dtype == TORCH["e4m3"] else "e5m2") for x in (a.contiguous(), b.contiguous()))
    left, right = wide
    y = left @ right * scale_a.double() * scale_b.double()
    return (y if bias is None else y + bias.double()).to(out_dtype)


@pytest.fixture
def native(monkeypatch):
    """`auto` takes the stand-in wherever a GPU would take its matmul; the fixture is the list of its calls."""
    calls = []
    why_not_native = matmul.why_not_native
    pretend(monkeypatch, 9, 0)
    monkeypatch.setattr(matmul, "why_not_native", lambda recipe, device, *rest: why_not_native(recipe, CUDA, *rest))
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: calls.append(kwargs) or scaled_mm(*args, **kwargs))
    return calls


def weight_of(recipe, *shape, dtype=BF16):
    scale = torch.tensor(0.01) if recipe.activation == "static" else None
    return Float8Tensor.quantize(torch.randn(*shape).to(dtype), recipe=recipe, input_scale=scale)


def emulated(weight):
    return weight._replace(recipe=replace(weight.recipe, backend="emulated"))


NATIVE = {
    "fp8": (Recipe(), BF16),
    "e5m2 activations": (Recipe(activation_format=E5M2), BF16),
    "row x tensor": (Recipe(activation="tensor"), BF16),
    "row x static": (Recipe(activation="static"), BF16),
    "tensor": (TENSOR, BF16),
    "tensor float16": (TENSOR, FP16),
    "tensor float32": (TENSOR, FP32),
    "static": (RECIPES["fp8-static"], BF16),
    "static float32": (RECIPES["fp8-static"], FP32),
    "e5m2 weights": (replace(TENSOR, format=E5M2), BF16),
}


def close(y, weight, x, bias=None):
    """A bound of one rounding of the result, and of one more where float32 adds the bias after the product."""
    oracle = F.linear(x, emulated(weight), bias)
    assert (y.dtype, y.shape) == (oracle.dtype, oracle.shape)
    torch.testing.assert_close(y, oracle, rtol=2 * torch.finfo(y.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE)
def test_native_is_handed_what_torch_takes(native, name):
    recipe, dtype = NATIVE[name]
    weight, base = weight_of(recipe, 32, 48, dtype=dtype), torch.randn(4, 48, 6).to(dtype)
    inputs = [
        base.mT,
        base.mT[:, ::2],
        base[0].t(),
        base[0, :, 0],
        base.mT[1:2, 2:3],
        torch.randn(48).to(dtype).expand(3, 5, 48),
        torch.empty_strided((1, 48), (1, 1), dtype=dtype).normal_(),
    ]
    for x in inputs:
        for bias in (None, torch.randn(32).to(dtype)):
            close(F.linear(x, weight, bias), weight, x, bias)
    assert len(native) == 2 * len(inputs)


@pytest.mark.parametrize("name", NATIVE)
def test_native_takes_weights_in_any_layout(native, name):
    recipe, dtype = NATIVE[name]
    whole, x = weight_of(recipe, 64, 96, dtype=dtype), torch.randn(5, 96).to(dtype)
    parts = [whole[::2], whole[16:48], whole[:, 16:64], whole.chunk(2)[1], whole.clone().view(2, 32, 96)[1]]
    stored = Float8Tensor(whole.qdata.view(torch.uint8), whole.scale, whole.input_scale, recipe, dtype)
    parts += [torch.cat([whole[:16], whole[48:]]), stored]
    parts += [whole.t()] if recipe.granularity == "tensor" else []
    for part in parts:
        close(F.linear(x[:, : part.shape[1]], part), part, x[:, : part.shape[1]])
    assert len(native) == len(parts)


def test_native_adds_no_empty_products(native):
    weight, bias = weight_of(Recipe(), 32, 48), torch.randn(32).bfloat16()
    assert F.linear(torch.zeros(2, 0, 48).bfloat16(), weight, bias).shape == (2, 0, 32)
    assert native == []


def test_accumulation_is_that_of_the_recipe_where_results_are_large(native):
    for fast, rows in itertools.product((False, True), (4095, 4096)):
        F.linear(torch.ones(rows, 48).bfloat16(), weight_of(replace(Recipe(), fast_accum=fast), 32, 48))
    assert [call["use_fast_accum"] for call in native] == [False, False, False, True]


def test_explicit_native_runs_native_or_raises(native):
    recipe = replace(Recipe(), backend="native")
    F.linear(torch.ones(2, 48).bfloat16(), weight_of(recipe, 32, 48))
    assert len(native) == 1
    layer = nn.Linear(40, 32)
    layer.weight = nn.Parameter(weight_of(recipe, 32, 40))
    refuses(
        lambda: F.linear(torch.ones(2, 40).bfloat16(), layer.weight), "'native' cannot", "[32, 40]", error=ValueError
    )
    assert [(row.runs, row.why) for row in report(layer)] == [("refused", "[32, 40] is not in multiples of 16")]
    F.linear(torch.ones(2, 40).bfloat16(), weight_of(Recipe(), 32, 40))  # auto
    assert len(native) == 1


def test_native_gradients(native):
    weight = weight_of(Recipe(), 32, 48)
    x, bias = torch.randn(3, 48).bfloat16().requires_grad_(), torch.randn(32).bfloat16().requires_grad_()
    grads = [torch.autograd.grad(F.linear(x, each, bias).sum(), (x, bias)) for each in (weight, emulated(weight))]
    assert len(native) == 1
    for mine, its in zip(*grads, strict=True):
        assert torch.equal(mine, its)


def test_what_is_not_finite_in_native_activations(native):
    x = torch.randn(4, 48).bfloat16()
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    token, one = F.linear(x, weight_of(Recipe(), 32, 48)), F.linear(x, weight_of(TENSOR, 32, 48))
    static = F.linear(x, weight_of(RECIPES["fp8-static"], 32, 48))
    assert token.isnan().all(-1).tolist() == token.isnan().any(-1).tolist() == [False, True, True, False]
    assert one.isnan().all()
    assert static.isnan().all(-1).tolist() == static.isnan().any(-1).tolist() == [False, True, False, False]
    assert len(native) == 3


def test_the_stand_in_is_torchs_own_where_the_cpu_has_one():
    a, b = torch.randn(5, 32).to(TORCH["e4m3"]), torch.randn(16, 32).to(TORCH["e4m3"]).t()
    scales = torch.tensor(0.5), torch.tensor(0.25)
    assert torch.equal(scaled_mm(a, b, *scales, out_dtype=BF16), torch._scaled_mm(a, b, *scales, out_dtype=BF16))


@pytest.mark.parametrize("name", [name for name in NATIVE if not name.startswith("row x")])
def test_torch_takes_it_for_cuda(hopper, name):
    """torch's own checks of fake tensors accept the operands; "row x ..." copies a scale, which needs CUDA."""
    recipe, dtype = NATIVE[name]
    with FakeTensorMode():
        codes = torch.empty(32, 48, dtype=TORCH[recipe.format], device="cuda")
        scale = torch.empty((32, 1) if recipe.granularity == "row" else (), device="cuda")
        input_scale = torch.empty((), device="cuda") if recipe.activation == "static" else None
        weight = Float8Tensor(codes, scale, input_scale, replace(recipe, backend="native"), dtype)
        for m in (1, 7):
            x, bias = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((2, m, 48), (32,)))
            for y in (F.linear(x, weight), F.linear(x, weight, bias)):
                assert (y.shape, y.dtype, y.device.type) == ((2, m, 32), dtype, "cuda")
