"""Folders with unusual files, nested and linked folders, foreign names and leftovers load, or the error names them."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from full import in_full
from mmdit import Pipeline, load_clip, load_mmdit, load_t5, load_vae
from mmdit.checkpoints import files as looked_through
from mmdit.checkpoints.describe import inspect
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.write import convert
from refusals import refuses

ALL = {"transformer", "vae", "clip_l", "clip_g", "t5"}
EMBEDDING = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def written(tiny_folders, tmp_path_factory):
    """`layout -> path` of a tiny pipeline."""
    root = tmp_path_factory.mktemp("written")
    return {layout: convert(tiny_folders["sd3.5-medium"], root / layout, layout) for layout in ("official", "comfyui")}


@pytest.fixture
def official(written, tmp_path):
    """A folder in the official layout to break; its files are links, so tests replace them and never rewrite."""
    return shutil.copytree(written["official"], tmp_path / "official", copy_function=os.link)


@pytest.fixture
def comfy(written, tmp_path):
    return shutil.copytree(written["comfyui"], tmp_path / "comfy", copy_function=os.link)


def main_of(folder: Path) -> Path:
    return next(path for path in folder.rglob("sd3_custom.safetensors"))


def replace(path: Path, tensors, metadata=None) -> Path:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


# An unusual file does not block a folder.

ODD = {
    "AppleDouble": lambda path: path.with_name("._clip_l.safetensors").write_bytes(b"\0\5\x16\7" + bytes(40)),
    "empty": lambda path: path.with_name("a.safetensors").write_bytes(b""),
    "truncated": lambda path: path.with_name("a.safetensors").write_bytes(path.read_bytes()[:3000]),
    "web page": lambda path: path.with_name("a.safetensors").write_bytes(b"<!DOCTYPE html><html></html>"),
    "GGUF": lambda path: path.with_name("t5.gguf").write_bytes(b"GGUF\3\0\0\0"),
    "folder": lambda path: path.with_name("x.safetensors").mkdir(),
    "link loop": lambda path: path.with_name("loop.safetensors").symlink_to(path.with_name("loop.safetensors")),
    "folder loop": lambda path: path.with_name("again").symlink_to(path.parent, target_is_directory=True),
    "link to nothing": lambda path: path.with_name("gone.safetensors").symlink_to("nowhere"),
    "pipe": lambda path: os.mkfifo(path.with_name("pipe.safetensors")),
    "another model": lambda path: save_file({"bert.a": torch.zeros(1)}, path.with_name("bert.safetensors")),
    "CLIP of another width": lambda path: save_file({EMBEDDING: torch.zeros(9, 8)}, path.with_name("o.safetensors")),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_does_not_block_a_folder(official, comfy, case):
    one = (official, comfy)[[*ODD].index(case) % 2]
    for folder in in_full((official, comfy), (one,)):
        places = [main_of(folder), next(folder.rglob("clip_l.safetensors"))]
        for place in places:
            ODD[case](place)
        assert set(locate(folder).weights) == ALL
        assert set(Pipeline.from_single_file(main_of(folder)).models) == ALL
        report = inspect(folder)
        assert report.problems == ()
        assert "complete" in report.text


def test_what_is_given_is_not_looked_for(official):
    """A second CLIP-L makes the folder ambiguous; naming the file resolves it."""
    texts = official / "text_encoders"
    shutil.copy(texts / "clip_l.safetensors", texts / "clip_l_other.safetensors")
    refuses(lambda: Pipeline.from_pretrained(official), "2 files", "CLIP-L text encoder")
    assert load_mmdit(official).config.depth == tiny.DEPTH, "what is not ambiguous loads"
    problems = inspect(official).problems
    assert len(problems) == 1
    assert "clip_l_other.safetensors" in problems[0]
    named = {"clip_l": texts / "clip_l.safetensors", "clip_g": texts / "clip_g.safetensors"}
    named |= {"t5": texts / "t5xxl_fp32.safetensors"}
    assert set(Pipeline.from_single_file(main_of(official), **named).models) == ALL


def test_ambiguous_files_anywhere_in_a_comfyui_tree(comfy):
    main = main_of(comfy)
    shutil.copy(main, main.with_name("other.safetensors"))
    refuses(lambda: load_mmdit(comfy), "2 files", "transformer", "other.safetensors")
    assert load_t5(comfy).config.width == tiny.T5_WIDTH
    assert set(Pipeline.from_single_file(main).models) == ALL


# Nested and linked folders, and other endings.


def test_nested_and_linked_folders(official, comfy, tmp_path):
    texts = official / "text_encoders"
    (texts / "sd3").mkdir()
    (texts / "clip_l.safetensors").rename(texts / "sd3" / "clip_l.safetensors")
    (texts / "clip_g.safetensors").rename(official / "my_clip_g.safetensors")
    (texts / "t5xxl_fp32.safetensors").rename(texts / "t5xxl_fp32.sft")
    disk = tmp_path / "disk"
    (comfy / "models" / "checkpoints").rename(disk)
    (comfy / "models" / "checkpoints").mkdir()
    (comfy / "models" / "checkpoints" / "big").symlink_to(disk, target_is_directory=True)
    for folder in (official, comfy):
        assert set(Pipeline.from_pretrained(folder).models) == ALL
    assert set(Pipeline.from_single_file(main_of(official)).models) == ALL


def test_a_whole_disk_is_not_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(looked_through, "MAX_ENTRIES", 20)
    for number in range(30):
        (tmp_path / str(number)).mkdir()
    refuses(lambda: locate(tmp_path), tmp_path, "more than 20")


# Files that lie in the right place and cannot be used are named.

GGUF = b"GGUF\3\0\0\0" + bytes(20)


def test_what_was_not_understood_is_named_first(official):
    t5 = official / "text_encoders" / "t5xxl_fp32.safetensors"
    t5.unlink()
    t5.with_suffix(".gguf").write_bytes(GGUF)
    with pytest.warns(UserWarning, match=r"no T5 encoder.*t5xxl_fp32\.gguf"):
        Pipeline.from_pretrained(official)
    assert "t5xxl_fp32.gguf" in inspect(official).text
    clip = official / "text_encoders" / "clip_l.safetensors"
    replace(clip, {"my.own.names": torch.zeros(2)})
    said = refuses(lambda: Pipeline.from_pretrained(official), clip, "my.own.names")
    assert said.index("my.own.names") < said.index("of stabilityai")


def openclip(tensors):
    """The tensors of a CLIP text tower under OpenCLIP's names."""
    found = {
        "token_embedding.weight": tensors[EMBEDDING],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["text_model.final_layer_norm.weight"],
        "ln_final.bias": tensors["text_model.final_layer_norm.bias"],
        "text_projection": tensors["text_projection.weight"].T,
        "logit_scale": torch.ones(()),
        "visual.conv1.weight": torch.ones(2),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(3):
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [tensors[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
            found[f"{theirs}attn.out_proj.{kind}"] = tensors[f"{ours}self_attn.out_proj.{kind}"]
            found |= {f"{theirs}{new}.{kind}": tensors[f"{ours}{old}.{kind}"] for old, new in names.items()}
    return found


RENAMED = {
    "T5, transformer.": ("t5", lambda tensors: {f"transformer.{key}": one for key, one in tensors.items()}),
    "T5, with decoder": ("t5", lambda t: t | {"decoder.block.0.a": torch.ones(1), "lm_head.weight": torch.ones(1)}),
    "CLIP-G, OpenCLIP": ("clip_g", openclip),
    "CLIP-G, transformers 5": ("clip_g", lambda t: {key.removeprefix("text_model."): one for key, one in t.items()}),
    "CLIP-G, bare projection": (
        "clip_g",
        lambda t: (
            {k: v for k, v in t.items() if "projection" not in k} | {"text_projection": t["text_projection.weight"].T}
        ),
    ),
    "CLIP-G, with vision tower": (
        "clip_g",
        lambda t: t | {"vision_model.a": torch.ones(1), "logit_scale": torch.ones(())},
    ),
    "CLIP-G, ComfyUI": ("clip_g", lambda t: {f"clip_g.transformer.{key}": one for key, one in t.items()}),
    "CLIP-L, compiled": ("clip_l", lambda tensors: {f"_orig_mod.{key}": one for key, one in tensors.items()}),
    "CLIP-L, parallel": ("clip_l", lambda tensors: {f"module.{key}": one for key, one in tensors.items()}),
}
LOAD = {"t5": load_t5, "clip_l": lambda p: load_clip(p, "l"), "clip_g": lambda p: load_clip(p, "g")}
FILES = {"t5": "t5xxl_fp32", "clip_l": "clip_l", "clip_g": "clip_g"}


@pytest.mark.filterwarnings("ignore:.*(are left out|are read without)")
@pytest.mark.parametrize("case", RENAMED)
def test_other_names_give_the_same_model(official, case):
    component, rename = RENAMED[case]
    path = official / "text_encoders" / f"{FILES[component]}.safetensors"
    wanted = LOAD[component](path).state_dict()
    replace(path, rename(load_file(path)))
    for found in (LOAD[component](path).state_dict(), LOAD[component](official).state_dict()):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())


# Tensors that other programs leave in files.

LEFTOVERS = {
    "model_sampling.sigmas": "a noise schedule",
    "model.diffusion_model.model_sampling.sigmas": "a noise schedule",
    "betas": "a noise schedule",
    "model_ema.decay": "averaged weights",
    "loss.discriminator.main.0.weight": "a training loss",
    "first_stage_model.loss.logvar": "a training loss",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": "a LoRA",
}


@pytest.mark.parametrize("key", LEFTOVERS)
def test_leftovers_are_left_out_with_a_note(official, key):
    main = main_of(official)
    tensors = load_file(main)
    replace(main, tensors | {key: torch.ones(1)})
    if key.startswith("lora"):  # without one of our prefixes, a file with such names alone could be a whole LoRA
        key = f"model.diffusion_model.{key}"
        replace(main, tensors | {key: torch.ones(1)})
    for load in (load_mmdit, load_vae):
        with pytest.warns(UserWarning, match="are left out") as said:
            load(main)
        assert len(said) == 1
        assert key in str(said[0].message)
    assert LEFTOVERS.get(key, "a LoRA") in inspect(main).text


def test_unknown_tensors_are_still_refused(official):
    main = main_of(official)
    replace(main, load_file(main) | {"something.else": torch.ones(1)})
    refuses(lambda: load_mmdit(main), "1 unexpected tensors", "something.else")
    assert any("something.else" in problem for problem in inspect(main).problems)


@pytest.mark.parametrize("spelling", ["with dots", "flat"])
@pytest.mark.filterwarnings("ignore:.*are left out")
def test_averaged_weights_can_be_chosen(official, spelling):
    main, prefix = main_of(official), "model.diffusion_model."
    tensors = load_file(main)
    averaged = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            inner = key.removeprefix("model.")
            averaged[f"model_ema.{inner.replace('.', '') if spelling == 'flat' else inner}"] = tensor + 1
    replace(main, tensors | averaged)
    plain, ema = load_mmdit(main).state_dict(), load_mmdit(main, ema=True).state_dict()
    assert all(torch.equal(plain[key] + 1, tensor) for key, tensor in ema.items())
    assert all(torch.equal(tensors[prefix + key], tensor) for key, tensor in plain.items())


# Compiled models.


def test_compiled_models_are_saved_under_their_own_names(tiny_folders, tmp_path):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3-medium"])
    wanted = {name: model.state_dict() for name, model in pipe.models.items()}
    pipe.transformer.joint_blocks[1] = torch.compile(pipe.transformer.joint_blocks[1], backend="eager")
    for name in ("vae", "clip_l", "t5"):
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
    for layout in ("official", "diffusers"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / layout, layout))
        for name, model in read.models.items():
            assert all(torch.equal(tensor, wanted[name][key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        del pipe.clip_g.text_model.final_layer_norm
    refuses(lambda: pipe.save_pretrained(tmp_path / "broken"), "missing: text_model.final_layer_norm")
    assert not (tmp_path / "broken").exists()


# Entries of config.json, and CLIP-G's projection.


def test_clip_g_without_its_projection_is_refused(official, tiny_folders, tmp_path):
    path = official / "text_encoders" / "clip_g.safetensors"
    tensors = load_file(path)
    del tensors["text_projection.weight"]
    replace(path, tensors)
    for load in (lambda p: load_clip(p, "g"), Pipeline.from_pretrained):
        refuses(lambda load=load: load(official), path, "text_projection.weight")
    assert any("text_projection.weight" in problem for problem in inspect(official).problems)
    folder = shutil.copytree(tiny_folders["sd3-medium"], tmp_path / "diffusers")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_projection.weight"]
    replace(path, tensors, {"format": "pt"})
    refuses(lambda: Pipeline.from_pretrained(folder), path, "CLIPTextModelWithProjection", "text_projection.weight")
    assert inspect(folder).problems


CLASSES = {
    "transformer": {"_class_name": "FluxTransformer2DModel"},
    "vae": {"_class_name": "AutoencoderTiny"},
    "text_encoder": {"architectures": ["BertModel"]},
    "text_encoder_2": {"projection_dim": 77},
    "text_encoder_3": {"architectures": ["UMT5EncoderModel"]},
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_projection_of_config_json(tiny_folders, tmp_path, name):
    folder = shutil.copytree(tiny_folders["sd3-medium"], tmp_path / "folder")
    tiny.rewrite_config(folder, name, **CLASSES[name])
    value = next(iter(CLASSES[name].values()))
    word = value[0] if isinstance(value, list) else value
    refuses(lambda: Pipeline.from_pretrained(folder), "config.json", word)
    assert any(str(word) in problem for problem in inspect(folder).problems)


# `mmdit inspect` runs the loader's checks.

REFUSED = {
    "missing tensor": ("transformer", lambda t: {k: v for k, v in t.items() if "norm_out.linear.bias" not in k}),
    "far block": ("transformer", lambda t: t | {"transformer_blocks.999.attn.to_q.weight": torch.ones(1)}),
    "int8": ("text_encoder_3", lambda t: {k: v.to(torch.int8) if v.ndim == 2 else v for k, v in t.items()}),
    "quant_conv": ("vae", lambda t: t | {"quant_conv.weight": torch.ones(1)}),
    "4 bits": (
        "text_encoder_3",
        lambda t: t | {"encoder.block.0.layer.0.SelfAttention.q.weight.absmax": torch.ones(1)},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inspect_refuses_what_the_loader_refuses(tiny_folders, tmp_path, case, capsys):
    from mmdit.cli import main

    folder = shutil.copytree(tiny_folders["sd3-medium"], tmp_path / "folder")
    name, change = REFUSED[case]
    path = next((folder / name).glob("*.safetensors"))
    replace(path, change(load_file(path)), {"format": "pt"})
    said = refuses(lambda: Pipeline.from_pretrained(folder))
    assert said in inspect(folder).problems
    assert main(["inspect", str(folder)]) == 1
    assert "complete: a picture" not in capsys.readouterr().out


def test_inspect_finds_what_does_not_go_together(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["sd3-medium"], tmp_path / "folder")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": -1}')
    assert "shift" in inspect(folder).problems[0] and "-1" in inspect(folder).problems[0]
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": NaN}')
    refuses(lambda: inspect(folder), "scheduler_config.json", "NaN")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 10**30}))
    assert inspect(folder).problems


# Paths that lead out of the folder.


@pytest.mark.parametrize(
    "name",
    [
        "../out.safetensors",
        "/etc/out.safetensors",
        ".hidden.safetensors",
        "a/b.safetensors",
        "..",
        "out.bin",
        "x" * 300 + ".safetensors",
        "a\0.safetensors",
    ],
)
def test_shards_outside_of_the_folder_are_refused(tmp_path, name):
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    refuses(lambda: load_mmdit(index), index, "plain name")
    refuses(lambda: load_mmdit(tmp_path / "model"), index, "plain name")


def test_only_known_tokenizer_files_are_copied(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["sd3-medium"], tmp_path / "folder")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "tokenizer" / "notes.txt").write_text("mine")
    (folder / "tokenizer" / "loop").symlink_to(folder / "tokenizer", target_is_directory=True)
    (folder / "tokenizer" / "id_rsa").symlink_to(secret)
    target = convert(folder, tmp_path / "copy", "official")
    names = {path.name for path in (target / "tokenizer").iterdir()}
    assert names <= set(looked_through_names())
    assert "vocab.json" in names
    (folder / "tokenizer" / "merges.txt").unlink()
    (folder / "tokenizer" / "merges.txt").symlink_to(secret)
    refuses(lambda: convert(folder, tmp_path / "other", "official"), "merges.txt", secret)
    assert not (tmp_path / "other").exists()


def looked_through_names():
    from encoders.tokenizer_files import KNOWN_FILES

    return KNOWN_FILES


# The hub's cache, and folders with a single variant.


def test_a_folder_of_the_hubs_cache_and_one_variant(tiny_folders, tmp_path):
    cache, commit = tmp_path / "models--someone--tiny", "a" * 40
    snapshot = shutil.copytree(tiny_folders["sd3-medium"], cache / "snapshots" / commit)
    (cache / "snapshots" / ("b" * 40)).mkdir()
    (cache / "refs").mkdir()
    refuses(lambda: locate(cache), cache, "2 commits")
    (cache / "refs" / "main").write_text(commit)
    assert set(locate(cache).weights) == ALL
    for path in snapshot.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.bf16.safetensors"))
    assert set(Pipeline.from_pretrained(cache).models) == ALL
