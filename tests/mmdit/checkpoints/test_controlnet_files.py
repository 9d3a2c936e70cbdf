"""Files of ControlNets: recognised, described, converted, quantized, located; and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
import recorded_models as recorded
from mmdit import CheckpointError, ControlNet, ControlNetConfig, load_controlnet, load_mmdit
from mmdit.checkpoints.components import REGISTRY
from mmdit.checkpoints.controlnet import control_rules
from mmdit.checkpoints.describe import inspect
from mmdit.checkpoints.keymaps import to_ours, to_theirs
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.quantize import quantize_checkpoint
from mmdit.checkpoints.recognise import split
from mmdit.checkpoints.write import convert


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    small = {"hidden_size": 64, "mlp_dim": 256, "pooled_dim": 48}
    for name, config in recorded.NETS.items():
        joint = {"context_dim": 32, "pos_embed_size": 4} if config.is_joint else {}
        save_file(recorded.stored("controlnet", replace(config, **small, **joint)), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in recorded.NETS}


def shapes(name):
    return {key: tuple(entry["shape"]) for key, entry in golden.manifest(name)["tensors"].items()}


def lazy(found):
    return {key: LazyTensor.of(torch.empty(shape, device="meta", dtype=torch.float16)) for key, shape in found.items()}


def test_the_official_file():
    """Stability's file at full size, with the text embedder that the published ones may hold and nobody reads."""
    stored = shapes("sd3.5_large_controlnet.safetensors")
    names = split([*stored, "context_embedder.weight", "context_embedder.bias"])
    assert set(names.models) == {"controlnet"}
    assert {key for keys in names.dropped.values() for key in keys} == {
        "context_embedder.weight",
        "context_embedder.bias",
    }
    wanted = {key: shape for key, shape in stored.items() if key != "control_type"}
    config = REGISTRY["controlnet"].config_of(wanted, {"_control_type": "canny"})
    assert config == ControlNetConfig(depth=19, hidden_size=2432, pooled_dim=2048, kind="canny")
    with torch.device("meta"):
        model = ControlNet(config)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == wanted
    theirs = shapes("diffusers.sd3.5_large.controlnet")
    rules = control_rules(19, joint=False)
    found, left = to_ours(lazy(theirs), rules)
    assert (left, {key: one.shape for key, one in found.items()}) == ([], wanted)
    back, left = to_theirs(found, rules)
    assert (left, {key: one.shape for key, one in back.items()}) == ([], theirs)
    said = golden.manifest("diffusers.sd3.5_large.controlnet")["config"]
    ours = REGISTRY["controlnet"].to_json(config)
    unread = {"caption_projection_dim", "pos_embed_max_size"}  # of the parts that such a net does not have
    assert {key: ours[key] for key in said.keys() - unread} == {key: said[key] for key in said.keys() - unread}


@pytest.mark.parametrize("name", ["canny", "inpaint"])
def test_every_layout_gives_back_every_tensor(name, files, tmp_path):
    places = {
        "single": "net.safetensors",
        "official": "controlnet/*.safetensors",
        "comfyui": "models/controlnet/*.safetensors",
        "diffusers": "controlnet/diffusion_pytorch_model.safetensors",
    }
    wanted = load_controlnet(files[name])
    for layout, place in places.items():
        target = tmp_path / ("net.safetensors" if layout == "single" else layout)
        convert(files[name], target, layout)
        (file,) = tmp_path.glob(place) if layout == "single" else target.glob(place)
        found = load_controlnet(file)
        assert found.config == wanted.config, layout
        assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in wanted.state_dict().items()), layout
        if layout != "diffusers":
            assert load_file(file).keys() == load_file(files[name]).keys()
    assert ("control_type" in load_file(files[name])) == (name == "canny")


def test_what_inspect_says(files):
    text = inspect(files["canny"]).text
    assert "ControlNet: canny hints, 2 single-stream blocks x 64" in text
    assert "missing to draw" not in text
    assert "kind of hint not said, 2 joint blocks" in inspect(files["instantx"]).text


