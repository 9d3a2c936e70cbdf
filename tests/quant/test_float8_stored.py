"""Float8Tensor: comparing, printing, storing, sharing, Parameters of modules; operations that raise."""

import copy
import io
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from safetensors.torch import load_file, save, save_file, save_model
from torch import Tensor, nn

from quant.packing import pack, unpack
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor
from refusals import refuses

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def quantized(*shape, granularity="row", **recipe):
    recipe = Recipe(granularity=granularity, **({"activation": "none"} | recipe))
    return Float8Tensor.quantize(torch.randn(*shape), recipe=recipe)


def test_equal():
    q = quantized(6, 8)
    assert torch.equal(q, q.clone())
    assert q.equal(q)
    assert not torch.equal(q, q.bfloat16())
    assert not torch.equal(q, -1 * q.dequantize())
    assert not torch.equal(q, q[:5])
    changed = q.clone()
    changed.qdata.view(torch.uint8)[3, 3] ^= 1
    assert not torch.equal(q, changed)
    changed = q.clone()
    changed.scale[2] *= 2
    assert not torch.equal(q, changed)
    recipe = Recipe(activation="token")
    assert not torch.equal(q, Float8Tensor(q.qdata, q.scale, None, recipe, q.dtype))
    static = [
        Float8Tensor(q.qdata, q.scale, scale, recipe, q.dtype) for scale in (None, torch.ones(()), 2 * torch.ones(()))
    ]
    assert not torch.equal(static[0], static[1])
    assert not torch.equal(static[1], static[2])
    assert torch.equal(static[1], static[1].clone())


def test_repr_is_one_line():
    q = quantized(6, 8, format="e5m2").bfloat16()
    said = "Float8Tensor([6, 8], e5m2, scale per row, activation='none', dtype=torch.bfloat16, device='cpu')"
    assert repr(q) == str(q) == repr(nn.Parameter(q)) == said
    q.input_scale = torch.tensor(1.0)
    assert "scale per row, static input scale" in repr(q)


def test_sizes_are_those_of_what_is_stored():
    assert quantized(6, 8).nbytes == 6 * 8 + 4 * 6
    q = quantized(6, 8, granularity="tensor")
    q.input_scale = torch.tensor(1.0)
    assert q.nbytes == 6 * 8 + 4 + 4
    assert (q.numel(), q.shape, q.stride(), q.is_floating_point()) == (48, (6, 8), (8, 1), True)


def test_recipes_are_values():
    assert Recipe() == Recipe()
    assert hash(Recipe()) == hash(Recipe())
    assert len({*RECIPES.values(), replace(Recipe(), fast_accum=True)}) == len(RECIPES)
    with pytest.raises(AttributeError):
        Recipe().format = "e5m2"
    for name, said in (("format", "'e4m3', 'e5m2'; got 'e3m4'"), ("activation", "'static'; got 'e3m4'")):
        broken = copy.copy(Recipe())
        object.__setattr__(broken, name, "e3m4")  # the suite checks types before the recipe can
        refuses(broken.__post_init__, f"Recipe.{name} must be one of", said, error=ValueError)
    refuses(lambda: Recipe(granularity="tensor"), "activation='tensor' for granularity='tensor'", error=ValueError)
    refuses(lambda: Recipe(activation="none", backend="native"), "weight-only", error=ValueError)


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda q: pickle.loads(pickle.dumps(q)),
    "between processes": lambda q: pickle.loads(ForkingPickler.dumps(q)),
    "torch.save, weights only": lambda q: saved(q, weights_only=True),
    "torch.save": lambda q: saved(q, weights_only=False),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_equal(name):
    q = Float8Tensor.quantize(torch.randn(6, 8).half(), recipe=RECIPES["fp8-static"], input_scale=torch.tensor(0.5))
    q.snr = 31.0
    for original in (q, q.t(), q[2:4], nn.Parameter(q)):
        twin = COPIES[name](original)
        assert type(twin) is Float8Tensor
        assert torch.equal(twin, original)
        assert torch.equal(twin.dequantize(), original.dequantize())
        assert isinstance(twin, nn.Parameter) == isinstance(original, nn.Parameter)
        assert (twin.snr, twin.input_scale.item()) == (original.snr, 0.5)
        assert (twin.qdata.data_ptr() == original.qdata.data_ptr()) == (name in ("copy", "between processes"))


