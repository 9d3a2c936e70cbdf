"""FP8 for researchers: tensor type, recipes, backends and file formats. A leaf: imports torch and nothing of ours."""

from quant.file_formats import (
    FLOAT8,
    Scales,
    check_formats,
    check_scale_shape,
    dequantize,
    find_scales,
    format_in,
    layers_in,
)

__all__ = [
    "FLOAT8",
    "Scales",
    "check_formats",
    "check_scale_shape",
    "dequantize",
    "find_scales",
    "format_in",
    "layers_in",
]
