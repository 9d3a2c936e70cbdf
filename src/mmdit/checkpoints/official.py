"""The official checkpoints: which transformers there are, what a picture needs, and where each part comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mmdit.checkpoints.components import Component, looks_like
from mmdit.checkpoints.locate import DIFFUSERS_FOLDERS, TOKENIZERS, Found, open_weights
from mmdit.models.config import MMDiTConfig

# Width, depth, QK-norm, blocks of second attention: what tells the official transformers apart.
VARIANTS: dict[tuple[int, int, str | None, int], tuple[str, str]] = {
    (1536, 24, None, 0): ("SD3-Medium", "sd3_medium"),
    (1536, 24, "rms", 13): ("SD3.5-Medium", "sd3.5_medium"),
    (2432, 38, "rms", 0): ("SD3.5-Large or Large-Turbo (same shapes)", "sd3.5_large"),
}
NEEDED: tuple[Component, ...] = ("transformer", "vae", "clip_l", "clip_g")
_DIFFUSERS: Mapping[str, str] = {str(component): folder for component, folder in DIFFUSERS_FOLDERS.items()}
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
