"""Every layout x variant x dtype loads, and layouts turn into each other without losing a byte."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

import spellings
import tiny
from full import in_full
from mmdit import Pipeline, load_clip, load_mmdit, load_t5, load_vae
from mmdit.checkpoints.describe import describe
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.write import convert

README = Path(__file__).parents[3] / "src" / "mmdit" / "checkpoints" / "README.md"
LAYOUTS = {
    "official file": "official",
    "file without prefix": "bare",
    "ComfyUI folder": "comfyui",
    "diffusers folder": "diffusers",
    "diffusers folder, sharded": "sharded",
}


@pytest.fixture(scope="module")
def written(tiny_folders, tmp_path_factory):
    """`(layout, variant) -> path` of the transformer alone, in float32."""
    root = tmp_path_factory.mktemp("layouts")

    @cache
    def write(layout: str, variant: str) -> Path:
        source, target = tiny_folders[variant] / "transformer", root / f"{layout}-{variant}"
        if layout == "bare":
            return _without_prefix(next(write("official", variant).glob("*.safetensors")), target)
        if layout == "sharded":
            return convert(source, target, "diffusers", max_shard_bytes=3_000_000)
        return convert(source, target, layout)

    return write


def _without_prefix(source: Path, target: Path) -> Path:
    from safetensors.torch import load_file, save_file

    target = target.with_name(f"{target.name}.safetensors")  # a suffix would take the place of ".5-medium"
    save_file({key.removeprefix("model.diffusion_model."): one for key, one in load_file(source).items()}, target)
    return target


@pytest.mark.parametrize("spelling", spellings.SPELLINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads(written, tmp_path, layout, spelling):
    number = [*LAYOUTS].index(layout) + [*spellings.SPELLINGS].index(spelling)
    for variant in in_full([*tiny.VARIANTS], [[*tiny.VARIANTS][number % len(tiny.VARIANTS)]]):
        path = written(LAYOUTS[layout], variant)
        respelled = spellings.respell(path, tmp_path / path.name, spelling)
        found = load_mmdit(respelled, dtype=torch.float32, float8="dequantize").state_dict()
        truth = load_mmdit(path).state_dict()
        assert found.keys() == truth.keys()
        for key, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert tiny.error(tensor, truth[key]) <= _rounding(key, truth[key], spelling), key


def _rounding(key: str, truth: torch.Tensor, spelling: str) -> float:
    """Half a unit in the last place; the smallest float8 numbers round more coarsely where there is no scale."""
    if spelling in spellings.DTYPES:
        return {"fp32": 0.0, "fp16": 2**-10, "bf16": 2**-8}[spelling]
    if spelling in spellings.SCALED:
        return 2**-4 if spellings.LINEARS.fullmatch(f"joint_blocks.0.{key}") else 2**-8
    return 0.1 if spelling == "fp8 e4m3" else 0.2


def test_readme_table_is_what_loads():
    """The table says exactly what the matrix above tests, in full."""
    columns = ["layout", *spellings.SPELLINGS]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " :-: |" * len(spellings.SPELLINGS)]
    cell = f"{len(tiny.VARIANTS)} of {len(tiny.VARIANTS)}"
    lines += ["| " + " | ".join([layout, *[cell] * len(spellings.SPELLINGS)]) + " |" for layout in LAYOUTS]
    table = "\n".join(lines)
    assert table in README.read_text(encoding="utf-8"), f"README's table of what loads should be:\n{table}"


ROUND_TRIPS = [("official", "diffusers"), ("official", "comfyui"), ("diffusers", "official"), ("official", "single")]


@pytest.mark.parametrize(("layout", "through"), ROUND_TRIPS)
def test_round_trips_are_byte_equal(tiny_folders, tmp_path, layout, through):
    """Written here, converted and converted back: every weight file is the same to the byte."""
    source = convert(tiny_folders["sd3.5-medium"], tmp_path / "source", layout)
    ending = ".safetensors" if through == "single" else ""
    middle = convert(source, tmp_path / f"middle{ending}", through)
    back = convert(middle, tmp_path / "back", layout)
    names = sorted(file.relative_to(source) for file in source.rglob("*.safetensors"))
    assert names == sorted(file.relative_to(back) for file in back.rglob("*.safetensors"))
    assert len(names) >= 4
    for name in names:
        assert (source / name).read_bytes() == (back / name).read_bytes(), name


def test_fp16_and_fp8_survive_conversion(tiny_folders, tmp_path):
    """Plain float8 is moved as codes, never computed with."""
    official = convert(tiny_folders["sd3-medium"] / "transformer", tmp_path / "official", "official")
    for spelling in ("fp16", "fp8 e4m3", "fp8 e5m2"):
        source = spellings.respell(official, tmp_path / spelling, spelling)
        there = convert(source, tmp_path / f"{spelling}-there", "diffusers")
        back = convert(there, tmp_path / f"{spelling}-back", "official")
        assert next(back.glob("*.safetensors")).read_bytes() == next(source.glob("*.safetensors")).read_bytes()


def test_conversion_can_cast(tiny_folders, tmp_path):
    target = convert(tiny_folders["sd3-medium"], tmp_path / "out", "official", dtype=torch.bfloat16)
    assert load_mmdit(target).pos_embed.dtype == torch.bfloat16
    assert (target / "text_encoders" / "t5xxl_bf16.safetensors").exists()


def test_shards_and_index(tiny_folders, tmp_path):
    target = convert(tiny_folders["sd3-medium"], tmp_path / "out", "diffusers", max_shard_bytes=2_000_000)
    index = json.loads((target / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = {path.name for path in (target / "transformer").glob("*.safetensors")}
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == shards
    reference = tiny.load(target).transformer.state_dict()
    for key, tensor in tiny.transformer(tiny.VARIANTS["sd3-medium"]).state_dict().items():
        assert torch.equal(reference[key], tensor), key


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfyui", "single"])
def test_whole_pipeline_from_every_layout(tiny_folders, tmp_path, layout):
    """The same picture, to the bit, whatever the layout."""
    source = tiny_folders["sd3.5-medium"]
    path = convert(source, tmp_path / ("all.safetensors" if layout == "single" else "folder"), layout)
    settings = {
        "num_inference_steps": 2,
        "seed": 1,
        "output_type": "pt",
        "height": 32,
        "width": 32,
        "max_sequence_length": 32,
    }
    pipe = Pipeline.from_single_file(path, tokenizers=source) if layout == "single" else Pipeline.from_pretrained(path)
    wanted = Pipeline.from_pretrained(source)("a star", **settings).images
    assert torch.equal(pipe("a star", **settings).images, wanted)


def test_single_file_finds_its_neighbours(tiny_folders, tmp_path):
    folder = convert(tiny_folders["sd3-medium"], tmp_path / "folder", "official")
    pipe = Pipeline.from_single_file(next(folder.glob("*.safetensors")))
    assert set(pipe.models) == {"transformer", "vae", "clip_l", "clip_g", "t5"}


def test_single_components_of_every_layout(tiny_folders, tmp_path):
    source = tiny_folders["sd3-medium"]
    official = convert(source, tmp_path / "folder", "official")
    encoders = official / "text_encoders"
    wanted = load_t5(source).state_dict()
    for path in (official, encoders / "t5xxl_fp32.safetensors", source / "text_encoder_3"):
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in load_t5(path).state_dict().items())
    for which in "lg":
        paths = (official, encoders / f"clip_{which}.safetensors")
        assert len({load_clip(path, which).config for path in paths}) == 1
    assert load_vae(official).config == load_vae(source / "vae").config


def test_identity_projection_of_clip_l_comes_and_goes(tiny_folders, tmp_path):
    """Official CLIP-L files have no projection; diffusers' class needs one, and the identity changes nothing."""
    pipe = Pipeline.from_pretrained(tiny_folders["sd3-medium"])
    pipe.clip_l.text_projection.weight.copy_(torch.eye(tiny.CLIP_L))
    official = pipe.save_pretrained(tmp_path / "official")
    assert load_clip(official, "l").config.projection_dim is None
    back = convert(official, tmp_path / "back", "diffusers")
    assert torch.equal(load_clip(back, "l").text_projection.weight, torch.eye(tiny.CLIP_L))


def test_describe_names_what_is_there_and_what_is_missing(tiny_folders, tmp_path):
    text = describe(tiny_folders["sd3.5-medium"])
    for words in ("layout: diffusers", "second attention in 2 blocks", "quick_gelu", "vocabulary 1000", "complete"):
        assert words in text
    alone = convert(tiny_folders["sd3.5-medium"] / "transformer", tmp_path / "alone", "official")
    text = describe(alone)
    for words in ("missing to draw a picture", "clip_l.safetensors", "tokenizer_2/", f"-> {alone}/text_encoders"):
        assert words in text
    assert set(locate(alone).weights) == {"transformer"}
