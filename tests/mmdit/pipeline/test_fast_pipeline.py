"""`pipe.accelerate()`: the same pictures, refusals, and the way back. On a CPU without Triton's kernels and graphs."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import mmdit
from mmdit.cli import main
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.fast_vae import FastVAE, plain_norm
from mmdit.training.adapters import attach
from mmdit.training.config import TrainingConfig
from quant.training import fake_quantize_

PROMPT = "a red circle"
SIZE = {"height": 64, "width": 64, "max_sequence_length": 77}
SETTINGS = {"num_inference_steps": 3, "seed": 1, "output_type": "latent", "progress": False, **SIZE}
PICTURE = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 24, 48, 64))


@pytest.fixture(scope="module")
def loaded():
    return mmdit.Pipeline.demo()


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.plain()


def latent_of(pipe, **options):
    return pipe(PROMPT, **SETTINGS | options).images


def near(found, wanted):
    return float((found - wanted).norm() / wanted.norm()) < 1e-4


GUIDED = {
    "euler": {},
    "two predictions a step": {"sampler": "heun"},
    "between the planned sigmas": {"sampler": "dpm_2"},
    "CFG++": {"sampler": "euler_cfg_pp"},
    "no guidance": {"guidance_scale": 1.0},
    "a layer skipped": {"skip_guidance_layers": [1]},
    "perturbed attention": {"guidance": mmdit.Guidance(perturbed_layers=(1,))},
    "several pictures": {"num_images_per_prompt": 2},
    "an odd size": {"height": 48, "width": 80},
    "from a picture": {"image": PICTURE, "strength": 0.7},
    "a mask": {"image": PICTURE, "mask_image": MASK, "strength": 0.9, "num_images_per_prompt": 2},
    "a mask and a crop": {"image": PICTURE, "mask_image": MASK, "padding_mask_crop": 8, "output_type": "pt"},
    "a second pass": {"hires": mmdit.Hires(scale=1.5, strength=0.7)},
    "a second pass of pixels": {"hires": mmdit.Hires(scale=1.25, strength=0.7, space="pixel", filter="lanczos")},
}


@pytest.mark.parametrize("options", GUIDED.values(), ids=GUIDED)
def test_it_draws_the_same(pipe, options, monkeypatch):
    wanted, own, passes = latent_of(pipe, **options), MMDiT.forward, []
    pipe.accelerate()
    monkeypatch.setattr(MMDiT, "forward", lambda *args, **rest: passes.append(1) or own(*args, **rest))
    assert near(latent_of(pipe, **options), wanted)
    assert bool(passes) == ("guidance" in options)  # perturbed attention runs the model's own forward


def test_again_with_a_mask_by_comfyui_s_rules_and_inverted(pipe):
    how = {"image": PICTURE, "mask_image": MASK, "strength": 0.9}
    noise = {"num_inference_steps": 2, "progress": False}
    pipe.profile = mmdit.PROFILES["comfyui"]
    try:
        wanted = latent_of(pipe, **how), pipe.invert(PICTURE, PROMPT, **noise).latents
        pipe.accelerate()
        for _ in range(2):
            assert near(latent_of(pipe, **how), wanted[0])
            assert near(pipe.invert(PICTURE, PROMPT, **noise).latents, wanted[1])
    finally:
        pipe.profile = mmdit.PROFILES["diffusers"]


def test_its_own_forward_does_not_run_and_plain_undoes_it(pipe, monkeypatch):
    wanted, passes = latent_of(pipe), []
    pipe.accelerate()
    with monkeypatch.context() as patched:
        patched.setattr(MMDiT, "forward", lambda *args, **rest: passes.append(args))
        latent_of(pipe)
    assert passes == []
    pipe.plain()
    assert pipe.accelerated is None
    assert torch.equal(latent_of(pipe), wanted)
    pipe.plain()


def test_float8_pipelines():
    pipe = mmdit.Pipeline.demo(quant="fp8")
    wanted = latent_of(pipe)
    report = pipe.accelerate()
    assert {layer.reads for layer in report.layers} == {"codes"}
    found = latent_of(pipe)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_what_looks_inside_refuses_it(pipe):
    pipe.accelerate()
    for look in (
        lambda: mmdit.capture(pipe, "joint_blocks.1.*"),
        lambda: mmdit.patch(pipe, "joint_blocks.1.x_block.mlp.post", scale=2.0),
        lambda: mmdit.attention_maps(pipe, "circle"),
    ):
        with pytest.raises(ValueError, match=r"pipe\.plain\(\)"), look():
            latent_of(pipe)
    with pytest.raises(ValueError, match=r"pipe\.plain\(\)"):
        mmdit.calibrate(pipe, [PROMPT])
    pipe.plain()
    with mmdit.capture(pipe, "joint_blocks.1.x_block.resid_post"):
        latent_of(pipe)


def test_a_step_that_is_not_finite_names_its_layer(pipe):
    pipe.accelerate()
    weight = pipe.transformer.joint_blocks[1].x_block.mlp.fc1.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(FloatingPointError, match=r"step 0 .* sigma 1 .*joint_blocks\.1\.x_block\.mlp\.fc1"):
            latent_of(pipe)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_models_that_take_turns_draw_the_same():
    wanted = latent_of(mmdit.Pipeline.demo(fast=True))
    for how in ({"offload": "stages"}, {"memory": "40MB"}):
        pipe = mmdit.Pipeline.demo(device="cpu", fast=True, **how)
        assert torch.equal(latent_of(pipe), wanted)
        assert "CUDA graphs: no GPU" in str(pipe.accelerated.report())


def test_it_can_be_asked_for_when_loading(tmp_path, loaded):
    assert mmdit.Pipeline.demo(fast=True).accelerated is not None
    outs = [tmp_path / "plain.png", tmp_path / "fast.png"]
    for out, more in zip(outs, ([], ["--fast"]), strict=True):
        assert main(["generate", PROMPT, "--steps", "2", "--device", "cpu", "-o", str(out), *more]) in (0, None)
    plain, fast = (np.asarray(Image.open(out), dtype=int) for out in outs)
    assert abs(plain - fast).max() <= 2


def test_a_folder_is_loaded_fast(loaded):
    fast = mmdit.Pipeline.from_pretrained(EMBEDDED, fast=True)
    assert loaded.accelerated is None
    assert fast.accelerated is not None
    options = {"height": 64, "width": 64, "max_sequence_length": 16, "num_inference_steps": 2}
    assert near(latent_of(fast, **options), latent_of(loaded, **options))
    assert any("fast VAE" in one for one in fast.accelerate().left_out)


def test_a_vae_or_encoder_that_is_exchanged_is_used(loaded):
    from mmdit.runtime.beside import Beside

    beside = Beside(loaded.vae, loaded._text_encoders, None)
    other = copy.deepcopy(loaded.vae)
    beside._vae = FastVAE(loaded.vae, plain_norm)
    assert beside.vae(other) is other
    assert beside.vae(loaded.vae) is loaded.vae  # no Triton on a CPU
    assert beside.encoders(loaded._text_encoders) == {}
    assert len(beside.left_out) == 1


def test_the_command_draws_with_models_that_take_turns(tmp_path):
    out = tmp_path / "a.png"
    how = ["--fast", "--offload", "stages", "--device", "cpu", "--steps", "1", "--height", "64", "--width", "64"]
    assert main(["generate", PROMPT, *how, "-o", str(out)]) in (0, None)
    assert out.exists()


def test_a_copy_of_an_accelerated_pipeline_is_accelerated(pipe):
    pipe.accelerate(graph=False)
    wanted = latent_of(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert other.accelerated.model is other.transformer
        assert other.transformer is not pipe.transformer
        assert torch.equal(latent_of(other), wanted)
    alone = Accelerated(pipe.transformer, graph=False, graphs=2, attention="flash")
    other = copy.deepcopy(alone)
    assert (other.graphs.limit, other._asked, other._only) == (2, False, "flash")


def test_a_pipeline_whose_weights_move_is_not_copied(loaded):
    moving = mmdit.Pipeline.demo(device="cpu", offload="stages")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="offload= cannot be copied"):
            copied(moving)
    assert copy.copy(moving).transformer is moving.transformer


class Half(torch.nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_keeps_it(pipe):
    """The fast forward, a LoRA, an adapter in training and fake quantization multiplied by its weight alone."""
    own = copy.deepcopy(pipe)
    own.transformer.joint_blocks[1].x_block.mlp.fc1.__class__ = Half
    wanted, name = latent_of(own), "joint_blocks.1.x_block.mlp.fc1"
    trained = TrainingConfig(rank=2, dtype="float32", targets=(name,))
    for change in (
        own.accelerate,
        lambda: own.load_lora_weights(mmdit.OUTLINES, "outlines"),
        lambda: attach(own.transformer, trained),
        lambda: fake_quantize_(own.transformer, "fp8-tensor"),
    ):
        with pytest.raises(ValueError, match=f"{name}.* Half"):
            change()
        assert torch.equal(latent_of(own), wanted)
    own.transformer.joint_blocks[1].x_block.mlp = torch.nn.Sequential(own.transformer.joint_blocks[1].x_block.mlp)
    with pytest.raises(ValueError, match=f"{name.removesuffix('.fc1')}"):
        own.accelerate()
    fake = copy.deepcopy(pipe)
    fake.load_lora_weights(mmdit.OUTLINES, "outlines")
    with pytest.raises(ValueError, match="LoraLinear"):
        fake_quantize_(fake.transformer, "fp8-tensor")
    fake.unload_lora_weights()
    fake_quantize_(fake.transformer, "fp8-tensor")
    with pytest.raises(ValueError, match="FakeQuantizedLinear"):
        fake.accelerate()
