"""LoRA files of every naming and kind on weights of every precision, against formulas in float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_files as files
import spellings
from mmdit import CheckpointError, load_lora, load_mmdit, merge_lora
from mmdit.checkpoints.lora import check_lora
from mmdit.checkpoints.lora_kinds import LowRank, Orthogonal
from quant import Float8Tensor, quantize_

README = Path(__file__).parents[3] / "src" / "mmdit" / "checkpoints" / "README.md"
LIMITS = {  # of the relative L2 error, by precision: one rounding to 24, 8, 4 bits
    "fp32": 1e-5,
    "bf16": 4e-3,
    "fp8 e4m3": 0.06,  # without a scale small weights are subnormal
    "fp8 scaled, ComfyUI old": 0.04,
    "fp8 scaled, ComfyUI per layer": 0.04,
    "ours per row": 0.04,
}


def test_a_plain_lora_is_checked_by_its_shapes_alone(monkeypatch):
    """Computing on the meta device would import torch's compiler, which takes seconds."""
    monkeypatch.setattr(LowRank, "of", None)
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    up, down = torch.ones(6, 2), torch.ones(2, 4)
    assert load_lora({f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down}).patches[0].change.rank == 2
    with pytest.raises(CheckpointError, match=r"lora_B.weight \[6, 2\].*lora_A.weight \[3, 4\]"):
        load_lora({f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": torch.ones(3, 4)})


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    """The state dicts of one transformer, loaded in every precision."""
    root = tmp_path_factory.mktemp("lora_bases")
    source = root / "fp32.safetensors"
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in files.model().state_dict().items()}, source)
    found = {}
    for name in LIMITS:
        file = source if name == "ours per row" else spellings.respell(source, root / f"{len(found)}.safetensors", name)
        model = load_mmdit(file)
        if name == "ours per row":
            quantize_(model, "fp8")
        state = model.state_dict(keep_vars=True)
        found[name] = {f"{key}.weight": state[f"{key}.weight"].detach() for key in files.SHAPES}
    assert sum(isinstance(tensor, Float8Tensor) for state in found.values() for tensor in state.values()) >= 7
    return found


def value_of(tensor: Tensor) -> Tensor:
    return (tensor.dequantize(torch.float32) if isinstance(tensor, Float8Tensor) else tensor).double()


@pytest.mark.parametrize("naming", files.NAMINGS)
def test_every_kind_and_precision(naming: str, bases) -> None:
    for kind in files.KINDS:
        tensors, afters = files.written(naming, kind)
        lora = load_lora(tensors)
        assert not lora.unused, (kind, lora.unused)
        assert {key.removeprefix("transformer.").removesuffix(".weight") for key in lora.targets} == set(files.SHAPES)
        for precision, limit in LIMITS.items():
            before = bases[precision]
            after = merge_lora(before, lora, 0.7)
            wanted = files.expected({key: value_of(tensor) for key, tensor in before.items()}, afters, 0.7)
            for key, value in wanted.items():
                assert (type(after[key]), after[key].dtype) == (type(before[key]), before[key].dtype)
                error = (value_of(after[key]) - value).norm() / value.norm()
                assert error < limit, (kind, precision, key, float(error))


def test_readme_has_the_table_of_what_loads() -> None:
    head = ["names of", *files.KINDS]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " :-: |" * len(files.KINDS)]
    cell = f"{len(LIMITS)} of {len(LIMITS)}"
    lines += ["| " + " | ".join([naming, *[cell] * len(files.KINDS)]) + " |" for naming in files.NAMINGS]
    table = "\n".join(lines)
    assert table in README.read_text(encoding="utf-8"), f"README's table of LoRAs should be:\n{table}"


@pytest.mark.parametrize("kind", ["LoRA", "DoRA, rows", "LoHa", "LoKr", "OFT", "full"])
@pytest.mark.parametrize("strength", [0.0, 1.0, -0.5])
def test_strengths(kind: str, strength: float, bases) -> None:
    tensors, afters = files.written("OneTrainer, legacy", kind)
    after = merge_lora(bases["fp32"], load_lora(tensors), strength)
    for key, value in files.expected(bases["fp32"], afters, strength).items():
        torch.testing.assert_close(after[key].double(), value, rtol=1e-4, atol=1e-5)