@pytest.mark.parametrize("name", ["copy", "between processes"])
def test_copies_in_the_same_memory_know_what_shares_their_scale(name):
    q = quantized(6, 8, granularity="tensor")
    before = q.clone()
    with pytest.raises(NotImplementedError, match="scale is that of other parts"):
        COPIES[name](q[2:4]).copy_(100 * torch.ones(2, 8))
    assert torch.equal(q, before)


def test_shared_memory():
    net = nn.Sequential(nn.Linear(8, 4))
    net[0].weight = nn.Parameter(quantized(4, 8, granularity="tensor", activation="static"))
    net[0].weight.input_scale = torch.tensor(0.5)
    assert not net[0].weight.is_shared()
    before = net[0].weight.clone()
    net.share_memory()
    weight = net[0].weight
    assert weight.is_shared()
    assert all(part.is_shared() for part in (weight.qdata, weight.scale, weight.input_scale, net[0].bias))
    assert torch.equal(weight, before)
    received = pickle.loads(ForkingPickler.dumps(weight))
    weight.copy_(torch.ones(4, 8))
    assert torch.equal(received, weight)


def test_pinned_memory(monkeypatch):
    """Pinning needs a GPU; a marked copy stands in for it."""
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda part: pinned.append(part.clone()) or pinned[-1])
    monkeypatch.setattr(Tensor, "is_pinned", lambda part: any(part is each for each in pinned))
    q = quantized(4, 8, granularity="tensor", activation="static")
    q.input_scale = torch.tensor(0.5)
    there = q.pin_memory()
    assert len(pinned) == 3
    assert there.is_pinned()
    assert not q.is_pinned()
    assert torch.equal(there, q)


# In modules.


def nets(count):
    return [nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False)) for _ in range(count)]


def quantize_all(net, granularity="row", **recipe):
    for layer in net:
        recipe_ = Recipe(granularity=granularity, **({"activation": "none"} | recipe))
        scale = torch.rand(()) + 0.1 if recipe_.activation == "static" else None
        layer.weight = nn.Parameter(Float8Tensor.quantize(layer.weight, recipe=recipe_, input_scale=scale))
    return net


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_state_dict_is_assigned(where):
    source, into = quantize_all(nets(1)[0]), nets(1)[0].to(where)
    x = torch.randn(3, 8)
    into.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(into(x), source(x))
    for mine, its in zip(into, source, strict=True):
        assert isinstance(mine.weight, nn.Parameter)
        assert torch.equal(mine.weight, its.weight)


def test_state_dict_is_copied():
    x = torch.randn(3, 8)
    plain, one, two = nets(3)
    for recipe in ({}, {"granularity": "tensor", "activation": "static"}):
        one, two = quantize_all(nets(1)[0], **recipe), quantize_all(nets(1)[0], **recipe)
        memory = two[0].weight.qdata.data_ptr()
        two.load_state_dict(one.state_dict())
        assert torch.equal(two(x), one(x))
        assert torch.equal(two[0].weight, one[0].weight)
        assert two[0].weight.qdata.data_ptr() == memory
        two.load_state_dict(plain.state_dict())  # plain weights are quantized when they are copied
        assert torch.equal(
            two[0].weight.qdata.float(),
            Float8Tensor.quantize(plain[0].weight, recipe=two[0].weight.recipe).qdata.float(),
        )
    without = quantize_all(nets(1)[0], granularity="tensor", activation="static")
    without[0].weight.input_scale = None
    without.load_state_dict(one.state_dict())  # the input scale comes along
    assert torch.equal(without(x), one(x))
    assert without[0].weight.input_scale is not one[0].weight.input_scale
    plain.load_state_dict(one.state_dict())
    assert type(plain[0].weight) is nn.Parameter
    assert torch.equal(plain[0].weight, one[0].weight.dequantize())


