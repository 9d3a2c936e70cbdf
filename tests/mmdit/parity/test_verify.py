"""`verify` passes on right pipelines in every layout, and names the stage where a fault was planted."""

import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from encoders import TextRules
from encoders.clip import QuickGELU
from mmdit import PROFILES, Pipeline
from mmdit.checkpoints.write import convert
from mmdit.parity.report import Comparison, Limits
from mmdit.parity.verify import GROUPS, LIMITS, group_of, limits_of, verify

SIZE = (32, 48)


@pytest.fixture(scope="module")
def official(tiny_folders, tmp_path_factory):
    return convert(tiny_folders["sd3.5-medium"], tmp_path_factory.mktemp("official") / "model", "official")


@pytest.fixture(scope="module")
def right(tiny_folders):
    return Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])


def check(folder, **settings) -> Comparison:
    return verify(folder, **({"size": SIZE, "steps": 2} | settings))


@pytest.mark.parametrize("variant", ["sd3-medium", "sd3.5-medium"])
def test_a_right_pipeline_passes(tiny_folders, variant):
    report = check(tiny_folders[variant], steps=3)
    assert report.passed and report.first is None, str(report)
    text = str(report)
    assert f"PASS: all {len(report.stages)} stages" in text.splitlines()[-1]
    assert "32 x 48 pixels, 3 steps" in text and "its weights: the same files" in text
    assert set(map(group_of, (stage.name for stage in report.stages))) == set(GROUPS)
    names = [stage.name for stage in report.stages]
    assert [name for name in names if name.endswith(" latent") and name.startswith("step ")] == [
        name for i in range(3) for name in [f"step {i} input latent"] * (i != 1) + [f"step {i} latent"]
    ]
    for step in (0, 2):
        blocks = [name for name in names if name.startswith(f"step {step} block ")]
        streams = ["0 context", "0 x", "1 context", "1 x", "2 x"]
        assert blocks == [f"step {step} block {stream}" for stream in streams]
    whole = {stage.name: stage.carried for stage in report.stages}
    assert whole["pixels"] < LIMITS["pixels"].value and whole["step 2 latent"] < 3 * LIMITS["latents"].value


def test_the_default_picture_is_not_square(tiny_folders):
    report = verify(tiny_folders["sd3-medium"], steps=1)
    assert report.passed and "192 x 256 pixels, 1 steps" in str(report)


def test_in_float64_the_steps_are_held_to_a_millionth(tiny_folders):
    report = check(tiny_folders["sd3.5-medium"], dtype=torch.float64)
    assert report.passed, str(report)
    limits = {stage.name: stage.carried_tolerance for stage in report.stages}
    assert [limits[f"step {i} latent"] for i in range(2)] == [1e-6, 2e-6] and limits["pixels"] == 1e-6


@pytest.mark.parametrize("layout", ["official", "comfyui", "single", "float8"])
def test_other_layouts_are_rewritten_for_the_reference(tiny_folders, official, tmp_path, layout):
    path = tmp_path / "model.safetensors"
    if layout == "official":
        path = official
    elif layout == "comfyui":
        path = convert(official, tmp_path / "comfy", "comfyui")
    else:
        dtype = torch.float8_e4m3fn if layout == "float8" else None
        convert(official, path, "single", dtype=dtype)
        Pipeline.from_pretrained(official).tokenizers.save(tmp_path)
    report = check(path)
    assert report.passed, str(report)
    assert "a copy of these" in str(report) and "key map" in str(report)


@pytest.mark.filterwarnings("ignore:.* has no T5 encoder")
def test_without_t5_both_sides_have_none(tiny_folders, tmp_path):
    for part in tiny_folders["sd3-medium"].iterdir():
        if part.name not in ("text_encoder_3", "tokenizer_3"):
            (tmp_path / part.name).symlink_to(part)
    report = check(tmp_path)
    assert report.passed, str(report)
    names = [stage.name for stage in report.stages]
    assert "prompt clip_g tokens" in names and "prompt t5 tokens" not in names


def swapped(parameter):
    parameter.data = torch.cat(parameter.data.chunk(2)[::-1])


