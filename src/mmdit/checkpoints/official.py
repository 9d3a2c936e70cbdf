"""The official transformers: how to tell them apart, and the names of their files."""

from __future__ import annotations

from mmdit.models.config import MMDiTConfig

REPOSITORY = "stabilityai/stable-diffusion-3.5-large"
# Width, depth, QK-norm and number of blocks with second attention identify an official transformer.
VARIANTS: dict[tuple[int, int, str | None, int], tuple[str, str]] = {
    (1536, 24, None, 0): ("SD3-Medium", "sd3_medium"),
    (1536, 24, "rms", 13): ("SD3.5-Medium", "sd3.5_medium"),
    (2432, 38, "rms", 0): ("SD3.5-Large or Large-Turbo (same shapes)", "sd3.5_large"),
}


def variant(config: MMDiTConfig) -> tuple[str, str]:
    """The name of an official transformer and the stem of its file, or a description and "sd3_custom"."""
    key = (config.hidden_size, config.depth, config.qk_norm, len(config.dual_attention_blocks))
    own = f"MMDiT of {config.depth} blocks x {config.hidden_size}, QK-norm {config.qk_norm or 'none'}"
    own += f", second attention in {len(config.dual_attention_blocks)} blocks" if config.dual_attention_blocks else ""
    return VARIANTS.get(key, (own, "sd3_custom"))


def file_stem(config: MMDiTConfig) -> str:
    """The stem of the official file of such a transformer."""
    return variant(config)[1]


def mmdit_words(config: MMDiTConfig) -> str:
    """An MMDiT in words."""
    return f"{variant(config)[0]}; pictures up to {config.max_pixels} px a side"
