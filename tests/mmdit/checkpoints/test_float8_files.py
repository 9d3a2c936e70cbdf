"""Float8 files stay in float8 with the same codes and scales in every spelling and layout, or they raise an error."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import spellings
import tiny
from mmdit import CheckpointError, MMDiT, Pipeline, load_clip, load_mmdit, load_t5
from mmdit.checkpoints import load
from mmdit.checkpoints.describe import describe
from mmdit.checkpoints.write import convert
from mmdit.parity.verify import verify
from quant.packing import pack
from quant.quantize import quantize_
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
STATIC, WIDENED = (Recipe("e4m3", "tensor", activation) for activation in ("static", "none"))
VARIANT = "sd3.5-medium"  # with the second attention
LAYER = "joint_blocks.1.x_block.attn.qkv"
INPUT = torch.tensor(0.25)


@pytest.fixture(scope="module")
def weights(tiny_folders, tmp_path_factory):
    """The tensors of a transformer under official names, in bfloat16."""
    folder = convert(tiny_folders[VARIANT] / "transformer", tmp_path_factory.mktemp("official") / "out", "official")
    tensors = load_file(next(folder.glob("*.safetensors")))
    return {key.removeprefix("model.diffusion_model."): tensor.bfloat16() for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def theirs(tiny_folders):
    """The same tensors under diffusers' names, in float32."""
    return load_file(next((tiny_folders[VARIANT] / "transformer").glob("*.safetensors")))


def quantized(weights, scale=None):
    """The weights of the blocks' Linears as Float8Tensors; a given scale divides the values as they are."""
    found = {}
    for key, tensor in weights.items():
        if spellings.LINEARS.fullmatch(key):
            codes, own = spellings.quantize(tensor) if scale is None else (spellings.cast(tensor, E4M3), scale)
            found[key] = Float8Tensor(codes, own, None, WIDENED, torch.bfloat16)
    assert len(found) > 20
    return found


def note(**said):
    text = json.dumps({"format": "float8_e4m3fn"} | said).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()


def spelled(weights, float8, spelling, *, static=True):
    """`(tensors, metadata)` of a file; with `static`, every input has the scale INPUT."""
    tensors = {key: tensor for key, tensor in weights.items() if key not in float8}
    layers = {key.removesuffix(".weight"): tensor for key, tensor in float8.items()}
    names = ("scale_weight", "scale_input") if spelling == "older" else ("weight_scale", "input_scale")
    for layer, tensor in layers.items():
        tensors[f"{layer}.weight"] = tensor.qdata.clone()
        if spelling != "plain":
            tensors[f"{layer}.{names[0]}"] = tensor.scale.clone()
        if static and spelling != "plain":
            tensors[f"{layer}.{names[1]}"] = INPUT.clone()
        if spelling == "notes":
            tensors[f"{layer}.comfy_quant"] = note(full_precision_matrix_mult=False)
    if spelling == "older":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=E4M3)
    header = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    return tensors, {"_quantization_metadata": json.dumps(header)} if spelling == "header" else {}


def write(path, tensors, metadata=None):
    save_file(tensors, path, metadata or None)
    return path


def check_loaded(model, wanted):
    """Assert that every weight of the model equals the given tensor, float8 where the tensor is."""
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert isinstance(state[key], Float8Tensor) == isinstance(tensor, Float8Tensor), key
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key


# Five spellings, one model.


@pytest.mark.parametrize("spelling", ["older", "notes", "header", "ModelOpt", "packed"])
def test_five_spellings_load_the_same(weights, tmp_path, spelling):
    float8 = quantized(weights)
    wanted = {key: Float8Tensor(each.qdata, each.scale, INPUT, STATIC, torch.bfloat16) for key, each in float8.items()}
    file = pack(weights | wanted) if spelling == "packed" else spelled(weights, float8, spelling)
    model = load_mmdit(write(tmp_path / "a.safetensors", *file))
    check_loaded(model, weights | wanted)
    assert all(not parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.get_parameter(f"{LAYER}.weight"), torch.nn.Parameter)


