"""`compare` finds planted faults at the stages where they are, and blames no other stage."""

from copy import deepcopy

import pytest
import torch

import planted
from compared import NEGATIVE, check, failed
from mmdit.parity.compare import Comparison


def block(i, *streams) -> set[str]:
    """A fault of a block shows there, and in the velocity of a step whose blocks are not looked into."""
    return {f"step 0 block {i} {stream}" for stream in streams} | LATER


LATER = {"step 1 velocity uncond", "step 1 velocity cond"}


ADALN = "final_layer.adaLN_modulation.1.weight"
FAULTS = [  # the fault, the first stage, all other stages beyond rounding (None: many), a part of the explanation
    (planted.swap_the_final_adaln, "step 0 final_layer", LATER, f"the first is {ADALN}"),
    (
        planted.swap_the_last_context_adaln,
        "step 0 block 2 x",
        block(2, "x"),
        "2.context_block.adaLN_modulation.1.weight",
    ),
    (planted.a_wrong_shift, "sigmas", set(), "shift: 1 in a, 3 in b"),
    (planted.a_missing_end, "prompt t5 tokens", {"negative t5 tokens"}, "t5 tokens of the prompt have no EOS in a; "),
    (
        planted.a_transposed_weight,
        "step 0 block 1 x",
        block(1, "x"),
        "joint_blocks.1.x_block.attn.proj.weight (relative 1.",
    ),
    (planted.a_wrong_t5_length, "prompt t5 tokens", {"negative t5 tokens"}, "field text.t5_length: 77 in a, 256 in b"),
    (
        planted.a_lost_qk_norm,
        "step 0 block 1 context",
        block(1, "context", "x"),
        "4 only in b: joint_blocks.1.context_block",
    ),
    (planted.a_wrong_vae_scale, "vae latent", set(), "vae config scaling_factor: 1.0 in a, 1.5305 in b"),
    (planted.a_wrong_activation, "prompt clip_g layer 1", {"negative clip_g layer 1"}, "nothing known"),
    (
        planted.a_tower_of_another_activation,
        "prompt clip_g layer 0",
        None,
        "hidden_act: 'quick_gelu' in a, 'gelu' in b",
    ),
    (planted.no_t5_bias, "prompt t5 layer 0", None, "SelfAttention.relative_attention_bias.weight (relative 1.0e+00)"),
    (
        planted.an_unprojected_clip_l,
        "prompt clip_l pooled",
        {"negative clip_l pooled"},
        "project_clip_l: False in a, True in b",
    ),
    (planted.a_wrong_padding, "prompt clip_g tokens", {"negative clip_g tokens"}, ""),
    (planted.another_embedding, "prompt clip_l embedding", {"negative clip_l embedding"}, "position_embedding.weight"),
    (planted.other_noise, "noise", set(), ""),
    (planted.rounded_levels, "timesteps", None, "nothing known"),
    (planted.exchanged_prompts, "step 0 input context", None, "nothing known"),
    (planted.exchanged_sine_and_cosine, "step 0 t_embedder", LATER, "t_embedder.mlp.0.weight"),
    (planted.transposed_patches, "step 0 x_embedder", LATER, "x_embedder.proj.weight"),
    (planted.a_shifted_position_table, "step 0 patches + position", None, "the first is pos_embed"),
    (planted.a_lost_second_attention, "step 0 block 0 x", block(0, "x"), "nothing known"),
    (planted.exchanged_axes, "step 0 velocity uncond", None, "nothing known"),
    (planted.weaker_guidance, "step 0 guided", None, "nothing known"),
    (planted.a_wrong_solver, "step 0 latent", {"step 1 latent"}, "nothing known"),
    (planted.a_transposed_vae_weight, "vae up 2", set(), "decoder.up.2.block.0.conv1.weight"),
    (planted.a_wrong_range, "pixels", set(), "nothing known"),
    (planted.truncated_levels, "uint8", set(), "profile field to_uint8: 'truncate' in a, 'round' in b"),
    (planted.a_nan, "vae conv_out", set(), "vae conv_out: not finite in a"),
]


def found_at(comparison: Comparison, first: str, others: set[str] | None, why: str) -> None:
    assert comparison.first is not None and comparison.first.name == first, str(comparison)
    stage = comparison.first
    assert stage.shape_a != stage.shape_b or stage.relative > 10 * stage.tolerance, "a fault must not be near the limit"
    assert others is None or set(failed(comparison)) - {first} == others - {first}, str(comparison)
    assert why in str(comparison).partition("First stage beyond rounding: ")[2]


