"""FP8 for researchers: tensor type, recipes, backends and file formats. A leaf: imports torch and nothing of ours."""

import quant.operations as _operations  # noqa: F401  (it fills the tables of quant.dispatch)
from quant.codec import decode, encode
from quant.formats import FLOAT8
from quant.matmul import backend_of
from quant.observers import Observed, observe
from quant.packing import pack, unpack
from quant.quantize import Layer, Report, dequantize_, is_quantized, linears_of, quantize_, report, snr
from quant.recipe import RECIPES, Recipe, as_recipe
from quant.spellings import (
    Scales,
    check_formats,
    check_scale_shape,
    dequantize,
    find_scales,
    format_in,
    layers_in,
    unread_quantization,
)
from quant.tensor import Float8Tensor

__all__ = [
    "FLOAT8",
    "RECIPES",
    "Float8Tensor",
    "Layer",
    "Observed",
    "Recipe",
    "Report",
    "Scales",
    "as_recipe",
    "backend_of",
    "check_formats",
    "check_scale_shape",
    "decode",
    "dequantize",
    "dequantize_",
    "encode",
    "find_scales",
    "format_in",
    "is_quantized",
    "layers_in",
    "linears_of",
    "observe",
    "pack",
    "quantize_",
    "report",
    "snr",
    "unpack",
    "unread_quantization",
]
