"""LoRAs of a pipeline against diffusers and peft, on the same tiny random weights and files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from mmdit import Pipeline

# peft warns of every second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
MODULES = {  # of the tiny SD3.5-Medium: rows and inputs
    "transformer_blocks.0.attn.to_q": (128, 128),
    "transformer_blocks.0.attn.to_out.0": (128, 128),
    "transformer_blocks.1.attn.add_v_proj": (128, 128),
    "transformer_blocks.0.attn2.to_k": (128, 128),
    "transformer_blocks.1.ff.net.0.proj": (512, 128),
    "transformer_blocks.0.norm1.linear": (9 * 128, 128),
    "transformer_blocks.1.norm1_context.linear": (6 * 128, 128),
    "transformer_blocks.2.norm1_context.linear": (2 * 128, 128),
    "norm_out.linear": (2 * 128, 128),
    "proj_out": (64, 128),
}
TEXT = [f"text_model.encoder.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
DRAWING = {
    "num_inference_steps": 2,
    "height": 32,
    "width": 32,
    "output_type": "latent",
    "guidance_scale": 4.0,
    "max_sequence_length": 32,
}
PROMPT = "a red circle above a blue square"


def written(path: Path, seed: int, alpha: int, *, dora: bool = False) -> Path:
    """A file as diffusers saves it, whose header has an alpha that is not the rank of 4."""
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def add(key: str, rows: int, columns: int) -> None:
        tensors[f"{key}.lora_A.weight"] = 0.2 * torch.randn(4, columns, generator=g)
        tensors[f"{key}.lora_B.weight"] = 0.2 * torch.randn(rows, 4, generator=g)
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = 1 + 0.1 * torch.randn(rows, generator=g)

    for name, (rows, columns) in MODULES.items():
        add(f"transformer.{name}", rows, columns)
    header = {"transformer.r": 4, "transformer.lora_alpha": alpha, "transformer.use_dora": dora}
    header["transformer.target_modules"] = list(MODULES)
    if not dora:
        for name in TEXT:
            add(f"text_encoder.{name}", 64, 64)
        header |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 4, "text_encoder.target_modules": TEXT}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    a, b = written(root / "a.safetensors", 1, 8), written(root / "b.safetensors", 2, 2)
    doras = {
        name: written(root / f"{name}.safetensors", i, 4, dora=True) for i, name in enumerate(("dora", "other"), 3)
    }
    return {"a": a, "b": b, **doras}


@pytest.fixture
def both(tiny_folders):
    folder = tiny_folders["sd3.5-medium"]
    return Pipeline.from_pretrained(folder), tiny.load(folder)


def agree(both, limit: float = 2e-5) -> Tensor:
    ours, theirs = both
    found = ours(PROMPT, generator=torch.Generator().manual_seed(3), **DRAWING).images
    wanted = theirs(PROMPT, generator=torch.Generator().manual_seed(3), **DRAWING).images
    assert tiny.error(found, wanted) < limit
    return found


def each(both, method: str, *args, **kwargs) -> None:
    for pipe in both:
        getattr(pipe, method)(*args, **kwargs)


def test_attached_weighted_fused_and_taken_away(both, files) -> None:
    plain = agree(both)
    each(both, "load_lora_weights", files["a"], adapter_name="a")
    drawn = [plain, agree(both)]
    each(both, "load_lora_weights", files["b"], adapter_name="b")
    each(both, "set_adapters", ["a", "b"], [0.7, -0.5])
    drawn.append(agree(both))
    each(both, "set_adapters", ["a"], [0.0])
    agree(both)
    each(both, "set_adapters", "b", 1.5)
    drawn.append(agree(both))
    assert both[0].get_active_adapters() == both[1].get_active_adapters() == ["b"]
    each(both, "disable_lora")
    assert torch.equal(agree(both), plain)
    each(both, "enable_lora")
    each(both, "set_adapters", ["a", "b"], [0.7, -0.5])
    each(both, "fuse_lora", adapter_names=["a", "b"])
    assert tiny.error(agree(both), drawn[2]) < 2e-5
    each(both, "unfuse_lora")
    agree(both)
    assert all(tiny.error(one, other) > 1e-2 for i, one in enumerate(drawn) for other in drawn[:i])
    both[0].unload_lora_weights()
    assert torch.equal(both[0](PROMPT, seed=3, **DRAWING).images, plain)


def test_dora(both, files) -> None:
    """peft's rule: the magnitude stays whatever the weight is, so that weight 0 is not the base model."""
    plain = agree(both)
    each(both, "load_lora_weights", files["dora"], adapter_name="dora")
    for weight in (1.0, -0.5, 0.0):
        each(both, "set_adapters", "dora", weight)
        drawn = agree(both)
        assert tiny.error(drawn, plain) > 1e-2
    both[0].set_adapters("dora", -0.5)
    drawn = both[0](PROMPT, seed=3, **DRAWING).images
    both[0].fuse_lora()
    assert tiny.error(both[0](PROMPT, seed=3, **DRAWING).images, drawn) < 2e-5


def test_two_doras_and_a_lora(both, files) -> None:
    """Each DoRA divides by the norms of the base with its own change alone, whatever was changed before it."""
    ours, theirs = both
    for name in ("dora", "a", "other"):
        each(both, "load_lora_weights", files[name], adapter_name=name)
    each(both, "set_adapters", ["dora", "a", "other"], [0.8, 0.5, 1.2])
    drawn = agree(both)
    name, layer = "joint_blocks.0.x_block.attn.proj", theirs.transformer.transformer_blocks[0].attn.to_out[0]
    base = weight = layer.base_layer.weight.double()
    for key, scale in (("dora", 0.8), ("a", 0.5 * 8 / 4), ("other", 1.2)):
        weight = weight + scale * layer.lora_B[key].weight.double() @ layer.lora_A[key].weight.double()
        if key != "a":
            change = scale * layer.lora_B[key].weight.double() @ layer.lora_A[key].weight.double()
            weight *= (layer.lora_magnitude_vector[key].weight.double() / (base + change).norm(dim=1))[:, None]
    delta = ours.transformer.get_submodule(name).delta.double()
    torch.testing.assert_close(base + delta, weight, rtol=1e-5, atol=1e-6)
    ours.fuse_lora(["dora", "a"])  # the other one stays attached to merged weights
    assert tiny.error(agree(both), drawn) < 2e-5
    each(both, "fuse_lora", adapter_names=["dora", "a", "other"])
    assert tiny.error(agree(both), drawn) < 2e-5
