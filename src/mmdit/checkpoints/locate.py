"""Locating the models of a checkpoint in a single file, or in a folder of one of the known layouts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoders.json_files import JSONError, parse_json, read_bytes
from mmdit.checkpoints.components import REGISTRY, Component, title
from mmdit.checkpoints.files import ENDINGS, OTHER_ENDINGS, Files, is_file, json_object, plain_name, regular_files
from mmdit.checkpoints.keymaps import some
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.recognise import Split, looks_like
from mmdit.checkpoints.safetensors_io import CheckpointError
from quant.packing import merge_metadata
from samplers import SamplingDefaults, from_scheduler_config

Layout = Literal["official", "diffusers", "comfyui", "single file"]
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
MAX_INDEX = 32 * 2**20  # bytes of the largest shard index
_MAIN_FOLDERS = ("checkpoints", "diffusion_models", "unet")
_TEXT_FOLDERS = ("text_encoders", "clip")
_CONTROL_FOLDER = "controlnet"
_SHOWN = 5  # number of files that a message names
_SHARD = "-of-"
_INFINITE = re.compile(rb'("lambda_min_clipped"\s*:\s*)-Infinity')
_VARIANT = r"[A-Za-z0-9_]+"


@dataclass
class Found:
    """The contents of a path: the weights file (or shard index) of each model, and the small files beside them."""

    path: Path
    layout: Layout
    weights: dict[Component, Path] = field(default_factory=dict)
    several: dict[Component, list[Path]] = field(
        default_factory=dict
    )  # several files of one model, none of which is preferred
    configs: dict[Component, dict[str, Any]] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    tokenizers: Path | None = None  # the folder that holds tokenizer, tokenizer_2 and tokenizer_3
    files: Files = field(default_factory=Files)
    ema: bool = False  # whether averaged weights are read instead of the others

    @property
    def sampling(self) -> SamplingDefaults | None:
        """The sampling defaults of the scheduler's config; None where there is no config.

        Raises:
            CheckpointError: an entry of the config is invalid or has no equivalent here; the key is named.
        """
        if self.scheduler is None:
            return None
        try:
            return from_scheduler_config(self.scheduler)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: scheduler_config.json: {error}") from error

    @property
    def shift(self) -> float | None:
        """The timestep shift of the scheduler's config, where it is a single number; raises as `sampling` does."""
        sampling = self.sampling
        return sampling.shift if sampling is not None and isinstance(sampling.shift, float) else None


def locate(path: str | Path, *, clip: Component = "", ema: bool = False) -> Found:
    """Find the models that a file or folder holds, by reading headers only.

    A file in a folder that cannot be read, or that holds no known model, is set aside (`Found.files.aside`); messages
    about a missing model mention it. Several files of one model are an error only where this model is loaded.

    Args:
        path: a safetensors file, a shard index, or a folder, which may be a repository's folder in the hub's cache.
        clip: the component of a text tower without prefix, where `path` is a file that holds one.
        ema: read averaged weights (`model_ema.`) instead of the weights that they average.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: `path` is a broken file, or a folder that holds no known model.
    """
    if not Path(path).exists():
        raise FileNotFoundError(_no_such(str(path)))
    path = Path(path).absolute()  # names of folders tell which files are neighbours and which role they have
    found = Found(path, "single file", ema=ema)
    if not path.is_dir():
        return _in_file(found, path, clip)
    found.path = path = _snapshot(path)
    if _is_diffusers(path):
        return _in_diffusers_folder(found)
    if any((base / name).is_dir() for base in (path, path / "models") for name in _MAIN_FOLDERS):
        return _in_comfyui_folder(found)
    return _in_official_folder(found)


def with_neighbours(found: Found) -> Found:
    """Add the models in files beside a single file: text encoders in `text_encoders/` or `clip/`, a VAE in `vae/`.

    These folders may lie in the file's own folder (official repository) or in the one above it (ComfyUI's `models/`);
    text encoders may also lie directly beside the file. Nothing is searched where no model is missing.
    """
    if found.layout == "single file":
        for folder in found.path.parents[:2]:
            _add_text_encoders(found, (folder / name for name in _TEXT_FOLDERS))
            _add(found, "main", folder / "vae")
        _add_text_encoders(found, [found.path.parent], nested=False)
    return found


