"""Which blocks of a LoRA decide, and how large its changes are."""

import matplotlib.pyplot as plt
import pytest
import torch

import lora_files as files
import mmdit
from mmdit import Pipeline, load_lora, lora_norms, plots, sweep_lora
from mmdit.models.lora import all_beside

NAMES = [f"joint_blocks.{i}.x_block.{module}" for i in (0, 2) for module in ("attn.qkv", "mlp.fc1")]


def tensors() -> dict[str, torch.Tensor]:
    found = {}
    for i, name in enumerate(NAMES):
        found[f"diffusion_model.{name}.lora_B.weight"] = files.noise(i, 768 if "qkv" in name else 1024, 2).float()
        found[f"diffusion_model.{name}.lora_A.weight"] = files.noise(i, 2, 256).float()
    return found


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.demo()


def acting(pipe: Pipeline) -> torch.Tensor:
    """Whether each Linear has something other than zero beside it."""
    beside = all_beside(pipe.transformer)
    return torch.tensor([float(bool(beside[name].up.any())) for name in NAMES])


@pytest.mark.parametrize("leave_out", [False, True])
def test_sweep_over_blocks_and_back(pipe: Pipeline, leave_out: bool) -> None:
    pipe.load_lora_weights(tensors(), "one", 0.5)
    found = sweep_lora(pipe, "one", lambda: acting(pipe), leave_out=leave_out, progress=False)
    assert found.axes["block"] == ("joint_blocks.0", "joint_blocks.2")
    wanted = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    assert torch.equal(found.values, 1 - wanted if leave_out else wanted)
    assert pipe.lora_report().adapters["one"].weight == 0.5
    finer = sweep_lora(pipe, "one", lambda: acting(pipe).sum(), blocks=["joint_blocks.2.x_block.mlp"], progress=False)
    assert finer.values.tolist() == [1.0]
    with pytest.raises(ValueError, match="'two'"):
        sweep_lora(pipe, "two", lambda: 0)
    with pytest.raises(ValueError, match=r"joint_blocks\.9"):
        sweep_lora(pipe, "one", lambda: 0, blocks=["joint_blocks.9"], progress=False)
    assert pipe.lora_report().adapters["one"].weight == 0.5
    pipe.unload_lora_weights()


def test_norms_by_block_and_module(pipe: Pipeline) -> None:
    lora = load_lora(tensors())
    norms = lora_norms(lora, pipe.models)
    assert list(norms) == [f"transformer.{name}.weight" for name in NAMES]
    change = files.noise(0, 768, 2) @ files.noise(0, 2, 256)
    assert norms[f"transformer.{NAMES[0]}.weight"].change == pytest.approx(float(change.norm()), rel=1e-4)
    figure = plots.lora_norms(norms, title="a LoRA")
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (2, 2)
    assert float(shown[0, 0]) == pytest.approx(norms[f"transformer.{NAMES[0]}.weight"].relative)
    plt.close(figure)
    with pytest.raises(ValueError, match="norms"):
        plots.lora_norms({})


def test_capture_of_one_drawing_with_and_without(pipe: Pipeline) -> None:
    pipe.load_lora_weights(tensors())
    drawing = {"seed": 1, "num_inference_steps": 1, "guidance_scale": 1.0, "height": 64, "width": 64}
    points = "joint_blocks.2.x_block.resid_post"
    with mmdit.capture(pipe, points, budget=None) as on:
        pipe("a red circle", output_type="latent", **drawing)
    with pipe.without_lora(), mmdit.capture(pipe, points, budget=None) as off:
        pipe("a red circle", output_type="latent", **drawing)
    assert not torch.equal(torch.as_tensor(on[points]), torch.as_tensor(off[points]))
    pipe.unload_lora_weights()