@pytest.mark.parametrize(("plant", "first", "others", "why"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_fault_is_found_where_it_is(right, plant, first, others, why):
    ours = deepcopy(right)
    plant(ours)
    found_at(check(ours, right), first, others, why)


def test_faults_do_not_hide_each_other(right):
    """Neither the stages between them nor those after them are blamed."""
    ours = deepcopy(right)
    for plant in (planted.no_t5_bias, planted.a_transposed_weight, planted.a_wrong_vae_scale, planted.truncated_levels):
        plant(ours)
    comparison = check(ours, right, steps=(0, 1))
    found = [name for name in failed(comparison) if " t5 layer " not in name]
    assert found == [*(f"step {i} block 1 x" for i in range(2)), "vae latent", "uint8"]
    carried = {stage.name: stage.carried for stage in comparison.stages}
    assert carried["pixels"] > 0.01, "the pictures themselves are far apart"
    assert len(comparison.explanation) == 4, comparison.explanation


IN_BFLOAT16 = [
    (planted.swap_the_final_adaln, "step 0 final_layer"),
    (planted.a_transposed_weight, "step 0 block 1 x"),
    (planted.a_wrong_vae_scale, "vae latent"),
    (planted.a_wrong_shift, "sigmas"),
    (planted.weaker_guidance, "step 0 guided"),
    (planted.a_missing_end, "prompt t5 tokens"),
]


@pytest.mark.usefixtures("rounded_draws")
@pytest.mark.parametrize(("plant", "first"), IN_BFLOAT16, ids=[fault[0].__name__ for fault in IN_BFLOAT16])
def test_bfloat16_hides_no_large_fault(right, plant, first):
    low = deepcopy(right).to(dtype=torch.bfloat16)
    plant(low)
    comparison = check(low, right)
    assert comparison.first is not None and comparison.first.name == first, str(comparison)


THEIR_FAULTS = [
    (planted.their_swapped_adaln, "step 0 final_layer", LATER, f"the first is {ADALN}"),
    (planted.their_transposed_weight, "step 0 block 1 x", block(1, "x"), "joint_blocks.1.x_block.attn.proj.weight"),
    (planted.their_transposed_query, "step 0 block 2 x", block(2, "x"), "joint_blocks.2.x_block.attn.qkv.weight"),
    (planted.their_lost_qk_norm, "step 0 block 1 context", block(1, "context"), "1.context_block.attn.ln_q.weight"),
    (planted.their_wrong_shift, "sigmas", set(), "shift: 3 in a, 1 in b"),
    (
        planted.their_missing_end,
        "prompt t5 tokens",
        {"negative t5 tokens"},
        "no EOS in b; the other side's is at position ",
    ),
    (
        planted.their_wrong_t5_length,
        "prompt t5 tokens",
        {"negative t5 tokens"},
        "256 tokens of the prompt in a, 77 in b",
    ),
    (planted.their_wrong_vae_scale, "vae latent", set(), "vae config scaling_factor: 1.5305 in a, 1.0 in b"),
    (planted.their_wrong_activation, "prompt clip_g layer 1", {"negative clip_g layer 1"}, "nothing known"),
    (planted.their_lost_t5_bias, "prompt t5 layer 0", None, "SelfAttention.relative_attention_bias.weight"),
    (planted.their_transposed_vae_weight, "vae up 2", set(), "decoder.up.2.block.0.conv1.weight"),
    (planted.their_truncated_levels, "uint8", set(), "nothing known"),
]


@pytest.mark.parametrize(
    ("plant", "first", "others", "why"), THEIR_FAULTS, ids=[fault[0].__name__ for fault in THEIR_FAULTS]
)
def test_a_fault_in_diffusers_is_found_where_it_is(right, reference, plant, first, others, why):
    theirs = deepcopy(reference)
    plant(theirs)
    found_at(check(right, theirs), first, others, why)


def test_diffusers_can_come_first(right, reference):
    """It is the side whose values are kept then, too; what is said of a and b is turned round."""
    ours, theirs = deepcopy(right), deepcopy(reference)
    planted.a_transposed_weight(ours)
    planted.a_nan(ours)
    planted.their_missing_end(theirs)
    encode = ours.encode
    ours.encode = lambda prompt: encode(prompt, max_sequence_length=80 if prompt == NEGATIVE else 90)
    comparison = check(theirs, ours)
    tokens = {"prompt t5 tokens", "negative t5 tokens"}
    assert set(failed(comparison)) == {*tokens, *block(1, "x"), "vae conv_out"}
    shapes = {stage.name: (stage.shape_a, stage.shape_b) for stage in comparison.stages}
    assert shapes["prompt t5 tokens"] == ((1, 256), (1, 90)) and shapes["negative t5 tokens"] == ((1, 256), (1, 80))
    assert next(stage.note for stage in comparison.stages if stage.name == "vae conv_out") == "not finite in b"
    assert "t5 reads 256 tokens of the negative prompt in a, 80 in b" in comparison.explanation
    assert any("of the prompt have no EOS in a; " in line for line in comparison.explanation)
