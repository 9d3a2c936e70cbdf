"""Float8 spellings: values that are read equal stored * scale, and every fault of a file is named."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from encoders.json_files import parse_json
from mmdit import CheckpointError, load_mmdit
from mmdit.checkpoints.lazy import LazyTensor
from quant import check_formats, dequantize, find_scales, format_in, layers_in, unread_quantization
from quant.packing import kinds_in
from quant.spellings import parse_text
from quant.stored import stored_weights
from sparse import HUGE, HUGE_LAYER, huge

E4M3, E5M2, F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float32
LAYER = "transformer_blocks.1.attn.to_k"
WEIGHT = f"{LAYER}.weight"
LINEAR = re.compile(r"transformer_blocks\.\d\.(attn|ff)\.(?!norm).*weight")
SPELLINGS = ("old", "new", "per layer", "header")


def every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    return codes[codes.float().isfinite()]


@pytest.mark.parametrize("stored_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, F32, torch.bfloat16, torch.float16])
def test_dequantized_is_the_product_rounded_once(stored_dtype, shape, dtype):
    stored = every_code(stored_dtype)
    stored = stored[: len(stored) // 4 * 4].reshape(4, -1)
    scale = torch.rand(4, 1) * 0.01 + 0.001 if shape == "row" else torch.tensor(0.0123)
    found = dequantize(stored, scale, "w", dtype)
    assert found.dtype == dtype
    exact = stored.double() * scale.double()  # 4 bits times 24 fit into 53
    assert torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (5, 3, 2, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]])], ids=["", "1", "11"])
def test_one_number_scales_any_shape(shape, scale):
    stored = torch.randn(shape).to(E4M3)
    assert torch.equal(dequantize(stored, scale, "w", F32), (stored.double() * scale.double().sum()).float())


@pytest.mark.parametrize("shape", [(5,), (5, 1)], ids=str)
def test_one_number_per_row(shape):
    stored, scale = torch.randn(5, 3, 2).to(E4M3), torch.rand(shape) + 0.1
    assert torch.equal(dequantize(stored, scale, "w", F32), stored.float() * scale.view(5, 1, 1))


@pytest.mark.parametrize("shape", [(3,), (1, 4), (4, 2), (4, 1, 1), (0,), (2, 2)], ids=str)
def test_scale_of_another_shape(shape):
    said = re.escape(f"w: scale of shape {list(shape)} for a weight of shape [4, 2]; expected one number, or one per")
    with pytest.raises(ValueError, match=said):
        dequantize(torch.zeros(4, 2, dtype=E4M3), torch.ones(shape), "w", F32)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_that_is_no_scale(value):
    with pytest.raises(ValueError, match=rf"w: a scale must be finite and above zero; 1 are not, first \[{value}\]"):
        dequantize(torch.zeros(4, 2, dtype=E4M3), torch.tensor([1.0, value, 1.0, 1.0]), "w", F32)


@pytest.mark.parametrize(
    ("dtypes", "said"),
    [
        ({"a.scale_weight": F32}, "stray scale 'a.scale_weight': it belongs to 'a.weight', and there is no such"),
        ({"a.input_scale": F32}, "stray scale 'a.input_scale': it belongs to 'a.weight', and there is no such"),
        ({"a.weight": F32, "a.weight_scale": F32}, "that weight is torch.float32, not float8"),
        ({"a.weight": E4M3, "a.weight_scale": F32, "a.scale_weight": F32}, "'a.weight' has two scales, 'a.weight_sc"),
        ({"a.weight": E4M3, "a.weight_scale": F32, "b.weight": E4M3}, "'b.weight': float8 without a scale"),
        ({"a.weight": E4M3, "scaled_fp8": E4M3}, "'a.weight': float8 without a scale"),
        ({"a.weight": E4M3, "a.input_scale": F32}, "'a.weight': float8 without a scale"),
        ({"a.weight": torch.uint8, "a.weight_scale": E4M3, "a.weight_scale_2": F32}, "NVFP4"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_scales_that_do_not_pair(dtypes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        find_scales(dtypes)


U8, I8 = torch.uint8, torch.int8
UNREAD = {  # what a file has, and the name that the sentence must hold
    "nf4": ({"a.weight": U8, "a.weight.absmax": U8, "a.weight.quant_state.bitsandbytes__nf4": U8}, {}, {}, "NF4"),
    "fp4": ({"a.weight": U8, "a.weight.quant_map": F32, "a.weight.quant_state.bitsandbytes__fp4": U8}, {}, {}, "FP4"),
    "nested": ({"a.weight": U8, "a.weight.nested_absmax": F32}, {}, {}, "bitsandbytes"),
    "absmax": ({"a.weight": U8, "a.weight.absmax": F32}, {}, {}, "bitsandbytes"),
    "int8": ({"a.weight": I8, "a.SCB": F32}, {}, {}, "LLM.int8"),
    "int8 of ComfyUI": ({"a.weight": I8, "a.weight_scale": F32}, {}, {}, "8-bit integers"),
    "nvfp4": ({"a.weight": U8, "a.weight_scale": E4M3, "a.weight_scale_2": F32}, {}, {}, "NVFP4"),
    "mxfp8": ({"a.weight": E4M3, "a.weight_scale": U8}, {}, {}, "MXFP8"),
    "mxfp8, e8m0": ({"a.weight": E4M3, "a.weight_scale": torch.float8_e8m0fnu}, {}, {}, "MXFP8"),
    "gptq": ({"a.qweight": torch.int32, "a.scales": F32}, {}, {}, "GPTQ"),
    "svdquant": ({"a.qweight": I8, "a.wscales": torch.bfloat16}, {}, {}, "SVDQuant"),
    "quanto": ({"a.weight._data": I8, "a.weight._scale": F32}, {}, {}, "optimum-quanto"),
    "header": ({"a.weight": E4M3}, {"_quantization_metadata": '{"layers": {"a": {"format": "mxfp8"}}}'}, {}, "'mxfp8'"),
    "config": ({"a.weight": F32}, {}, {"quantization_config": {"quant_method": "torchao"}}, "'torchao'"),
    "odd config": ({"a.weight": F32}, {}, {"quantization_config": ["x"]}, "quantization_config"),
}


@pytest.mark.parametrize("case", UNREAD)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_quantizations_are_recognised(case, prefix):
    dtypes, metadata, config, name = UNREAD[case]
    dtypes = {prefix + key: dtype for key, dtype in dtypes.items()}
    found = unread_quantization(dtypes, metadata, config)
    assert name in found
    assert "not read" in found
    if not metadata and not config:
        with pytest.raises(ValueError, match=name):
            find_scales(dtypes)


@pytest.mark.parametrize(
    "dtypes",
    [
        {"a.weight": E4M3, "a.weight_scale": F32, "a.input_scale": F32, "a.comfy_quant": U8},
        {"a.weight": E5M2, "a.scale_weight": torch.float16, "scaled_fp8": E4M3},
        {"a.weight": torch.bfloat16, "position_ids": torch.int64, "a.scale": F32, "model.absmax_pool.weight": F32},
    ],
)
def test_quantizations_that_are_read_are_no_others(dtypes):
    header = {"_quantization_metadata": '{"layers": {"a": {"format": "float8_e4m3fn"}}}'}
    assert unread_quantization(dtypes, header, {"hidden_size": 4}) == ""


def test_the_sentence_stays_short():
    keys = {f"{'k' * 1000}{i}.weight_scale_2": F32 for i in range(1000)}
    assert len(unread_quantization(keys)) < 1000
    assert len(unread_quantization({}, {}, {"quantization_config": "x" * 10**6})) < 1000


def test_sizes_are_checked_before_anything_is_read():
    every = {"a.weight": E4M3, "a.weight_scale": F32, "a.comfy_quant": U8}
    fine = {"a.weight": [4, 2], "a.weight_scale": [4, 1], "a.comfy_quant": [30], "a.input_scale": []}
    for key, shape in (
        ("a.comfy_quant", [2**28]),
        ("a.weight_scale", [2**28]),
        ("a.weight_scale", [2, 4]),
        ("a.input_scale", [2**28]),
        ("a.input_scale", [0]),
    ):
        dtypes = every | ({"a.input_scale": F32} if key == "a.input_scale" else {})
        shapes = {name: fine[name] for name in dtypes} | {key: shape}
        read = []

        def get(name, shapes=shapes, dtypes=dtypes, read=read):
            read.append(name)
            return tensor_of(name, shapes, dtypes)

        with pytest.raises(ValueError, match=r"bytes|shape"):
            stored_weights(shapes, dtypes, get, {}, {})
        assert key not in read


@pytest.mark.parametrize("case", HUGE)
def test_huge_scales_and_notes_of_a_file_are_not_read(tmp_path, monkeypatch, case):
    path, read = huge(tmp_path / "sparse.safetensors", case), []
    load = LazyTensor.read

    def counted(lazy, *how, **where):
        read.append(lazy.nbytes)
        return load(lazy, *how, **where)

    monkeypatch.setattr(LazyTensor, "read", counted)
    with pytest.raises(CheckpointError, match=HUGE_LAYER):
        load_mmdit(path)
    assert max(read, default=0) < 2**12


def tensor_of(name, shapes, dtypes):
    if name == "a.comfy_quant":
        return note({"format": "float8_e4m3fn"})
    return torch.ones(shapes[name], dtype=dtypes[name])


def test_norms_and_embeddings_may_be_plain_among_scaled_ones():
    plain = dict.fromkeys(["ln.norm.weight", "shared.weight", "x.relative_attention_bias.weight", "a.bias"], E4M3)
    assert find_scales(plain | {"a.weight": E4M3, "a.weight_scale": F32}).weights == {"a.weight": "a.weight_scale"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": []}', '{"layers": {"a": {}}}', '{"layers": {"a": 1}}'])
def test_metadata_that_is_not_the_expected_json(text):
    with pytest.raises(ValueError, match=r"_quantization_metadata is not the expected JSON, .*layers"):
        layers_in({"_quantization_metadata": text})


@pytest.mark.parametrize("note", [b"", b"\xff\xfe", b"[]", b"{}", b'"x"'])
def test_note_that_is_not_the_expected_json(note):
    with pytest.raises(ValueError, match=r'comfy_quant holds .*, expected JSON like \{"format"'):
        format_in(note)


HOSTILE = {
    "deep": "[" * 100_000,
    "deep objects": '{"layers":' * 50_000,
    "digits": '{"layers": {"a": {"format": ' + "9" * 5000 + "}}}",
    "digits of our own": '{"version": ' + "9" * 5000 + ', "weights": {}}',
    "odd dtype": '{"weights": {"w": {"dtype": "nn", "recipe": {}}}}',
    "unhashable dtype": '{"weights": {"w": {"dtype": [], "recipe": {}}}}',
    "odd recipe": '{"weights": {"w": {"dtype": "float32", "recipe": {"format": [1]}}}}',
    "unknown field": '{"weights": {"w": {"dtype": "float32", "recipe": {"colour": "red"}}}}',
    "long word": '{"weights": {"w": {"dtype": "float32", "recipe": {"format": "' + "x" * 10**6 + '"}}}}',
    "layers that are a list": '{"layers": [{"format": "float8_e4m3fn"}], "weights": []}',
    "version that is a word": '{"version": "x", "weights": {}, "layers": 3}',
    "too large": " " * (9 * 2**20),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_refused_in_few_words(case):
    """Both quant's own parser and mmdit's strict one refuse it."""
    text = HOSTILE[case]
    for parse in (parse_text, parse_json):
        for read in (
            lambda parse=parse: layers_in({"_quantization_metadata": text}, parse),
            lambda parse=parse: format_in(text.encode(), parse),
            lambda parse=parse: kinds_in({"mmdit_quant": text}, parse),
        ):
            with pytest.raises(ValueError, match=r"_quantization_metadata|comfy_quant|mmdit_quant") as caught:
                read()
            assert len(str(caught.value)) < 1000
    assert unread_quantization({}, {"_quantization_metadata": text}) == ""


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int8_tensorwise", ["list"], None])
def test_other_formats_are_named(name):
    said = re.escape(f"quantization {str(name)!r} of 'a' is not read, only float8_e4m3fn, float8_e5m2; use a float8")
    with pytest.raises(ValueError, match=said):
        check_formats(layers_in({"_quantization_metadata": json.dumps({"layers": {"a": {"format": name}}})}), {})


# Whole files: one tiny transformer in diffusers' names, its linears quantized per tensor or per row.


@pytest.fixture(scope="module")
def quantized(tiny_folders):
    """The tensors that stay plain, and codes and scale of each quantized layer by its name."""
    tensors = load_file(tiny_folders["sd3.5-large"] / "transformer" / "diffusion_pytorch_model.safetensors")
    layers = {}
    for place, key in enumerate(sorted(key for key in tensors if LINEAR.fullmatch(key))):
        weight = tensors.pop(key)
        amax = weight.abs().amax(1, keepdim=True) if place % 2 else weight.abs().amax()
        scale = amax / 448
        layers[key.removesuffix(".weight")] = (weight / scale).to(E4M3), scale
    assert len(layers) > 20
    return tensors, layers


def spelled(quantized, spelling, path):
    """Write the file in a spelling and return its path; `quantized` is the fixture."""
    tensors, layers = dict(quantized[0]), quantized[1]
    ending = ("scale_weight", "scale_input") if spelling == "old" else ("weight_scale", "input_scale")
    for layer, (codes, scale) in layers.items():
        tensors |= {f"{layer}.weight": codes, f"{layer}.{ending[0]}": scale, f"{layer}.{ending[1]}": torch.tensor(0.5)}
        if spelling == "per layer":
            tensors[f"{layer}.comfy_quant"] = note({"format": "float8_e4m3fn", "full_precision_matrix_mult": False})
    if spelling == "old":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=E4M3)
    header = {"layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    save_file(tensors, path, {"_quantization_metadata": json.dumps(header)} if spelling == "header" else None)
    return path


def note(value):
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).clone()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_all_spellings_load_the_same(quantized, tmp_path, dtype):
    plain = dict(quantized[0]) | {
        f"{layer}.weight": (codes.double() * scale.double()).to(dtype) for layer, (codes, scale) in quantized[1].items()
    }
    save_file(plain, tmp_path / "plain.safetensors")
    wanted = load_mmdit(tmp_path / "plain.safetensors", dtype=dtype).state_dict()
    for spelling in SPELLINGS:
        path = spelled(quantized, spelling, tmp_path / f"{spelling}.safetensors")
        found = load_mmdit(path, dtype=dtype, float8="dequantize").state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), spelling


BROKEN = {  # spelling, what changes beside one layer's weight (None: is left out), what is said
    "no dtype": ("new", {}, "in float8, which layers do not compute in: give a dtype, e.g. dtype=torch.bfloat16"),
    "missing": ("new", {"weight_scale": None}, f"{WEIGHT!r}: float8 without a scale"),
    "missing, header": ("header", {"weight_scale": None, "input_scale": None}, f"{WEIGHT!r}: float8 without a scale"),
    "stray": ("new", {"weight": None}, f"stray scale {LAYER + '.weight_scale'!r}"),
    "doubled": ("old", {"weight_scale": torch.tensor(1.0)}, f"{WEIGHT!r} has two scales"),
    "zero": ("new", {"weight_scale": torch.tensor(0.0)}, f"{WEIGHT}: a scale must be finite and above zero; 1 are not"),
    "negative": ("old", {"scale_weight": torch.tensor(-0.5)}, f"{WEIGHT}: a scale must be finite and above zero"),
    "NaN": ("new", {"weight_scale": torch.tensor(float("nan"))}, f"{WEIGHT}: a scale must be finite and above zero"),
    "shape": ("new", {"weight_scale": torch.ones(1, 128)}, "scale of shape [1, 128] for a weight of shape [128, 128]"),
    "NVFP4": ("new", {"weight_scale_2": torch.tensor(1.0)}, "NVFP4"),
    "NVFP4 note": ("per layer", {"comfy_quant": note({"format": "nvfp4"})}, f"quantization 'nvfp4' of {LAYER!r}"),
    "odd note": ("per layer", {"comfy_quant": torch.zeros(3)}, "comfy_quant holds b'"),
    "wrong note": ("per layer", {"comfy_quant": note({"format": "float8_e5m2"})}, "said to be float8_e5m2, but that"),
    "note alone": (
        "new",
        {"comfy_quant": note({"format": "float8_e4m3fn"}), "weight": None},
        "there is no such weight",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(quantized, tmp_path, case):
    spelling, changes, said = BROKEN[case]
    path = spelled(quantized, spelling, tmp_path / "model.safetensors")
    tensors = load_file(path) | {f"{LAYER}.{name}": value for name, value in changes.items()}
    header = {"layers": {layer: {"format": "float8_e4m3fn"} for layer in quantized[1]}}
    metadata = {"_quantization_metadata": json.dumps(header)} if spelling == "header" else None
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata)
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        load_mmdit(path, dtype=None if case == "no dtype" else torch.float32, float8="dequantize")
    assert str(path) in str(error.value)


def test_metadata_names_layers_as_the_file_does(quantized, tmp_path):
    """In an all-in-one file the metadata's layers have the prefix; a layer without a weight is an error."""
    header = {"layers": {layer: {"format": "float8_e4m3fn"} for layer in quantized[1]}}
    path = spelled(quantized, "new", tmp_path / "new.safetensors")
    prefixed = {f"model.diffusion_model.{key}": value for key, value in load_file(path).items()}
    save_file(prefixed, path, {"_quantization_metadata": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"is said to be float8_e4m3fn, but there is no such weight"):
        load_mmdit(path, dtype=F32)
    header["layers"] = {f"model.diffusion_model.{layer}": said for layer, said in header["layers"].items()}
    save_file(prefixed, path, {"_quantization_metadata": json.dumps(header)})
    assert load_mmdit(path, dtype=F32).config.depth == tiny.DEPTH
