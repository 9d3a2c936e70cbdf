"""quantize_, dequantize_ and report; float8 weights in T5, CLIP and MMDiT."""

import copy
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from encoders.clip import CLIPConfig, CLIPText
from encoders.t5 import T5Config, T5Encoder
from float8_law import codes_by_law, decoded, scale_by_law
from mmdit import Pipeline
from quant.quantize import KEPT, dequantize_, is_quantized, linears_of, quantize_, report, snr
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor
from quant.training import FakeQuantizedLinear, fake_quantize_, quantize_trained_
from refusals import refuses


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16, bias=False)
        self.norm1, self.adaLN_modulation = nn.LayerNorm(16), nn.Sequential(nn.SiLU(), nn.Linear(16, 32))

    def forward(self, x):
        return self.proj(self.qkv(self.norm1(x))[..., 32:]) + self.adaLN_modulation(x)[..., :16]


def model():
    net = nn.ModuleDict({"x_embedder": nn.Linear(8, 16), "blocks": nn.ModuleList([Block(), Block()])})
    net["final_layer"] = nn.Linear(16, 4)
    return net


DONE = ["blocks.0.qkv", "blocks.0.proj", "blocks.1.qkv", "blocks.1.proj"]
STATIC = {name: torch.tensor(0.02) for name in DONE}


def float8(net):
    return [name for name, linear in linears_of(net) if isinstance(linear.weight, Float8Tensor)]


def state(net):
    return {key: (value.data_ptr(), type(value), value.clone()) for key, value in net.state_dict().items()}


def unchanged(net, before):
    now = state(net)
    return now.keys() == before.keys() and all(
        now[key][:2] == before[key][:2] and torch.equal(now[key][2], before[key][2]) for key in now
    )


@pytest.mark.parametrize("name", RECIPES)
def test_one_word_quantizes_what_is_large(name):
    net, recipe = model(), RECIPES[name]
    original = copy.deepcopy(net)
    quantize_(net, name, input_scales=STATIC if recipe.activation == "static" else None)
    assert float8(net) == DONE
    for layer in DONE:
        weight, plain = net.get_submodule(layer).weight, original.get_submodule(layer).weight
        assert isinstance(weight, nn.Parameter)
        assert weight.recipe == recipe
        assert torch.equal(weight.scale, scale_by_law(plain.detach(), recipe.format, recipe.granularity))
        assert torch.equal(weight.qdata.view(torch.uint8), codes_by_law(plain.detach(), weight.scale, recipe.format))
        assert (weight.input_scale is not None) == (recipe.activation == "static")
    for key, value in original.state_dict().items():
        if key.removesuffix(".weight") not in DONE:
            assert torch.equal(net.state_dict()[key], value)
    x = torch.randn(3, 16)
    assert (net["blocks"][0](x) - original["blocks"][0](x)).abs().max() < 0.3
    assert is_quantized(net)
    assert not is_quantized(original)


@pytest.mark.parametrize(
    ("select", "done"),
    [
        ("*.qkv", ["blocks.0.qkv", "blocks.1.qkv"]),
        (["blocks.1.*", "*.1.proj"], ["blocks.1.qkv", "blocks.1.proj", "blocks.1.adaLN_modulation.1"]),
        (["final_layer", "x_embedder"], ["x_embedder", "final_layer"]),
        ("blocks.?.proj", ["blocks.0.proj", "blocks.1.proj"]),
        ([], []),
        (None, DONE),
    ],
)
def test_select_takes_globs(select, done):
    net = model()
    found = quantize_(net, "fp8-weight-only", select)
    assert float8(net) == [layer.name for layer in found if layer.recipe] == done


def test_a_linear_by_itself():
    linear = nn.Linear(16, 8)
    quantize_(linear)
    assert isinstance(linear.weight, Float8Tensor)