@pytest.mark.parametrize("spelling", ["plain", "older", "notes", "header", "ModelOpt"])
def test_a_scale_of_one_may_be_left_out(weights, tmp_path, spelling):
    float8 = quantized(weights, scale=torch.ones(()))
    path = write(tmp_path / "a.safetensors", *spelled(weights, float8, spelling, static=False))
    check_loaded(load_mmdit(path), weights | float8)


def test_full_precision_means_weight_only(weights, tmp_path):
    """The marker turns off rounding in all layers, a note or header in one; the input scale is kept and not used."""
    float8 = quantized(weights)
    tensors, _ = spelled(weights, float8, "older")
    everywhere = load_mmdit(write(tmp_path / "a.safetensors", tensors | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}))
    assert {everywhere.get_parameter(key).recipe for key in float8} == {WIDENED}
    tensors, _ = spelled(weights, float8, "notes")
    one = write(tmp_path / "b.safetensors", tensors | {f"{LAYER}.comfy_quant": note(full_precision_matrix_mult=True)})
    tensors, metadata = spelled(weights, float8, "header")
    said = json.loads(metadata["_quantization_metadata"])
    said["layers"][LAYER]["full_precision_matrix_mult"] = True
    two = write(tmp_path / "c.safetensors", tensors, {"_quantization_metadata": json.dumps(said)})
    for path in (one, two):
        model = load_mmdit(path)
        for key in float8:
            recipe = WIDENED if key == f"{LAYER}.weight" else STATIC
            assert model.get_parameter(key).recipe == recipe and torch.equal(
                model.get_parameter(key).input_scale, INPUT
            )


