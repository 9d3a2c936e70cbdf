"""State dicts with Float8Tensors as files: no bit is lost, and every fault of a file is named."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import nn

from quant.packing import HEADER, OWN, merge_metadata, pack, unpack
from quant.quantize import quantize_
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TENSOR = RECIPES["fp8-tensor"]
STATIC = RECIPES["fp8-static"]
HALF = torch.tensor(0.5)


def quantized(*shape, recipe=TENSOR, dtype=torch.bfloat16, input_scale=None):
    return Float8Tensor.quantize(torch.randn(shape).to(dtype), recipe=recipe, input_scale=input_scale)


def through_file(tensors, metadata):
    """The tensors and metadata that the safetensors library writes and reads back."""
    data = save(tensors, metadata or None)
    length = int.from_bytes(data[:8], "little")
    return load(data), json.loads(data[8 : 8 + length]).get("__metadata__", {})


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert isinstance(found[key], Float8Tensor) == isinstance(tensor, Float8Tensor), key
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
        if isinstance(tensor, Float8Tensor):
            assert found[key].recipe == tensor.recipe
            assert found[key].qdata.dtype in (E4M3, E5M2)
            assert (found[key].input_scale is None) == (tensor.input_scale is None)


recipes = st.builds(
    lambda format, activation, granularity, static: Recipe(
        format, "row" if activation == "token" else granularity, activation, fast_accum=static
    ),
    st.sampled_from(["e4m3", "e5m2"]),
    st.sampled_from(["none", "tensor", "token", "static"]),
    st.sampled_from(["tensor", "row"]),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(
    recipe=recipes,
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    key=st.sampled_from(["weight", "a.weight", "a.b.weight", "a.in_proj_weight", "w", "norm.weight"]),
    seed=st.integers(0, 2**30),
    size=st.sampled_from([1e-30, 1.0, 1e4]),
    with_input=st.booleans(),
)
def test_nothing_is_lost(recipe, shape, dtype, key, seed, size, with_input):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    static = torch.tensor(0.3) if with_input or recipe.activation == "static" else None
    weight = Float8Tensor.quantize(values.to(dtype), recipe=recipe, input_scale=static)
    state = {key: weight, "a.bias": torch.randn(3), "table": torch.arange(4)}
    tensors, metadata = through_file(*pack(state))
    found = unpack(tensors, metadata)
    same(found, state)
    again, same_metadata = pack(found)
    assert same_metadata == metadata
    assert save(again) == save(pack(state)[0])


def test_what_comfyui_reads():
    """ComfyUI's keys of scales and formats in the header; without an input scale the note asks for full precision."""
    state = {
        "a.weight": quantized(3, 4),
        "b.weight": quantized(2, 4, recipe=replace(STATIC, format="e5m2"), input_scale=HALF),
        "b.bias": torch.ones(2),
    }
    tensors, metadata = pack(state)
    assert {key: tensor.dtype for key, tensor in tensors.items()} == {
        "b.bias": torch.float32,
        "a.weight": E4M3,
        "a.weight_scale": torch.float32,
        "b.weight": E5M2,
        "b.weight_scale": torch.float32,
        "b.input_scale": torch.float32,
    }
    assert json.loads(metadata[HEADER]) == {
        "format_version": "1.0",
        "layers": {
            "a": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
            "b": {"format": "float8_e5m2"},
        },
    }
    assert tensors["a.weight_scale"].shape == ()
    values = tensors["a.weight"].float() * tensors["a.weight_scale"]
    assert torch.equal(values, state["a.weight"].dequantize(torch.float32))


def test_without_float8_nothing_changes():
    state = {"a.weight": torch.ones(2, 2), "b": torch.zeros(3, dtype=E4M3)}
    tensors, metadata = pack(state)
    assert metadata == {}
    assert all(tensors[key] is state[key] for key in state) and unpack(tensors, metadata) == state


def test_a_model_is_saved_and_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    quantize_(model, "fp8")
    tensors, metadata = pack(model.state_dict())
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        state = unpack({key: file.get_tensor(key) for key in file.keys()}, file.metadata())  # noqa: SIM118
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    other.load_state_dict(state, assign=True)
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))


