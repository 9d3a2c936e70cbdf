"""What a checkpoint is, in words: `mmdit inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.checkpoints.components import TITLES
from mmdit.checkpoints.load import Config, StoredModel, open_model
from mmdit.checkpoints.locate import TOKENIZERS, Found, locate, with_neighbours
from mmdit.checkpoints.official import how_to_get, missing, unknown, variant
from mmdit.checkpoints.safetensors_io import NAMES, CheckpointError
from mmdit.models.config import MMDiTConfig
from quant.formats import FLOAT8

_ACTIVATIONS = {
    "none": "as they are",
    "static": "float8 under the input scale",
    "tensor": "float8 under a scale of the moment",
    "token": "float8 under a scale per token",
}


def describe(path: str | Path) -> str:
    """A text for people: layout, models, tensors, dtypes, bytes, scales, and what is missing to draw a picture.

    Raises:
        FileNotFoundError, CheckpointError: see `mmdit.checkpoints.locate.locate`, `mmdit.checkpoints.load.open_model`.
    """
    found = locate(path)
    if not found.weights:
        raise CheckpointError(unknown(found))
    if "transformer" in found.weights:  # then a picture is what it is for
        found = with_neighbours(found)
    parts = [open_model(found, component) for component in found.weights]
    lines = [f"{path}", f"layout: {found.layout}", *(line for part in parts for line in _part_lines(part))]
    lines.append(_tokenizer_line(found))
    total = sum(lazy.nbytes for part in parts for lazy in part.tensors.values())
    lines.append(f"in all: {sum(len(part.tensors) for part in parts)} tensors, {total / 1e9:.3f} GB")
    return "\n".join([*lines, "", *_missing_lines(found)])


def _part_lines(part: StoredModel) -> list[str]:
    dtypes = Counter(NAMES[lazy.dtype] for lazy in part.tensors.values())
    size = sum(lazy.nbytes for lazy in part.tensors.values())
    stored = ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
    lines = [
        f"{TITLES[part.component]}: {_model_words(part.config)}",
        f"  {part.source}",
        f"  {len(part.tensors)} tensors ({stored}), {size / 1e9:.3f} GB",
    ]
    return lines + _float8_lines(part)


def _float8_lines(part: StoredModel) -> list[str]:
    """Format, spelling, and how many weights have scales of their own and of their input."""
    scales = part.scales
    float8 = Counter(NAMES[lazy.dtype] for lazy in part.tensors.values() if lazy.dtype in FLOAT8)
    if not float8:
        return []
    formats = ", ".join(f"{count} {name}" for name, count in float8.most_common())
    if not scales.weights:
        return [f"  {scales.spelling}: {formats}"]
    codes = [lazy.codes for lazy in part.tensors.values() if lazy.codes is not None]
    rows = sum(bool(each.scale.ndim) for each in codes)
    recipes = Counter(each.recipe.activation for each in codes)
    treated = ", ".join(f"{count} {_ACTIVATIONS[name]}" for name, count in recipes.most_common())
    return [
        f"  float8 scales: {len(scales.weights)} weights, {len(scales.inputs)} inputs, spelled as {scales.spelling}",
        f"  kept in float8: {formats}"
        + (f", {rows} with a scale per row" if rows else "")
        + f"; activations: {treated}",
    ]


def _model_words(config: Config) -> str:
    match config:
        case MMDiTConfig():
            return f"{variant(config)[0]}; pictures up to {config.max_pixels} px a side"
        case VAEConfig():
            return f"widths {'-'.join(map(str, config.widths))}, {config.latent_channels} latent channels"
        case CLIPConfig():
            projection = "no projection" if config.projection_dim is None else "with projection"
            return f"{config.layers} layers x {config.width}, {config.activation}, {projection}"
        case T5Config():
            return f"{config.layers} layers x {config.width}, vocabulary {config.vocabulary}"


def _tokenizer_line(found: Found) -> str:
    if found.tokenizers is None:
        return "tokenizers: none found"
    present = [name for name in TOKENIZERS if (found.tokenizers / name).is_dir()]
    return f"tokenizers: {', '.join(present)} in {found.tokenizers}"


def _missing_lines(found: Found) -> list[str]:
    without = missing(found)
    optional = [] if "t5" in found.weights else ["t5"]
    if not without:
        lines = ["complete: a picture can be drawn with it"]
    else:
        lines = ["missing to draw a picture:", *how_to_get(without, found)]
    if optional:
        lines += ["optional, without it prompts are followed less well:", *how_to_get(optional, found)]
    return lines