def test_comfyui_has_the_strength_of_oft_twice(bases) -> None:
    tensors, _ = files.written("kohya sd-scripts, OneTrainer", "OFT")
    comfy, ours = (load_lora(tensors, profile) for profile in ("comfyui", None))
    twice, once = merge_lora(bases["fp32"], comfy, -0.5), merge_lora(bases["fp32"], ours, 0.25)
    for key in once:
        torch.testing.assert_close(twice[key], once[key])


def test_butterflies_rotate() -> None:
    """Every factor of BOFT keeps the norms of columns, mixes rows of other blocks, and does nothing at strength 0."""
    weight = files.noise(5, 64, 8)
    change = Orthogonal(blocks=files.noise(6, 3, 8, 8, 8))
    turned = weight + change.of(weight, 1.0)
    torch.testing.assert_close(turned.norm(dim=0), weight.norm(dim=0))
    assert change.of(weight, 0.0).abs().max() < 1e-12
    mixed = torch.autograd.functional.jacobian(lambda one: change.of(one[:, None], 1.0)[:, 0], weight[:, 0])
    assert (mixed.abs() > 1e-9).sum(1).min() > 8


def test_untouched_tensors_are_the_same_objects_and_nothing_is_written_to(bases) -> None:
    before = bases["fp32"] | {"joint_blocks.0.x_block.attn.proj.weight": torch.zeros(3)}
    copies = {key: tensor.clone() for key, tensor in before.items()}
    after = merge_lora(before, load_lora(files.written("ComfyUI", "LoRA")[0]))
    assert after["joint_blocks.0.x_block.attn.proj.weight"] is before["joint_blocks.0.x_block.attn.proj.weight"]
    assert all(torch.equal(before[key], copies[key]) for key in before)


def test_a_model_is_changed_in_place() -> None:
    model = files.model().bfloat16()
    parameters = dict(model.named_parameters())
    lora = load_lora(files.written("diffusers, SimpleTuner", "LoRA")[0])
    wanted = merge_lora(model.state_dict(), lora, 0.5)
    assert merge_lora(model, lora, 0.5) is model
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[key])
        assert (parameter is parameters[key]) == (f"transformer.{key}" not in lora.targets)


def test_biases_of_slices_and_exchanged_halves(bases) -> None:
    """ComfyUI loses them; by default they work, also those that peft trains beside lora_B."""
    bias = torch.arange(192.0)
    halves = torch.arange(128.0)
    state = bases["fp32"] | {"joint_blocks.0.x_block.attn.qkv.bias": torch.zeros(192)}
    state |= {"joint_blocks.1.context_block.adaLN_modulation.1.bias": torch.zeros(128)}
    to_k, norm = "transformer.transformer_blocks.0.attn.to_k", "transformer.transformer_blocks.1.norm1_context.linear"
    tensors, _ = files.written("diffusers, SimpleTuner", "LoRA")
    tensors |= {f"{to_k}.diff_b": bias[64:128].clone(), f"{norm}.lora_B.bias": halves}
    after = merge_lora(state, load_lora(tensors), 0.5)
    third = after["joint_blocks.0.x_block.attn.qkv.bias"]
    assert torch.equal(third[64:128], 0.5 * bias[64:128])
    assert not third[:64].any() and not third[128:].any()
    wanted = 0.5 * 0.5 * halves.roll(64)  # strength, and alpha 2 over rank 4
    assert torch.equal(after["joint_blocks.1.context_block.adaLN_modulation.1.bias"], wanted)
    assert set(load_lora(tensors, "comfyui").unused) == {f"{to_k}.diff_b", f"{norm}.lora_B.bias"}


def test_norms_of_rows_are_exchanged_with_them_but_not_in_comfyui(bases) -> None:
    tensors, _ = files.written("OneTrainer, legacy", "DoRA, rows")
    key = "joint_blocks.1.context_block.adaLN_modulation.1.weight"
    ours, theirs = (merge_lora(bases["fp32"], load_lora(tensors, profile))[key] for profile in (None, "comfyui"))
    norms = tensors["lora_transformer_transformer_blocks_1_norm1_context_linear.dora_scale"].flatten()
    torch.testing.assert_close(ours.norm(dim=1), norms.roll(64).abs())
    assert (theirs.norm(dim=1) - norms.roll(64).abs()).abs().max() > 0.1