def swap_last_image_adaln(pipe):
    swapped(pipe.transformer.final_layer.adaLN_modulation[1].weight)


def swap_last_context_adaln(pipe):
    swapped(pipe.transformer.joint_blocks[-1].context_block.adaLN_modulation[1].weight)


def transpose_a_weight(pipe):
    weight = pipe.transformer.joint_blocks[1].x_block.attn.proj.weight
    weight.data = weight.data.T.contiguous()


def drop_the_qk_norm(pipe):
    for stream in (pipe.transformer.joint_blocks[1].context_block, pipe.transformer.joint_blocks[1].x_block):
        stream.attn.ln_q = stream.attn.ln_k = torch.nn.Identity()


def drop_the_second_attention(pipe):
    attn2 = pipe.transformer.joint_blocks[0].x_block.attn2
    attn2.register_forward_hook(lambda module, args, update: torch.zeros_like(update))


def transpose_the_patches(pipe):
    weight = pipe.transformer.x_embedder.proj.weight
    weight.data = weight.data.transpose(2, 3).contiguous()


def exchange_sine_and_cosine(pipe):
    weight = pipe.transformer.t_embedder.mlp[0].weight
    weight.data = weight.data.roll(128, dims=1)


def a_wrong_t5_length(pipe):
    pipe.profile = replace(PROFILES["diffusers"], text=TextRules(t5_length=77))


def a_wrong_padding_token(pipe):
    clip_g = replace(pipe.tokenizers.clip_g, pad=pipe.tokenizers.clip_l.pad)
    pipe.tokenizers = replace(pipe.tokenizers, clip_g=clip_g)


def a_changed_token(pipe):
    encode = pipe.tokenizers.t5.encode

    def changed(text):
        tokens = encode(text)
        return replace(tokens, ids=(tokens.ids[0], tokens.ids[1] + 1, *tokens.ids[2:]))

    object.__setattr__(pipe.tokenizers.t5, "encode", changed)


def a_wrong_activation(pipe):
    pipe.clip_g.text_model.encoder.layers[1].mlp.act = QuickGELU()


def a_wrong_bias_distance(pipe):
    pipe.t5.encoder.max_distance = 64


def an_unprojected_clip_l(pipe):
    pipe.profile = replace(PROFILES["diffusers"], text=TextRules(project_clip_l=False))


def other_noise(pipe):
    noise = pipe.noise
    pipe.noise = lambda seed, **sizes: noise(seed + 1, **sizes)


def a_shifted_sigma(pipe):
    pipe.shift = 1.0


def a_rounded_timestep(pipe):
    predict = pipe.predict
    pipe.predict = lambda x, sigma, conditionings, **rest: predict(x, round(sigma, 2), conditionings, **rest)


def guidance_the_wrong_way(pipe):
    sample = pipe.sample
    pipe.sample = lambda cond, uncond, noise, **settings: sample(uncond, cond, noise, **settings)


def an_unshifted_vae(pipe):
    pipe.vae.config = replace(pipe.vae.config, shift=0.0)


def a_nan_in_the_vae(pipe):
    pipe.vae.decoder.conv_out.bias.data[0] = torch.nan


FAULTS = [
    (a_changed_token, "prompt t5 tokens", "1 of 256 ids differ, the first at 1: "),
    (a_wrong_t5_length, "prompt t5 tokens", "77 tokens in a, 256 in b"),
    (a_wrong_padding_token, "prompt clip_g tokens", " of 77 ids differ, the first at "),
    (a_wrong_activation, "prompt clip_g layer 1", "error "),
    (a_wrong_bias_distance, "prompt t5 layer 0", "error "),
    (an_unprojected_clip_l, "prompt clip_l pooled", "error "),
    (other_noise, "noise", "error "),
    (a_shifted_sigma, "sigmas", "error "),
    (a_rounded_timestep, "timesteps", "error "),
    (transpose_the_patches, "step 0 x_embedder", "error "),
    (exchange_sine_and_cosine, "step 0 t_embedder", "error "),
    (drop_the_second_attention, "step 0 block 0 x", "error "),
    (drop_the_qk_norm, "step 0 block 1 context", "error "),
    (transpose_a_weight, "step 0 block 1 x", "error "),
    (swap_last_context_adaln, "step 0 block 2 x", "error "),
    (swap_last_image_adaln, "step 0 final_layer", "error "),
    (guidance_the_wrong_way, "step 0 input context", "error "),
    (an_unshifted_vae, "vae latent", "error "),
    (a_nan_in_the_vae, "vae conv_out", "not finite in a"),
]


