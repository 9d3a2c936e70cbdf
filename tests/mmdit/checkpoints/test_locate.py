"""Finding models in folders, for paths in every form."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from mmdit import CheckpointError, Pipeline, load_mmdit, load_t5
from mmdit.bench.random_models import MODELS
from mmdit.checkpoints import files, load_pipeline, write
from mmdit.checkpoints.describe import describe
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.write import convert


@pytest.fixture(scope="module")
def comfy(tiny_folders, tmp_path_factory):
    return convert(tiny_folders["sd3.5-medium"], tmp_path_factory.mktemp("comfy") / "tree", "comfyui")


def test_a_relative_path_finds_the_same_neighbours(comfy, monkeypatch):
    main = next((comfy / "models" / "checkpoints").glob("*.safetensors"))
    monkeypatch.chdir(main.parent)
    assert set(Pipeline.from_single_file(main.name).models) == {"transformer", "vae", "clip_l", "clip_g", "t5"}
    assert "complete" in describe(main.name)


def test_here_is_a_component_folder(tiny_folders, monkeypatch):
    monkeypatch.chdir(tiny_folders["sd3.5-medium"] / "text_encoder_2")
    assert set(locate(".").weights) == {"clip_g"}


def test_two_vaes_are_not_chosen_between(comfy, tiny_folders, tmp_path):
    """Flux's VAE has the same names and shapes with another scale, so the loader must not take the first file."""
    shutil.copytree(comfy, tmp_path / "tree")
    main = next((tmp_path / "tree").glob("models/checkpoints/*.safetensors"))
    tensors = load_file(main)
    save_file({key: one for key, one in tensors.items() if key.startswith("model.")}, main)
    vae = {key.removeprefix("first_stage_model."): one for key, one in tensors.items() if key.startswith("first_")}
    (tmp_path / "tree" / "models" / "vae").mkdir()
    for name in ("ae", "sd3_vae"):
        save_file(vae, tmp_path / "tree" / "models" / "vae" / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 files are the VAE: .*ae.safetensors.*vae="):
        Pipeline.from_pretrained(tmp_path / "tree")


def test_folders_without_a_transformer(comfy, tiny_folders, tmp_path):
    assert load_t5(comfy / "models" / "text_encoders").config.width == tiny.T5_WIDTH
    vae = convert(tiny_folders["sd3-medium"] / "vae", tmp_path / "vae", "official")
    assert set(locate(vae).weights) == {"vae"}
    assert "missing to draw a picture" in describe(vae)


def test_a_folder_of_another_model_is_said_and_nothing_is_written(tmp_path):
    (tmp_path / "bert").mkdir()
    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2)}, tmp_path / "bert" / "model.safetensors")
    for call in (lambda: describe(tmp_path / "bert"), lambda: convert(tmp_path / "bert", tmp_path / "out", "official")):
        with pytest.raises(CheckpointError, match="no SD3 checkpoint"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["joint_blocks.0.x_block.attn.ln_q.weight", "joint_blocks.1.x_block.attn2.qkv.weight"])
def test_one_missing_tensor_is_named(tiny_folders, tmp_path, key):
    file = next(convert(tiny_folders["sd3.5-medium"] / "transformer", tmp_path / "t", "official").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[f"model.diffusion_model.{key}"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        load_mmdit(file)
    assert f"1 missing: {key}" in str(error.value)
    assert "unexpected" not in str(error.value)


def test_mixed_dtypes_need_one_to_compute_in(tiny_folders, tmp_path):
    file = next(convert(tiny_folders["sd3-medium"] / "transformer", tmp_path / "t", "official").glob("*.safetensors"))
    save_file({key: one.half() if one.ndim > 1 else one for key, one in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"float16.*float32.*give one dtype"):
        load_mmdit(file)
    assert load_mmdit(file, dtype=torch.float32).pos_embed.dtype == torch.float32


def test_what_a_layout_cannot_carry_is_said(tiny_folders, tmp_path):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3-medium"])
    pipe.shift = 1.0
    with pytest.warns(UserWarning, match="shift 1.0"):
        pipe.save_pretrained(tmp_path / "comfy", "comfyui")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "official")).shift == 1.0


def test_the_picture_size_of_official_models_is_kept_in_every_layout():
    """What pyproject.toml ignores are sizes of tiny models; here these warnings are errors."""
    for config in (MODELS["large"], MODELS["medium"], replace(MODELS["medium"], pos_embed_size=192)):
        write._warn_of_size(config)
        for size in (64, 192):
            with pytest.raises(UserWarning, match=f"{size} latent cells.* 128"):
                write._warn_of_size(replace(config, sample_size=size))


def test_a_tokenizer_of_another_model_is_refused(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["sd3-medium"], tmp_path / "folder")
    file = folder / "text_encoder_2" / "model.safetensors"
    key = "text_model.embeddings.token_embedding.weight"
    tensors = load_file(file)
    save_file(tensors | {key: tensors[key][:900].clone()}, file, {"format": "pt"})
    tiny.rewrite_config(folder, "text_encoder_2", vocab_size=900)
    with pytest.raises(CheckpointError, match=r"CLIP-G .*1000 tokens.* 900"):
        Pipeline.from_pretrained(folder)


def test_a_picture_that_is_not_finite_is_refused(tiny_folders):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3-medium"])
    pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        pipe("x", num_inference_steps=1)


@pytest.mark.parametrize("main", [True, False], ids=["file", "folder"])
def test_names_of_a_file_are_sorted_into_models_once(comfy, monkeypatch, main):
    read, split = [], files.split
    monkeypatch.setattr(files, "split", lambda keys, **more: read.append(len(list(keys))) or split(keys, **more))
    path = next((comfy / "models" / "checkpoints").glob("*.safetensors")) if main else comfy
    found = load_pipeline.Source(path).find()
    models = load_pipeline._opened(found)
    assert len(models) == 5
    assert len(read) == len(set(found.weights.values()))