def test_header_scales() -> None:
    """lora_alpha, patterns and rank-stabilized scales count for trainers' readings, and not for ComfyUI's."""
    tensors, _ = files.written("diffusers, SimpleTuner", "LoRA")
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("alpha")}
    header = '{"transformer.lora_alpha": 8, "transformer.use_rslora": true, "transformer.alpha_pattern": {"net.2": 3}}'
    lora = load_lora(tensors, metadata={"lora_adapter_metadata": header})
    assert sorted(lora.scales.values()) == [1.5, 4.0, 4.0]
    comfy = load_lora(tensors, "comfyui", metadata={"lora_adapter_metadata": header})
    assert set(comfy.scales.values()) == {1.0}
    assert comfy.notes and lora.notes


@pytest.mark.parametrize(("profile", "scale"), [(None, 1.0), ("comfyui", 0.0)])
def test_alpha_zero(profile: str | None, scale: float) -> None:
    tensors, _ = files.written("ComfyUI", "LoRA")
    tensors |= {key: torch.zeros(1, dtype=torch.int64) for key in tensors if key.endswith("alpha")}
    assert set(load_lora(tensors, profile).scales.values()) == {scale}


def test_of_two_names_for_one_module_the_later_in_comfyuis_order_counts(bases) -> None:
    one, two = (files.written(naming, "LoRA")[0] for naming in ("ComfyUI", "kohya sd-scripts, OneTrainer"))
    lora = load_lora(one | {key: tensor * 2 for key, tensor in two.items()})
    assert set(lora.unused) == set(two)
    alone = merge_lora(bases["fp32"], load_lora(one))
    assert all(torch.equal(tensor, alone[key]) for key, tensor in merge_lora(bases["fp32"], lora).items())


def test_a_third_and_the_whole_weight_both_apply(bases) -> None:
    whole, third = (files.written(naming, "full") for naming in ("ComfyUI", "diffusers, SimpleTuner"))
    keys = [key for key in third[0] if "to_k" in key]
    lora = load_lora(whole[0] | {key: third[0][key] for key in keys})
    key = "joint_blocks.0.x_block.attn.qkv.weight"
    change = merge_lora(bases["fp32"], lora)[key] - bases["fp32"][key]
    wanted = whole[0]["diffusion_model.joint_blocks.0.x_block.attn.qkv.diff"].clone()
    wanted[64:128] += third[0][keys[0]]
    torch.testing.assert_close(change, wanted)


def test_weights_grow_where_a_file_says_so() -> None:
    name = "diffusion_model.x_embedder.proj"
    tensors = {f"{name}.lora_up.weight": torch.ones(8, 1), f"{name}.lora_down.weight": torch.ones(1, 5 * 4)}
    tensors[f"{name}.reshape_weight"] = torch.tensor([8, 5, 2, 2])
    before = {"x_embedder.proj.weight": torch.zeros(8, 3, 2, 2)}
    after = merge_lora(before, load_lora(tensors), part="transformer")
    assert torch.equal(after["x_embedder.proj.weight"], torch.ones(8, 5, 2, 2))


def test_repr_and_table() -> None:
    tensors, _ = files.written("kohya sd-scripts, OneTrainer", "LoRA")
    lora = load_lora(tensors | {"bundle_emb.cat.clip_l": torch.zeros(2, 3)}, metadata={"ss_network_module": "x"})
    text = repr(lora)
    assert len(text.splitlines()) <= 24
    assert all(word in text for word in ("rank 4", "0.5", "kohya", "bundle_emb.cat.clip_l", "64", "3 lora"))
    assert lora.metadata == {"ss_network_module": "x"}


# Bad files


KOHYA = "lora_unet_joint_blocks_0_x_block_attn_qkv"


