"""Folders with missing, contradictory or surplus files raise an error that names the files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import tiny
from mmdit import Pipeline, load_mmdit, load_vae
from mmdit.checkpoints.describe import describe
from mmdit.checkpoints.write import convert
from refusals import refuses, weights

LORA = {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.zeros(1)}
HUB = "stabilityai/stable-diffusion-3.5-large"


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A diffusers folder to break."""
    return shutil.copytree(tiny_folders["sd3.5-medium"], tmp_path / "model")


def shard(folder):
    """The transformer of a folder in two shards with their index."""
    place = folder / "transformer"
    convert(place, folder.parent / "sharded", "diffusers", max_shard_bytes=3_000_000)
    (place / "diffusion_pytorch_model.safetensors").unlink()
    for file in (folder.parent / "sharded" / "transformer").iterdir():
        shutil.copy(file, place / file.name)
    return place / "diffusion_pytorch_model.safetensors.index.json"


def test_shards(folder):
    index = shard(folder)
    assert load_mmdit(folder).config.depth == tiny.DEPTH
    parts, whole = sorted(index.parent.glob("*-of-*.safetensors")), json.loads(index.read_text())
    first = min(key for key, file in whole["weight_map"].items() if file == parts[0].name)

    index.write_text(json.dumps(whole | {"weight_map": whole["weight_map"] | {"more": parts[0].name}}))
    refuses(lambda: load_mmdit(folder), index, "1 tensors differ", parts[0].name, "'more'")
    index.write_text(json.dumps({"weight_map": {k: v for k, v in whole["weight_map"].items() if k != first}}))
    refuses(lambda: load_mmdit(folder), index, repr(first), "only in the shard")
    index.write_text(json.dumps(whole))
    parts[0].unlink()
    refuses(lambda: load_mmdit(folder), index, parts[0].name)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        refuses(lambda: load_mmdit(index), index, "weight_map", ".safetensors file")
    index.write_text("{")
    refuses(lambda: load_mmdit(index), index, "JSON")
    index.unlink()
    refuses(lambda: load_mmdit(folder), "diffusion_pytorch_model.safetensors.index.json")