def test_codes_stand_for_the_dtype_that_is_asked_for(weights, tmp_path):
    float8 = quantized(weights)
    path = write(tmp_path / "a.safetensors", *spelled(weights, float8, "older"))
    for dtype in (torch.float16, torch.float64):
        model = load_mmdit(path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.equal(
            model.get_parameter(f"{LAYER}.weight").qdata.float(), float8[f"{LAYER}.weight"].qdata.float()
        )


def test_dequantized_is_the_product(weights, tmp_path):
    float8 = quantized(weights)
    path = write(tmp_path / "a.safetensors", *spelled(weights, float8, "older"))
    values = {key: tensor.dequantize(torch.float64) for key, tensor in float8.items()}
    wanted = {key: tensor.double() for key, tensor in weights.items()} | values
    check_loaded(load_mmdit(path, dtype=torch.float64, float8="dequantize"), wanted)
    with pytest.raises(CheckpointError, match=r"float8.*dtype="):
        load_mmdit(path, float8="dequantize")


# Files entirely in float8, like t5xxl_fp8_e4m3fn, including norms, embeddings, biases and convolutions.


MODELS = {
    "transformer": load_mmdit,
    "text_encoder": lambda path, **how: load_clip(path, "l", **how),
    "text_encoder_3": load_t5,
}


@pytest.mark.parametrize(("stored", "dtype"), [(E4M3, None), (E5M2, torch.float32)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_linear_is_widened(tiny_folders, tmp_path, name, stored, dtype):
    """Tensors become bfloat16 unless another dtype is given, and outputs are bit-equal to those of upcast weights."""
    (tmp_path / name).mkdir()  # the folder's name tells which tower it is
    tensors = load_file(next((tiny_folders[VARIANT] / name).glob("*.safetensors")))
    path = tmp_path / name / "model.safetensors"
    write(path, {key: spellings.cast(tensor, stored) for key, tensor in tensors.items()})
    kept = MODELS[name](path, dtype=dtype)
    widened = MODELS[name](path, dtype=dtype or torch.bfloat16, float8="dequantize")
    linears = {f"{name}.weight" for name, part in kept.named_modules() if isinstance(part, torch.nn.Linear)}
    found = dict(kept.state_dict())
    assert {key for key, tensor in found.items() if isinstance(tensor, Float8Tensor)} == linears
    check_loaded(widened, {key: each.dequantize() if key in linears else each for key, each in found.items()})
    assert torch.equal(run(kept), run(widened))


@torch.no_grad()
def run(model):
    """The output of a transformer or a text encoder for a fixed input."""
    if isinstance(model, MMDiT):
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 16, 8, 8), (2, 5, tiny.T5_WIDTH), (2, tiny.CLIP_L + tiny.CLIP_G)
        latent, *texts = (torch.randn(shape, generator=generator).to(model.pos_embed.dtype) for shape in shapes)
        return model(latent, torch.full((2,), 500.0), *texts)
    found = model(torch.arange(1, 9)[None])
    return found if isinstance(found, torch.Tensor) else found.last


# Under diffusers' names, q, k and v become one weight, and the halves of some adaLN weights are swapped.

BLOCK = "transformer_blocks.1.attn"


def their_qkv(scales, input_scales=(None,) * 3, dtypes=(E4M3,) * 3):
    """Three float8 layers, by the endings of their names in a file."""
    found = {}
    for part, scale, input_scale, dtype in zip("qkv", scales, input_scales, dtypes, strict=True):
        layer = f"{BLOCK}.to_{part}"
        found[f"{layer}.weight"] = spellings.cast(torch.randn(tiny.HIDDEN, tiny.HIDDEN), dtype)
        found[f"{layer}.weight_scale"] = torch.as_tensor(scale)
        if input_scale is not None:
            found[f"{layer}.input_scale"] = torch.tensor(input_scale)
    return found


def values_of(qkv):
    """The fused weight in float64."""
    layers = [f"{BLOCK}.to_{part}" for part in "qkv"]
    return torch.cat([qkv[f"{each}.weight"].double() * qkv[f"{each}.weight_scale"].double() for each in layers])


@pytest.mark.parametrize(
    ("scales", "granularity"),
    [((0.1, 0.1, 0.1), "tensor"), ((0.1, 0.2, 0.3), "row"), ((0.1, torch.rand(tiny.HIDDEN, 1) + 0.1, 0.1), "row")],
    ids=["one", "three", "rows"],
)
def test_fused_weights_keep_codes_and_values(theirs, tmp_path, scales, granularity):
    qkv = their_qkv(scales, (0.5, 0.5, 0.5))
    path = write(tmp_path / "a.safetensors", theirs | qkv)
    weight = load_mmdit(path).get_parameter(f"{LAYER}.weight")
    assert weight.recipe == Recipe("e4m3", granularity, "static") and float(weight.input_scale) == 0.5
    codes = torch.cat([qkv[f"{BLOCK}.to_{part}.weight"].view(torch.uint8) for part in "qkv"])
    assert torch.equal(weight.qdata.view(torch.uint8), codes)
    assert torch.equal(weight.dequantize(torch.float64), values_of(qkv))
    assert weight.scale.shape == (() if granularity == "tensor" else (3 * tiny.HIDDEN, 1))


@pytest.mark.parametrize("inputs", [(0.5, 0.25, 0.5), (0.5, None, 0.5)], ids=["other", "missing"])
def test_inputs_that_disagree_are_left_as_they_are(theirs, tmp_path, inputs):
    """An input has a single scale; where two differ, neither is used, and the weight is kept."""
    qkv = their_qkv((0.1, 0.2, 0.3), inputs)
    path = write(tmp_path / "a.safetensors", theirs | qkv)
    with pytest.warns(UserWarning, match=rf"1 layers .* different input scales, first {BLOCK}\.to_q\.weight \+ "):
        weight = load_mmdit(path).get_parameter(f"{LAYER}.weight")
    assert weight.recipe == Recipe("e4m3", "row", "none") and weight.input_scale is None
    assert torch.equal(weight.dequantize(torch.float64), values_of(qkv))


def test_formats_that_cannot_be_one_are_widened(theirs, tmp_path):
    qkv = their_qkv((0.1, 0.2, 0.3), dtypes=(E4M3, E5M2, E4M3))
    weight = load_mmdit(write(tmp_path / "a.safetensors", theirs | qkv)).get_parameter(f"{LAYER}.weight")
    assert type(weight) is torch.nn.Parameter and torch.equal(weight, values_of(qkv).float())
    mixed = qkv | {f"{BLOCK}.to_k.weight": torch.randn(tiny.HIDDEN, tiny.HIDDEN)}
    del mixed[f"{BLOCK}.to_k.weight_scale"]
    weight = load_mmdit(write(tmp_path / "b.safetensors", theirs | mixed)).get_parameter(f"{LAYER}.weight")
    wanted = values_of(mixed | {f"{BLOCK}.to_k.weight_scale": torch.ones(())})
    assert type(weight) is torch.nn.Parameter and torch.equal(weight, wanted.float())


@pytest.mark.parametrize("layer", ["norm_out.linear", "transformer_blocks.2.norm1_context.linear"])
@pytest.mark.parametrize("rows", [False, True])
def test_halves_change_places_with_their_scales(theirs, tmp_path, layer, rows):
    ours = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    weight = theirs[f"{layer}.weight"]
    float8 = Float8Tensor.quantize(weight, "e4m3", "row" if rows else "tensor")
    tensors = theirs | {f"{layer}.weight": float8.qdata, f"{layer}.weight_scale": float8.scale}
    model = load_mmdit(write(tmp_path / "a.safetensors", tensors))
    found = model.get_parameter(f"{ours.get(layer, 'joint_blocks.2.context_block.adaLN_modulation.1')}.weight")
    one, other = float8.dequantize().chunk(2)
    assert isinstance(found, Float8Tensor) and torch.equal(found.dequantize(), torch.cat([other, one]))


# Conversion to other layouts and back.


@pytest.mark.parametrize("spelling", ["older", "notes", "header", "packed"])
def test_conversion_keeps_codes_and_scales(weights, tmp_path, spelling):
    """Sharded files too: the metadata of each shard has our own entry."""
    float8, recipe = quantized(weights), RECIPES["fp8-tensor"] if spelling == "packed" else STATIC
    wanted = weights | {
        key: Float8Tensor(each.qdata, each.scale, INPUT, recipe, torch.bfloat16) for key, each in float8.items()
    }
    file = pack(wanted) if spelling == "packed" else spelled(weights, float8, spelling)
    source = write(tmp_path / "a.safetensors", *file)
    there = convert(source, tmp_path / "there", "diffusers", max_shard_bytes=1_000_000)
    assert len(list((there / "transformer").glob("*.safetensors"))) > 2
    check_loaded(load_mmdit(there), wanted)
    check_loaded(load_mmdit(convert(there, tmp_path / "back", "official")), wanted)
    check_loaded(
        load_mmdit(convert(source, tmp_path / "wide", "comfyui", dtype=torch.float32)),
        {key: each.dequantize(torch.float32) if key in float8 else each.float() for key, each in wanted.items()},
    )


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfyui"])
def test_quantized_pipelines_are_saved_and_loaded(tiny_folders, tmp_path, layout):
    pipe = Pipeline.from_pretrained(tiny_folders[VARIANT])
    quantize_(pipe.transformer, "fp8")
    quantize_(pipe.t5, "fp8-tensor")
    back = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "out", layout))
    for name, model in pipe.models.items():
        check_loaded(back.models[name], model.state_dict())