def pair(name: str, rows: int = 192, columns: int = 64, rank: int = 4) -> dict[str, Tensor]:
    return {f"{name}.lora_up.weight": torch.ones(rows, rank), f"{name}.lora_down.weight": torch.ones(rank, columns)}


GOOD = pair(KOHYA)
BAD = {
    "sdxl": (pair("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"), "Stable Diffusion XL"),
    "sd15": (pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"), "Stable Diffusion 1.x"),
    "flux": (pair("lora_unet_double_blocks_0_img_attn_qkv"), "Flux"),
    "flux in diffusers": (GOOD | pair("transformer.single_transformer_blocks.0.attn.to_q"), "Flux"),
    "up alone": ({f"{KOHYA}.lora_up.weight": torch.ones(192, 4)}, "without down"),
    "down alone": ({f"{KOHYA}.lora_down.weight": torch.ones(4, 64)}, "without up"),
    "half a LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(4, 4)}, "lokr_w2_a and lokr_w2_b"),
    "ranks differ": (GOOD | {f"{KOHYA}.lora_down.weight": torch.ones(5, 64)}, r"\[192, 4\].*\[5, 64\]"),
    "rank 0": (pair(KOHYA, rank=0), "rank of 0"),
    "nan": (GOOD | {f"{KOHYA}.lora_up.weight": torch.full((192, 4), torch.nan)}, "768 of 768"),
    "alpha": (GOOD | {f"{KOHYA}.alpha": torch.ones(2)}, r"alpha has shape \[2\]"),
    "controlnet": ({"controlnet_blocks.0.weight": torch.ones(3)}, "ControlNet"),
    "model": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.ones(3)}, "MMDiT"),
    "model with a LoRA": (GOOD | {"joint_blocks.0.x_block.attn.qkv.weight": torch.ones(3)}, "MMDiT"),
    "no module of ours": (pair("lora_unet_something"), "none of its 2 tensors"),
    "nothing": ({}, "a file without tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_say_what_is_wrong(name: str, tmp_path: Path) -> None:
    tensors, said = BAD[name]
    save_file(tensors, tmp_path / "bad.safetensors")
    for given in (tensors, tmp_path / "bad.safetensors"):
        with pytest.raises(ValueError, match=said) as caught:
            load_lora(given)
        assert isinstance(given, dict) or str(given) in str(caught.value)


def test_header_must_hold_numbers() -> None:
    header = {"lora_adapter_metadata": '{"transformer.lora_alpha": "8"}'}
    with pytest.raises(ValueError, match=r"lora_alpha.*string"):
        load_lora(pair("transformer.transformer_blocks.0.attn.to_q"), metadata=header)
    with pytest.raises(ValueError, match="lora_adapter_metadata"):
        load_lora(GOOD, metadata={"lora_adapter_metadata": "{"})


@pytest.mark.parametrize("wrong", [pair(KOHYA, rows=191), pair(KOHYA, columns=32)])
def test_wrong_shapes_are_named_and_nothing_is_applied(wrong: dict[str, Tensor]) -> None:
    model = files.model()
    before = {key: (id(tensor), tensor._version) for key, tensor in model.named_parameters()}
    lora = load_lora(pair("lora_unet_joint_blocks_0_x_block_mlp_fc1", rows=256) | wrong)
    with pytest.raises(ValueError, match=f"1 of 2 patches.*{KOHYA}.*192 x 64"):
        merge_lora(model, lora)
    assert before == {key: (id(tensor), tensor._version) for key, tensor in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [1e6, 1e38])
def test_a_sum_that_is_too_large_is_named_and_nothing_is_applied(dtype: torch.dtype, value: float) -> None:
    """float8 without scales ends at 448, as ComfyUI's, where the sum is finite in float32."""
    model = files.model().to(torch.float16)
    key = "joint_blocks.0.x_block.mlp.fc1.weight"
    if dtype != torch.float16:
        with torch.no_grad():
            model.get_submodule(key.removesuffix(".weight")).weight = nn.Parameter(torch.ones(256, 64).to(dtype), False)
    state = model.state_dict()
    too_large = pair("lora_unet_joint_blocks_0_x_block_mlp_fc1", rows=256)
    too_large = {name: value * one if "up" in name else one for name, one in too_large.items()}
    lora = load_lora(GOOD | too_large)
    if dtype != torch.float16 and value == 1e6:
        assert merge_lora(state, lora)[key].float().max() == 448
        return
    before = {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match=f"{key} of the .*: 16384 of 16384 values are not finite"):
        merge_lora(model, lora)
    assert before == {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}


def test_modules_that_a_model_has_not(bases) -> None:
    attn2 = pair("lora_unet_joint_blocks_0_x_block_attn2_qkv")
    with pytest.raises(ValueError, match="none of the 1 tensors"):
        merge_lora(bases["fp32"], load_lora(attn2))
    with pytest.warns(UserWarning, match=r"1 of 2 patches.*attn2"):
        merge_lora(bases["fp32"], load_lora(GOOD | attn2))


def test_strengths_and_parts_are_checked(bases) -> None:
    lora, state = load_lora(GOOD), bases["fp32"]
    with pytest.raises(ValueError, match="strength"):
        merge_lora(state, lora, float("nan"))
    with pytest.raises(ValueError, match="2 numbers for 1"):
        merge_lora(state, lora, [1.0, 2.0])
    with pytest.raises(ValueError, match="profile"):
        load_lora(GOOD, "a1111")
    with pytest.raises(ValueError, match="transformer"):
        merge_lora({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 4)}, lora)
    check_lora(lora)
    with pytest.raises(TypeError, match=r"lora is str.*mmdit.load_lora"):
        check_lora("style.safetensors")