def test_parts_have_memory_of_their_own():
    """Pieces of a split weight share a scale, and one weight under two keys shares qdata: safetensors refuses both."""
    whole = quantized(6, 4)
    state = {f"{name}.weight": piece for name, piece in zip("qkv", whole.chunk(3), strict=True)}
    state |= {"twin.weight": state["q.weight"], "columns.weight": whole[:, :2]}
    same(unpack(*through_file(*pack(state))), state)


def test_codes_as_bytes_become_float8():
    """Devices without float8 dtypes hold bytes."""
    weight = quantized(3, 4)
    as_bytes = Float8Tensor(weight.qdata.view(torch.uint8), weight.scale, None, weight.recipe, weight.dtype)
    same(unpack(*pack({"a.weight": as_bytes})), {"a.weight": weight})


SPELLED = {  # how to change a packed file, and the activations of the recipe that is read then
    "header": (lambda tensors: None, "static"),
    "notes": (lambda tensors: tensors.update({"a.comfy_quant": note({"format": "float8_e4m3fn"})}), "static"),
    "older": (lambda tensors: older(tensors, 0), "static"),
    "older, full precision": (lambda tensors: older(tensors, 2), "none"),
    "ModelOpt": (lambda tensors: None, "static"),
    "no input scale": (lambda tensors: tensors.pop("a.input_scale"), "none"),
    "full precision": (
        lambda tensors: tensors.update(
            {"a.comfy_quant": note({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})}
        ),
        "none",
    ),
}


def note(value):
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def older(tensors, elements):
    tensors["a.scale_weight"], tensors["a.scale_input"] = tensors.pop("a.weight_scale"), tensors.pop("a.input_scale")
    tensors["scaled_fp8"] = torch.zeros(elements, dtype=E4M3)


@pytest.mark.parametrize("case", SPELLED)
def test_the_spelling_alone_is_enough(case):
    change, activation = SPELLED[case]
    weight = quantized(3, 4, recipe=STATIC, input_scale=HALF)
    tensors, metadata = pack({"a.weight": weight, "a.bias": torch.ones(3)})
    del metadata[OWN]
    change(tensors)
    found = unpack(tensors, metadata if case == "header" else {}, dtype=torch.float16)
    assert found.keys() == {"a.weight", "a.bias"}
    recipe = Recipe("e4m3", "tensor", activation)
    input_scale = None if case == "no input scale" else HALF
    wanted = Float8Tensor(weight.qdata, weight.scale, input_scale, recipe, torch.float16)
    same(found, {"a.weight": wanted, "a.bias": torch.ones(3)})


@pytest.mark.parametrize("shape", [(3,), (3, 1)], ids=str)
def test_one_scale_per_row_is_told_by_its_shape(shape):
    weight = quantized(3, 4, recipe=Recipe(activation="none"))
    tensors = {"a.weight": weight.qdata, "a.weight_scale": weight.scale.reshape(shape)}
    same(unpack(tensors), {"a.weight": weight})


def changed(**changes):
    """A packed file with tensors put in, or left out (None)."""
    tensors, metadata = pack({"a.weight": quantized(3, 4, recipe=STATIC, input_scale=HALF)})
    tensors |= {f"a.{key}": value for key, value in changes.items()}
    return {key: value for key, value in tensors.items() if value is not None}, metadata


