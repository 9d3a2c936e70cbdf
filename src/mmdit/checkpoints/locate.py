"""Where the models of a checkpoint are: in one file, or in a folder of one of the known layouts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoders.json_files import parse_json
from mmdit.checkpoints.components import CLIP_WIDTHS, TITLES, Component, looks_like, split
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import CheckpointError, open_tensors, read_header
from quant.packing import merge_metadata

Layout = Literal["official", "diffusers", "comfyui", "single file"]
DIFFUSERS_FOLDERS: dict[Component, str] = {
    "transformer": "transformer",
    "vae": "vae",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_MAIN_FOLDERS = ("checkpoints", "diffusion_models", "unet")
_TEXT_FOLDERS = ("text_encoders", "clip")
_TEXT_ENCODERS = ("clip_l", "clip_g", "t5")
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_SHOWN = 5  # files that a message names
_SHARD = "-of-"
_PICKLE_ENDINGS = (".bin", ".ckpt", ".pt", ".pth")


@dataclass
class Found:
    """What a path holds: for each model its weights file (or shard index), and the small files beside them."""

    path: Path
    layout: Layout
    weights: dict[Component, Path] = field(default_factory=dict)
    configs: dict[Component, dict[str, Any]] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    tokenizers: Path | None = None  # the folder that holds tokenizer, tokenizer_2 and tokenizer_3

    @property
    def shift(self) -> float | None:
        """The timestep shift of the scheduler's config, where there is one; CheckpointError if it is no number."""
        shift = (self.scheduler or {}).get("shift")
        if shift is not None and (isinstance(shift, bool) or not isinstance(shift, int | float) or not shift > 0):
            raise CheckpointError(
                f"{self.path}: scheduler_config.json says shift = {shift!r}, expected a number above 0"
            )
        return shift


def locate(path: str | Path, *, clip: Component | None = None) -> Found:
    """Find the models that a file or folder holds, by reading headers only.

    Args:
        path: a safetensors file, a shard index, or a folder.
        clip: what a text tower without prefix is taken for, where `path` is a file that holds one.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: a file is broken, or a folder holds nothing that is known.
    """
    if not Path(path).exists():
        raise FileNotFoundError(_no_such(str(path)))
    path = Path(path).absolute()  # neighbours and roles are told by the names of folders
    if path.is_file():
        return _in_file(path, clip)
    if _is_diffusers(path):
        return _in_diffusers_folder(path)
    if any((base / name).is_dir() for base in (path, path / "models") for name in _MAIN_FOLDERS):
        return _in_comfyui_folder(path)
    return _in_official_folder(path)


def with_neighbours(found: Found) -> Found:
    """Add the text encoders and the VAE that lie beside a single file, in `text_encoders/` (or `clip/`) and `vae/`.

    Beside is the file's own folder (official repository) or the one above it (ComfyUI's `models/`).
    """
    folders = found.path.parents[:2] if found.path.is_file() else ()
    for folder in folders:
        for name in _TEXT_FOLDERS:
            _add(found, text_encoders((folder / name).glob("*.safetensors"), known=found.weights))
        _add_vae(found, folder / "vae")
    return found


