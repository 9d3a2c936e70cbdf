"""Checkpoint files and folders that cannot be used raise an error that names the file and the fault."""

import json
import struct

import pytest
import torch
from safetensors.torch import save, save_file

import golden
from mmdit import Pipeline, load_mmdit
from mmdit.checkpoints.describe import describe
from mmdit.checkpoints.safetensors_io import read_header
from refusals import refuses

# Files in other formats, and broken files.


def raw(path, header, data=b"", length=None):
    """A file with this header, given as a JSON value or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("ending", ["ckpt", "pt", "bin", "safetensors"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles(tmp_path, ending, zipped):
    path = tmp_path / f"model.{ending}"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    for load in (load_mmdit, Pipeline.from_single_file, describe):
        refuses(lambda load=load: load(path), path, "pickle", "never opened", ".safetensors")


@pytest.mark.parametrize("folders", [["."], ["transformer", "vae"], ["models/checkpoints"]], ids=str)
def test_folder_of_pickles(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        torch.save({}, tmp_path / folder / "diffusion_pytorch_model.bin")
    for load in (load_mmdit, Pipeline.from_pretrained, describe):
        refuses(
            lambda load=load: load(tmp_path),
            tmp_path,
            "diffusion_pytorch_model.bin",
            "pickle",
            ".safetensors",
        )


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (b"GGUF\x03\0\0\0", "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x80\x05\x95\x10\0\0\0\0\0", "is a Python pickle"),
        (b"\xff" * 20, "18446744073709551615 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "100000001 bytes"),
    ],
    ids=lambda value: value[:12].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_files_of_other_kinds(tmp_path, begin, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(begin)
    refuses(lambda: read_header(path), path, said, ".safetensors file")


def test_truncated_anywhere(tmp_path):
    whole, path = save({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.float16)}, {"m": "n"}), tmp_path / "f"
    path.write_bytes(whole)
    assert len(read_header(path).entries) == 2
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        said = refuses(lambda: read_header(path), path, "truncated", "download")
        assert str(length if not 8 <= length < len(whole) - 16 else length - 8) in said


A, B = entry(), entry(offsets=(8, 16))
BROKEN_HEADERS = {
    "header longer than the file": ({"a": A}, 8, {"length": 5000}, "5000 bytes"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 3}', 8, {}, "1 keys more than once in one object: 'a'"),
    "duplicate word": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 8, {}, "in one object: 'dtype'"),
    "duplicate metadata": (b'{"__metadata__": {}, "__metadata__": {}}', 0, {}, "in one object: '__metadata__'"),
    "overlap": ({"a": A, "b": entry(offsets=(4, 12))}, 12, {}, "'b' overlaps 'a'"),
    "same place": ({"a": A, "b": A}, 8, {}, "'b' overlaps 'a'"),
    "gap": ({"a": A, "b": entry(offsets=(12, 20))}, 20, {}, "'b' leaves a gap after 'a'"),
    "gap at the start": ({"a": entry(offsets=(4, 12))}, 12, {}, "'a' leaves a gap after the header"),
    "trailing bytes": ({"a": A}, 11, {}, "3 bytes follow the last tensor"),
    "missing bytes": ({"a": A, "b": B}, 13, {}, "3 missing"),
    "shape against bytes": ({"a": entry((3,))}, 8, {}, "'a' is F32 [3], which takes 12 bytes"),
    "offsets backwards": ({"a": entry(offsets=(8, 0))}, 8, {}, "offsets span -8"),
    "unknown dtype": ({"a": entry(dtype="F31")}, 8, {}, "'a' has dtype 'F31' (unknown)"),
    "odd dtype": ({"a": entry(dtype=["F32"])}, 8, {}, "'a' has dtype ['F32'] (unknown)"),
    "packed dtype": ({"a": entry(dtype="F8_E8M0")}, 8, {}, "MX and NVFP4"),
    "negative offsets": ({"a": entry(offsets=(-8, 0))}, 8, {}, "offsets [-8, 0]"),
    "float offsets": ({"a": entry(offsets=(0.0, 8.0))}, 8, {}, "offsets [0.0, 8.0]"),
    "bool offsets": ({"a": entry((True,), (False, 4))}, 4, {}, "shape [True] and offsets [False, 4]"),
    "huge shape": ({"a": entry((0, 2**63), (0, 0))}, 0, {}, "shape [0, 9223372036854775808]"),
    "one offset": ({"a": entry(offsets=(8,))}, 8, {}, "shape [2] and offsets [8]"),
    "no shape": ({"a": {"dtype": "F32"}}, 8, {}, "dtype, shape and two data_offsets"),
    "entry is a number": ({"a": 3}, 8, {}, "header entry of 'a' is 3"),
    "entry is null": ({"a": None}, 8, {}, "header entry of 'a' is None"),
    "malformed JSON": (b'{"a": ', 8, {}, "the header is not valid JSON: "),
    "no text": (b"{\xff\xfe}", 8, {}, "the header is not UTF-8 text"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le"), 8, {}, "the header is not valid JSON: "),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", 8, {}, "integer of 5000 digits"),
    "endless nesting": (b'{"a": ' + b"[" * 200_000, 8, {}, "more than 8 deep"),
    "list": ([A], 8, {}, "the header holds an array"),
    "string": ("a", 8, {}, 'the header holds the string "a"'),
    "metadata list": ({"__metadata__": ["a"]}, 0, {}, "__metadata__ holds an array"),
    "metadata number": (
        {"__metadata__": {"a": "b", "c": 4}},
        0,
        {},
        "'c' is the number 4",
    ),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_header(tmp_path, case):
    header, size, more, said = BROKEN_HEADERS[case]
    path = raw(tmp_path / "model.safetensors", header, b"\0" * size, **more)
    refuses(lambda: read_header(path), path, said)


# Valid files of other models.

LORAS = {
    "diffusers peft": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "peft default": "transformer.transformer_blocks.0.attn.to_q.lora_B.default.weight",
    "flash-sd3": "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight",
    "OneTrainer": "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
    "text encoder": "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    "SimpleTuner": "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
    "kohya": "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
    "generic": "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_up.weight",
    "old diffusers": "transformer_blocks.0.attn.processor.to_q_lora.up.weight",
    "linear layer": "transformer.transformer_blocks.0.attn.to_q.lora_linear_layer.up.weight",
    "dotted": "transformer_blocks.0.attn.to_q.lora.down.weight",
    "LoHa": "diffusion_model.joint_blocks.0.x_block.attn.qkv.hada_w1_a",
    "difference": "diffusion_model.joint_blocks.0.x_block.attn.qkv.diff_b",
    "T5 and CLIP": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
}
UNET, FLUX = "model.diffusion_model.input_blocks.0.0.weight", "double_blocks.0.img_attn.qkv.weight"
VAE_4 = "first_stage_model.decoder.up.0.block.0.conv1.weight"
FOREIGN = {f"LoRA, {name}": ([key], "a LoRA (weights to add to a model") for name, key in LORAS.items()} | {
    "SD1.5": ([UNET, VAE_4, "cond_stage_model.transformer.text_model.a"], "a Stable Diffusion 1.x checkpoint"),
    "SD2": ([UNET, VAE_4, "cond_stage_model.model.ln_final.bias"], "a Stable Diffusion 2 checkpoint"),
    "SDXL": ([UNET, VAE_4, "conditioner.embedders.0.a"], "a Stable Diffusion XL checkpoint"),
    "SDXL UNet": ([UNET, "model.diffusion_model.label_emb.0.0.bias"], "a Stable Diffusion XL checkpoint"),
    "SD1.5 UNet": ([UNET], "a UNet of Stable Diffusion 1.x or 2"),
    "SD1.5 UNet, diffusers": (["down_blocks.0.attentions.0.proj_in.bias"], "a UNet of Stable Diffusion 1.x or 2"),
    "SDXL UNet, diffusers": (["down_blocks.1.attentions.0.a", "add_embedding.a"], "a Stable Diffusion XL checkpoint"),
    "Flux": ([FLUX, "single_blocks.0.linear1.weight"], "a Flux checkpoint"),
    "Flux, prefix": ([f"model.diffusion_model.{FLUX}"], "a Flux checkpoint"),
    "Flux, diffusers": (
        ["transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.attn.to_q.weight"],
        "a Flux checkpoint",
    ),
    "SD1.5 ControlNet": (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
    "SDXL ControlNet, diffusers": (["controlnet_cond_embedding.conv_in.bias", "add_embedding.a"], "a ControlNet"),
    "InstantX ControlNet": (
        ["transformer_blocks.0.attn.add_q_proj.weight", "controlnet_blocks.0.bias"],
        "ControlNet",
    ),
    "official ControlNet": (list(golden.manifest("sd3.5_large_controlnet.safetensors")["tensors"]), "ControlNet"),
    "diffusers ControlNet": (list(golden.manifest("diffusers.sd3.5_large.controlnet")["tensors"]), "ControlNet"),
    "anything": (["b", "a"], "no model known here (first keys: a, b)"),
    "nothing": ([], "a file without tensors"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_models_are_named(tmp_path, case):
    keys, name = FOREIGN[case]
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(1) for key in keys}, path)
    for load in (load_mmdit, Pipeline.from_single_file):
        refuses(
            lambda load=load: load(path),
            path,
            "no transformer (MMDiT)",
            f"looks like {name}",
        )
    named = "looks like ControlNet" if name == "ControlNet" else f"other.safetensors ({name}"  # a kind that we know
    refuses(lambda: load_mmdit(tmp_path), tmp_path, "no transformer", named)


def test_inspecting_other_models_names_them(tmp_path):
    save_file({LORAS["kohya"]: torch.zeros(1)}, tmp_path / "lora.safetensors")
    refuses(lambda: describe(tmp_path / "lora.safetensors"), tmp_path / "lora.safetensors", "a LoRA")