CONFIGS = {
    "depth": ("transformer", {"num_layers": 4}, "transformer (MMDiT) says num_layers = 4, its tensors say 3"),
    "norm": ("transformer", {"qk_norm": None}, "says qk_norm = None, its tensors say 'rms_norm'"),
    "second attention": (
        "transformer",
        {"dual_attention_layers": []},
        "dual_attention_layers = [], its tensors say [0, 1]",
    ),
    "sample size": ("transformer", {"sample_size": "big"}, "sample_size = 'big'"),
    "VAE widths": (
        "vae",
        {"block_out_channels": [32, 64]},
        "block_out_channels = [32, 64]",
    ),
    "VAE groups": ("vae", {"norm_num_groups": 0}, "norm_num_groups = 0"),
    "VAE groups that do not divide": (
        "vae",
        {"norm_num_groups": 48},
        "48",
    ),
    "VAE scale": ("vae", {"scaling_factor": "1.5"}, "scaling_factor = '1.5'"),
    "VAE shift": ("vae", {"shift_factor": None}, "shift_factor = None"),
    "CLIP width": (
        "text_encoder",
        {"hidden_size": 768},
        "hidden_size = 768, its tensors say 64",
    ),
    "CLIP heads": ("text_encoder", {"num_attention_heads": 5}, "5 heads"),
    "CLIP activation": (
        "text_encoder",
        {"hidden_act": "relu"},
        "hidden_act = 'relu', expected 'quick_gelu' or 'gelu'",
    ),
    "CLIP end of text": ("text_encoder", {"eos_token_id": "2"}, "eos_token_id = '2'"),
    "CLIP end of text outside": ("text_encoder", {"eos_token_id": 10**6}, "eos_token_id is 1000000"),
    "VAE activation": ("vae", {"act_fn": "gelu"}, "act_fn = 'gelu'"),
    "VAE blocks": ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"]}, "up_block_types"),
    "VAE attention": ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention = False"),
    "T5 activation": ("text_encoder_3", {"dense_act_fn": "relu"}, "dense_act_fn = 'relu'"),
    "T5 layers": ("text_encoder_3", {"num_layers": 24}, "num_layers = 24, its tensors say 2"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_json_that_contradicts_the_tensors(folder, case):
    name, changes, said = CONFIGS[case]
    tiny.rewrite_config(folder, name, **changes)
    refuses(lambda: Pipeline.from_pretrained(folder), weights(folder, name), said)


def test_config_json_that_is_none(folder):
    for text, said in (("[]", "array"), ("{", "JSON")):
        (folder / "vae" / "config.json").write_text(text)
        refuses(lambda: load_vae(folder), folder / "vae" / "config.json", said)
    (folder / "vae" / "config.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": "3"}')
    refuses(lambda: Pipeline.from_pretrained(folder), folder, "shift", "'3'")


MISSING = {
    "tokenizer": ["tokenizer: tokenizer/ (vocab.json, merges.txt, tokenizer_config.json)"],
    "tokenizer_3": ["tokenizer_3: tokenizer_3/ (tokenizer.json or spiece.model)"],
    "text_encoder": ["clip_l: text_encoder/"],
    "vae": ["vae: vae/"],
    "text_encoder_2": ["clip_g: text_encoder_2/"],
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_part_of_a_folder(folder, name):
    shutil.rmtree(folder / name)
    said = [folder, *MISSING[name], f"of {HUB}"]
    message = refuses(lambda: Pipeline.from_pretrained(folder), *said, f"-> {folder / name}")
    assert len(message.splitlines()) == 2
    assert MISSING[name][0] in describe(folder)


def test_missing_tokenizer_files(folder):
    (folder / "tokenizer_2" / "merges.txt").unlink()
    (folder / "tokenizer_2" / "tokenizer.json").unlink(missing_ok=True)
    refuses(
        lambda: Pipeline.from_pretrained(folder),
        folder,
        "tokenizer_2/: no merges.txt",
        f"hf download {HUB}",
        f"--local-dir {folder}",
        error=FileNotFoundError,
    )


def test_missing_beside_a_single_file(tiny_folders, tmp_path):
    with pytest.warns(UserWarning, match=r"have 8 latent cells.*will have 32"):
        path = convert(tiny_folders["sd3.5-medium"] / "transformer", tmp_path / "in" / "a.safetensors", "single")
    message = refuses(
        lambda: Pipeline.from_single_file(path),
        path,
        "has transformer",
        f"clip_l: text_encoders/clip_l.safetensors of {HUB} -> {tmp_path}/in/text_encoders",
        "clip_l=",
        f"tokenizer_2/ (vocab.json, merges.txt, tokenizer_config.json) of {HUB} -> {tmp_path}/in",
        "tokenizers=",
    )
    assert len(message.splitlines()) == 6
    refuses(
        lambda: Pipeline.from_single_file(path, tokenizers=tmp_path / "no"),
        f"tokenizers={tmp_path / 'no'}",
        "tokenizer, tokenizer_2, tokenizer_3",
        error=FileNotFoundError,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses(lambda: Pipeline.from_single_file(path, tokenizers=empty), f"-> {empty}/tokenizer_2")
    refuses(lambda: Pipeline.from_single_file(path, vae=empty), f"{empty} holds no", "nor another model")
    refuses(lambda: Pipeline.from_pretrained(tiny_folders["sd3.5-medium"] / "vae"), "holds no transformer")
    inside = tiny_folders["sd3.5-medium"] / "transformer"
    refuses(lambda: Pipeline.from_pretrained(inside), "not enough", f"{inside.parent} is a whole pipeline")
    lora = tmp_path / "lora.safetensors"
    save_file(LORA, lora)
    refuses(lambda: Pipeline.from_single_file(path, vae=lora), lora, "no VAE", "a LoRA")


def test_two_of_a_kind(folder, tmp_path):
    official = convert(folder, tmp_path / "official", "official")
    main = next(official.glob("*.safetensors"))
    clip = official / "text_encoders" / "clip_l.safetensors"
    other = shutil.copy(clip, clip.with_name("clip_l_other.safetensors"))
    refuses(lambda: Pipeline.from_pretrained(official), "2 files", "CLIP-L text encoder", clip, other)
    assert Pipeline.from_single_file(main, clip_l=other).clip_l is not None
    shutil.copy(main, official / "second.safetensors")
    refuses(lambda: load_mmdit(official), official, "2 files", "transformer", "second.safetensors")


def test_models_that_do_not_go_together(folder):
    from transformers import T5Config, T5EncoderModel

    shutil.rmtree(folder / "text_encoder_3")
    config = T5Config(
        d_model=128, d_kv=64, d_ff=64, num_layers=1, num_heads=2, vocab_size=99, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    refuses(
        lambda: Pipeline.from_pretrained(folder),
        weights(folder, "text_encoder_3"),
        "T5 encoder has 128 channels",
        "256",
    )


def test_paths_that_are_not_there(tmp_path):
    gone = tmp_path / "gone.safetensors"
    for load in (load_mmdit, Pipeline.from_single_file, describe):
        refuses(lambda load=load: load(gone), gone, "does not exist", error=FileNotFoundError)
    refuses(lambda: load_mmdit(tmp_path), tmp_path, "no transformer", "sd3*.safetensors")
    refuses(
        lambda: load_mmdit(HUB),
        f"{HUB} does not exist",
        f"hf download {HUB} --local-dir stable-diffusion-3.5-large",
        "pip install huggingface_hub",
        error=FileNotFoundError,
    )