def open_weights(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file, or of all shards that an index names, and their metadata.

    Raises:
        CheckpointError: a shard is missing, index and shards disagree on a tensor, or metadata are not what they claim.
    """
    if not path.name.endswith(".json"):
        return open_tensors(path)
    weight_map = _index(path)
    tensors: dict[str, LazyTensor] = {}
    notes: list[dict[str, str]] = []
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path} names the shard {shard}, which is not beside it; download it too")
        found, metadata = open_tensors(path.parent / shard)
        said = {key for key, file in weight_map.items() if file == shard}
        if odd := sorted(said ^ set(found)):
            where = "only in the index" if odd[0] in said else "only in the shard"
            raise CheckpointError(
                f"{path}: {len(odd)} tensors differ between index and {shard}: {odd[0]!r} is {where}; "
                "they are not of the same model: download both again"
            )
        tensors |= found
        notes.append(metadata)
    try:
        return tensors, merge_metadata(notes, parse_json)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def weights_in(folder: Path) -> Path | None:
    """The weights of a component folder: an index, else a single file; a plain name before its fp16 variant."""
    for stem in _WEIGHT_STEMS:
        for variant in ("", ".fp16"):
            for name in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors"):
                if (folder / name).is_file():
                    return folder / name
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def tokenizer_folder(*places: Path) -> Path | None:
    """The first place that has at least one of the tokenizer folders."""
    return next((place for place in places if any((place / name).is_dir() for name in TOKENIZERS)), None)


def text_encoders(files: Iterable[Path], *, known: Collection[Component] = ()) -> dict[Component, Path]:
    """Which file is which text encoder, told by its tensors; the name decides only between unusual CLIP widths.

    Encoders that are known already are not looked for.

    Raises:
        CheckpointError: two files are the same encoder (of T5, the 16- or 32-bit one is preferred to float8).
    """
    candidates: dict[Component, list[Path]] = {}
    for file in sorted(files):
        shapes = {key: entry.shape for key, entry in read_header(file).entries.items()}
        for kind, model in split(shapes)[0].items():
            component = _clip_role(file, shapes) if kind == "clip" else kind
            if component in _TEXT_ENCODERS and component not in known and len(model.keys) == len(shapes):
                candidates.setdefault(component, []).append(file)
    return {component: _only(component, files) for component, files in candidates.items()}


def _in_file(path: Path, clip: Component | None) -> Found:
    tensors, _ = open_weights(path)
    models, _ = split(tensors)
    found = Found(path, "single file", tokenizers=tokenizer_folder(path.parent, *path.parents[1:3]))
    for kind in models:
        if kind == "clip":
            found.weights[_clip_role(path, {key: lazy.shape for key, lazy in tensors.items()}, clip)] = path
        else:
            found.weights[kind] = path
    if (path.parent / "config.json").is_file() and weights_in(path.parent) is not None:
        found.configs = dict.fromkeys(found.weights, read_json(path.parent / "config.json"))
    return found


def _is_diffusers(folder: Path) -> bool:
    return any(weights_in(place) for place in (folder, folder / "transformer"))


def _in_diffusers_folder(folder: Path) -> Found:
    if (own := weights_in(folder)) is not None:  # the folder of a single component
        role = next((part for part, name in DIFFUSERS_FOLDERS.items() if name == folder.name), None)
        found = _in_file(own, role)
        found.layout = "diffusers"
        return found
    found = Found(folder, "diffusers", tokenizers=tokenizer_folder(folder))
    for component, name in DIFFUSERS_FOLDERS.items():
        if (weights := weights_in(folder / name)) is not None:
            found.weights[component] = weights
    return _with_configs(found)


def _in_official_folder(folder: Path) -> Found:
    found = Found(folder, "official", tokenizers=tokenizer_folder(folder))
    files = sorted(folder.glob("*.safetensors"))
    if main := _main_files(files):
        _add_main(found, _single(main, folder))
        _add_vae(found, folder / "vae")
        for name in _TEXT_FOLDERS:
            _add(found, text_encoders((folder / name).glob("*.safetensors")))
    elif not any(_SHARD in file.name for file in files):  # a folder of text encoders, say, or of one VAE
        _add_vae(found, folder)
        _add(found, text_encoders(files))
    if not found.weights:
        raise CheckpointError(_nothing_in(folder))
    return _with_configs(found)


def _in_comfyui_folder(folder: Path) -> Found:
    models = folder / "models" if (folder / "models").is_dir() else folder
    found = Found(folder, "comfyui", tokenizers=tokenizer_folder(folder, models))
    main = _main_files(file for name in _MAIN_FOLDERS for file in (models / name).glob("**/*.safetensors"))
    if not main:
        raise CheckpointError(_nothing_in(models))
    _add_main(found, _single(main, models))
    _add_vae(found, models / "vae")
    for name in _TEXT_FOLDERS:
        _add(found, text_encoders((models / name).glob("*.safetensors")))
    return found


def _with_configs(found: Found) -> Found:
    """Take the diffusers config files that lie in the folder; the official repository has them too."""
    for component, name in DIFFUSERS_FOLDERS.items():
        if (config := found.path / name / "config.json").is_file():
            found.configs[component] = read_json(config)
    if (scheduler := found.path / "scheduler" / "scheduler_config.json").is_file():
        found.scheduler = read_json(scheduler)
    return found


def _add_main(found: Found, file: Path) -> None:
    for kind in split(read_header(file).entries)[0]:
        if kind != "clip":
            found.weights[kind] = file


def _add(found: Found, more: Mapping[Component, Path]) -> None:
    for component, file in more.items():
        found.weights.setdefault(component, file)


def _add_vae(found: Found, folder: Path) -> None:
    if "vae" not in found.weights:
        files = [file for file in sorted(folder.glob("*.safetensors")) if _holds_vae(file)]
        found.weights |= {"vae": _only("vae", files)} if files else {}


def _holds_vae(file: Path) -> bool:
    models, left = split(read_header(file).entries)
    return "vae" in models and not left  # what is left would be a model of another kind, and the VAE its own


def _main_files(files: Iterable[Path]) -> list[Path]:
    return [file for file in sorted(files) if "transformer" in split(read_header(file).entries)[0]]


def _single(files: list[Path], folder: Path) -> Path:
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise CheckpointError(f"{folder} holds {len(files)} transformers: {names}; give one of these files by its path")
    return files[0]


def _only(component: Component, files: list[Path]) -> Path:
    if component == "t5" and len(files) > 1:
        wide = [file for file in files if all(e.dtype.itemsize > 1 for e in read_header(file).entries.values())]
        files = wide or files
    if len(files) > 1:
        raise CheckpointError(
            f"{len(files)} files are the {TITLES[component]}: {', '.join(map(str, files))}; "
            f"keep one, or name one with {component}="
        )
    return files[0]


def _clip_role(file: Path, shapes: Mapping[str, tuple[int, ...]], asked: Component | None = None) -> Component:
    tables = [shape for key, shape in shapes.items() if key.endswith("token_embedding.weight")]
    width = tables[0][-1] if tables and tables[0] else 0
    if width in CLIP_WIDTHS:
        return CLIP_WIDTHS[width]
    if asked is not None:
        return asked
    by_name: list[Component] = [role for role in ("clip_l", "clip_g") if role in file.name]
    by_name += [role for role in ("clip_l", "clip_g") if DIFFUSERS_FOLDERS[role] == file.parent.name]
    if len(by_name) != 1:
        raise CheckpointError(
            f"{file} is a CLIP text tower of width {width}: CLIP-L has 768, CLIP-G 1280. "
            "Say which it is: name the file clip_l… or clip_g…, or pass it as clip_l= or clip_g="
        )
    return by_name[0]


def _index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f"{path} is no shard index: it has no weight_map from tensors to files. "
            "Give a .safetensors file, its .safetensors.index.json, or the folder"
        )
    return weight_map


def _no_such(path: str) -> str:
    said = f"{path} does not exist; expected a safetensors file or a folder of checkpoints"
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        said += (
            f". If it names a repository on Hugging Face, download it first: hf download {path} "
            f"--local-dir {path.rpartition('/')[2]}  (the tool comes with: pip install huggingface_hub)"
        )
    return said


def _nothing_in(folder: Path) -> str:
    """What a folder without a transformer of SD3 has instead."""
    files = sorted(folder.glob("**/*.safetensors"))
    pickles = sorted(file.name for ending in _PICKLE_ENDINGS for file in folder.glob(f"**/*{ending}"))
    said = f"{folder} holds no transformer of SD3"
    if files:
        seen = (f"{file.relative_to(folder)} ({looks_like(read_header(file).entries)})" for file in files[:_SHOWN])
        said += f". It has {len(files)} safetensors files: {', '.join(seen)}"
        if shards := [file for file in files if _SHARD in file.name and not list(file.parent.glob("*.index.json"))]:
            said += (
                f". Shards need their index: download {shards[0].name.partition(_SHARD)[0][:-6]}.safetensors.index.json"
            )
    elif pickles:
        said += (
            f": no safetensors, only pickles ({', '.join(pickles[:_SHOWN])}), which can run code and are never opened"
        )
    return (
        f"{said}. Expected are sd3*.safetensors with text_encoders/ beside it (official), transformer/, vae/ and "
        "text_encoder*/ (diffusers), or models/checkpoints/ (ComfyUI), all as .safetensors"
    )
