"""`mmdit.checkpoints.quantize` writes the codes of `quant.scaling`, tensor by tensor; ComfyUI reads the files."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import measure_quantizing
import spellings
from mmdit import MMDiT, MMDiTConfig, Pipeline, load_clip, load_mmdit, load_t5
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.quantize import quantize_checkpoint
from mmdit.checkpoints.safetensors_io import write_tensors
from mmdit.checkpoints.write import convert
from quant.quantize import quantize_
from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor
from refusals import refuses

VARIANT = "sd3.5-medium"
ROWS = "ignore:this recipe has a scale per row"


@pytest.fixture(scope="module")
def official(tiny_folders, tmp_path_factory):
    """A transformer in one file, in bfloat16."""
    folder = tmp_path_factory.mktemp("official") / "out"
    convert(tiny_folders[VARIANT] / "transformer", folder, "official", dtype=torch.bfloat16)
    return next(folder.glob("*.safetensors"))


def quantize(source, target, recipe="fp8-tensor", **how):
    return quantize_checkpoint(source, target, recipe, progress=False, **how)


def same(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert isinstance(found[key], Float8Tensor) == isinstance(tensor, Float8Tensor), key
        assert torch.equal(found[key], tensor), key


def opened(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.filterwarnings(ROWS)
@pytest.mark.parametrize("recipe", ["fp8", "fp8-weight-only", "fp8-tensor", "fp8-e5m2"])
def test_a_quantized_file_is_the_quantized_model(official, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(
        "mmdit.checkpoints.quantize.PIECE", 5000
    )  # weights are rounded in pieces, of which the last has fewer rows
    target = tmp_path / "a.safetensors"
    done = quantize(official, target, recipe)
    model = load_mmdit(official)
    report = quantize_(model, recipe)
    same(load_mmdit(target), model)
    assert done.layers == sum(layer.recipe is not None for layer in report) and done.linears == len(report)
    assert done.bytes_after == target.stat().st_size and done.bytes_before < official.stat().st_size
    assert str(done).startswith(f"{target}: {done.layers} of {done.linears} Linears in float8")


def test_both_spellings_load_the_same(official, tmp_path):
    models = []
    for spelling in ("comfyui", "comfyui-old"):
        quantize(official, tmp_path / f"{spelling}.safetensors", spelling=spelling)
        models.append(load_mmdit(tmp_path / f"{spelling}.safetensors"))
    same(*models)


def test_what_comfyui_finds_in_the_newer_spelling(official, tmp_path):
    """Notes stand in the header and beside the weights: loaders lose the one, some versions do not know the other."""
    quantize(official, tmp_path / "a.safetensors")
    (tensors, metadata), source = opened(tmp_path / "a.safetensors"), load_file(official)
    layers = {key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")}
    blocks = {key.removesuffix(".weight") for key in source if spellings.LINEARS.fullmatch(key) and "adaLN" not in key}
    assert layers == blocks
    said = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert json.loads(metadata["_quantization_metadata"])["layers"] == dict.fromkeys(layers, said)
    new = {f"{layer}.{name}" for layer in layers for name in ("weight_scale", "comfy_quant")}
    assert tensors.keys() == source.keys() | new
    for layer in layers:
        assert json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) == said
        assert tensors[f"{layer}.weight"].dtype == torch.float8_e4m3fn
        assert tensors[f"{layer}.weight_scale"].dtype == torch.float32 and not tensors[f"{layer}.weight_scale"].ndim
    assert all(torch.equal(tensors[key], source[key]) for key in source if key.removesuffix(".weight") not in layers)


@pytest.mark.parametrize("static", [False, True])
def test_what_comfyui_finds_in_the_older_spelling(official, tmp_path, static):
    """The marker has two elements where activations are not rounded; a header would select the newer spelling."""
    names = [name for name, part in load_mmdit(official).named_modules() if isinstance(part, torch.nn.Linear)]
    how = {"recipe": "fp8-static", "input_scales": dict.fromkeys(names, torch.tensor(0.5))} if static else {}
    quantize(official, tmp_path / "a.safetensors", spelling="comfyui-old", **how)
    tensors, metadata = opened(tmp_path / "a.safetensors")
    assert "_quantization_metadata" not in metadata
    marker = tensors.pop("model.diffusion_model.scaled_fp8")
    assert marker.dtype == torch.float8_e4m3fn and marker.numel() == (0 if static else 2)
    layers = {key.removesuffix(".scale_weight") for key in tensors if key.endswith(".scale_weight")}
    ends = ("scale_weight", "scale_input") if static else ("scale_weight",)
    assert tensors.keys() == load_file(official).keys() | {f"{layer}.{end}" for layer in layers for end in ends}
    recipes = {
        each.recipe for each in load_mmdit(tmp_path / "a.safetensors").parameters() if isinstance(each, Float8Tensor)
    }
    assert recipes == {RECIPES["fp8-static" if static else "fp8-tensor"]}


def test_static_recipes_need_input_scales(official, tmp_path):
    target = tmp_path / "a.safetensors"
    said = "25 have none, first 'transformer.joint_blocks.0."
    refuses(lambda: quantize(official, target, "fp8-static"), said, "mmdit.calibrate", error=ValueError)
    refuses(
        lambda: quantize(official, target, input_scales={"a": torch.tensor(1.0)}),
        "input_scales",
        "'tensor'",
        error=ValueError,
    )
    refuses(
        lambda: quantize(official, target, "fp8-static", input_scales={"a": torch.tensor(1.0)}),
        "input_scales",
        "first 'a'",
        error=ValueError,
    )
    model = load_mmdit(official)
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    scales = {name: torch.tensor(0.1 + i) for i, name in enumerate(names)}
    quantize(official, target, "fp8-static", input_scales=scales)
    quantize_(model, "fp8-static", input_scales=scales)
    same(load_mmdit(target), model)
    for bad in (torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises(ValueError, match=r"transformer\.joint_blocks.*input scale"):
            quantize(official, tmp_path / "b.safetensors", "fp8-static", input_scales=dict.fromkeys(names, bad))


# Layouts.


@pytest.mark.parametrize("spelling", ["comfyui", "comfyui-old"])
def test_a_folder_keeps_its_layout(tiny_folders, tmp_path, spelling):
    """All models, tokenizers and configs are written; diffusers' parts of a fused weight share its scale."""
    source, target = tiny_folders[VARIANT], tmp_path / "out"
    quantize(source, target, spelling=spelling)
    ours, wanted = Pipeline.from_pretrained(target), Pipeline.from_pretrained(source)
    for name, model in wanted.models.items():
        if name in ("transformer", "t5"):
            quantize_(model, "fp8-tensor")
        same(ours.models[name], model)
    tensors = load_file(target / "transformer" / "diffusion_pytorch_model.safetensors")
    end = "scale_weight" if spelling == "comfyui-old" else "weight_scale"
    scales = {float(tensors[f"transformer_blocks.0.attn.to_{part}.{end}"]) for part in "qkv"}
    assert scales == {float(ours.transformer.joint_blocks[0].x_block.attn.qkv.weight.scale)}
    assert ours("a red circle", num_inference_steps=1, height=64, width=64, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("layout", ["official", "comfyui"])
def test_other_folders(tiny_folders, tmp_path, layout):
    source = convert(tiny_folders[VARIANT], tmp_path / "source", layout)
    quantize(source, tmp_path / "out")
    names = {file.relative_to(tmp_path / "out").name for file in (tmp_path / "out").rglob("*.safetensors")}
    assert "t5xxl_fp8_e4m3fn_scaled.safetensors" in names and "clip_l.safetensors" in names
    model = Pipeline.from_pretrained(source).t5
    quantize_(model, "fp8-tensor")
    same(Pipeline.from_pretrained(tmp_path / "out").t5, model)


def test_a_text_encoder_has_no_prefix(tiny_folders, tmp_path):
    quantize(tiny_folders[VARIANT] / "text_encoder_3", tmp_path / "t5.safetensors", spelling="comfyui-old")
    keys = load_file(tmp_path / "t5.safetensors").keys()
    assert {"scaled_fp8", "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.scale_weight"} <= keys
    model = load_t5(tiny_folders[VARIANT] / "text_encoder_3")
    quantize_(model, "fp8-tensor")
    same(load_t5(tmp_path / "t5.safetensors"), model)


# Which layers.


def test_selected_layers(official, tmp_path):
    quantize(official, tmp_path / "a.safetensors", select=["joint_blocks.*.mlp.fc1", "transformer.t_embedder.*"])
    model = load_mmdit(official)
    quantize_(model, "fp8-tensor", select=["joint_blocks.*.mlp.fc1", "t_embedder.*"])
    same(load_mmdit(tmp_path / "a.safetensors"), model)
    with pytest.raises(ValueError, match=r"'joint_blocks\.9\.\*' .* 38 Linears"):
        quantize(official, tmp_path / "b.safetensors", select="joint_blocks.9.*")


def test_models_that_are_float8_already_stay_as_they_are(tiny_folders, tmp_path):
    """A T5 in float8, plain or scaled, is kept; selecting it by name is refused."""
    source = convert(tiny_folders[VARIANT], tmp_path / "source.safetensors", "single", dtype=torch.float16)
    tensors = load_file(source)
    encoder = {key: each for key, each in tensors.items() if key.startswith("text_encoders.t5xxl.")}
    plain = {key: spellings.cast(each, torch.float8_e4m3fn) for key, each in encoder.items()}
    save_file(tensors | plain, source)
    with pytest.warns(UserWarning, match="T5 encoder is float8 already"):
        quantize(source, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {key for key in found if "t5xxl" in key} == encoder.keys()
    assert all(torch.equal(found[key].view(torch.uint8), each.view(torch.uint8)) for key, each in plain.items())
    same(load_t5(tmp_path / "out.safetensors"), load_t5(source))
    for how in ({"select": "t5.*"}, {"select": "encoder.block.*"}):
        refuses(lambda how=how: quantize(source, tmp_path / "b.safetensors", **how), "T5 encoder is float8 already")
    again = tmp_path / "out.safetensors"
    refuses(lambda: quantize(again, tmp_path / "b.safetensors"), "is float8 already")
    assert not (tmp_path / "b.safetensors").exists()


def test_scaled_models_are_respelled(tiny_folders, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    quantize(tiny_folders[VARIANT], one, select="t5.encoder.*", spelling="comfyui-old")
    with pytest.warns(UserWarning, match="T5 encoder is float8 already"):
        quantize(one, two)
    same(load_t5(two), load_t5(one))
    assert not any("scale_weight" in key or "scaled_fp8" in key for key in load_file(two))
    assert isinstance(load_mmdit(two).joint_blocks[0].x_block.mlp.fc1.weight, Float8Tensor)


def test_clip_is_quantized_where_it_is_named_or_alone(tiny_folders, tmp_path):
    source, weight = tiny_folders[VARIANT], "text_model.encoder.layers.0.mlp.fc1.weight"
    quantize(source, tmp_path / "named.safetensors", select="clip_l.*fc1")
    quantize(source / "text_encoder", tmp_path / "alone.safetensors")
    for name in ("named", "alone"):
        assert isinstance(load_clip(tmp_path / f"{name}.safetensors", "l").get_parameter(weight), Float8Tensor)
    quantize(source, tmp_path / "usual.safetensors")
    assert type(load_clip(tmp_path / "usual.safetensors", "l").get_parameter(weight)) is torch.nn.Parameter


# All or nothing.


def test_nothing_is_overwritten_and_nothing_is_left(official, tmp_path, monkeypatch):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"mine")
    for taken in (target, tmp_path):
        refuses(lambda taken=taken: quantize(official, taken), f"{taken} exists already", error=FileExistsError)
    assert target.read_bytes() == b"mine"
    target.unlink()
    tensors = load_file(official)
    key = "model.diffusion_model.joint_blocks.2.x_block.mlp.fc2.weight"
    tensors[key][3, 5], tensors[key][0, 0] = float("nan"), float("inf")
    save_file(tensors, tmp_path / "bad.safetensors")
    facts = ("bad.safetensors", f"2 of {tensors[key].numel()}", "joint_blocks.2.x_block.mlp.fc2.weight", "not finite")
    refuses(lambda: quantize(tmp_path / "bad.safetensors", target), *facts)
    monkeypatch.setattr("mmdit.checkpoints.quantize.to_codes", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    refuses(lambda: quantize(official, target), "no space", error=OSError)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.safetensors"]


def test_what_cannot_be_asked_for(official, tiny_folders, tmp_path):
    target = tmp_path / "a.safetensors"
    cases = {
        "unknown recipe 'fp9'": {"recipe": "fp9"},
        "E4M3 with one per row": {
            "recipe": "fp8",
            "spelling": "comfyui-old",
        },
        "E5M2 with one per tensor": {
            "recipe": Recipe("e5m2", "tensor", "none"),
            "spelling": "comfyui-old",
        },
    }
    for said, how in cases.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            quantize_checkpoint(official, target, how.pop("recipe", "fp8-tensor"), progress=False, **how)
    refuses(lambda: quantize(official, tmp_path / "folder"), official, ".safetensors", error=ValueError)
    refuses(lambda: quantize(tiny_folders[VARIANT] / "vae", target), "nothing to quantize", "no Linear")
    refuses(lambda: quantize(tiny_folders[VARIANT], target, select=[]), "nothing to quantize", "select=")
    refuses(lambda: quantize(tiny_folders[VARIANT], tmp_path / "a.safetensor"), "a.safetensor would", error=ValueError)
    with pytest.warns(UserWarning, match="scale per row.*ComfyUI.*'fp8-tensor'"):
        quantize(official, target, "fp8")


def test_progress_is_shown(official, tmp_path, capsys):
    quantize_checkpoint(official, tmp_path / "a.safetensors", "fp8-tensor", progress=True)
    shown = capsys.readouterr().err
    count = 25 + len(load_file(official))
    assert f"{count}/{count}" in shown and "100%" in shown
    quantize(official, tmp_path / "b.safetensors")
    assert not capsys.readouterr().err


# Memory.


def test_memory_is_that_of_some_tensors(tmp_path):
    """Quantizing 120 MB holds some tensors of at most 2 MB at a time; loading takes the memory of the model."""
    config = MMDiTConfig(depth=12, hidden_size=384, context_dim=64, pooled_dim=64, pos_embed_size=16)
    with torch.device("meta"):
        shapes = {key: tuple(each.shape) for key, each in MMDiT(config).state_dict().items()}
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    write_tensors(source, {key: halves(shape) for key, shape in shapes.items()})
    assert source.stat().st_size > 120e6
    found = measure_quantizing.undisturbed(source, target)
    assert found["quantize"]["result"] == 12 * 8 - 3  # the last block passes no context on
    assert found["quantize"]["grown"] < 30e6, found
    assert found["load"]["result"] < 0.68 * source.stat().st_size
    assert found["load"]["grown"] < found["load"]["result"] + 30e6, found


def halves(shape):
    return LazyTensor(shape, torch.float16, lambda dtype, device: torch.full(shape, 0.5, dtype=dtype, device=device))