def test_folders(files, tmp_path):
    """A ComfyUI tree with several nets, of which the kind names one; other files there are set aside."""
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    shutil.copytree(files["canny"].parent, tmp_path / "models" / "controlnet")
    save_file(
        {"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}, tmp_path / "models/controlnet/sd15.safetensors"
    )
    found = locate(tmp_path)
    assert len(found.several["controlnet"]) == 5
    assert any("ControlNet of another model" in reason for reason in found.files.aside.values())
    assert load_controlnet(tmp_path, kind="depth").config.kind == "depth"
    with pytest.raises(CheckpointError, match="5 files"):
        load_controlnet(tmp_path)
    assert inspect(tmp_path).text.count(".safetensors") >= 5


def test_kinds(files, tmp_path):
    assert load_controlnet(files["instantx"], kind="tile").config.kind == "tile"
    assert load_controlnet(files["canny"], kind="canny").config.kind == "canny"
    with pytest.raises(CheckpointError, match=r"canny.*depth"):
        load_controlnet(files["canny"], kind="depth")
    with pytest.raises(CheckpointError, match=r"17 channels|inpaint"):
        load_controlnet(files["inpaint"], kind="canny")
    with pytest.raises(CheckpointError, match="16 channels"):
        load_controlnet(files["instantx"], kind="inpaint")
    with pytest.raises(ValueError, match=r"cany.*canny"):
        load_controlnet(files["instantx"], kind="cany")


@pytest.mark.parametrize("value", [torch.tensor([3], dtype=torch.int32), torch.tensor([1.0]), torch.tensor([0, 1])])
def test_a_kind_that_no_file_has(value, files, tmp_path):
    save_file(load_file(files["canny"]) | {"control_type": value}, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="control_type"):
        load_controlnet(tmp_path / "net.safetensors")


def test_config_and_tensor_that_disagree(files, tmp_path):
    shutil.copy(files["canny"], tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_control_type": "depth"}))
    with pytest.raises(CheckpointError, match=r"depth.*canny"):
        load_controlnet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"force_zeros_for_pooled_projection": 1}))
    with pytest.raises(CheckpointError, match="force_zeros_for_pooled_projection"):
        load_controlnet(tmp_path)


def test_one_kind_of_model_in_the_place_of_another(files, tmp_path):
    with pytest.raises(CheckpointError, match="looks like ControlNet"):
        load_mmdit(files["canny"])
    save_file(recorded.stored("transformer", recorded.TRANSFORMERS["sd35l4"]), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="looks like transformer"):
        load_controlnet(tmp_path / "model.safetensors")
    save_file(
        {"controlnet_x_embedder.weight": torch.zeros(1), "pos_embed_input.x": torch.zeros(1)},
        tmp_path / "flux.safetensors",
    )
    with pytest.raises(CheckpointError, match="ControlNet of another model"):
        load_controlnet(tmp_path / "flux.safetensors")


def test_missing_tensors_are_listed(files, tmp_path):
    tensors = load_file(files["instantx"])
    for key in ("controlnet_blocks.1.bias", "transformer_blocks.0.attn.to_k.weight"):
        tensors.pop(key)
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"to_k\.weight|to_q\.weight"):
        load_controlnet(tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["canny", "instantx"])
def test_quantized_files(name, files, tmp_path):
    """Linears of the blocks are in float8, the rest is byte for byte as before, and the error is that of float8."""
    written = quantize_checkpoint(files[name], tmp_path / "fp8.safetensors", "fp8-tensor")
    blocks = 2 * (8 if name == "instantx" else 4)  # qkv, proj, fc1, fc2 of each stream
    assert written.layers == blocks + 2  # and the projections to residuals
    plain, rounded = (
        load_controlnet(files[name], dtype=torch.float32),
        load_controlnet(written.path, dtype=torch.float32),
    )
    assert rounded.config == plain.config
    dense = load_controlnet(written.path, dtype=torch.float32, float8="dequantize")
    for key, tensor in plain.state_dict().items():
        error = (dense.state_dict()[key] - tensor).abs().max() / tensor.abs().max()
        assert error <= 2**-4 if key.endswith("weight") and ".linear" not in key and "embed" not in key else error == 0
