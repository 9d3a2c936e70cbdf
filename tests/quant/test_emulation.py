"""Products on 16-bit matrix units: decoding, rounding and sums against the codec and a float64 formula.

Triton's kernels run interpreted where there is no GPU, at toy size. The tests marked `gpu` see real sizes.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd

from float8_law import decoded
from half_units import pretend_half
from quant import emulation, matmul
from quant.codec import decode
from quant.formats import DTYPES, LARGEST
from quant.product import Product, Tile
from quant.quantize import quantize_, report
from quant.recipe import RECIPES, Recipe
from quant.scaling import from_codes, scale_of, to_codes, to_values, values_of
from quant.tensor import Float8Tensor
from skips import SKIPS
from triton_device import DEVICE, HAS_TRITON, quiet

if not HAS_TRITON:
    pytest.skip(SKIPS["triton"], allow_module_level=True)

from quant import emulation_kernels, kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = ("e4m3", "e5m2")
TILE = Tile(16, 32, 16, 2, 4)


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def same(found, wanted):
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_every_code_is_decoded_as_the_codec_does(format, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    found = emulation_kernels.widen(codes.to(DEVICE), None, format, dtype).cpu()
    wanted = decode(codes, format, dtype)
    same(found, wanted)
    numbers = ~wanted.isnan()
    assert torch.equal(found.signbit()[numbers], wanted.signbit()[numbers])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_weight_is_dequantized_in_one_pass_bit_for_bit(format, per, dtype):
    codes = torch.arange(256, dtype=torch.uint8).roll(77).view(4, 64)[:, :51].contiguous().to(DEVICE)
    scale = torch.tensor(0.0123, device=DEVICE) if per == "tensor" else torch.rand(4, 1, device=DEVICE) * 0.01
    same(emulation_kernels.widen(codes, scale, format, dtype), values_of(codes, scale, format, dtype))


def hard(format):
    """Values at, between and beyond the codes, of both signs, and what is not finite."""
    numbers = decode(torch.arange(128, dtype=torch.uint8), format).double()
    numbers = numbers[numbers.isfinite()]
    between = (numbers[1:] + numbers[:-1]) / 2
    near = [between * (1 + sign * 2.0**-20) for sign in (-1, 1)]
    some = torch.cat([numbers, between, *near, torch.tensor([1e9, 3e-9, float("inf"), float("nan")]).double()]).float()
    return torch.cat([some, -some])


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_those_of_the_codes(format):
    x, one = hard(format), torch.ones(())
    same(to_values(x, one, format), from_codes(to_codes(x, one, format), format, FP16))
    rows = torch.randn(5, 333) * torch.tensor([[1e-30], [1.0], [0.0], [3e4], [1e30]])
    scale = scale_of(rows.abs().amax(1, keepdim=True), format)
    same(to_values(rows, scale, format), from_codes(to_codes(rows, scale, format), format, FP16))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [40, 5000])
def test_kernels_round_to_the_same_values(format, width):
    rows = torch.randn(3, width, device=DEVICE)
    rows[0, :40] = torch.linspace(1, 2, 40)
    rows[2, 7] = float("nan")
    found, scale = kernels.quantize_rows(rows, format, FP16)
    same(found, to_values(rows, scale, format))
    same(scale, scale_of(rows.abs().amax(1, keepdim=True), format))
    x, one = hard(format).to(DEVICE), torch.ones((), device=DEVICE)
    same(kernels.quantize_with(x, one, format, FP16), to_values(x, one, format))


def drawn(rows, outs, width, *, recipe=RECIPES["fp8"], dtype=FP32, bias=True, device=DEVICE):
    """Operands of a product, and its float64 formula."""
    x = torch.randn(rows, width, device=device).to(dtype)
    x[:, ::10] *= 10
    weight = Float8Tensor.quantize(0.02 * torch.randn(outs, width, device=device).to(dtype), recipe=recipe)
    b = torch.randn(outs, device=device).to(dtype) if bias else None
    if recipe.activation == "none":
        values, x_scale, w = x, None, weight.dequantize().double()
        a = x.double()
    else:
        values, x_scale = matmul.round_activation(x, recipe, torch.tensor(0.03, device=device))
        a, w = values.double() * x_scale.double(), decoded(weight.qdata.cpu(), recipe.format) * weight.scale.cpu()
    wanted = a @ w.to(device).T
    return Product(values, x_scale, weight.qdata, weight.scale, b, recipe.format), wanted + (0 if b is None else b)


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


CASES = {
    "rows": RECIPES["fp8"],
    "tensor": RECIPES["fp8-tensor"],
    "one input scale, scales per row": Recipe(activation="static"),
    "e5m2 weight": Recipe(format="e5m2"),
    "e5m2 both": Recipe(format="e5m2", activation_format="e5m2"),
}


@pytest.mark.parametrize(
    ("name", "decodes"), [*((name, True) for name in CASES), ("rows", False), ("e5m2 both", False)]
)
def test_sums_are_the_formula_up_to_their_rounding(name, decodes):
    for rows, outs, width in ((19, 33, 32), (16, 32, 25)):
        product, wanted = drawn(rows, outs, width, recipe=CASES[name], bias=rows == 19)
        out = torch.full((rows, outs), 7.0, device=DEVICE)
        weight = None if decodes else emulation_kernels.widen(product.codes, None, product.format, FP16)
        emulation_kernels.multiply(product, out, TILE, weight=weight)
        assert error(out, wanted) <= 3e-7


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", ["fp8-weight-only", "fp8-e5m2"])
def test_weight_only_is_the_product_with_the_dequantized_weight(name, dtype):
    product, wanted = drawn(19, 33, 41, recipe=RECIPES[name], dtype=dtype)
    out = torch.empty(19, 33, device=DEVICE)
    emulation_kernels.multiply(product, out, TILE)
    assert error(out, wanted) <= 3e-7


def test_rows_of_the_result_are_written_where_they_lie():
    product, wanted = drawn(5, 33, 16)
    whole = torch.zeros(9, 40, device=DEVICE)
    emulation_kernels.multiply(product, whole[2:7, :33], TILE)
    assert error(whole[2:7, :33], wanted) <= 3e-7
    assert not whole[:2].any() and not whole[7:].any() and not whole[:, 33:].any()


def test_nan_and_the_scale_of_a_row_stay_in_their_row():
    product, wanted = drawn(19, 33, 16)
    product.x[3, 5] = float("nan")
    out = torch.empty(19, 33, device=DEVICE)
    emulation_kernels.multiply(product, out, TILE)
    assert out[3].isnan().all()
    assert error(torch.cat([out[:3], out[4:]]), torch.cat([wanted[:3], wanted[4:]])) <= 3e-7


# Which way is taken, on a CPU that is treated as a GPU.


@pytest.fixture
def half(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip(SKIPS["stand-in"])
    pretend_half(monkeypatch)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("registers 128x128", "fp8"),
        ("registers 256x128", "fp8-weight-only"),
        ("widened", "fp8-static"),
        ("library", "fp8-tensor"),
        ("library", "fp8-weight-only"),
    ],
)
def test_linear_takes_the_way_of_the_rule(half, monkeypatch, name, way):
    scale = torch.tensor(0.03) if name == "fp8-static" else None
    weight = Float8Tensor.quantize(0.02 * torch.randn(24, 40).bfloat16(), recipe=RECIPES[name], input_scale=scale)
    x, bias = torch.randn(2, 3, 40).bfloat16(), torch.randn(24).bfloat16()
    with monkeypatch.context() as plain:
        plain.setattr(matmul, "multiplies_by_half", lambda *args: False)
        wanted = F.linear(x, weight, bias)
    taken, ways = [], emulation.ways_for

    def spied(product):
        return {
            key: lambda *args, one=one, key=key: (taken.append(key), one(*args)) for key, one in ways(product).items()
        }

    monkeypatch.setattr(emulation, "ways_for", spied)
    monkeypatch.setattr(emulation, "rule", lambda product: way)
    torch.testing.assert_close(F.linear(x, weight, bias), wanted, rtol=2**-7, atol=1e-3)
    assert taken == [way]


@pytest.mark.parametrize("name", ["fp8", "fp8-weight-only"])
def test_a_compiler_sees_one_operation(half, monkeypatch, name):
    monkeypatch.setattr(emulation, "HAS_TRITON", False)
    weight = Float8Tensor.quantize(0.02 * torch.randn(24, 40).bfloat16(), recipe=RECIPES[name])
    x, bias = torch.randn(3, 40).bfloat16(), torch.randn(24).bfloat16()
    seen = []

    def spied(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compile = torch.compile(
        lambda x: F.linear(x, weight, bias), fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=spied)
    )
    with torch.no_grad():
        assert torch.equal(compile(x), F.linear(x, weight, bias))
    torch._dynamo.reset()
    assert len([name for name in seen if "multiply_by_half" in name]) == 1
    assert not [name for name in seen if "float8" in name or ".mm" in name]


def test_the_library_without_triton(half, monkeypatch):
    product, wanted = drawn(7, 24, 40, device="cpu")
    monkeypatch.setattr(emulation, "HAS_TRITON", False)
    assert list(emulation.ways_for(product)) == ["library"] == [emulation.rule(product)]
    out = torch.empty(7, 24)
    emulation.multiply(product, out)
    assert error(out, wanted) <= 3e-7


@pytest.mark.parametrize(("dtype", "sums"), [(FP32, [1600, 1536]), (BF16, [3136]), (FP16, [3136])])
def test_long_sums_are_cut_where_the_result_shows_it(dtype, sums):
    """A stand-in multiplies exactly, and tells how long its sums are."""
    product, wanted = drawn(3, 5, 3136, device="cpu")
    lengths = []

    def way(product, out):
        lengths.append(product.x.shape[1])
        assert product.codes.is_contiguous()
        exact = product.x.double() @ from_codes(product.codes, "e4m3", torch.float64).t()
        y = exact * product.scale.double().t() * product.x_scale
        out.copy_(y if product.bias is None else y + product.bias)

    out = torch.empty(4, 9, dtype=dtype)[1:, 2:7]
    emulation.by_parts(way, product, out)
    assert lengths == sums
    assert error(out, wanted) <= (3e-7 if dtype == FP32 else 2e-3)


def test_the_plain_path_goes_by_the_number_of_rows():
    few, _ = drawn(2047, 5, 16, device="cpu")
    many, _ = drawn(2048, 5, 16, device="cpu")
    weight_only, _ = drawn(2048, 5, 16, recipe=RECIPES["fp8-weight-only"], dtype=BF16, device="cpu")
    assert [emulation.rule(one) for one in (few, many, weight_only)] == ["library", "widened", "library"]
    assert all(emulation.rule(one) in emulation.ways_for(one) for one in (few, many, weight_only))


def test_the_quickest_way_is_measured_once_and_others_say_why_not(monkeypatch):
    product, _ = drawn(5, 24, 40, device="cpu")
    out, ran = torch.empty(5, 24), []

    def failing(product, out):
        raise RuntimeError("no such unit\nhere")

    ways = {"slow": lambda *args: ran.append("slow"), "broken": failing, "quick": lambda *args: ran.append("quick")}
    times = {"slow": 2.0, "quick": 1.0}
    monkeypatch.setattr(emulation, "_CHOICES", {})
    monkeypatch.setattr(emulation, "ways_for", lambda product: ways)
    monkeypatch.setattr(emulation, "milliseconds", lambda run: (run(), times[ran[-1]])[1])
    emulation.multiply(product, out, measured=True)
    emulation.multiply(product, out, measured=True)
    assert ran == ["slow", "quick", "quick", "quick"]
    ((key, choice),) = emulation.choices().items()
    assert key[:4] == (8, 24, 40, "emulated")
    assert (choice.name, choice.milliseconds, choice.refused) == ("quick", times, {"broken": "no such unit"})


def test_the_report_says_in_which_dtype_products_are(monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)).bfloat16()
    quantize_(net[:1], "fp8", "0")
    assert [layer.arithmetic for layer in report(net)] == ["float32", "bfloat16"]
    cuda = torch.device("cuda")
    arithmetic = matmul.arithmetic_of
    assert arithmetic("emulated", cuda, BF16) == arithmetic("emulated", cuda, FP32) == "float16"
    assert arithmetic("emulated", cuda, torch.float64) == "float64"
    assert arithmetic("dequantized", cuda, BF16) == "bfloat16"
    assert arithmetic("native", cuda, BF16) == "float8"
    assert "float32" in repr(report(net)).splitlines()[1]


# On a GPU, at the sizes of SD3.5.

SIZES = [(666, 2432, 2432), (2048, 7296, 2432), (333, 2432, 9728), (1, 256, 9728), (17, 72, 40)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason=SKIPS["gpu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*CASES, "weight-only"])
def test_every_way_on_a_gpu(size, name):
    recipe = RECIPES["fp8-weight-only"] if name == "weight-only" else CASES[name]
    product, wanted = drawn(*size, recipe=recipe, dtype=BF16 if name == "weight-only" else FP32)
    ways = emulation.ways_for(product)
    assert {"registers 128x128", "library"} < set(ways)
    for way, run in ways.items():
        dtype = BF16 if name == "weight-only" else FP32
        out = torch.empty(size[:2], device="cuda", dtype=dtype)
        emulation.by_parts(run, product, out)
        assert error(out, wanted) <= (2e-3 if dtype == BF16 else 3e-7), way


def of_other_codes(x, weight, scale):
    """How far an output may be if x is off by the rounding to bfloat16, for each output.

    Compiled code keeps GELU in float32 until it has the codes: a value and the largest of its row, by which its scale
    is given, are each up to 2^-9 larger or smaller than what the eager model rounds. Where a tie lies between, a code
    is another one, an eighth of its value away: 2 % of them are.
    """
    if weight.recipe.activation == "none":
        return 0.0
    if scale is None:
        scale = scale_of(x.float().abs().amax(-1, keepdim=True), "e4m3")
    low, high = (to_values(x.float() * near, scale, "e4m3") for near in (1 - 2**-8, 1 + 2**-8))
    return ((high - low).abs().float() * scale) @ weight.dequantize().float().abs().t()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason=SKIPS["gpu"])
# Warnings of torch's compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["fp8", "fp8-static", "fp8-weight-only"])
def test_linear_on_a_gpu_is_that_of_a_cpu(name):
    recipe = replace(RECIPES[name], backend="emulated")
    scale = torch.tensor(0.03) if name == "fp8-static" else None
    weight = Float8Tensor.quantize(0.02 * torch.randn(256, 320).bfloat16(), recipe=recipe, input_scale=scale)
    x, bias = torch.randn(3, 50, 320).bfloat16(), torch.randn(256).bfloat16()
    wanted, cuda = F.linear(x, weight, bias), weight.cuda()
    found = F.linear(x.cuda(), cuda, bias.cuda())
    torch.testing.assert_close(found.cpu(), wanted, rtol=2**-7, atol=1e-3)
    run = torch.compile(lambda x: F.linear(F.gelu(x), cuda, bias.cuda()), fullgraph=True, dynamic=False)
    wanted = F.linear(F.gelu(x), weight, bias)
    difference = (run(x.cuda()).cpu().float() - wanted.float()).abs() - 2**-6 * wanted.float().abs()
    assert (difference > 1e-2).float().mean() < 0.005
    assert (difference <= 1e-2 + of_other_codes(F.gelu(x), weight, scale)).all()


def test_largest_tells_the_formats_apart():
    """The kernels know a format by its largest number."""
    assert LARGEST == {"e4m3": 448.0, "e5m2": 57344.0}
    assert set(DTYPES) == set(FORMATS)


@pytest.mark.parametrize(
    ("capability", "most"), [((8, 0), 99), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)]
)
def test_tiles_fit_the_shared_memory_of_a_card(capability, most, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    large = emulation._has_large_tiles(torch.device("cuda"))
    for way in emulation._by_kernels(dequantizes=False, large=large).values():
        tile = way.keywords["tile"]
        assert 2 * (tile.rows + tile.outs) * tile.summands * tile.stages <= 1024 * most
