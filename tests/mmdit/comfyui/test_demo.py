"""Workflows on the embedded model: the article's own, the pipeline's picture, settings both ways, the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mmdit
from mmdit import NodeError, Pipeline, SettingsError, WorkflowCache, from_workflow, run_workflow, to_workflow
from mmdit.cli.app import main
from mmdit.comfyui.declare import NODES, decimal, wire
from mmdit.comfyui.run import overridden
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.settings import text_chunks

ARTICLE = Path(__file__).parents[3] / "notebooks" / "workflows" / "article.json"
PROMPT = "a large red circle above a blue star, on a white background"


@pytest.fixture(scope="module")
def article() -> dict:
    """The article's workflow, smaller and with few steps."""
    return overridden(json.loads(ARTICLE.read_text()), ["3.steps=2", "5.width=64", "5.height=64"])


@pytest.fixture(scope="module")
def output(article, tmp_path_factory) -> mmdit.WorkflowResult:
    return run_workflow(article, output=tmp_path_factory.mktemp("output"), keep=[("3", 0)])


@pytest.fixture(scope="module")
def drawn() -> object:
    pipe = Pipeline.demo(profile="comfyui", dtype=torch.float32)
    return pipe(PROMPT, seed=7, num_inference_steps=2, guidance_scale=4.0, height=64, width=64)


def test_the_article_s_workflow_draws_the_pipeline_s_picture(output, drawn):
    (picture,) = output.images["9"]
    assert np.array_equal(np.asarray(picture), np.asarray(drawn.images[0]))
    assert output.values["3", 0]["samples"].shape == (1, 16, 8, 8)
    assert [path.name for path in output.files] == ["article_00001_.png"]


def test_our_settings_become_a_graph_that_draws_the_same(drawn):
    settings = drawn.settings[0]
    found = run_workflow(to_workflow(settings))
    assert np.array_equal(np.asarray(found.images["8"][0]), np.asarray(drawn.images[0]))


def test_settings_come_back_from_graphs_and_pictures(output, drawn, article):
    read = from_workflow(output.files[0])
    assert (read.prompt, read.seed, read.num_inference_steps, read.guidance_scale) == (PROMPT, 7, 2, 4.0)
    same = replace(drawn.settings[0], guidance="skip_guidance_layers=1,2 skip_layer_guidance_scale=2.5")
    back = from_workflow(to_workflow(same))
    names = ("prompt", "negative_prompt", "seed", "height", "width", "num_inference_steps", "guidance_scale", "sampler")
    for name in (*names, "schedule", "shift", "profile"):
        assert getattr(back, name) == getattr(same, name), name
    assert mmdit.Guidance.from_text(back.guidance).skip_guidance_layers == (1, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"3.denoise": 0.5}, "node 3 .KSampler.*denoise"),
        ({"5.batch_size": 2}, "node 5 .EmptyLatentImage"),
        ({"3.latent_image": ["8", 0]}, "node 8 .VAEDecode"),
        ({"3.positive": ["3", 0]}, "node 3"),
        ({"3.model": ["77", 0]}, "no node"),
        ({"3.seed": ["5", 0]}, "seed comes from another node"),
        ({"3.seed": None}, "node 3 .KSampler., seed"),
    ],
)
def test_what_settings_cannot_say_is_named(article, change, said):
    graph = json.loads(json.dumps(article))
    for place, value in change.items():
        id, name = place.split(".")
        graph[id]["inputs"][name] = value
    with pytest.raises(SettingsError, match=said):
        from_workflow(graph)


@pytest.mark.parametrize(
    "change",
    [{"sampler": "flow_heun"}, {"schedule": "diffusers_beta"}, {"seed": None}, {"strength": 0.5}, {"quant": "fp8"}],
)
def test_what_comfyui_cannot_do_is_not_exported(drawn, change):
    with pytest.raises(SettingsError):
        to_workflow(replace(drawn.settings[0], **change))
    with pytest.warns(UserWarning, match="diffusers"):
        to_workflow(replace(drawn.settings[0], profile="diffusers"))


def test_the_names_of_files_are_those_of_the_model(drawn):
    graph = to_workflow(replace(drawn.settings[0], model="/models/sd3.5_large.safetensors"))
    assert graph["1"]["inputs"]["ckpt_name"] == "sd3.5_large.safetensors"
    assert graph["2"]["class_type"] == "TripleCLIPLoader"
    given = to_workflow(drawn.settings[0], checkpoint="a.safetensors", encoders=["l", "g"])
    assert given["2"]["inputs"] == {"clip_name1": "l", "clip_name2": "g", "type": "sd3"}


