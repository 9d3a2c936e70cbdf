"""All models of a pipeline from one folder or file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from encoders import VAE, CLIPText, T5Encoder, Tokenizers
from mmdit.checkpoints.components import TITLES, Component
from mmdit.checkpoints.float8 import Float8
from mmdit.checkpoints.load import StoredModel, build, open_model
from mmdit.checkpoints.locate import TOKENIZERS, Found, locate, with_neighbours
from mmdit.checkpoints.official import how_to_get, missing
from mmdit.checkpoints.safetensors_io import CheckpointError
from mmdit.models.mmdit import MMDiT


@dataclass
class Components:
    """What a pipeline is made of."""

    transformer: MMDiT
    vae: VAE
    clip_l: CLIPText | None
    clip_g: CLIPText | None
    t5: T5Encoder | None
    tokenizers: Tokenizers
    shift: float | None  # of the scheduler's config, where there is one


def from_folder(
    folder: str | Path, device: torch.device | str, dtype: torch.dtype | None, float8: Float8 = "keep"
) -> Components:
    """The models of a folder in the official, diffusers or ComfyUI layout; see `mmdit.load_mmdit` for the arguments.

    Raises:
        FileNotFoundError: there is no such folder; for a name on a hub, how to download it.
        CheckpointError: something is missing (what, from where, to where) or broken.
    """
    return _build(locate(folder), device, dtype, float8)


def from_file(
    path: str | Path,
    others: Mapping[Component, str | Path | None],
    tokenizers: str | Path | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
    float8: Float8 = "keep",
) -> Components:
    """The models of a single file, of the files given beside it, and of those that lie next to it.

    Raises:
        FileNotFoundError, CheckpointError: see `from_folder`.
    """
    found = locate(path)
    for component, given in others.items():
        if given is not None:
            there = locate(given, clip=component if component in ("clip_l", "clip_g") else None)
            if component not in there.weights:
                open_model(there, component)  # says what the file is instead
            found.weights[component] = there.weights[component]
            found.configs |= {part: config for part, config in there.configs.items() if part == component}
    if tokenizers is not None:
        if not Path(tokenizers).is_dir():
            raise FileNotFoundError(
                f"tokenizers={tokenizers} is no folder; expected one that holds {', '.join(TOKENIZERS)}"
            )
        found.tokenizers = Path(tokenizers)
    return _build(with_neighbours(found), device, dtype, float8)


def _build(found: Found, device: torch.device | str, dtype: torch.dtype | None, float8: Float8) -> Components:
    if "transformer" not in found.weights:
        open_model(found, "transformer")  # says what there is instead
    parts = {name: open_model(found, name) for name in found.weights}
    if without := missing(found):
        has = ", ".join(found.weights) or "no model of SD3"
        said = f"{found.path} is not enough for a picture: it has {has}. Missing:"
        raise CheckpointError("\n".join([said, *how_to_get(without, found)]))
    _check_together(parts)
    if "t5" not in found.weights:
        warnings.warn(
            f"{found.path} has no T5 encoder; prompts are followed less well. {how_to_get(['t5'], found)[0].strip()}",
            stacklevel=4,
        )
    assert found.tokenizers is not None, "missing() looks for them"
    tokenizers = Tokenizers.from_folder(found.tokenizers, t5="t5" in parts)
    _check_tokenizers(parts, tokenizers)
    shift = found.shift  # read before the weights, because it can be wrong
    models: dict[str, Any] = {name: build(part, device, dtype, float8) for name, part in parts.items()}
    return Components(**({"t5": None} | models), tokenizers=tokenizers, shift=shift)


def _check_together(parts: Mapping[Component, StoredModel]) -> None:
    """Raise CheckpointError where models that are sound alone do not go together."""
    config: dict[Component, Any] = {name: part.config for name, part in parts.items()}
    transformer, towers = config["transformer"], (config["clip_l"], config["clip_g"])
    pooled = sum(tower.projection_dim or tower.width for tower in towers)
    pairs: list[tuple[Component, str, int, int]] = [
        ("vae", "latent channels", config["vae"].latent_channels, transformer.in_channels),
        ("clip_l", "pooled channels together with CLIP-G", pooled, transformer.pooled_dim),
    ]
    if "t5" in config:
        pairs.append(("t5", "channels", config["t5"].width, transformer.context_dim))
    for name, what, found, expected in pairs:
        if found != expected:
            raise CheckpointError(
                f"{parts[name].source}: this {TITLES[name]} has {found} {what}, but the transformer of "
                f"{parts['transformer'].source} takes {expected}; they are not of the same model"
            )


def _check_tokenizers(parts: Mapping[Component, StoredModel], tokenizers: Tokenizers) -> None:
    """Raise CheckpointError where a tokenizer gives ids that its encoder has no row for."""
    pairs: list[tuple[Component, Any]] = [
        ("clip_l", tokenizers.clip_l),
        ("clip_g", tokenizers.clip_g),
        ("t5", tokenizers.t5),
    ]
    for name, tokenizer in pairs:
        config: Any = parts[name].config if name in parts else None
        if tokenizer is not None and config is not None and tokenizer.vocab_size > config.vocabulary:
            raise CheckpointError(
                f"the tokenizer of the {TITLES[name]} has {tokenizer.vocab_size} tokens, but {parts[name].source} has "
                f"embeddings for {config.vocabulary}; they are not of the same model"
            )
