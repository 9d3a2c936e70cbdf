"""The registry of model kinds: a row is all that a new kind needs, and the tables of other packages cover every row."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mmdit
from mmdit import ControlNet, ControlNetConfig, Pipeline
from mmdit.checkpoints import keymaps, safetensors_io
from mmdit.checkpoints.components import REGISTRY, ModelKind, Naming
from mmdit.checkpoints.describe import inspect
from mmdit.checkpoints.load import build, open_model
from mmdit.checkpoints.load_pipeline import Components
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.write import convert
from mmdit.parity import sides


@dataclass(frozen=True)
class ToyConfig:
    width: int


class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.toy_blocks = nn.ModuleList([nn.Linear(config.width, config.width)])


def to_theirs(tensors, config):
    return {key.replace("toy_blocks", "toys"): lazy for key, lazy in tensors.items()}


def to_ours(tensors, source):
    stored_as = {key.replace("toys", "toy_blocks"): (key,) for key in tensors}
    return keymaps.Mapped({ours: tensors[theirs] for ours, (theirs,) in stored_as.items()}, stored_as)


TOY = ModelKind(
    component="toy",
    title="toy model",
    config=ToyConfig,
    module=Toy,
    namings=(Naming("official", r"toy_blocks\.\d+\.", keymaps.unchanged), Naming("diffusers", r"toys\.\d+\.", to_ours)),
    prefixes=("toy_model.",),
    write_official=keymaps.write_unchanged,
    write_diffusers=to_theirs,
    infer=lambda shapes, said: ToyConfig(shapes["toy_blocks.0.weight"][0]),
    to_json=lambda config: {"_class_name": "ToyModel", "width": config.width},
    dimensions={r"toy_blocks\.0\.weight": 2},
    classes=("ToyModel",),
    blocks=r"toy_blocks\.(\d+)\.",
    block_tensors=2,
    folder="toy",
    stem="diffusion_pytorch_model",
    library="diffusers",
    place="text",
    file_name=lambda config, dtype: f"toy_{dtype}",
    source="toy/toy.safetensors",
    words=lambda config: f"a toy {config.width} wide",
    needed=False,
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(REGISTRY, "toy", TOY)


def test_a_row_is_all_that_a_kind_needs(toy, tmp_path):
    """A new kind is recognised, located, described, loaded and written in every layout; a broken file is refused."""
    source, weights = tmp_path / "toy.safetensors", Toy(ToyConfig(4)).state_dict()
    save_file({f"toy_model.{key}": tensor for key, tensor in weights.items()}, source)
    assert set(locate(source).weights) == {"toy"}
    assert "toy model: a toy 4 wide" in inspect(source).text
    places = {
        "official": "text_encoders/toy_fp32.safetensors",
        "diffusers": "toy/diffusion_pytorch_model.safetensors",
        "comfyui": "models/text_encoders/toy_fp32.safetensors",
    }
    for layout, name in places.items():
        folder = convert(source, tmp_path / layout, layout)
        path = folder / name
        assert path.is_file()
        read = build(open_model(locate(path), "toy"), "cpu", None).state_dict()
        assert all(torch.equal(read[key], tensor) for key, tensor in weights.items())
    assert "toys.0.weight" in load_file(tmp_path / "diffusers" / places["diffusers"])
    save_file({"toy_blocks.0.weight": weights["toy_blocks.0.weight"]}, source)
    assert any("1 missing: toy_blocks.0.bias" in problem for problem in inspect(source).problems)


def test_a_pipeline_with_another_kind_beside_it_loads(toy, tiny_folders):
    assert set(Pipeline.from_pretrained(tiny_folders["sd3-medium"]).models) == set(REGISTRY) - {"toy", "controlnet"}


def test_rows_are_whole():
    for component, kind in REGISTRY.items():
        assert component == kind.component
        assert component in Components.__dataclass_fields__ or kind.many
        assert issubclass(kind.module, nn.Module)
    folders, prefixes = [[getattr(kind, name) for kind in REGISTRY.values()] for name in ("folder", "prefixes")]
    assert len(set(folders)) == len(folders)
    assert len({prefix for of_one in prefixes for prefix in of_one}) == sum(map(len, prefixes))


def test_tables_of_other_rooms_cover_the_registry():
    """Packages that look into models have tables of their own, which must cover the registry."""
    models = Pipeline.demo().models | {"controlnet": ControlNet(ControlNetConfig(1, 64, 48))}
    assert models.keys() == REGISTRY.keys()
    for component, model in models.items():
        assert mmdit.points(model), f"mmdit.points knows no {component}"
    texts = {component: kind.folder for component, kind in REGISTRY.items() if kind.place == "text"}
    assert texts == sides._THEIR_ENCODERS
    assert sides._THEIR_TOKENIZERS.keys() == texts.keys()


def test_a_file_is_opened_once(monkeypatch):
    """The embedded model has four files, so four headers are read."""
    read, original = [], safetensors_io.read_header

    def counted(path):
        read.append(path)
        return original(path)

    monkeypatch.setattr("mmdit.checkpoints.files.read_header", counted)
    pipe = Pipeline.demo()
    assert len(read) == len(set(read)) == len(pipe.models) - 1 == 4, "the VAE shares the transformer's file"
