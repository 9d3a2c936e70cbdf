"""All models of a pipeline from one folder or file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from encoders import VAE, CLIPText, T5Encoder, Tokenizers
from mmdit.checkpoint import build, open_part
from mmdit.describe import REPOSITORY, how_to_get, missing
from mmdit.locate import Found, locate, with_neighbours
from mmdit.model import MMDiT
from mmdit.recognise import Component
from mmdit.safetensors_file import CheckpointError


@dataclass
class Parts:
    """What a pipeline is made of."""

    transformer: MMDiT
    vae: VAE
    clip_l: CLIPText
    clip_g: CLIPText
    t5: T5Encoder | None
    tokenizers: Tokenizers
    shift: float | None  # of the scheduler's config, where there is one


def from_folder(folder: str | Path, device: torch.device | str, dtype: torch.dtype | None) -> Parts:
    """The models of a folder in the official, diffusers or ComfyUI layout.

    Raises:
        FileNotFoundError: there is no such folder; for a name on a hub, how to download it.
        CheckpointError: something is missing (what, from where, to where) or broken.
    """
    if not Path(folder).exists() and _is_hub_id(str(folder)):
        raise FileNotFoundError(
            f"there is no folder {folder}; if it names a repository on Hugging Face, download it first: "
            f"hf download {folder} --local-dir {Path(folder).name}  (the tool comes with: pip install huggingface_hub)"
        )
    return _build(locate(folder), device, dtype)


def from_file(
    path: str | Path,
    others: Mapping[Component, str | Path | None],
    tokenizers: str | Path | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Parts:
    """The models of a single file, of the files given beside it, and of those that lie next to it.

    Raises:
        FileNotFoundError, CheckpointError: see `from_folder`.
    """
    found = locate(path)
    for component, given in others.items():
        if given is not None:
            there = locate(given, clip=component)
            if component not in there.weights:
                open_part(there, component)  # says what the file is instead
            found.weights[component] = there.weights[component]
            found.configs |= {part: config for part, config in there.configs.items() if part == component}
    if tokenizers is not None:
        found.tokenizers = Path(tokenizers)
    return _build(with_neighbours(found), device, dtype)


def _build(found: Found, device: torch.device | str, dtype: torch.dtype | None) -> Parts:
    if without := missing(found):
        has = ", ".join(found.weights) or "no model of SD3"
        raise CheckpointError(
            "\n".join([f"{found.path} is not enough for a picture: it has {has}. Missing:", *how_to_get(without)])
        )
    if "t5" not in found.weights:
        warnings.warn(
            f"{found.path} has no T5 encoder; prompts are followed less well. {how_to_get(['t5'])[0].strip()}",
            stacklevel=4,
        )
    models: dict[str, Any] = {name: build(open_part(found, name), device, dtype) for name in found.weights}
    assert found.tokenizers is not None, "missing() looks for them"
    return Parts(
        **({"t5": None} | models),
        tokenizers=Tokenizers.from_folder(found.tokenizers, t5="t5" in models),
        shift=None if found.scheduler is None else found.scheduler.get("shift"),
    )


def _is_hub_id(name: str) -> bool:
    return (name.count("/") == 1 and not name.startswith((".", "/", "~"))) or name == REPOSITORY