def open_weights(path: Path, files: Files | None = None) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file, or of all shards that an index names, and their metadata.

    Args:
        path: a safetensors file or a shard index.
        files: the files of a located checkpoint, whose headers are not read again.

    Raises:
        CheckpointError: a shard is missing, index and shards disagree on a tensor, or metadata are invalid.
    """
    files = Files() if files is None else files
    if path.suffix != ".json":
        header = files.header(path)
        return header.tensors(), header.metadata
    weight_map = _index(path)
    shards: dict[str, set[str]] = {}
    for key, shard in weight_map.items():
        shards.setdefault(shard, set()).add(key)
    tensors: dict[str, LazyTensor] = {}
    notes: list[dict[str, str]] = []
    for shard, said in sorted(shards.items()):
        if not is_file(path.parent / shard):
            raise CheckpointError(f"{path} names the shard {shard}, which is not beside it; download it too")
        header = files.header(path.parent / shard)
        if odd := sorted(said ^ set(header.entries)):
            where = "only in the index" if odd[0] in said else "only in the shard"
            raise CheckpointError(
                f"{path}: {len(odd)} tensors differ between index and {shard}: {some(odd, 1)!r} is {where}; "
                "they are not of the same model: download both again"
            )
        tensors |= header.tensors()
        notes.append(header.metadata)
    try:
        return tensors, merge_metadata(notes, parse_json)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def weights_in(folder: Path) -> Path | None:
    """The weights in a component's folder: an index, or else a single file; a plain name before the fp16 variant.

    Another variant (such as "bf16") is used where it is the only one.
    """
    for stem in dict.fromkeys(kind.stem for kind in REGISTRY.values()):
        for variant in ("", ".fp16"):
            for name in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors"):
                if is_file(folder / name):
                    return folder / name
        others = [*folder.glob(f"{stem}.safetensors.index.*.json"), *folder.glob(f"{stem}.*.safetensors")]
        names = rf"{stem}(\.{_VARIANT}\.safetensors|\.safetensors\.index\.{_VARIANT}\.json)"
        others = [file for file in others if re.fullmatch(names, file.name) and is_file(file)]
        if len(others) == 1:
            return others[0]
    return None


def tokenizer_folder(*places: Path) -> Path | None:
    """The first of these folders that contains a tokenizer folder."""
    return next((place for place in places if any((place / name).is_dir() for name in TOKENIZERS)), None)


def split_of(found: Found, path: Path) -> Split:
    """The models that a file holds, as the names of its tensors tell."""
    return found.files.split(path, found.files.header(path).entries, ema=found.ema)


def _in_file(found: Found, path: Path, clip: Component) -> Found:
    shapes = {key: lazy.shape for key, lazy in open_weights(path, found.files)[0].items()}
    found.tokenizers = tokenizer_folder(path.parent, *path.parents[1:3])
    for name in found.files.split(path, shapes, ema=found.ema).models:
        found.weights[_role(path, name, shapes, clip)] = path
    if is_file(path.parent / "config.json") and weights_in(path.parent) is not None:
        found.configs = dict.fromkeys(found.weights, json_object(path.parent / "config.json"))
    return found


def _is_diffusers(folder: Path) -> bool:
    if any(map(weights_in, (folder, folder / REGISTRY["transformer"].folder))):
        return True
    others = (folder / kind.folder for kind in REGISTRY.values() if kind.place == "text")
    return any(map(weights_in, others)) and not any(path.suffix in ENDINGS for path in regular_files(folder, 1))


def _in_diffusers_folder(found: Found) -> Found:
    folder, found.layout = found.path, "diffusers"
    if (own := weights_in(folder)) is not None:  # the folder of a single component
        role = next((component for component, kind in REGISTRY.items() if kind.folder == folder.name), "")
        found.path = own
        return _in_file(found, own, role)
    found.tokenizers = tokenizer_folder(folder)
    for component, kind in REGISTRY.items():
        if (weights := weights_in(folder / kind.folder)) is not None:
            found.weights[component] = weights
        else:
            for file in found.files.weights(folder / kind.folder, nested=False):
                found.files.aside[file] = f"{file} {_why_not_read(file, kind.stem)}"
    return _with_configs(found)


def _why_not_read(file: Path, stem: str) -> str:
    """The reason why a file in a component's folder is not used as its weights."""
    if _SHARD in file.name:
        index = f"{file.name.partition(_SHARD)[0][:-6]}.safetensors.index.json"
        return f"needs the index of its shards: download {index} too"
    return f"is not named {stem}.safetensors"


def _in_official_folder(found: Found) -> Found:
    folder, found.layout = found.path, "official"
    found.tokenizers = tokenizer_folder(folder)
    files = found.files.weights(folder, nested=False)
    _choose(found, "transformer", _holding(found, "transformer", files))
    if "transformer" in found.weights:
        _add_beside(found, found.weights["transformer"])
    if {"transformer"} & (found.weights.keys() | found.several.keys()):
        _add(found, "main", folder / "vae")
        _add(found, "control", folder / _CONTROL_FOLDER)
        _add_text_encoders(found, (folder / name for name in _TEXT_FOLDERS))
        _add_text_encoders(found, [folder], nested=False)
    elif not any(_SHARD in file.name for file in files):  # for example a folder of text encoders, or of a VAE
        _add(found, "main", folder)
        _add(found, "control", folder)
        _add_text_encoders(found, [folder])
    if not found.weights and not found.several:
        raise CheckpointError(_nothing_in(found, folder))
    return _with_configs(found)


