"""The device's own float8 matmul and our kernels against the emulated backend. Needs a GPU with a float8 matmul."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from quant.matmul import backend_of, linear, quantize_activation
from quant.prepared import product
from quant.quantize import snr
from quant.recipe import RECIPES
from quant.scaling import scale_of, to_codes
from quant.tensor import Float8Tensor
from quant.training import fake_quantize_, quantize_trained_
from skips import SKIPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason=SKIPS["float8 gpu"]
    ),
]
NATIVE = ("fp8", "fp8-tensor", "fp8-static")
SHAPES = [(666, 2432, 2432), (8192, 7296, 2432), (333, 9728, 2432), (1, 256, 9728), (17, 64, 64)]


def operands(shape, dtype=torch.bfloat16):
    rows, out, width = shape
    x = torch.randn(rows, width, device="cuda", dtype=dtype)
    x[:, ::100] *= 10
    return x, 0.02 * torch.randn(out, width, device="cuda", dtype=dtype), torch.randn(out, device="cuda", dtype=dtype)


def quantized(weight, name, **settings):
    static = torch.tensor(0.05) if name == "fp8-static" else None
    return Float8Tensor.quantize(weight, recipe=replace(RECIPES[name], **settings), input_scale=static)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_native_is_the_emulated_product(name, shape):
    x, weight, bias = operands(shape)
    exact, fast, emulated = (
        quantized(weight, name, **settings)
        for settings in (
            {"backend": "native", "fast_accum": False},
            {"backend": "native", "fast_accum": True},
            {"backend": "emulated"},
        )
    )
    assert backend_of(exact.recipe, x.device, x.dtype, weight.shape)[0] == "native"
    wanted = F.linear(x, emulated, bias)
    assert snr(wanted, F.linear(x, exact, bias)) >= 55
    assert snr(wanted, F.linear(x, fast, bias)) >= 45


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_the_quick_way_gives_the_same_bits(name, shape):
    x, weight, bias = operands(shape)
    memory = torch.cat([x.new_zeros(1), x.flatten()])
    float8 = quantized(weight, name)
    wanted = linear(x, float8.qdata, float8.scale, float8.input_scale, bias, float8.recipe, float8.dtype)
    for _ in range(2):  # Triton compiles in the first turn
        for rows in (x, memory[1:].view_as(x)):  # at an address that is no multiple of 16 too
            assert torch.equal(product(rows, float8, bias), wanted)
            assert torch.equal(product(rows[None], float8, bias)[0], wanted)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_native_gradients_in_e5m2_are_the_emulated_ones(name, shape):
    x, weight, _ = operands(shape)
    grad = 1e-3 * torch.randn(shape[0], shape[1], device="cuda", dtype=torch.bfloat16)
    found = []
    for settings in ({"gradient": "e5m2"}, {"gradient": "e5m2", "backend": "emulated"}, {}):
        leaf = x.clone().requires_grad_()
        F.linear(leaf, quantized(weight, name, **settings)).backward(grad)
        found.append(leaf.grad)
    native, emulated, full = found
    assert snr(emulated, native) >= 40
    assert 20 <= snr(full, native) <= 35, "two bits of mantissa"


@pytest.mark.parametrize("name", NATIVE)
def test_the_forward_of_a_training_is_the_native_product(name):
    x, weight, bias = operands(SHAPES[0])
    model = torch.nn.Sequential(torch.nn.Linear(*reversed(weight.shape))).to(x)
    model[0].weight.data, model[0].bias.data = weight.clone(), bias.clone()
    fake_quantize_(model, name, input_scales={"0": 0.05} if name == "fp8-static" else None)
    trained = model(x).detach()
    quantize_trained_(model)
    assert backend_of(model[0].weight.recipe, x.device, x.dtype, weight.shape)[0] == "native"
    assert snr(trained, model(x).detach()) >= 45


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [300, 2432, 9728])
@pytest.mark.parametrize("activation", ["token", "tensor", "static"])
def test_kernels_round_bit_for_bit(activation, width, dtype):
    x = operands((70, 16, width), dtype)[0]
    x[1] = 0
    x[2] *= 1e-30
    x[5] *= 1e30 if dtype != torch.float16 else 1
    x[4, ::2] = torch.linspace(1, 2, width // 2, device="cuda", dtype=dtype)  # ties among them
    recipe = {"token": RECIPES["fp8"], "tensor": RECIPES["fp8-tensor"], "static": RECIPES["fp8-static"]}[activation]
    static = torch.tensor(0.05, device="cuda")
    codes, scale = quantize_activation(x, recipe, static, as_bytes=False)
    amax = x.abs().amax(1, keepdim=True) if activation == "token" else x.abs().amax()
    wanted = static if activation == "static" else scale_of(amax, "e4m3")
    assert torch.equal(scale, wanted)
    assert torch.equal(codes.view(torch.uint8), to_codes(x, wanted, "e4m3").view(torch.uint8))


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_finite(name):
    x, weight, _ = operands((32, 64, 64))
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    y = F.linear(x, quantized(weight, name, backend="native"))
    assert y[3].isnan().all()
    assert y[4].isfinite().all() if name == "fp8-static" else y[4].isnan().all()


def gelu_linear(x, float8, bias):
    return F.linear(F.gelu(x), float8, bias)


# Warnings of torch's compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", NATIVE)
def test_compiled_is_eager(name):
    for width in (2432, 9728):
        x, weight, bias = operands((666, 256, width))
        float8 = quantized(weight, name)
        run = torch.compile(partial(gelu_linear, float8=float8, bias=bias), fullgraph=True, dynamic=False)
        assert snr(gelu_linear(x, float8, bias), run(x)) > 35