def test_the_second_run_computes_only_what_changed(article, monkeypatch):
    cache, calls = WorkflowCache(), []
    for name in ("CheckpointLoaderSimple", "CLIPTextEncode", "KSampler", "VAEDecode"):
        one = NODES[name]
        run = one.run
        watched = replace(one, run=_watched(run, name, calls))
        monkeypatch.setitem(NODES, name, watched)
    run_workflow(overridden(article, ["3.steps=1"]), cache=cache)
    assert calls == ["CheckpointLoaderSimple", "CLIPTextEncode", "CLIPTextEncode", "KSampler", "VAEDecode"]
    calls.clear()
    run_workflow(overridden(article, ["3.steps=1", "3.seed=8"]), cache=cache)
    assert calls == ["KSampler", "VAEDecode"]
    calls.clear()
    run_workflow(overridden(article, ["3.steps=1"]), cache=cache, tokenizers=Pipeline.demo().tokenizers)
    assert calls[:2] == ["CheckpointLoaderSimple", "CLIPTextEncode"]  # what other tokenizers made is not used


def _watched(run, name, calls):
    from functools import wraps

    @wraps(run)
    def watching(*args, **kwargs):
        calls.append(name)
        return run(*args, **kwargs)

    return watching


def test_only_what_an_output_needs_is_run(article):
    extra = {"77": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["4", 2]}}}
    with pytest.raises(ValueError, match="77"):
        run_workflow(article | extra, keep=[("77", 0)])


@pytest.mark.parametrize("change", ["3.stepz=1", "33.steps=1", "3.model=1", "3.steps", "3"])
def test_a_change_names_a_value_of_the_graph(article, change):
    with pytest.raises(ValueError, match=change.partition("=")[0]):
        overridden(article, [change])


def test_a_node_of_ones_own(article):
    @mmdit.workflow_node("Darken", [wire("image", "IMAGE"), decimal("by", 0.5, 0, 1)], ["IMAGE"])
    def darken(image, by):
        return image * (1 - by)

    try:
        picture = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0xFFFFFF}}
        darker = {"class_type": "Darken", "inputs": {"image": ["1", 0], "by": 0.5}}
        show = {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}}
        found = run_workflow({"1": picture, "2": darker, "3": show})
        assert found.images["3"][0].getpixel((0, 0)) == (127, 127, 127)  # cut off, not rounded
        with pytest.raises(ValueError, match="Darken"):
            mmdit.workflow_node("Darken", [wire("image", "IMAGE")], ["IMAGE"])(lambda image: image)
        with pytest.raises(TypeError, match="function takes"):
            mmdit.workflow_node("Other", [wire("image", "IMAGE")], ["IMAGE"])(lambda picture: picture)
        mmdit.workflow_node("Darken", [wire("image", "IMAGE")], ["IMAGE"], replace=True)(lambda image: None)
        with pytest.raises(NodeError, match="node 3"):
            run_workflow({"1": picture, "2": {**darker, "inputs": {"image": ["1", 0]}}, "3": show})
    finally:
        NODES.pop("Darken", None)


def test_run_and_workflow_on_the_command_line(output, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["run", str(output.files[0]), "--set", "3.seed=8", "3.steps=1", "--output", "out", "--device", "cpu"]) == 0
    )
    assert capsys.readouterr().out.strip() == "wrote out/article_00001_.png"
    assert "3" in json.loads(text_chunks(Path("out/article_00001_.png"))["prompt"])
    assert main(["workflow", str(output.files[0]), "--models", "demo"]) == 0
    said = capsys.readouterr().out
    assert "checkpoints/demo.safetensors: there" in said and "it can run; its outputs are 9" in said
    assert main(["run", str(ARTICLE), "--limit", "steps=1", "--device", "cpu"]) == 1
    assert "--limit steps=N" in capsys.readouterr().err
    assert main(["run", str(ARTICLE), "--set", "3.nothing=1"]) == 2
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    assert main(["workflow", str(ARTICLE), "--models", "models"]) == 0
    assert "demo.safetensors: MISSING" in capsys.readouterr().out


def test_generate_draws_a_picture_of_comfyui_again(output, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--settings", str(output.files[0]), "-o", "a.png", "--device", "cpu"]) == 1
    assert "give --model" in capsys.readouterr().err
    assert main(["generate", "--settings", str(output.files[0]), "-m", "demo", "-o", "a.png", "--device", "cpu"]) == 0
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(output.images["9"][0]))
    assert set(text_chunks(Path("a.png"))) == {"mmdit", "prompt"}


@torch.no_grad()
def test_pictures_are_encoded_in_tiles(monkeypatch):
    vae, pixels = mmdit.load_vae(EMBEDDED, dtype=torch.float32), torch.rand(1, 64, 40, 3)
    whole = NODES["VAEEncode"].run(pixels=pixels, vae=vae)
    monkeypatch.setattr(type(vae), "encode", None)
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    tiled = NODES["VAEEncodeTiled"].run(pixels=pixels, vae=vae, **tiles)
    torch.testing.assert_close(tiled["samples"], whole["samples"], rtol=1e-5, atol=1e-5)
