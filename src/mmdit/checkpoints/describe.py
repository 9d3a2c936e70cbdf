"""What a checkpoint is, in words: `mmdit inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.checkpoints.components import TITLES, Component, looks_like
from mmdit.checkpoints.load import Config, Part, open_part
from mmdit.checkpoints.locate import DIFFUSERS_FOLDERS, TOKENIZERS, Found, locate, open_weights, with_neighbours
from mmdit.checkpoints.safetensors_io import NAMES, CheckpointError
from mmdit.models.config import MMDiTConfig
from quant.spellings import FLOAT8

# Width, depth, QK-norm, blocks of second attention: what tells the official transformers apart.
VARIANTS: dict[tuple[int, int, str | None, int], tuple[str, str]] = {
    (1536, 24, None, 0): ("SD3-Medium", "sd3_medium"),
    (1536, 24, "rms", 13): ("SD3.5-Medium", "sd3.5_medium"),
    (2432, 38, "rms", 0): ("SD3.5-Large or Large-Turbo (same shapes)", "sd3.5_large"),
}
NEEDED: tuple[Component, ...] = ("transformer", "vae", "clip_l", "clip_g")
_DIFFUSERS: Mapping[str, str] = {str(component): folder for component, folder in DIFFUSERS_FOLDERS.items()}
_ACTIVATIONS = {
    "none": "as they are",
    "static": "float8 under the input scale",
    "tensor": "float8 under a scale of the moment",
    "token": "float8 under a scale per token",
}
_CLIP_FILES = "vocab.json, merges.txt, tokenizer_config.json"
WHERE: dict[str, tuple[str, str]] = {  # what to get from the official repository, and the folder where it goes
    "transformer": ("sd3.5_large.safetensors", ""),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "vae/"),
    "clip_l": ("text_encoders/clip_l.safetensors", "text_encoders/"),
    "clip_g": ("text_encoders/clip_g.safetensors", "text_encoders/"),
    "t5": ("text_encoders/t5xxl_fp16.safetensors", "text_encoders/"),
    "tokenizer": (f"tokenizer/ ({_CLIP_FILES})", "tokenizer/"),
    "tokenizer_2": (f"tokenizer_2/ ({_CLIP_FILES})", "tokenizer_2/"),
    "tokenizer_3": ("tokenizer_3/ (tokenizer.json or spiece.model)", "tokenizer_3/"),
}
REPOSITORY = "stabilityai/stable-diffusion-3.5-large"


def variant(config: MMDiTConfig) -> tuple[str, str]:
    """The name of an official transformer and the stem of its file, or a description and "sd3_custom"."""
    key = (config.hidden_size, config.depth, config.qk_norm, len(config.dual_attention_blocks))
    own = f"MMDiT of {config.depth} blocks x {config.hidden_size}, QK-norm {config.qk_norm or 'none'}"
    own += f", second attention in {len(config.dual_attention_blocks)} blocks" if config.dual_attention_blocks else ""
    return VARIANTS.get(key, (own, "sd3_custom"))


def file_stem(config: MMDiTConfig) -> str:
    """What the file of such a transformer is called officially."""
    return variant(config)[1]


def describe(path: str | Path) -> str:
    """A text for people: layout, models, tensors, dtypes, bytes, scales, and what is missing to draw a picture.

    Raises:
        FileNotFoundError, CheckpointError: see `mmdit.checkpoints.locate.locate`, `mmdit.checkpoints.load.open_part`.
    """
    found = locate(path)
    if not found.weights:
        raise CheckpointError(unknown(found))
    if "transformer" in found.weights:  # then a picture is what it is for
        found = with_neighbours(found)
    parts = [open_part(found, component) for component in found.weights]
    lines = [f"{path}", f"layout: {found.layout}", *(line for part in parts for line in _part_lines(part))]
    lines.append(_tokenizer_line(found))
    total = sum(lazy.nbytes for part in parts for lazy in part.tensors.values())
    lines.append(f"in all: {sum(len(part.tensors) for part in parts)} tensors, {total / 1e9:.3f} GB")
    return "\n".join([*lines, "", *_missing_lines(found)])


def unknown(found: Found) -> str:
    """The error for a file that holds none of the models."""
    return f"{found.path}: no SD3 checkpoint; it looks like {looks_like(open_weights(found.path)[0])}"


def missing(found: Found) -> list[str]:
    """What a picture needs and this checkpoint does not have: components, and folders of tokenizers."""
    without: list[str] = [component for component in NEEDED if component not in found.weights]
    names = TOKENIZERS if "t5" in found.weights else TOKENIZERS[:2]
    place = found.tokenizers
    return without + [name for name in names if place is None or not (place / name).is_dir()]


def how_to_get(what: Iterable[str], found: Found) -> list[str]:
    """One line for each missing thing: where it comes from and where it goes."""
    return [f"  {name}: {source} of {REPOSITORY} -> {place}" for name in what for source, place in [_way(name, found)]]


def _way(name: str, found: Found) -> tuple[str, str]:
    source, place = WHERE[name]
    folder = found.path.parent if found.path.is_file() else found.path
    if found.layout == "diffusers" and name in _DIFFUSERS:
        source = place = f"{_DIFFUSERS[name]}/"
    if found.layout == "comfyui" and (folder / "models").is_dir() and name not in TOKENIZERS:
        folder /= "models"
    argument = "tokenizers" if name in TOKENIZERS else name
    return source, f"{folder / place}" + (f", or pass {argument}=" if found.layout == "single file" else "")


def _part_lines(part: Part) -> list[str]:
    dtypes = Counter(NAMES[lazy.dtype] for lazy in part.tensors.values())
    size = sum(lazy.nbytes for lazy in part.tensors.values())
    stored = ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
    lines = [
        f"{TITLES[part.component]}: {_model_words(part.config)}",
        f"  {part.source}",
        f"  {len(part.tensors)} tensors ({stored}), {size / 1e9:.3f} GB",
    ]
    return lines + _float8_lines(part)


def _float8_lines(part: Part) -> list[str]:
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
