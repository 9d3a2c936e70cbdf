"""What a checkpoint lacks to draw a picture, what it holds instead, and where to get the missing files."""

from __future__ import annotations

from collections.abc import Iterable

from mmdit.checkpoints.components import REGISTRY, Component, needed, title
from mmdit.checkpoints.locate import TOKENIZERS, Found, open_weights
from mmdit.checkpoints.official import REPOSITORY
from mmdit.checkpoints.recognise import looks_like
from mmdit.checkpoints.safetensors_io import CheckpointError

_CLIP_FILES = "vocab.json, merges.txt, tokenizer_config.json"
TOKENIZER_FILES = {
    "tokenizer": f"tokenizer/ ({_CLIP_FILES})",
    "tokenizer_2": f"tokenizer_2/ ({_CLIP_FILES})",
    "tokenizer_3": "tokenizer_3/ (tokenizer.json or spiece.model)",
}
_SHOWN = 3  # number of files that a message names


def missing(found: Found) -> list[str]:
    """The components and tokenizer folders that a picture needs and this checkpoint lacks."""
    without = [component for component in needed() if component not in found.weights]
    names = TOKENIZERS if "t5" in found.weights else TOKENIZERS[:2]
    place = found.tokenizers
    return without + [name for name in names if place is None or not (place / name).is_dir()]


def how_to_get(what: Iterable[str], found: Found) -> list[str]:
    """A line for each missing file, with its source and destination, after lines about files that were set aside."""
    what = list(what)
    lines = [f"  {name}: {source} of {REPOSITORY} -> {place}" for name in what for source, place in [_way(name, found)]]
    aside = [reason for file, reason in sorted(found.files.aside.items())]
    if not aside or not any(name in REGISTRY for name in what):
        return lines
    more = [f"  and {len(aside) - _SHOWN} more"] if len(aside) > _SHOWN else []
    return ["  files that could not be used:", *(f"    {reason}" for reason in aside[:_SHOWN]), *more, *lines]


def unknown(found: Found) -> CheckpointError:
    """The error for a file that holds none of the models."""
    looks = looks_like(open_weights(found.path, found.files)[0])
    return CheckpointError(f"{found.path}: no SD3 checkpoint; it looks like {looks}")


def absent(found: Found, component: Component) -> CheckpointError:
    """The error for a model that a checkpoint does not hold."""
    if found.path.is_file():
        holds = looks_like(open_weights(found.path, found.files)[0])
        holds, aside = " and ".join(map(title, found.weights)) if holds == title("clip") else holds, ""
    else:
        holds = " and ".join(map(title, found.weights))
        aside = "".join(f"; {reason}" for _, reason in sorted(found.files.aside.items())[:_SHOWN])
    return CheckpointError(
        f"{found.path} holds no {title(component)} of SD3; it looks like {holds or 'nothing known here'}{aside}. "
        f"Give a file or folder that holds the {title(component)}"
    )


def _way(name: str, found: Found) -> tuple[str, str]:
    folder = found.path.parent if found.path.is_file() else found.path
    if name in TOKENIZERS:
        source, place, argument = TOKENIZER_FILES[name], f"{name}/", "tokenizers"
        if found.tokenizers is not None:
            return source, f"{found.tokenizers / place}"
    else:
        kind, argument = REGISTRY[name], name
        source, place = kind.source, kind.source.rpartition("/")[0] + "/" if "/" in kind.source else ""
        if found.layout == "diffusers":
            source = place = f"{kind.folder}/"
        if found.layout == "comfyui" and (folder / "models").is_dir():
            folder /= "models"
    return source, f"{folder / place}" + (f", or pass {argument}=" if found.layout == "single file" else "")
