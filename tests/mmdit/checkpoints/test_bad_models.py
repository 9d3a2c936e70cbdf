"""A file of another model, or with wrong tensors, raises an error that names the model and the tensors."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit import load_clip, load_mmdit, load_t5, load_vae
from mmdit.checkpoints.describe import describe
from mmdit.checkpoints.write import convert
from refusals import refuses, weights


@pytest.mark.parametrize(
    ("load", "name", "expected", "found"),
    [
        (load_mmdit, "vae", "transformer (MMDiT)", "VAE"),
        (load_mmdit, "text_encoder_3", "transformer (MMDiT)", "T5 encoder"),
        (load_mmdit, "text_encoder", "transformer (MMDiT)", "CLIP-L text encoder"),
        (load_vae, "transformer", "VAE", "transformer (MMDiT)"),
        (load_t5, "text_encoder_2", "T5 encoder", "CLIP-G text encoder"),
        (lambda path: load_clip(path, "l"), "text_encoder_3", "CLIP-L text encoder", "T5 encoder"),
        (lambda path: load_clip(path, "g"), "vae", "CLIP-G text encoder", "VAE"),
    ],
)
def test_one_model_for_another(tiny_folders, load, name, expected, found):
    path = weights(tiny_folders["sd3.5-medium"], name)
    refuses(lambda: load(path), path, f"no {expected}", f"looks like {found}")


def test_clip_towers_are_not_swapped(tmp_path):
    save_file({"text_model.embeddings.token_embedding.weight": torch.zeros(2, 1280)}, tmp_path / "clip_l.safetensors")
    refuses(
        lambda: load_clip(tmp_path / "clip_l.safetensors", "l"),
        tmp_path / "clip_l.safetensors",
        "no CLIP-L text encoder",
        "looks like CLIP-G",
    )
    with pytest.raises(ValueError, match=r"which .*'h'"):
        load_clip(tmp_path, "h")


def test_unusual_clip_tower_must_say_which_it_is(tmp_path):
    save_file({"text_model.embeddings.token_embedding.weight": torch.zeros(2, 64)}, tmp_path / "tower.safetensors")
    refuses(lambda: describe(tmp_path / "tower.safetensors"), "width 64", "clip_l=", "clip_g=")


# The right kind of model, with wrong tensors.

BLOCK = "transformer_blocks.1"


def broken(source, target, **changes):
    """A copy of a file in which some tensors are changed (by a function), replaced (by a tensor) or removed (None)."""
    tensors = load_file(source)
    for key, change in changes.items():
        value = change(tensors.pop(key)) if callable(change) else change
        tensors |= {} if value is None else {key: value.contiguous()}
        if value is None:
            tensors.pop(key, None)
    save_file(tensors, target)
    return target


CHANGES = {
    "missing": ("transformer", {f"{BLOCK}.ff.net.2.bias": None}, [f"1 missing: {BLOCK}.ff.net.2.bias"]),
    "unexpected": ("transformer", {"more.weight": torch.ones(1)}, ["1 unexpected tensors: more.weight"]),
    "q without k, v": (
        "transformer",
        {f"{BLOCK}.attn.to_k.weight": None, f"{BLOCK}.attn.to_v.weight": None},
        [
            f"1 unexpected tensors: {BLOCK}.attn.to_q.weight",
            f"{BLOCK}.attn.to_k.weight, {BLOCK}.attn.to_v.weight",
        ],
    ),
    "no signature": (
        "transformer",
        {f"transformer_blocks.0.attn.add_{part}_proj.weight": None for part in "qkv"},
        ["1 missing: transformer_blocks.0.attn.add_q_proj.weight + transformer_blocks.0.attn.add_k_proj.weight"],
    ),
    "wrong shape": (
        "transformer",
        {f"{BLOCK}.ff.net.2.bias": torch.ones(5)},
        [f"1 of another shape: {BLOCK}.ff.net.2.bias [5]", "[128]"],
    ),
    "wrong shape of a part of a fused weight": (
        "transformer",
        {f"{BLOCK}.attn.to_q.weight": torch.ones(128, 5)},
        ["joint_blocks.1.x_block.attn.qkv.weight", f"{BLOCK}.attn.to_q.weight [128, 5]"],
    ),
    "no dimension": (
        "transformer",
        {"norm_out.linear.bias": torch.tensor(1.0)},
        ["final_layer.adaLN_modulation.1.bias", "norm_out.linear.bias []"],
    ),
    "integers": (
        "transformer",
        {f"{BLOCK}.ff.net.2.bias": lambda tensor: tensor.int()},
        [f"1 not floating point: {BLOCK}.ff.net.2.bias torch.int32"],
    ),
    "all at once": (
        "transformer",
        {f"{BLOCK}.ff.net.0.proj.bias": None, f"{BLOCK}.ff.net.2.bias": torch.ones(5)},
        ["1 missing: ", "1 of another shape: "],
    ),
    "far number": (
        "transformer",
        {"transformer_blocks.99999999.a": torch.ones(1)},
        ["block 3", "transformer_blocks.99999999.a"],
    ),
    "no patches": ("transformer", {"pos_embed.proj.weight": None}, ["'x_embedder.proj.weight' is missing"]),
    "flat table": (
        "transformer",
        {"pos_embed.pos_embed": torch.ones(256)},
        ["pos_embed has shape [256]", "3 dimensions"],
    ),
    "no square table": ("transformer", {"pos_embed.pos_embed": torch.ones(1, 255, 128)}, ["255 positions"]),
    "empty tensor": ("transformer", {"proj_out.weight": torch.ones(0, 128)}, ["final_layer.linear.weight is empty"]),
    "VAE, missing": ("vae", {"decoder.conv_out.bias": None}, ["1 missing: decoder.conv_out.bias"]),
    "VAE of SD1": ("vae", {"quant_conv.weight": torch.ones(1)}, ["1 unexpected tensors: quant_conv.weight"]),
    "VAE, half": ("vae", {"decoder.conv_in.weight": None}, ["not a VAE in LDM names", "no decoder"]),
    "CLIP, missing": (
        "text_encoder",
        {"text_model.final_layer_norm.bias": None, "text_model.encoder.layers.1.mlp.fc2.bias": None},
        ["2 missing: text_model.", "text_model.final_layer_norm.bias"],
    ),
    "CLIP, no table": (
        "text_encoder",
        {"text_model.embeddings.position_embedding.weight": None},
        ["'text_model.embeddings.position_embedding.weight'", "CLIP-L text encoder", "missing"],
    ),
    "CLIP, unexpected": ("text_encoder", {"more.a": torch.ones(1)}, ["1 unexpected: more.a"]),
    "T5, missing": (
        "text_encoder_3",
        {"encoder.final_layer_norm.weight": None},
        ["1 missing: encoder.final_layer_norm.weight"],
    ),
    "T5, no table": (
        "text_encoder_3",
        {"shared.weight": None, "encoder.embed_tokens.weight": None},
        ["not a T5 encoder: shared.weight missing"],
    ),
    "T5, two tables": (
        "text_encoder_3",
        {"shared.weight": torch.ones(9, 256), "encoder.embed_tokens.weight": torch.zeros(9, 256)},
        ["shared.weight", "encoder.embed_tokens.weight", "differ"],
    ),
}
LOAD = {
    "transformer": load_mmdit,
    "vae": load_vae,
    "text_encoder_3": load_t5,
    "text_encoder": lambda p: load_clip(p, "l"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_tensors_that_do_not_fit(tiny_folders, tmp_path, case):
    name, changes, said = CHANGES[case]
    path = broken(weights(tiny_folders["sd3.5-medium"], name), tmp_path / "model.safetensors", **changes)
    refuses(lambda: LOAD[name](path), path, *said)


def test_many_problems_are_counted_and_the_first_named(tiny_folders, tmp_path):
    convert(tiny_folders["sd3.5-medium"] / "transformer", tmp_path / "a.safetensors", "single")
    tensors = load_file(tmp_path / "a.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".attn2." not in key or "blocks.0." in key}
    kept |= {f"model.diffusion_model.joint_blocks.0.more.{i}": torch.ones(1) for i in range(7)}
    del kept["model.diffusion_model.joint_blocks.0.x_block.attn2.ln_q.weight"]
    save_file(kept, tmp_path / "a.safetensors")
    said = refuses(
        lambda: load_mmdit(tmp_path / "a.safetensors"), "1 missing: joint_blocks.0.x_block.attn2.ln_q.weight"
    )
    assert re.search(r"\d+ unexpected: .*joint_blocks\.0\.more\.0, .* and \d+ more", said)
    save_file(kept | {"optimizer.state": torch.ones(1)}, tmp_path / "a.safetensors")
    refuses(lambda: load_mmdit(tmp_path / "a.safetensors"), "1 unexpected tensors", "transformer", "optimizer.state")


def test_dtypes_that_layers_do_not_compute_in(tiny_folders):
    for dtype in (torch.int32, torch.float8_e4m3fn):
        refuses(
            lambda dtype=dtype: load_mmdit(tiny_folders["sd3.5-medium"], dtype=dtype),
            "torch.float32, torch.bfloat16, torch.float16, torch.float64",
            f"got {dtype}",
            error=ValueError,
        )