@pytest.mark.parametrize(("plant", "stage", "note"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_fault_is_found_where_it_is(tiny_folders, right, plant, stage, note):
    ours = deepcopy(right)
    plant(ours)
    report = check(tiny_folders["sd3.5-medium"], ours=ours)
    first = report.first
    assert first is not None and first.name == stage, str(report)
    far = first.shape_a != first.shape_b or first.relative > 10 * first.tolerance
    assert far, "a fault must not be near the limit"
    verdict = str(report).partition("FAIL: ")[2]
    assert f"{stage}: " in verdict and note in verdict


def test_a_fault_is_found_in_the_official_layout_too(official, right):
    """The reference has been rewritten by our key map there, so this could hide behind it."""
    ours = deepcopy(right)
    swap_last_image_adaln(ours)
    first = check(official, ours=ours).first
    assert first is not None and group_of(first.name) == "velocity"


def test_it_leaves_a_given_pipeline_as_it_was(tiny_folders, right):
    before = {key: value.clone() for key, value in right.transformer.state_dict().items()}
    settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert check(tiny_folders["sd3.5-medium"], ours=right).passed
    modules = [module for model in right.models.values() for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert all(torch.equal(value, before[key]) for key, value in right.transformer.state_dict().items())
    assert settings == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_refused(tiny_folders, dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        verify(tiny_folders["sd3-medium"], dtype=dtype)


def test_a_pipeline_of_another_dtype_is_refused(tiny_folders, right):
    with pytest.raises(ValueError, match=r"is in torch\.float32, verify was asked for torch\.float64"):
        verify(tiny_folders["sd3.5-medium"], dtype=torch.float64, ours=right)


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_missing_library_names_the_extra(tiny_folders, monkeypatch, library):
    folder = tiny_folders["sd3-medium"]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r'pip install "mmdit-lab\[test\]"'):
        verify(folder)


def test_whole_runs_are_held_to_limits_too(tiny_folders, right, monkeypatch):
    """Errors that are each within a stage's limit must not add up to another picture."""
    monkeypatch.setitem(LIMITS, "blocks", LIMITS["blocks"]._replace(value=10.0))
    monkeypatch.setitem(LIMITS, "velocity", LIMITS["velocity"]._replace(value=10.0))
    ours = deepcopy(right)
    transpose_a_weight(ours)
    report = check(tiny_folders["sd3.5-medium"], ours=ours)
    first = report.first
    assert first is not None and first.name == "step 0 guided", str(report)
    assert first.relative <= first.tolerance and first.carried > 100 * first.carried_tolerance


def test_limits_by_stage():
    assert limits_of("prompt clip_l tokens", 3, torch.float32) == Limits(0.0, 0.0)
    assert limits_of("negative t5 layer 11", 3, torch.float32) == Limits(1e-5, 1e-5)
    assert limits_of("step 2 block 7 x", 3, torch.float32) == Limits(1e-5)
    assert limits_of("step 1 latent", 3, torch.float32) == Limits(1e-5, 2e-4)
    assert limits_of("final latent", 3, torch.float32) == Limits(1e-5, 3 * 1e-4)
    assert limits_of("pixels", 3, torch.float64) == Limits(1e-5, 1e-6)
    assert limits_of("sigmas", 3, torch.float64) == Limits(1e-6, 1e-6)


@pytest.mark.parametrize("steps", [0, -1])
def test_at_least_one_step(tiny_folders, steps):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        verify(tiny_folders["sd3-medium"], steps=steps)