def _in_comfyui_folder(found: Found) -> Found:
    folder, found.layout = found.path, "comfyui"
    models = folder / "models" if (folder / "models").is_dir() else folder
    found.tokenizers = tokenizer_folder(folder, models)
    files = [file for name in _MAIN_FOLDERS for file in found.files.weights(models / name)]
    _choose(found, "transformer", _holding(found, "transformer", files))
    if "transformer" in found.weights:
        _add_beside(found, found.weights["transformer"])
    _add(found, "main", models / "vae")
    _add(found, "control", models / _CONTROL_FOLDER)
    _add_text_encoders(found, (models / name for name in _TEXT_FOLDERS))
    if not found.weights and not found.several:
        raise CheckpointError(_nothing_in(found, models))
    return found


def _with_configs(found: Found) -> Found:
    """Add the diffusers config files in the folder, which the official repository has too."""
    for component, kind in REGISTRY.items():
        if is_file(config := found.path / kind.folder / "config.json"):
            found.configs[component] = json_object(config)
    if is_file(scheduler := found.path / "scheduler" / "scheduler_config.json"):
        found.scheduler = _scheduler_config(scheduler)
    return found


def _scheduler_config(path: Path) -> dict[str, Any]:
    """The scheduler's config; -Infinity is allowed in it, because diffusers writes it for a key that flows ignore."""
    try:
        text = _INFINITE.sub(rb"\1null", read_bytes(path))
        value: dict[str, Any] = parse_json(text, path, kind=dict)
    except JSONError as error:
        raise CheckpointError(str(error)) from error
    return value


def _add_beside(found: Found, file: Path) -> None:
    """Add the other models in the transformer's file; the prefix of a text tower must tell which one it is."""
    for name in split_of(found, file).models:
        if name in REGISTRY:
            found.weights.setdefault(name, file)


def _add(found: Found, place: str, folder: Path) -> None:
    """Add the models of one `place` that the folder holds, except the transformer."""
    files: list[Path] | None = None
    for component, kind in REGISTRY.items():
        if kind.place == place and component != "transformer" and component not in found.weights:
            files = found.files.weights(folder) if files is None else files
            _choose(found, component, _holding(found, component, files, alone=True))


def _add_text_encoders(found: Found, folders: Iterable[Path], *, nested: bool = True) -> None:
    """Add the text encoders in these folders that were not found before; their tensors tell which they are."""
    wanted = {c for c, kind in REGISTRY.items() if kind.place == "text"} - found.weights.keys() - found.several.keys()
    if not wanted:
        return
    candidates: dict[Component, list[Path]] = {}
    for folder in folders:
        for file in found.files.weights(folder, nested=nested):
            role = _text_role(found, file)
            if role in wanted and file not in candidates.setdefault(role, []):
                candidates[role].append(file)
    for component, files in candidates.items():
        _choose(found, component, files)


def _text_role(found: Found, file: Path) -> Component | None:
    """The component of a text encoder's file; where it is no text encoder or its role is unclear, set it aside."""
    if (header := found.files.usable(file)) is None:
        return None
    names = split_of(found, file)
    text = [
        name for name in names.models if any(name in (c, k.family) for c, k in REGISTRY.items() if k.place == "text")
    ]
    if len(names.models) != 1 or not text:
        if not names.models:
            found.files.aside[file] = f"{file} looks like {looks_like(header.entries)}"
        return None
    try:
        return _role(file, text[0], {key: entry.shape for key, entry in header.entries.items()})
    except CheckpointError as error:
        found.files.aside[file] = str(error)
        return None


def _holding(found: Found, component: Component, files: Iterable[Path], *, alone: bool = False) -> list[Path]:
    """The files that hold a model; with `alone`, only those that hold no other model and no unknown tensors."""
    holding = []
    for file in files:
        if found.files.usable(file) is None:
            continue
        names = split_of(found, file)
        if component in names.models and not (alone and (names.left or len(names.models) > 1)):
            holding.append(file)
        elif not names.models:
            found.files.aside[file] = f"{file} looks like {looks_like(found.files.header(file).entries)}"
    return holding