def test_whoever_asks_for_gradients_is_told_what_trains():
    weight, tensor = nn.Parameter(quantized(4, 8)), quantized(4, 8)
    net = nn.Sequential(nn.Linear(8, 4))
    net[0].weight = weight
    for ask in (
        tensor.requires_grad_,
        tensor.detach().requires_grad_,
        weight.requires_grad_,
        lambda: weight.requires_grad_(requires_grad=True),
        lambda: setattr(tensor, "requires_grad", True),
        lambda: setattr(weight, "requires_grad", True),
        net.requires_grad_,
        lambda: [parameter.requires_grad_() for parameter in net.parameters()],
    ):
        with pytest.raises(RuntimeError, match=r"not trained.*dequantize_"):
            ask()
    assert not tensor.requires_grad
    assert not weight.requires_grad
    for parameter in net.parameters():
        parameter.requires_grad_(not isinstance(parameter, Float8Tensor))
    assert net[0].bias.requires_grad


def test_gradients_by_default_are_not_asked_for():
    """nn.Parameter and load_state_dict(assign=True) ask for gradients by default and get none; freezing is possible."""
    weight = nn.Parameter(quantized(4, 8))
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, Float8Tensor)
    assert weight.is_leaf
    source, into = nn.Linear(8, 4), nn.Linear(8, 4)
    source.weight = weight
    assert into.weight.requires_grad
    into.load_state_dict(source.state_dict(), assign=True)
    kept = nn.Linear(8, 4)
    kept.load_state_dict(source.state_dict(keep_vars=True), assign=True)
    for layer in (source, into, kept, copy.deepcopy(source), into.double()):
        assert type(layer.weight) is Float8Tensor
        assert not layer.weight.requires_grad
        layer.requires_grad_(False)
        layer.weight.requires_grad = False
        assert not layer.bias.requires_grad


# Operations that raise.