def test_two_clips_need_to_be_told_apart() -> None:
    name = "text_model_encoder_layers_0_mlp_fc1"
    both = load_lora(pair(f"lora_te1_{name}", 8, 4) | pair(f"lora_te2_{name}", 8, 4, rank=2))
    state = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 4)}
    with pytest.raises(ValueError, match="clip_l or clip_g"):
        merge_lora(state, both)
    for part, rank in (("clip_l", 4.0), ("clip_g", 2.0)):
        assert (merge_lora(state, both, part=part)["text_model.encoder.layers.0.mlp.fc1.weight"] == rank).all()


TEXT = {
    "clip_l": ("text_model.encoder.layers.3.self_attn.q_proj", ("lora_te1_", "lora_te_"), "text_encoder.", "clip_l."),
    "clip_g": ("text_model.encoder.layers.3.mlp.fc2", ("lora_te2_",), "text_encoder_2.", "clip_g."),
    "t5": ("encoder.block.3.layer.1.DenseReluDense.wi_0", ("lora_te3_",), "text_encoder_3.", "t5."),
}


@pytest.mark.parametrize("part", TEXT)
def test_text_encoders_in_every_naming(part: str) -> None:
    name, flat, diffusers, omi = TEXT[part]
    comfy = f"text_encoders.{'t5xxl' if part == 't5' else part}.transformer."
    names = [prefix + name.replace(".", "_") for prefix in flat] + [prefix + name for prefix in (diffusers, comfy, omi)]
    for each in names:
        lora = load_lora(pair(each, 8, 4))
        assert list(lora.targets) == [f"{part}.{name}.weight"]
        assert lora.parts == [part]
        after = merge_lora({f"{name}.weight": torch.zeros(8, 4)}, lora, part=part)
        assert (after[f"{name}.weight"] == 4).all()
    if part != "t5":
        assert list(load_lora(pair(f"{flat[0]}text_projection", 8, 4)).targets) == [f"{part}.text_projection.weight"]


def test_float8_beside_its_scale_is_refused(bases) -> None:
    key = "joint_blocks.0.x_block.attn.qkv"
    state = {f"{key}.weight": torch.zeros(192, 64).to(torch.float8_e4m3fn), f"{key}.weight_scale": torch.ones(())}
    with pytest.raises(ValueError, match=r"quant\.unpack"):
        merge_lora(state, load_lora(GOOD))


def test_diffusers_state_dicts_are_refused() -> None:
    with pytest.raises(ValueError, match="diffusers"):
        merge_lora({"transformer_blocks.0.attn.add_q_proj.weight": torch.zeros(4, 4)}, load_lora(GOOD))
