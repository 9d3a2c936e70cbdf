"""Products by a GPU's own float8 matmul in little of the host's time; without such a GPU, a CPU plays it."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quant import matmul, operations, prepared
from quant.recipe import RECIPES
from quant.tensor import Float8Tensor
from skips import SKIPS

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.skipif(HAS_GPU and torch.cuda.get_device_capability() < (8, 9), reason=SKIPS["float8 gpu"])
BF16 = torch.bfloat16
NATIVE = ("fp8", "fp8-tensor", "fp8-static")
ROWS, WIDTH, OUTS = 2, 32, 48


@pytest.fixture
def gpu(monkeypatch):
    """The list of what the GPU's matmul was given; where there is no GPU, tensors say that they are on one."""
    given = []

    def scaled_mm(codes, weight, x_scale, scale, bias=None, **settings):
        given.append((codes, weight, x_scale, scale, bias, settings))
        y = (codes.double() @ weight.double()) * x_scale.double() * scale.double()
        return (y if bias is None else y + bias.double()).to(settings["out_dtype"])

    def native(recipe, device, dtype, shape):
        return "" if dtype == BF16 and recipe.backend != "emulated" else "not here"

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    if not HAS_GPU:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(matmul, "why_not_native", native)
        monkeypatch.setattr(matmul, "_capability", lambda device: (9, 0))
    return given


def operands(name="fp8", *, rows=(ROWS,), bias=True, dtype=BF16, **settings):
    x, weight = torch.randn(*rows, WIDTH).to(DEVICE, dtype), torch.randn(OUTS, WIDTH).to(DEVICE, dtype)
    static = torch.tensor(0.05) if name == "fp8-static" else None
    recipe = replace(RECIPES[name], **settings)
    float8 = Float8Tensor.quantize(weight, recipe=recipe, input_scale=static)
    return x, float8, torch.randn(OUTS).to(DEVICE, dtype) if bias else None


def by_linear(x, weight, bias):
    return matmul.linear(x, weight.qdata, weight.scale, weight.input_scale, bias, weight.recipe, weight.dtype)


def is_quick(x, weight, bias=None):
    return prepared.product(x, weight, bias) is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(ROWS,), (2, 1)], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_the_matmul_is_given_the_same_operands(name, rows, bias, gpu, monkeypatch):
    x, weight, bias = operands(name, rows=rows, bias=bias)
    wanted = by_linear(x, weight, bias)
    monkeypatch.setattr(operations, "linear", None)
    for _ in range(2):
        assert torch.equal(F.linear(x, weight, bias), wanted)
    first, *others = gpu
    for other in others:
        assert other[-1] == first[-1]
        for one, two in zip(first[:4], other[:4], strict=True):
            assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)
            assert torch.equal(one.float(), two.float())
        assert other[4] is bias


@pytest.mark.parametrize("name", NATIVE)
def test_inputs_with_gaps(name, gpu):
    joint, weight, bias = operands(name, rows=(2, 3))
    gaps = {
        "between samples": joint[:, 1:2],
        "between rows": joint[:, ::2],
        "between values": joint.transpose(0, 1).contiguous().transpose(0, 1),
        "of a matrix": joint[0, ::2],
        "columns first": joint[0].t().contiguous().t(),
    }
    for what, x in gaps.items():
        assert not x.is_contiguous(), what
        found = prepared.product(x, weight, bias)
        assert torch.equal(found, by_linear(x, weight, bias)), what
        assert found.is_contiguous()


def test_fast_sums_are_those_of_large_products(gpu, monkeypatch):
    monkeypatch.setattr(prepared, "SMALL", ROWS * OUTS)
    for fast in (True, False):
        x, weight, _ = operands(fast_accum=fast)
        F.linear(x, weight)
        F.linear(x[1:], weight)
    assert [settings["use_fast_accum"] for *_, settings in gpu] == [True, False, False, False]