# Broken files.

BROKEN = {  # changes to the tensors of a layer, and a fact of the error
    "stray": ({"weight": None}, f"'{LAYER}.weight_scale'"),
    "wide weight": ({"weight": torch.zeros(2)}, "torch.float32"),
    "missing": ({"weight_scale": None}, f"'{LAYER}.weight'"),
    "two": ({"scale_weight": torch.ones(())}, f"'{LAYER}.weight' has two scales"),
    "two of the input": ({"scale_input": torch.ones(())}, f"'{LAYER}.weight' has two scales"),
    "shape": ({"weight_scale": torch.ones(7)}, f"{LAYER}.weight: scale of shape [7]"),
    "columns": ({"weight_scale": torch.ones(1, 128)}, "scale of shape [1, 128]"),
    "input shape": ({"input_scale": torch.ones(128)}, f"{LAYER}.weight: input scale of shape [128]"),
    "integer": ({"weight_scale": torch.tensor(1)}, "torch.int64"),
    "note": ({"comfy_quant": note(full_precision_matrix_mult="yes")}, 'comfy_quant holds b\'{"format"'),
}
NO_SCALES = {"zero": 0.0, "negative": -0.5, "NaN": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
BROKEN |= {
    f"{name}, {which}": (
        {which: torch.tensor(value)},
        f"{LAYER}.weight: {what} must be finite",
    )
    for which, what in (("weight_scale", "a scale"), ("input_scale", "an input scale"))
    for name, value in NO_SCALES.items()
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(weights, tmp_path, monkeypatch, case):
    """One error that names the file, before any weight is read."""
    changes, said = BROKEN[case]
    tensors, _ = spelled(weights, quantized(weights), "ModelOpt")
    tensors |= {f"{LAYER}.{name}": value for name, value in changes.items()}
    path = write(tmp_path / "a.safetensors", {key: value for key, value in tensors.items() if value is not None})
    monkeypatch.setattr(load, "_read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        load_mmdit(path)
    assert str(path) in str(error.value)


def test_header_and_note_must_agree(weights, tmp_path):
    tensors, metadata = spelled(weights, quantized(weights), "header")
    tensors[f"{LAYER}.comfy_quant"] = note(full_precision_matrix_mult=True)
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=f"'{LAYER}': _quantization_metadata .*comfy_quant"):
        load_mmdit(path)


def test_shards_with_metadata_that_are_none(tiny_folders, tmp_path):
    folder = convert(tiny_folders[VARIANT] / "transformer", tmp_path / "a", "diffusers", max_shard_bytes=3_000_000)
    for shard in (folder / "transformer").glob("*.safetensors"):
        write(shard, load_file(shard), {"_quantization_metadata": "[]"})
    with pytest.raises(CheckpointError, match=r"index\.json: _quantization_metadata"):
        load_mmdit(folder)


# The output of `mmdit inspect`.


def test_describe_says_what_float8_is_there(weights, theirs, tmp_path):
    float8 = quantized(weights)
    count = len(float8)
    said = {
        "older": f"{count} weights, {count} inputs, spelled as ComfyUI's older (scale_weight)",
        "notes": f"{count} weights, {count} inputs, spelled as ComfyUI's newer (weight_scale)",
        "ModelOpt": f"{count} weights, {count} inputs, spelled as ModelOpt's (weight_scale)",
    }
    for spelling, words in said.items():
        path = write(tmp_path / f"{spelling}.safetensors", *spelled(weights, float8, spelling))
        text = describe(path)
        assert f"float8 scales: {words}" in text
        assert f"kept in float8: {count} F8_E4M3; activations: {count} float8 with the stored input scale" in text
    text = describe(write(tmp_path / "rows.safetensors", theirs | their_qkv((0.1, 0.2, 0.3))))
    assert "3 weights, 0 inputs" in text
    assert "kept in float8: 1 F8_E4M3, 1 with a scale per row; activations: 1 not rounded" in text
    plain = write(tmp_path / "plain.safetensors", {key: spellings.cast(each, E5M2) for key, each in weights.items()})
    assert f"plain float8 (no scales): {len(weights)} F8_E5M2" in describe(plain)
    assert "loat8:" not in describe(write(tmp_path / "wide.safetensors", weights))


@pytest.mark.filterwarnings("ignore:There are modules in")
def test_verify_compares_the_values(tiny_folders, tmp_path):
    """The reference has no float8, so activations are not rounded although the file asks for it."""
    pipe = Pipeline.from_pretrained(tiny_folders[VARIANT])
    names = [name for name, part in pipe.transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    quantize_(pipe.transformer, "fp8-static", input_scales=dict.fromkeys(names, INPUT))
    report = verify(pipe.save_pretrained(tmp_path / "out"), size=(32, 48), steps=1)
    assert report.passed, str(report)