UNKNOWN = {
    "add": ("torch.Tensor.add", lambda q: q + 1),
    "mul": ("torch.Tensor.mul", lambda q: q * q),
    "eq": ("aten.eq", lambda q: q == q.clone()),
    "add_": ("aten.add_", lambda q: q.add_(1)),
    "fill_": ("torch.Tensor.fill_", lambda q: q.fill_(1)),
    "setitem": ("__setitem__", lambda q: q.__setitem__(0, 1.0)),
    "sum": ("torch.Tensor.sum", lambda q: q.sum()),
    "allclose": ("torch.allclose", lambda q: torch.allclose(q, q)),
    "einsum": ("einsum", lambda q: torch.einsum("oi,bi->bo", q, torch.randn(3, 8))),
    "stack with a plain one": (
        "cat of a Float8Tensor with other tensors",
        lambda q: torch.stack([q, torch.zeros(8, 8)]),
    ),
    "flip": ("flip", lambda q: q.flip(0)),
    "repeat": ("repeat", lambda q: q.repeat(2, 1)),
    "item": ("item", lambda q: q[0, 0].item()),
    "new_zeros": ("new_zeros", lambda q: q.new_zeros(3)),
    "baddbmm": ("baddbmm", lambda q: torch.baddbmm(torch.zeros(2, 3, 4), torch.zeros(2, 3, 8), q.view(2, 4, 8).mT)),
    "addmv": ("addmv", lambda q: torch.addmv(torch.zeros(8), q, torch.zeros(8))),
    "embedding with max_norm": (
        "embedding_renorm_",
        lambda q: nn.functional.embedding(torch.tensor([1]), q, max_norm=1.0),
    ),
    "embedding_bag": ("embedding_bag", lambda q: nn.functional.embedding_bag(torch.tensor([[1]]), q)),
    "as_strided": ("as_strided", lambda q: q.as_strided((4, 8), (16, 1))),
    "matmul with a row": ("matmul", lambda q: torch.zeros(3, 8) @ q[0]),
    "resize_": ("resize_", lambda q: q.resize_(3)),
    "init": ("normal_", nn.init.normal_),
    "where": ("torch.where", lambda q: torch.where(torch.ones(8, 8) > 0, q, 0.0)),
    "zeros_like": ("zeros_like", torch.zeros_like),
    "view of another dtype": ("aten.view.dtype", lambda q: q.view(torch.int32)),
    "isfinite": ("isfinite", torch.isfinite),
    "addmm_": ("addmm_", lambda q: torch.zeros(8, 8).addmm_(torch.zeros(8, 8), q)),
    "out=": (
        "matmul of a Float8Tensor with out=",
        lambda q: torch.matmul(torch.zeros(2, 8), q.t(), out=torch.zeros(2, 8)),
    ),
    "set_": ("set_", lambda q: q.set_(torch.zeros(8, 8))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operation_names_itself(name, mode):
    says, call = UNKNOWN[name]
    q = quantized(8, 8)
    before = q.clone()
    with MODES[mode](), pytest.raises(NotImplementedError) as caught:
        call(q)
    assert says in str(caught.value)
    assert torch.equal(q, before)


@pytest.mark.parametrize("write", [save_file, lambda state, path: save(state), save_model])
def test_safetensors_own_functions_name_what_writes_it(tmp_path, write):
    net = nn.Linear(8, 4)
    net.weight = nn.Parameter(quantized(4, 8))
    state = net if write is save_model else net.state_dict()
    with pytest.raises(TypeError) as caught:
        write(state, tmp_path / "a.safetensors")
    assert all(name in str(caught.value) for name in ("save_pretrained", "quant.pack", "quant.unpack"))
    assert not list(tmp_path.iterdir())
    tensors, metadata = pack(net.state_dict())
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert torch.equal(unpack(load_file(tmp_path / "a.safetensors"), metadata)["weight"].qdata, net.weight.qdata)


def test_whole_modules_and_state_dicts_are_saved_by_torch(tmp_path):
    net = quantize_all(nets(1)[0])
    for what, safe in ((net.state_dict(), True), (net, False)):
        torch.save(what, tmp_path / "a.pt")
        found = torch.load(tmp_path / "a.pt", weights_only=safe)
        found = found if safe else found.state_dict()
        assert all(torch.equal(found[key], value) for key, value in net.state_dict().items())


def test_parameters_are_swapped(monkeypatch):
    """torch's other way to convert and load modules."""
    net, other = quantize_all(nets(1)[0]), quantize_all(nets(1)[0])
    x = torch.randn(3, 8)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.load_state_dict(other.state_dict())
        assert torch.equal(net(x), other(x))
        net.bfloat16()
        assert type(net[0].weight) is Float8Tensor
        assert net(x.bfloat16()).dtype == torch.bfloat16
        net.load_state_dict(other.bfloat16().state_dict(), assign=True)
        assert torch.equal(net[0].weight, other[0].weight)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(torch.func.functional_call(net, dict(other.state_dict()), x.bfloat16()), other(x.bfloat16()))


def test_nobody_gets_its_memory_as_if_it_held_the_values():
    with pytest.raises(NotImplementedError, match="dlpack of a Float8Tensor; give dequantize"):
        torch.from_dlpack(quantized(6, 8))


def test_compiled_code_is_found_again_for_the_same_kind_only():
    """torch finds compiled code on disk by this text, and the graph beside it does not hold shapes."""
    q = quantized(8, 8)
    text = q._stable_hash_for_caching()
    assert text == quantized(8, 8)._stable_hash_for_caching()
    static = q.clone()
    static.input_scale = torch.tensor(1.0)
    others = [
        quantized(16, 8),
        quantized(8, 16),
        quantized(8, 8, granularity="tensor"),
        quantized(8, 8, format="e5m2"),
        quantized(8, 8, activation="token"),
        q.bfloat16(),
        q.t().contiguous().t(),
        q.to("meta"),
        Float8Tensor(q.qdata.view(torch.uint8), q.scale, None, q.recipe, q.dtype),
        static,
    ]
    assert len({text, *(other._stable_hash_for_caching() for other in others)}) == len(others) + 1


def test_compiled_code_of_another_state_of_the_package_is_not_found(monkeypatch):
    q = quantized(8, 8)
    text = q._stable_hash_for_caching()
    monkeypatch.setattr("quant.tensor._source", lambda: "edited")
    assert q._stable_hash_for_caching() != text
