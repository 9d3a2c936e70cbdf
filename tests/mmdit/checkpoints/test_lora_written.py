"""LoRA files in other names, merged checkpoints, and what `mmdit inspect` says of a LoRA."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_cases as recorded
import lora_files as files
import spellings
from mmdit import load_lora, load_mmdit, merge_lora
from mmdit.checkpoints.lora_checkpoint import Strengths, merge_checkpoint
from mmdit.checkpoints.lora_convert import convert_lora
from mmdit.checkpoints.lora_describe import describe_lora, lora_norms
from mmdit.checkpoints.write import convert
from mmdit.cli import main
from quant import Float8Tensor

SAYABLE = ["LoRA", "DoRA, rows", "DoRA, inputs", "LoHa", "LoKr", "LoKr, whole", "GLoRA", "OFT", "full", "replacement"]
STARTS = {
    "diffusers": "transformer.transformer_blocks.",
    "kohya": "lora_unet_joint_blocks_",
    "comfyui": "diffusion_model.",
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return files.model().state_dict()


@pytest.fixture
def written(tmp_path: Path):
    def write(naming: str, kind: str) -> Path:
        path = tmp_path / f"{naming}-{kind}.safetensors"
        save_file(files.written(naming, kind)[0], path)
        return path

    return write


def same(state: dict[str, Tensor], one: Path, other: Path, limit: float = 1e-5) -> None:
    before, after = (merge_lora(state, load_lora(path), 0.7) for path in (one, other))
    for key, tensor in before.items():
        assert (tensor is state[key]) == (after[key] is state[key])
        assert (after[key] - tensor).norm() <= limit * (tensor - state[key]).norm() + 1e-6 * tensor.norm(), key


@pytest.mark.parametrize("layout", STARTS)
@pytest.mark.parametrize("naming", ["diffusers, SimpleTuner", "kohya sd-scripts, OneTrainer", "OneTrainer, OMI"])
def test_loras_mean_the_same_in_every_layout(naming: str, layout: str, state, written, tmp_path: Path) -> None:
    source = written(naming, "LoRA")
    found = convert_lora(source, tmp_path / "out.safetensors", layout)
    assert any(key.startswith(STARTS[layout]) for key in load_file(found))
    assert any("alpha" in key for key in load_file(found)) == (layout != "diffusers")
    same(state, source, found)
    back = convert_lora(found, tmp_path / "back.safetensors", "diffusers" if layout != "diffusers" else "kohya")
    same(state, source, back)
    same(state, source, convert_lora(back, tmp_path / "again.safetensors", layout))


@pytest.mark.parametrize("kind", SAYABLE)
def test_other_kinds_keep_their_tensors_in_official_names(kind: str, state, written, tmp_path: Path) -> None:
    source = written("kohya sd-scripts, OneTrainer", kind)
    dotted = convert_lora(source, tmp_path / "dotted.safetensors", "comfyui")
    same(state, source, dotted)
    for key, tensor in load_file(convert_lora(dotted, tmp_path / "back.safetensors", "kohya")).items():
        assert torch.equal(tensor.flatten().float(), load_file(source)[key].flatten().float()), key


@pytest.mark.parametrize("file", ["kohya_l", "onetrainer_m"])
def test_recorded_files_and_their_text_encoders(file: str, tmp_path: Path) -> None:
    source = recorded.FOLDER / f"{file}.safetensors"
    found = convert_lora(source, tmp_path / "out.safetensors", "comfyui")
    models = {"transformer": recorded.bare("l128" if file.endswith("_l") else "m128")}
    models |= {"clip_l": recorded.base("clip_l64"), "clip_g": recorded.base("clip_g64"), "t5": recorded.base("t5_64")}
    for part, weights in models.items():
        if load_lora(source).of(part):
            one, other = (merge_lora(weights, load_lora(path), part=part) for path in (source, found))
            for key in weights:
                torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)


UNSAID = [
    ("kohya sd-scripts, OneTrainer", "LoHa", "diffusers", "lora_unet_joint_blocks_0_x_block_attn_qkv.*loha"),
    ("kohya sd-scripts, OneTrainer", "DoRA, rows", "diffusers", "dora"),
    ("OneTrainer, legacy", "LoKr", "kohya", "lokr"),
    ("diffusers, SimpleTuner", "DoRA of peft", "comfyui", "dora"),
]


@pytest.mark.parametrize(("naming", "kind", "layout", "said"), UNSAID)
def test_what_a_layout_cannot_say_is_named(naming, kind, layout, said, written, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        convert_lora(written(naming, kind), tmp_path / "out.safetensors", layout)
    assert not (tmp_path / "out.safetensors").exists()


def test_t5_is_nothing_for_diffusers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="T5"):
        convert_lora(recorded.FOLDER / "kohya_l.safetensors", tmp_path / "out.safetensors", "diffusers")
    with pytest.raises(FileExistsError):
        convert_lora(recorded.FOLDER / "kohya_l.safetensors", recorded.FOLDER / "loha_l.safetensors", "kohya")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, state) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("spelling", ["fp32", "bf16", "fp8 e4m3", "fp8 scaled, ComfyUI per layer"])
def test_merged_checkpoints_load_as_models_that_are_merged_in_memory(spelling, checkpoint, written, tmp_path) -> None:
    base = spellings.respell(checkpoint, tmp_path / "base.safetensors", spelling)
    lora = load_lora(written("diffusers, SimpleTuner", "LoRA"))
    found = merge_checkpoint(base, [(lora, Strengths(0.5))], tmp_path / "merged.safetensors")
    assert found.tensors == 3
    wanted, model = merge_lora(load_mmdit(base), lora, 0.5), load_mmdit(found.path)
    for key, tensor in wanted.state_dict(keep_vars=True).items():
        other = model.state_dict(keep_vars=True)[key]
        if (
            spelling == "fp8 e4m3" and key.removesuffix(".weight") in files.SHAPES
        ):  # without scales there is none to find
            torch.testing.assert_close(value_of(other), value_of(tensor), rtol=0.13, atol=2**-9)
        else:
            assert torch.equal(value_of(other), value_of(tensor)), key
            assert type(other) is type(tensor)


def value_of(tensor: Tensor) -> Tensor:
    return (tensor.dequantize(torch.float32) if isinstance(tensor, Float8Tensor) else tensor.detach()).float()


def test_merged_folders_keep_their_layout(checkpoint: Path, tmp_path: Path) -> None:
    source = convert(checkpoint, tmp_path / "source", "diffusers")
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 64), f"{name}.lora_B.weight": torch.ones(64, 1)}
    found = merge_checkpoint(source, [(load_lora(tensors), Strengths())], tmp_path / "merged")
    before, after = (load_file(next(folder.rglob("*.safetensors"))) for folder in (source, found.path))
    assert before.keys() == after.keys()
    differ = [key for key in before if not torch.equal(before[key], after[key])]
    assert differ == ["transformer_blocks.0.attn.to_q.weight"]


def test_description_and_norms(checkpoint: Path, state, written, capsys) -> None:
    path = written("diffusers, SimpleTuner", "LoRA")
    text = describe_lora(path)
    assert all(word in text for word in ("joint_blocks.*.x_block.attn.qkv.weight[k]", "rank 4", "0.5", "width 64"))
    norms = lora_norms(load_lora(path), {"transformer": files.model()})
    key = "joint_blocks.0.x_block.mlp.fc2.weight"
    change = merge_lora(state, load_lora(path))[key] - state[key]
    assert norms[f"transformer.{key}"].relative == pytest.approx(float(change.norm() / state[key].norm()), rel=1e-5)
    assert main(["inspect", str(path), "--model", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "transformer.joint_blocks.1" in out
    for key, one in lora_norms(load_lora(path), checkpoint).items():
        assert one == pytest.approx(norms[key])
    assert main(["inspect", str(checkpoint), "--model", str(checkpoint)]) == 2


def test_command_line(checkpoint: Path, written, tmp_path: Path, capsys) -> None:
    lora = str(written("diffusers, SimpleTuner", "LoRA"))
    assert main(["convert", lora, str(tmp_path / "kohya.safetensors"), "--layout", "kohya"]) == 0
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", str(checkpoint), f"{lora}:0.5", f"{tmp_path / 'kohya.safetensors'}:-0.5:1", str(merged)]) == 0
    assert "3 tensors" in capsys.readouterr().out
    before, after = load_file(checkpoint), load_file(merged)
    for key, tensor in before.items():  # one and the same LoRA, added and taken away
        torch.testing.assert_close(after[key], tensor, rtol=1e-4, atol=1e-5)
    assert main(["convert", lora, str(tmp_path / "x.safetensors"), "--layout", "single"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["merge", str(checkpoint), f"{lora}:nan", str(tmp_path / "y.safetensors")])
    assert main(["merge", str(checkpoint), lora, str(merged)]) == 1


def test_a_lora_that_changes_nothing_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    lora = load_lora({f"{name}.lora_up.weight": torch.ones(4, 1), f"{name}.lora_down.weight": torch.ones(1, 4)})
    with pytest.raises(ValueError, match="clip_l"):
        merge_checkpoint(checkpoint, [(lora, Strengths())], tmp_path / "x.safetensors")