def test_what_is_refused_changes_nothing():
    net, bad = model(), model()
    with torch.no_grad():
        bad["blocks"][1].proj.weight[2, 3:5] = math.inf
    whole = model()
    whole["blocks"][1].proj.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    some = model()
    quantize_(some, select="blocks.1.proj")
    tied = model()
    tied["blocks"][1].proj.weight = tied["blocks"][0].proj.weight
    computed = model()
    nn.utils.parametrizations.weight_norm(computed["blocks"][1].proj)
    missing = {key: value for key, value in STATIC.items() if key != "blocks.1.proj"}
    for each, arguments, *said in (
        (
            net,
            ("fp8", "blocks.*.qvk"),
            "'blocks.*.qvk' matches none of 8 Linears; nearest are blocks.1.qkv, blocks.0.qkv",
        ),
        (net, ("fp8", ["*.qkv", "nothing"]), "'nothing' matches none"),
        (net, ("fp9",), "unknown recipe 'fp9'", "fp8-weight-only"),
        (bad, ("fp8",), "blocks.1.proj.weight: 2 of 256 values are not finite"),
        (whole, ("fp8",), "blocks.1.proj.weight", "torch.int8"),
        (some, ("fp8",), "'blocks.1.proj' is quantized already"),
        (tied, ("fp8",), "blocks.0.proj.weight and blocks.1.proj.weight are one parameter"),
        (tied, ("fp8", "blocks.0.*"), "blocks.1.proj.weight and blocks.0.proj.weight are one parameter"),
        (computed, ("fp8",), "blocks.1.proj.weight is no parameter"),
        (net, ("fp8-static",), "4 have none, first 'blocks.0.qkv'", "mmdit.calibrate"),
        (net, ("fp8-static", None, missing), "1 have none, first 'blocks.1.proj'"),
        (
            net,
            ("fp8-static", None, STATIC | {"blocks.9.qkv": torch.ones(())}),
            "1 names of no Linear",
            "'blocks.9.qkv'",
        ),
        (net, ("fp8", None, STATIC), "for static activations; the recipe has 'token'"),
        (net, ("fp8-static", None, STATIC | {"blocks.1.proj": torch.zeros(())}), "blocks.1.proj", "above zero"),
        (net, ("fp8-static", None, STATIC | {"blocks.1.proj": torch.tensor(1e-50).double()}), "blocks.1.proj", "[0.0]"),
        (net, ("fp8-static", None, STATIC | {"blocks.1.proj": torch.ones(16)}), "blocks.1.proj", "one positive number"),
    ):
        recipe, select, scales = (*arguments, None, None)[:3]
        before = state(each)
        refuses(lambda: quantize_(each, recipe, select, input_scales=scales), *said, error=ValueError)  # noqa: B023
        assert unchanged(each, before)


