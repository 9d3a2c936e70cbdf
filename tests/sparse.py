"""Safetensors files whose data take no room on the disk: what a small file may claim."""

import json
import struct
from math import prod
from pathlib import Path

SIZES = {"F64": 8, "F32": 4, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
HUGE = {  # what a sparse file of 256 MB claims of one layer
    "note": {"weight_scale": ("F32", []), "comfy_quant": ("U8", [2**28])},
    "scale": {"weight_scale": ("F32", [2**26])},
    "input scale": {"weight_scale": ("F32", []), "input_scale": ("F32", [2**26])},
    "older scale": {"scale_weight": ("F64", [2**25])},
}
HUGE_LAYER = "joint_blocks.0.x_block.attn.qkv"


def sparse(path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None) -> Path:
    """A file with tensors of these dtypes and shapes, all zero."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def huge(path: Path, case: str) -> Path:
    """A file of one quantized layer, and of the names and shapes that a transformer is known by."""
    tensors = {f"{HUGE_LAYER}.weight": ("F8_E4M3", [4, 4])}
    tensors |= {f"{HUGE_LAYER}.{name}": said for name, said in HUGE[case].items()}
    tensors |= {"context_embedder.weight": ("F32", [8, 8]), "x_embedder.proj.weight": ("F32", [8, 16, 2, 2])}
    return sparse(path, tensors)