def _choose(found: Found, component: Component, files: list[Path]) -> None:
    """Add the only file of a model; for T5, a file in 16 or 32 bits is preferred to float8."""
    if len(files) > 1 and component == "t5":
        entries = {file: found.files.header(file).entries.values() for file in files}
        files = [file for file in files if all(entry.dtype.itemsize > 1 for entry in entries[file])] or files
    if len(files) == 1:
        found.weights[component] = files[0]
        found.several.pop(component, None)
    elif files:
        found.several[component] = files


def _role(file: Path, name: str, shapes: Mapping[str, tuple[int, ...]], asked: Component = "") -> Component:
    """The component of a model in a file; within a family, its width, folder or file name tells which."""
    if name in REGISTRY:
        return name
    relatives = {component: kind for component, kind in REGISTRY.items() if kind.family == name}
    tables = [shape for key, shape in shapes.items() if key.endswith("token_embedding.weight")]
    width = tables[0][-1] if tables and tables[0] else 0
    by_width = [component for component, kind in relatives.items() if kind.width == width]
    if by_width:
        return by_width[0]
    if asked in relatives:
        return asked
    by_name = [component for component in relatives if component in file.name]
    by_name += [component for component, kind in relatives.items() if kind.folder == file.parent.name]
    if len(by_name) != 1:
        widths = ", ".join(f"{kind.title} has {kind.width}" for kind in relatives.values())
        arguments = " or ".join(f"{component}=" for component in relatives)
        raise CheckpointError(
            f"{file} is a text tower of width {width}: {widths}. Say which it is: begin the file's name with "
            f"{' or '.join(relatives)}, or pass it as {arguments}"
        )
    return by_name[0]


def ambiguous(found: Found, component: Component) -> CheckpointError:
    """The error for several files of one model."""
    files = found.several[component]
    return CheckpointError(
        f"{found.path}: {len(files)} files are the {title(component)}: {', '.join(map(str, files))}; "
        + (
            "give one of these files by its path"
            if component == "transformer" or REGISTRY[component].many
            else f"keep one, or name one with {component}="
        )
    )


def _index(path: Path) -> dict[str, str]:
    weight_map = json_object(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f"{path} is no shard index: it has no weight_map from tensors to files. "
            "Give a .safetensors file, its .safetensors.index.json, or the folder"
        )
    for shard in set(weight_map.values()):
        plain_name(path, shard)
    return weight_map


def _snapshot(folder: Path) -> Path:
    """The folder of a repository's files in the hub's cache: those of the main branch, or of its only commit."""
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return folder
    commits = sorted(place for place in (folder / "snapshots").iterdir() if place.is_dir())
    main = folder / "refs" / "main"
    if is_file(main):
        said = main.read_bytes()[:100].decode("ascii", "replace").strip()
        commits = [place for place in commits if place.name == said] or commits
    if len(commits) != 1:
        raise CheckpointError(
            f"{folder} is a repository in the hub's cache with {len(commits)} commits; give one of the folders in "
            f"{folder / 'snapshots'}"
        )
    return commits[0]


def _no_such(path: str) -> str:
    said = f"{path:.300} does not exist; expected a safetensors file or a folder of checkpoints"
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        said += (
            f". If it names a repository on Hugging Face, write hf:{path} where a pipeline is loaded, or download it "
            f"first: hf download {path} "
            f"--local-dir {path.rpartition('/')[2]}  (the tool comes with: pip install huggingface_hub)"
        )
    return said


def _nothing_in(found: Found, folder: Path) -> str:
    """The message for a folder without a known model, with what it holds instead."""
    files = found.files.weights(folder)
    others = sorted(file.name for file in found.files.aside if file.suffix.lower() in OTHER_ENDINGS)
    said = f"{folder} holds no transformer of SD3, nor another model of it"
    if files:
        seen = (f"{file.relative_to(folder)} ({_seen(found, file)})" for file in files[:_SHOWN])
        said += f". It has {len(files)} safetensors files: {', '.join(seen)}"
        if shards := [file for file in files if _SHARD in file.name and not list(file.parent.glob("*.index.json"))]:
            said += (
                f". Shards need their index: download {shards[0].name.partition(_SHARD)[0][:-6]}.safetensors.index.json"
            )
    elif others:
        said += (
            f": no safetensors, only files that are never opened ({', '.join(others[:_SHOWN])}), since pickles can run "
            "code and other formats are not read"
        )
    return (
        f"{said}. For a picture, expected are sd3*.safetensors with text_encoders/ beside it (official), transformer/, "
        f"vae/ and text_encoder*/ (diffusers), or models/checkpoints/ (ComfyUI), with files in {' or '.join(ENDINGS)}"
    )


def _seen(found: Found, file: Path) -> str:
    header = found.files.usable(file)
    return found.files.aside[file].removeprefix(f"{file} ") if header is None else looks_like(header.entries)