def test_input_scales_of_layers_that_are_not_chosen_are_left():
    net = model()
    quantize_(
        net, "fp8-static", "*.qkv", input_scales=STATIC | {"blocks.0.qkv": torch.tensor([0.5], dtype=torch.float64)}
    )
    scale = net["blocks"][0].qkv.weight.input_scale
    assert (scale.dtype, scale.shape, scale.item()) == (torch.float32, (), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dequantize_gives_plain_weights_of_these_values(dtype):
    net = model().to(dtype)
    quantize_(net)
    weights = {name: linear.weight for name, linear in linears_of(net)}
    dequantize_(net, "*.qkv")
    assert float8(net) == ["blocks.0.proj", "blocks.1.proj"]
    dequantize_(net)
    assert not is_quantized(net)
    for name in DONE:
        weight, recipe = net.get_submodule(name).weight, weights[name].recipe
        exact = decoded(weights[name].qdata, recipe.format) * weights[name].scale.double()
        assert type(weight) is nn.Parameter
        assert weight.dtype == dtype
        assert torch.equal(weight, exact.to(torch.promote_types(dtype, torch.float32)).to(dtype))
    refuses(lambda: dequantize_(net, "nothing"), "'nothing' matches none", error=ValueError)


def test_a_shared_float8_weight_is_not_dequantized_twice():
    net = model()
    quantize_(net)
    net["blocks"][1].proj.weight = net["blocks"][0].proj.weight
    before = state(net)
    for select in (None, "blocks.1.*"):
        refuses(lambda: dequantize_(net, select), "blocks.0.proj.weight", "blocks.1.proj.weight", error=ValueError)  # noqa: B023
        assert unchanged(net, before)
    dequantize_(net, "*.qkv")
    assert float8(net) == ["blocks.0.proj", "blocks.1.proj"]


# The report.


def test_the_report_says_what_was_done():
    net = model().bfloat16()
    original = copy.deepcopy(net)
    returned = quantize_(net, "fp8", ["*.qkv", "final_layer"])
    for found in (returned, report(net)):
        rows = {layer.name: layer for layer in found}
        assert list(rows) == [name for name, _ in linears_of(net)]
        qkv, proj, embedder = rows["blocks.1.qkv"], rows["blocks.1.proj"], rows["x_embedder"]
        assert (qkv.shape, qkv.recipe, qkv.runs, qkv.why) == (
            (48, 16),
            RECIPES["fp8"],
            "emulated",
            "no float8 matmul on cpu",
        )
        assert (proj.recipe, proj.snr, proj.runs, proj.why) == (None, None, "bfloat16", "not selected")
        assert (embedder.recipe, embedder.runs, embedder.why) == (None, "bfloat16", "kept: *embed*")
        assert (qkv.bytes, proj.bytes) == (48 * 16 + 48 * 4, 2 * 16 * 16)
        plain = original["blocks"][1].qkv.weight.detach().double()
        weight = net["blocks"][1].qkv.weight.dequantize(torch.float64)
        expected = 10 * torch.log10(plain.square().sum() / (plain - weight).square().sum())
        assert qkv.snr == pytest.approx(float(expected), abs=1e-3)
    lines = str(returned).splitlines()
    assert str(returned) == repr(returned)
    assert len(lines) == 1 + 8 + 1
    assert lines[0].split() == [
        "layer",
        "shape",
        "format",
        "scale",
        "activation",
        "SNR",
        "dB",
        "runs",
        "in",
        "why",
        "MB",
    ]
    assert f"blocks.1.qkv                 48x16  e4m3    row    token       {qkv.snr:.1f}    emulated" in lines[5]
    assert lines[-1].startswith("3 of 8 Linears in float8: 0.0 of 0.0 MB")
    assert "kept: *embed*" in lines[1]


def test_noise_is_known_as_long_as_the_values_are_those():
    net = model()
    quantize_(net)
    known = [layer.snr for layer in report(net)]
    assert all(28 < ratio < 35 for ratio in known if ratio is not None)
    for same in (copy.deepcopy(net), net.bfloat16(), net.to("cpu")):
        assert [layer.snr for layer in report(same)] == known
    fresh = model()
    fresh.load_state_dict(net.state_dict(), assign=True)
    assert [layer.snr for layer in report(fresh)] == known
    net["blocks"][0].qkv.weight.copy_(torch.ones(48, 16))
    assert [layer.name for layer in report(net) if layer.recipe and layer.snr is None] == ["blocks.0.qkv"]


def test_the_report_says_what_cannot_run():
    net = model()
    quantize_(net, replace(Recipe(), backend="native"), "*.qkv")
    weight = net["blocks"][0].proj.weight
    net["blocks"][0].proj.weight = nn.Parameter(Float8Tensor.quantize(weight, recipe=RECIPES["fp8-static"]))
    found = {layer.name: (layer.runs, layer.why) for layer in report(net) if layer.recipe}
    assert found["blocks.0.qkv"] == found["blocks.1.qkv"] == ("refused", "no float8 matmul on cpu")
    assert found["blocks.0.proj"] == ("refused", "no input scale")
    x = torch.randn(2, 16)
    refuses(lambda: net["blocks"][1].qkv(x), "no float8 matmul on cpu", error=ValueError)
    refuses(lambda: net["blocks"][0].proj(x), "input scales", error=ValueError)


def test_noise_of_nothing_and_of_everything():
    values = torch.tensor([3.0, 4.0])
    assert snr(values, values) == math.inf
    assert snr(values, torch.zeros(2)) == pytest.approx(0)
    assert snr(values, values * 1.1) == pytest.approx(20, abs=1e-4)
    assert snr(torch.zeros(2), torch.zeros(2)) == math.inf


# In models. The error of float8 depends on the model; outputs must be finite, have the model's dtype, and be as near to
# the plain model in float64 as 8 bits allow.

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WORDS = [name for name in RECIPES if name != "fp8-static"]


def quantized(net, name, dtype):
    recipe = RECIPES[name]
    scales = {each: torch.tensor(0.05) for each, _ in linears_of(net)} if recipe.activation == "static" else None
    twin = copy.deepcopy(net).to(dtype)
    quantize_(twin, recipe, input_scales=scales)
    return twin


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    net = T5Encoder(T5Config(width=64, layers=2, heads=2, head_dim=32, mlp_dim=96, vocabulary=50))
    with torch.no_grad():
        net.encoder.block[1].layer[1].DenseReluDense.wi_1.weight.mul_(300)
        net.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(2000)  # its output then exceeds float16
    return net.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_t5(t5, name, dtype):
    """T5's residual stream is float32 where its weights are float16, so `wo` gets an input of another dtype."""
    ids, largest = torch.randint(0, 50, (2, 9)), []
    expected, net = t5(ids), quantized(t5, name, dtype)
    wo = net.encoder.block[1].layer[1].DenseReluDense
    wo.register_forward_hook(lambda module, args, output: largest.append(output.abs().max()))
    found = net(ids)
    assert {linear.weight.dtype for _, linear in linears_of(net)} == {dtype}
    assert found.dtype == dtype
    assert found.isfinite().all()
    if name != "fp8-static":
        assert largest[0] > 65504
        assert snr(expected, found) > (12 if "e5m2" in name else 18)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WORDS)
