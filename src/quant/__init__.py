"""FP8 for researchers: tensor type, recipes, backends and file formats. A leaf: imports torch and nothing of ours."""

from quant.file_formats import FLOAT8, Scales, dequantize, find_scales

__all__ = ["FLOAT8", "Scales", "dequantize", "find_scales"]