PARTS = {
    "qdata": lambda weight, other: setattr(weight, "qdata", other.qdata),
    "scale": lambda weight, other: setattr(weight, "scale", other.scale),
    "all": lambda weight, other: setattr(weight, "data", other),
    "memory of qdata": lambda weight, other: setattr(weight.qdata, "data", other.qdata),
    "memory of the scale": lambda weight, other: setattr(weight.scale, "data", other.scale),
    "values of qdata": lambda weight, other: weight.qdata.view(torch.uint8).copy_(other.qdata.view(torch.uint8)),
    "values of the scale": lambda weight, other: weight.scale.copy_(other.scale),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_are_replaced_after_a_product_count(part, gpu):
    x, weight, bias = operands()
    before = F.linear(x, weight, bias)
    PARTS[part](weight, operands()[1])
    found = F.linear(x, weight, bias)
    assert torch.equal(found, by_linear(x, weight, bias))
    assert not torch.equal(found, before)
    assert is_quick(x, weight, bias)


def test_views_of_the_same_memory_count(gpu):
    for part in ("qdata", "scale"):
        x, weight, bias = operands()
        before = F.linear(x, weight, bias)
        setattr(weight, part, getattr(weight, part)[:1].expand(OUTS, -1))  # the first row, at the same address
        found = F.linear(x, weight, bias)
        assert torch.equal(found, by_linear(x, weight, bias))
        assert not torch.equal(found, before)


def test_a_recipe_or_an_input_scale_that_is_replaced_counts(gpu):
    x, weight, _ = operands("fp8-static")
    before = F.linear(x, weight)
    weight.input_scale = torch.tensor(0.02, device=DEVICE)
    assert not torch.equal(F.linear(x, weight), before)
    weight.recipe = RECIPES["fp8-tensor"]
    assert torch.equal(F.linear(x, weight), by_linear(x, weight, None))
    weight.recipe = replace(weight.recipe, backend="emulated")
    assert not is_quick(x, weight)
    assert F.linear(x, weight).dtype == BF16


def test_another_dtype_counts(gpu):
    x, weight, _ = operands()
    F.linear(x, weight)
    weight.data = weight._replace(dtype=torch.float32)  # of the same parts
    assert F.linear(x.float(), weight).dtype == torch.float32
    with pytest.raises(ValueError, match="bfloat16"):
        F.linear(x, weight)


def test_nothing_that_is_kept_takes_memory_or_gets_into_copies(gpu):
    x, weight, _ = operands()
    linear = nn.Linear(WIDTH, OUTS, bias=False)
    linear.weight = weight.as_parameter()
    size = weight.nbytes
    wanted = linear(x)
    kept = linear.weight.prepared
    linear(x)
    assert linear.weight.prepared is kept
    own = kept.native
    for view, part in ((own.weight, weight.qdata), (own.factor, weight.scale)):
        assert view.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
    assert linear.weight.nbytes == size
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    copies = [copy.deepcopy(linear).weight, copy.copy(weight), weight.detach(), linear.state_dict()["weight"]]
    for other in (*copies, torch.load(file, weights_only=True)["weight"], weight.clone()):
        assert other.prepared is None
        assert torch.equal(F.linear(x, other), wanted)


def test_a_weight_that_moves_keeps_nothing_of_where_it_was(gpu):
    x, weight, _ = operands()
    linear = nn.Linear(WIDTH, OUTS, bias=False)
    linear.weight = weight.as_parameter()
    linear(x)
    linear.to("meta")
    assert linear.weight.prepared is None
    assert linear.weight.qdata.is_meta


ERRORS = {
    "dtype": lambda x, weight, bias: (x.float(), weight, bias),
    "width": lambda x, weight, bias: (x[:, :16].contiguous(), weight, bias),
    "dtype of the bias": lambda x, weight, bias: (x, weight, bias.float()),
    "shape of the bias": lambda x, weight, bias: (x, weight, bias[:16]),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_wrong_inputs_are_refused_after_a_good_one(wrong, gpu):
    call = operands()
    F.linear(*call)
    with pytest.raises(ValueError, match=r"float32|16"):
        F.linear(*ERRORS[wrong](*call))


def test_wrong_weights_are_refused_after_a_good_product(gpu):
    x, weight, _ = operands("fp8-static")
    F.linear(x, weight)
    weight.input_scale = None
    with pytest.raises(ValueError, match="input scales"):
        F.linear(x, weight)
    x, weight, _ = operands()
    F.linear(x, weight)
    weight.scale = torch.ones(1, WIDTH, device=DEVICE)
    with pytest.raises(ValueError, match="one per output channel"):
        F.linear(x, weight)
    x, weight, _ = operands(backend="native")
    F.linear(x, weight)
    weight.data = weight._replace(dtype=torch.float16)
    with pytest.raises(ValueError, match="native"):
        F.linear(x.half(), weight)


class Subclass(torch.Tensor):
    pass


class Replacing(TorchDispatchMode):
    """Gives subclasses of tensors, as the mode of fake tensors does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found.as_subclass(Subclass) if func is torch.ops.aten.t.default else found


def test_no_view_is_kept_that_a_mode_of_torch_has_made(gpu):
    x, weight, bias = operands()
    with Replacing():
        assert not is_quick(x, weight, bias)
    assert torch.equal(F.linear(x, weight, bias), by_linear(x, weight, bias))


def test_all_else_is_left_to_linear(gpu, monkeypatch):
    x, weight, bias = operands()
    assert is_quick(x, weight, bias)
    assert not is_quick(x.as_subclass(Subclass), weight, bias)
    assert not is_quick(x, weight, bias.as_subclass(Subclass))
    assert not is_quick(x.clone().requires_grad_(), weight, bias)
    assert not is_quick(x, weight, bias.clone().requires_grad_())
    with torch.no_grad():
        assert is_quick(x, weight, bias.clone().requires_grad_())
    assert not is_quick(x[0], weight, bias)
    assert not is_quick(x.view(ROWS, 1, 1, WIDTH), weight, bias)
    assert not is_quick(x[:0], weight, bias)
    for of, name, there in (
        (torch, "is_autocast_enabled", lambda device: device == "cuda"),
        (torch.compiler, "is_compiling", lambda: True),
        (torch.cuda, "current_device", lambda: 1),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(of, name, there)
            assert not is_quick(x, weight, bias)
    monkeypatch.undo()
    assert not is_quick(x.cpu(), weight, bias)


def test_weights_that_are_no_plain_operands_are_left_to_linear(gpu):
    for settings in ({"backend": "emulated"}, {"activation": "tensor"}, {"activation": "none"}):
        x, weight, _ = operands(**settings)
        assert not is_quick(x, weight)
    x, weight, _ = operands()
    for other in (weight.qdata.t().contiguous().t(), weight.qdata.view(torch.uint8)):
        weight.qdata = other
        assert not is_quick(x, weight)
    x, weight, _ = operands(dtype=torch.float16)
    assert not is_quick(x, weight)