def test_clip(name, dtype):
    config = CLIPConfig(64, 2, 128, "gelu", heads=2, vocabulary=50, projection_dim=64)
    clip, ids = CLIPText(config).double().eval(), torch.randint(0, 50, (2, 77))
    expected, net = clip(ids), quantized(clip, name, dtype)
    assert len(float8(net)) == 12
    found = net(ids)
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert mine.isfinite().all()
        assert snr(its, mine) > (12 if "e5m2" in name else 20)


@pytest.fixture(scope="module")
def demo():
    """The embedded transformer and its inputs for a prompt; random inputs overflow float16, also without FP8."""
    pipe = Pipeline.demo()
    words = pipe.encode(["a large red circle above a blue star"])
    inputs = (torch.randn(1, 16, 8, 8), torch.tensor([900.0]), words.context[:, :90], words.pooled)
    return pipe.transformer.double().eval(), inputs


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WORDS)
def test_mmdit(demo, name, dtype):
    model, inputs = demo
    expected, net = model(*(each.double() for each in inputs)), quantized(model, name, dtype)
    assert len(float8(net)) > 20
    assert not any(word.strip("*") in layer for layer in float8(net) for word in KEPT)
    found = net(*(each.to(dtype) for each in inputs))
    assert found.dtype == dtype
    assert snr(expected, found) > (17 if "e5m2" in name else 20)


