"""A workflow is data from strangers: names stay in their folders, sizes have limits, and nothing is executed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from encoders.json_files import JSONError
from mmdit import LimitError, NodeError, WorkflowError, WorkflowLimits, run_workflow
from mmdit.comfyui.context import Context
from mmdit.comfyui.files import Folders, inside
from mmdit.comfyui.graph import MAX_NODES, as_graph, read_graph
from mmdit.comfyui.nodes import NODES
from mmdit.comfyui.outline import outline

OUTSIDE = [
    "../a.png",
    "a/../../b.png",
    "/etc/passwd",
    "\\\\host\\a.png",
    "C:\\a.png",
    "c:a.png",
    "a\0.png",
    "",
    ".",
    "a//b",
]
PICTURE = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 8, "batch_size": 1, "color": 255}}


def saving(prefix: str) -> dict:
    return {"1": PICTURE, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}}}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_cannot_leave_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="inside"):
        inside(tmp_path, name)
    load = {"1": {"class_type": "LoadImage", "inputs": {"image": name}}}
    show = {"2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
    with pytest.raises(WorkflowError) as caught:
        run_workflow(load | show, input=tmp_path)
    assert [one.type for one in caught.value.node_errors["1"]] == ["custom_validation_failed"]


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "a/../../x", "%year%/../../x", "C:\\x"])
def test_a_prefix_cannot_leave_the_output_folder(tmp_path, prefix):
    with pytest.raises(NodeError, match="inside"):
        run_workflow(saving(prefix), output=tmp_path / "out")
    assert list(tmp_path.rglob("*.png")) == []


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path):
    """Not a search for a free name without end."""
    (tmp_path / "file").touch()
    for prefix, output in (("x", tmp_path / "file"), ("file/x", tmp_path)):
        with pytest.raises(NodeError, match="Not a directory"):
            run_workflow(saving(prefix), output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_are_numbered_on_in_the_folders_of_the_prefix(tmp_path):
    for number in (1, 2):
        (path,) = run_workflow(saving("sub/%width%x%height%_%batch_num%"), output=tmp_path).files
        assert path == tmp_path / "sub" / f"16x8_0_{number:05}_.png"
    (tmp_path / "sub" / "16x8_0_00041_.png").touch()
    assert run_workflow(saving("sub/16x8_0"), output=tmp_path).files[0].name == "16x8_0_00042_.png"
    found = Image.open(path)
    assert json.loads(found.text["prompt"]) == saving("sub/%width%x%height%_%batch_num%")
    assert found.getpixel((3, 3)) == (0, 0, 255)


def test_a_pickle_is_neither_listed_nor_opened(tmp_path):
    class Bad:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    (tmp_path / "checkpoints").mkdir()
    for name in ("a.ckpt", "b.pt", "c.safetensors"):
        (tmp_path / "checkpoints" / name).write_bytes(pickle.dumps(Bad()))
    assert Folders((tmp_path,)).names("checkpoints") == ["c.safetensors"]
    load = {"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "c.safetensors"}}}
    decode = {"2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}}}
    latent = {"3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}}
    show = {"4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}}}
    with pytest.raises(NodeError) as caught:
        run_workflow(load | decode | latent | show, models=tmp_path)
    assert caught.value.node_id == "1"
    assert caught.value.exception_type == "CheckpointError"
    assert not (tmp_path / "run").exists()


def test_a_circle_of_links_between_folders_of_models_ends(tmp_path):
    folder = tmp_path / "loras" / "a"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").touch()
    (folder / "again").symlink_to(tmp_path / "loras")
    assert Folders((tmp_path,)).names("loras") == ["a/x.safetensors"]


def makes_sizes() -> list[str]:
    """The nodes whose numbers say how large what they make is."""
    sizes = {"width", "height", "scale_by", "megapixels", "amount", "left", "batch_size"}
    cutting = {"ImageCrop", "CropMask", "LatentCrop", "FeatherMask"}  # never larger than what they are given
    of_conditioning = {name for name in NODES if name.startswith("Conditioning")}
    named = {name for name, one in NODES.items() if sizes & {each.name for each in one.inputs}}
    return sorted(named - cutting - of_conditioning)


def made_up(type: str, largest: float | None) -> object:
    values = {"IMAGE": torch.zeros(2, 64, 64, 3), "MASK": torch.zeros(1, 64, 64)}
    values["LATENT"] = {"samples": torch.zeros(2, 16, 8, 8)}
    return values.get(type, largest)


@pytest.mark.parametrize("name", makes_sizes())
def test_nothing_larger_than_the_limits_is_made(name):
    declared = NODES[name]
    context = Context(Folders(), WorkflowLimits(pixels=10_000), torch.device("cpu"), None, {})
    arguments = {
        one.name: one.options(Folders())[0] if one.type == "COMBO" else made_up(one.type, one.most)
        for one in declared.inputs
    }
    with pytest.raises(LimitError, match=r"--limit (pixels|batch)="):
        declared.run(context=context, **arguments)


def chain(name: str, kind: str, count: int, first: dict) -> dict:
    """A node whose two inputs are the node before, so often: what it makes doubles each time."""
    names = [one.name for one in NODES[name].inputs if one.type == kind]
    graph = {"0": first}
    for i in range(count):
        more = {"delimiter": ""} if name == "StringConcatenate" else {}
        graph[str(i + 1)] = {"class_type": name, "inputs": {one: [str(i), 0] for one in names} | more}
    return graph


def test_what_doubles_with_each_node_meets_a_limit():
    show = {"show": {"class_type": "PreviewImage", "inputs": {"images": ["30", 0]}}}
    with pytest.raises(LimitError, match=r"ImageBatch.*batch"):
        run_workflow(chain("ImageBatch", "IMAGE", 30, PICTURE) | show)
    text = {"class_type": "PrimitiveString", "inputs": {"value": "x"}}
    node = {"class_type": "CLIPTextEncode", "inputs": {"text": ["30", 0], "clip": ["c", 1]}}
    loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "demo.safetensors"}}
    sampler = {"seed": 0, "steps": 1, "cfg": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1}
    wires = {"model": ["c", 0], "positive": ["t", 0], "negative": ["t", 0], "latent_image": ["l", 0]}
    rest = {
        "c": loader,
        "t": node,
        "l": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "s": {"class_type": "KSampler", "inputs": sampler | wires},
        "d": {"class_type": "VAEDecode", "inputs": {"samples": ["s", 0], "vae": ["c", 2]}},
        "p": {"class_type": "PreviewImage", "inputs": {"images": ["d", 0]}},
    }
    with pytest.raises(LimitError, match=r"StringConcatenate.*characters"):
        run_workflow(chain("StringConcatenate", "STRING", 30, text) | rest)


def test_steps_and_nodes_have_limits():
    with pytest.raises(LimitError, match="nodes"):
        run_workflow(saving("x"), limits=WorkflowLimits(nodes=1))
    assert WorkflowLimits.from_text(["steps=5", "pixels=7"]) == WorkflowLimits(steps=5, pixels=7)
    for wrong in ("step=5", "steps=-1", "steps=x", "steps=0", "steps"):
        with pytest.raises(ValueError, match="step"):
            WorkflowLimits.from_text([wrong])


def test_long_chains_and_many_nodes_are_no_recursion(tmp_path):
    invert = {str(i + 1): {"class_type": "ImageInvert", "inputs": {"image": [str(i), 0]}} for i in range(1100)}
    show = {"show": {"class_type": "PreviewImage", "inputs": {"images": ["1100", 0]}}}
    found = run_workflow({"0": PICTURE} | invert | show, limits=WorkflowLimits(nodes=1200))
    assert found.images["show"][0].getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(WorkflowError, match=str(MAX_NODES)):
        as_graph({str(i): PICTURE for i in range(MAX_NODES + 1)})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"1": {"class_type": "X", "inputs": {"a": NaN}}}', JSONError),
        ('{"1": 1, "1": 2}', JSONError),
        ("[" * 100 + "]" * 100, JSONError),
        ("[]", WorkflowError),
        ('{"1": []}', WorkflowError),
        ('{"1": {"class_type": 3}}', WorkflowError),
        ('{"1": {"class_type": "SaveImage", "inputs": []}}', WorkflowError),
        ('{"1": {"class_type": "SaveImage", "inputs": {"images": [["x"], 0]}}}', WorkflowError),
        ('{"1": {"class_type": "SaveImage", "inputs": {"images": ["1", true], "filename_prefix": {}}}}', WorkflowError),
        ('{"1": {"class_type": "SaveImage"}}', WorkflowError),
    ],
)
def test_strange_files_are_one_clear_error(tmp_path, text, error):
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(error):
        run_workflow(path)
    if error is WorkflowError and text != "[]":
        assert outline(path)  # which shows even broken graphs


def test_a_png_without_a_workflow_says_so(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match="no workflow"):
        read_graph(path)
    info = PngInfo()
    info.add_text("workflow", json.dumps({"nodes": [], "links": []}))
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    assert read_graph(path) == {}
