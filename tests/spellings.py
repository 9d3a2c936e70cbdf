"""Checkpoint files in every dtype and float8 spelling that is met in the wild, written with the safetensors library."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
NAMES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLAIN = {"fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2}
SCALED = (
    "fp8 scaled, ComfyUI old",
    "fp8 scaled, ComfyUI per layer",
    "fp8 scaled, ComfyUI header",
    "fp8 scaled, ModelOpt",
)
SPELLINGS = (*DTYPES, *PLAIN, *SCALED)
# The linears of the blocks, under official and diffusers' names: what FP8 checkpoints of SD3.5 quantize.
LINEARS = re.compile(
    r".*(joint_blocks|transformer_blocks)\.\d+\..*(attn|attn2|mlp|ff|ff_context)\.(?!.*norm|ln_).*weight"
)


def respell(source: Path, target: Path, spelling: str) -> Path:
    """A copy of a file or folder of float32 checkpoints, with every transformer in another spelling."""
    files = [source] if source.is_file() else sorted(source.rglob("*.safetensors"))
    if source.is_dir():
        shutil.copytree(source, target)
    for number, file in enumerate(files):
        out = target if source.is_file() else target / file.relative_to(source)
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        spelled, metadata = spell(tensors, spelling)
        if number:  # one marker for all shards
            spelled = {key: tensor for key, tensor in spelled.items() if not key.endswith("scaled_fp8")}
        save_file(spelled, out, {"format": "pt"} | metadata)
    for index in target.rglob("*.index.json") if source.is_dir() else ():
        weight_map = {}
        for shard in sorted(index.parent.glob("*.safetensors")):
            with safe_open(shard, "pt") as opened:
                weight_map |= dict.fromkeys(opened.keys(), shard.name)
        index.write_text(json.dumps({"weight_map": weight_map}))
    return target


def spell(tensors: dict[str, Tensor], spelling: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file in a spelling, and the metadata that goes with it."""
    if spelling in DTYPES:
        return {key: tensor.to(DTYPES[spelling]) for key, tensor in tensors.items()}, {}
    if spelling in PLAIN:
        return {key: cast(tensor, PLAIN[spelling]) for key, tensor in tensors.items()}, {}
    found = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    layers = [key.removesuffix(".weight") for key in tensors if LINEARS.fullmatch(key)]
    for layer in layers:
        codes, scale = quantize(tensors[f"{layer}.weight"])
        found[f"{layer}.weight"] = codes
        found |= _scale(layer, scale, spelling)
    if spelling == SCALED[0] and layers:
        prefix = "model.diffusion_model." if layers[0].startswith("model.") else ""
        found[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    header = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    return found, {"_quantization_metadata": json.dumps(header)} if spelling == SCALED[2] else {}


def _scale(layer: str, scale: Tensor, spelling: str) -> dict[str, Tensor]:
    if spelling == SCALED[0]:
        return {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(0.5)}
    found = {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.5)}
    if spelling == SCALED[1]:
        note = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": False}).encode()
        found[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
    return found


def quantize(tensor: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """float8 codes and the one scale: amax / largest finite value."""
    scale = tensor.abs().max().float() / MAX[dtype]
    return cast(tensor.float() / scale, dtype), scale


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To float8, saturating."""
    return tensor.float().clamp(-MAX[dtype], MAX[dtype]).to(dtype)