BROKEN = {
    "missing scale": ({"weight_scale": None}, "mmdit_quant names 'a.weight_scale', and there is no such tensor"),
    "missing weight": ({"weight": None}, "mmdit_quant names 'a.weight', and there is no such tensor"),
    "missing input scale": ({"input_scale": None}, "'a.weight' is said to have static activations, but has no input"),
    "two scales": ({"scale_weight": HALF}, "'a.weight' has two scales, 'a.weight_scale' and 'a.scale_weight'"),
    "two input scales": ({"scale_input": HALF}, "'a.weight' has two scales, 'a.input_scale' and 'a.scale_input'"),
    "other dtype": (
        {"weight": torch.zeros(3, 4)},
        "'a.weight' is said to be float8_e4m3fn, but that weight is torch.f",
    ),
    "other format": ({"weight": torch.zeros(3, 4, dtype=E5M2)}, "is said to be float8_e4m3fn, but that weight is"),
    "other granularity": (
        {"weight_scale": torch.ones(3, 1)},
        "'a.weight' is said to have granularity 'tensor', but has",
    ),
    "scale of another shape": (
        {"weight_scale": torch.ones(4)},
        "a.weight: scale of shape [4] for a weight of shape [3,",
    ),
    "input scales": ({"input_scale": torch.ones(4)}, "a.weight: input scale of shape [4]; expected one number"),
    "integer scale": ({"weight_scale": torch.tensor(1)}, "a.weight: a scale must be floating point, got torch.int64"),
    "note": ({"comfy_quant": note({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})}, "'a': _quantiz"),
    "odd note": ({"comfy_quant": note({"format": "float8_e4m3fn", "full_precision_matrix_mult": 1})}, "comfy_quant ho"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(case):
    changes, said = BROKEN[case]
    with pytest.raises(ValueError, match=re.escape(said)):
        unpack(*changed(**changes))


@pytest.mark.parametrize("which", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-60])
def test_scale_that_is_no_scale(which, value):
    kind = "a scale" if which == "weight_scale" else "an input scale"
    scale = torch.tensor(value, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"a.weight: {kind} must be finite and above zero; 1 are not"):
        unpack(*changed(**{which: scale}))


OWN_ENTRIES = ("", "[]", "{}", '{"weights": {"a.weight": {}}}', '{"weights": {"a.weight": {"dtype": 1, "recipe": {}}}}')
UNKNOWN_FORMAT = '{"weights": {"a.weight": {"dtype": "float16", "recipe": {"format": "e3m4"}}}}'
UNKNOWN_DTYPE = '{"weights": {"a.weight": {"dtype": "nn", "recipe": {}}}}'


@pytest.mark.parametrize("text", [*OWN_ENTRIES, UNKNOWN_FORMAT, UNKNOWN_DTYPE])
def test_own_entry_that_is_not_the_expected_json(text):
    tensors, metadata = changed()
    with pytest.raises(ValueError, match="mmdit_quant is not the expected JSON"):
        unpack(tensors, metadata | {OWN: text})


def test_names_that_only_our_entry_knows_are_checked_too():
    tensors, metadata = pack({"w": quantized(3, 4)})
    with pytest.raises(ValueError, match=r"mmdit_quant names 'w' as float8, but it is torch\.float32"):
        unpack(tensors | {"w": torch.zeros(3, 4)}, metadata)
    with pytest.raises(ValueError, match="w: a scale must be finite and above zero"):
        unpack(tensors | {"w_scale": torch.tensor(0.0)}, metadata)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match=r"'a.weight' has scales of shape \[1, 3\] for qdata of shape \[4, 3\]"):
        pack({"a.weight": quantized(3, 4, recipe=Recipe(activation="none")).t()})
    with pytest.raises(ValueError, match=r"'a.weight' has static activations and no input scale: run mmdit.calibrate"):
        pack({"a.weight": quantized(3, 4, recipe=STATIC)})
    with pytest.raises(
        ValueError, match=r"'a.weight_scale' is a key of its own, and a part of the Float8Tensor 'a.wei"
    ):
        pack({"a.weight": quantized(3, 4), "a.weight_scale": torch.ones(())})


def test_metadata_of_shards_are_one():
    files = [pack({f"{name}.weight": quantized(2, 3, recipe=STATIC, input_scale=HALF)}) for name in "ab"]
    tensors = {key: tensor for tensors, _ in files for key, tensor in tensors.items()}
    merged = merge_metadata([{"format": "pt"}, *(metadata for _, metadata in files)])
    assert merged["format"] == "pt"
    assert all(weight.recipe == STATIC for weight in unpack(tensors, merged).values())
    assert json.loads(merged[HEADER])["layers"].keys() == {"a", "b"}
    with pytest.raises(ValueError, match="_quantization_metadata is not the expected JSON"):
        merge_metadata([{HEADER: "{}"}, {HEADER: "{}"}])


def test_a_file_of_a_newer_version_is_refused():
    tensors, metadata = pack({"a.weight": Float8Tensor.quantize(torch.ones(2, 4))})
    entry = json.loads(metadata[OWN])
    metadata |= {OWN: json.dumps(entry | {"version": 2})}
    with pytest.raises(ValueError, match="mmdit_quant has version 2, this is 1: a newer mmdit-lab wrote the file"):
        unpack(tensors, metadata)
