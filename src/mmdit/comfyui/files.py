"""The folders of models, pictures and results of a workflow; a name in a graph cannot escape its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Literal

from mmdit.checkpoints.load_pipeline import DEMO
from mmdit.checkpoints.locate import tokenizer_folder
from mmdit.embedded import EMBEDDED

ENDINGS = (".safetensors", ".sft")  # pickle files are never listed or opened
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# The model folders under ComfyUI's names, each with its former names.
MODEL_FOLDERS: dict[str, tuple[str, ...]] = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "loras": ("loras",),
    "controlnet": ("controlnet",),
}
DEMO_CHECKPOINT = "demo.safetensors"  # the name of the embedded model in graphs
Place = Literal["input", "output", "temp"]
PLACES: tuple[Place, ...] = ("input", "output", "temp")
_MOST_FILES = 20_000  # maximum number of files in one model folder


@dataclass(frozen=True)
class Folders:
    """The folders that a workflow may read and write.

    Args:
        models: ComfyUI's folder or its `models` folder, or several, which are searched in order. "demo" provides the
            embedded model as the checkpoint demo.safetensors.
        input: the folder that LoadImage reads from; None provides no pictures.
        output: the folder that SaveImage writes to; None writes nothing.
    """

    models: tuple[str | Path, ...] = (DEMO,)
    input: Path | None = None
    output: Path | None = None
    _listed: dict[str, dict[str, Path]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for folder in (*self.models, self.input):
            if folder is not None and folder != DEMO and not Path(folder).is_dir():
                raise FileNotFoundError(f"{folder} is no folder; give ComfyUI's folder, its models folder, or 'demo'")

    @cached_property
    def roots(self) -> tuple[Path, ...]:
        """The folders that hold checkpoints, loras and so on."""
        given = [Path(folder) for folder in self.models if folder != DEMO]
        return tuple(folder / "models" if (folder / "models").is_dir() else folder for folder in given)

    def names(self, kind: str) -> list[str]:
        """The names of the model files of a kind of `MODEL_FOLDERS`, as in graphs: with "/" for sub-folders."""
        return sorted(self._files(kind))

    def model(self, kind: str, name: str) -> Path:
        """The path of a model file that `names` lists; "demo.safetensors" is the embedded model's folder.

        Raises:
            FileNotFoundError: there is no model file of this name; the message names the folders.
        """
        found = self._files(kind)
        if name not in found:
            raise FileNotFoundError(f"there is no {name!r} in {self.where(kind)}")
        return found[name]

    def where(self, kind: str) -> str:
        """The folders of a kind of models, as text for an error message."""
        return " or ".join(str(root / MODEL_FOLDERS[kind][0]) for root in self.roots) or "the embedded model"

    def pictures(self) -> list[str]:
        """The names of the pictures in the input folder, without sub-folders."""
        if self.input is None:
            return []
        return sorted(path.name for path in self.input.iterdir() if path.suffix.lower() in PICTURES and path.is_file())

    def picture(self, said: str) -> Path:
        """The path of a picture that LoadImage names: in the input folder, or in the folder of "name [output]".

        Raises:
            ValueError: the name escapes its folder, or there is no such folder.
            FileNotFoundError: there is no such file.
        """
        name, place = _annotated(said)
        folder = self.folder(place)
        if folder is None:
            raise ValueError(f"picture {said!r}: no {place} folder is given; give one, such as {place}=FOLDER")
        path = inside(folder, name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no picture {name!r} in {folder}")
        return path

    def folder(self, place: Place) -> Path | None:
        """The input, output or temp folder; the temp folder is inside the output folder."""
        if place == "input":
            return self.input
        return self.output if place == "output" or self.output is None else self.output / "temp"

    @cached_property
    def tokenizers(self) -> Path | None:
        """The folder that holds tokenizer, tokenizer_2 and tokenizer_3: beside the models, or the embedded model's."""
        places = [place for root in self.roots for place in (root, root / "tokenizers", root.parent)]
        return tokenizer_folder(*places, *([EMBEDDED] if DEMO in self.models else []))

    def _files(self, kind: str) -> dict[str, Path]:
        if kind not in self._listed:
            found: dict[str, Path] = {}
            for root in reversed(self.roots):
                for name in reversed(MODEL_FOLDERS[kind]):
                    found |= _listed(root / name)
            if DEMO in self.models and kind == "checkpoints":
                found.setdefault(DEMO_CHECKPOINT, EMBEDDED)
            self._listed[kind] = found
        return self._listed[kind]


def inside(folder: Path, name: str) -> Path:
    """The path of a file of this name in a folder or its sub-folders.

    Raises:
        ValueError: the name is absolute, contains "..", or is not a valid file name.
    """
    parts = name.replace("\\", "/").split("/")
    odd = not name or "\0" in name or len(name) > 500 or PureWindowsPath(name).drive or PureWindowsPath(name).root
    if odd or any(part in ("", ".", "..") or ":" in part for part in parts):
        raise ValueError(f"the file name {name[:100]!r} must name a file inside {folder}: no '..', no absolute path")
    return folder.joinpath(*parts)


def _listed(folder: Path) -> dict[str, Path]:
    """The model files in a folder and its sub-folders, by name relative to the folder."""
    found: dict[str, Path] = {}
    seen: set[str] = set()  # real paths, because symbolic links can form a loop
    for base, inner, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        for file in files:
            path = Path(base) / file
            if path.suffix in ENDINGS:
                found[path.relative_to(folder).as_posix()] = path
        if len(found) > _MOST_FILES:
            raise ValueError(f"{folder} holds more than {_MOST_FILES} model files; give another folder of models")
    return found


def _annotated(said: str) -> tuple[str, Place]:
    """Split the name of a picture into its file name and folder: "a.png [output]" is in the output folder."""
    for place in PLACES:
        if said.endswith(f"[{place}]"):
            return said.removesuffix(f"[{place}]").rstrip(), place
    return said, "input"


def as_folders(
    models: str | Path | Sequence[str | Path],
    input: str | Path | None,
    output: str | Path | None,
) -> Folders:
    """Make `Folders` from the arguments of `mmdit.run_workflow`."""
    several = (models,) if isinstance(models, str | Path) else tuple(models)
    return Folders(several, None if input is None else Path(input), None if output is None else Path(output))