MISTAKES = {  # what somebody writes, and what the error must name
    "quant.quantize_(pipe)": ("Pipeline", ".transformer"),
    "quant.dequantize_(pipe)": ("Pipeline", ".transformer"),
    "quant.report(pipe)": ("Pipeline", ".transformer"),
    "quant.is_quantized(pipe)": ("Pipeline", ".transformer"),
    "quant.observe(pipe).__enter__()": ("Pipeline", ".transformer"),
    "quant.quantize_(net.state_dict())": ("nn.Module", "OrderedDict"),
    "quant.quantize_(net[0].weight)": ("nn.Module", "Parameter"),
    "quant.quantize_(nn.Linear)": ("nn.Module", "type"),
    "quant.quantize_(net, quant.Recipe)": ("recipe", "type", "fp8"),
    "quant.quantize_(net, True)": ("recipe", "bool", "fp8"),
    "quant.quantize_(net, torch.float8_e4m3fn)": ("recipe", "dtype", "fp8"),
    "quant.quantize_(net, select=lambda name: True)": ("select", "glob"),
    "quant.quantize_(net, select=[net[0]])": ("select", "glob"),
    "quant.quantize_(net, 'fp8-static', input_scales=[0.5])": ("input_scales", "list"),
    "quant.quantize_(net, 'fp8-static', input_scales={'0': 'large'})": ("0", "str"),
    "quant.pack(net)": ("state_dict()",),
    "quant.unpack(quant.pack(net.state_dict()))": ("two arguments",),
    "quant.unpack('model.safetensors')": ("str",),
    "quant.Float8Tensor.quantize([1.0])": ("list",),
    "quant.Float8Tensor.quantize(net)": ("Sequential",),
    "quant.Float8Tensor.quantize(torch.ones(2, 2), 'fp8')": ("fp8", "e4m3"),
    "quant.Float8Tensor.quantize(torch.ones(2, 2), recipe='fp9')": ("fp9", "fp8"),
    "quant.Float8Tensor.quantize(torch.ones(2, 2)).dequantize(torch.int32)": ("int32", "float16"),
    "quant.encode(torch.ones(2), 'fp8')": ("fp8", "e4m3"),
    "quant.decode(torch.ones(2).to(torch.float8_e4m3fn), 'e4m3')": ("float8_e4m3fn", "uint8"),
    "quant.Recipe('fp8')": ("fp8", "e4m3"),
    "quant.Recipe(fast_accum=1)": ("fast_accum", "True"),
}


def test_natural_mistakes_name_what_was_given_and_what_is_taken():
    """In a process of its own, without the checks of signatures that pytest has here."""
    code = f"""
import torch, quant
from torch import nn
from mmdit import Pipeline

pipe, net = Pipeline.demo(), nn.Sequential(nn.Linear(16, 16))
before = {{key: value.clone() for key, value in net.state_dict().items()}}
for mistake in {list(MISTAKES)!r}:
    try:
        eval(mistake)
        print("nothing was raised")
    except (TypeError, ValueError) as error:
        print(str(error).replace(chr(10), " "))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
"""
    lines = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert len(lines) == len(MISTAKES)
    for line, (mistake, words) in zip(lines, MISTAKES.items(), strict=True):
        assert all(word in line for word in words), (mistake, line)


class Twice(nn.Module):
    """One Linear under three names, of which one is that of a block around it."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(16, 16)
        self.block = nn.Sequential(self.first)

    def forward(self, x):
        return self.block(self.second(self.first(x)))


def test_a_linear_with_several_names_is_one_layer():
    net, x = Twice(), torch.randn(3, 16)
    with torch.no_grad():
        assert len(quantize_(net, "fp8-weight-only")) == 1
        wanted = net(x)
        dequantize_(net)
        torch.testing.assert_close(net(x), wanted)
        assert not is_quantized(net)
        fake_quantize_(net, "fp8")
        assert isinstance(net.first, FakeQuantizedLinear)
        assert net.first is net.second is net.block[0]
        quantize_trained_(net)
    assert isinstance(net.first.weight, Float8Tensor)
    assert net.first is net.second is net.block[0]
    net.third = nn.Linear(16, 16)
    net.third.weight = net.first.weight
    with pytest.raises(ValueError, match=r"first\.weight and third\.weight are one parameter"):
        dequantize_(net)
