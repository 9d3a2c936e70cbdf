"""The recorded LoRA cases of the reference programs: files, base weights by formula, and changes by projection."""

import json
import zlib
from functools import cache

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from golden import DATA
from mmdit import Lora, load_lora

FOLDER = DATA / "lora"
CASES = json.loads((FOLDER / "cases.json").read_text())
RUNS = [(case, run) for case in CASES["cases"] for run in case["runs"]]
PREFIX = "model.diffusion_model."


@cache
def golden() -> dict[str, Tensor]:
    return load_file(FOLDER / "golden.safetensors")


@cache
def base(model: str) -> dict[str, Tensor]:
    """The weights of a recorded model, in float32."""
    return {key: _weight(key, shape) for key, shape in CASES["models"][model]["tensors"].items()}


def bare(model: str) -> dict[str, Tensor]:
    """The same without the prefix of single files."""
    return {key.removeprefix(PREFIX): tensor for key, tensor in base(model).items()}


def models_of(case: dict) -> dict[str, dict[str, Tensor]]:
    return {"transformer": base(case["model"])} | {part: base(name) for part, name in case["text_encoders"].items()}


def loras_of(case: dict, run: dict) -> list[Lora]:
    return [lora(one["file"], case["profile"]) for one in run["stack"]]


@cache
def lora(file: str, profile: str | None = None) -> Lora:
    return load_lora(FOLDER / f"{file}.safetensors", profile)


def tensors(file: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{file}.safetensors")


def strengths(run: dict, part: str) -> list[float]:
    return [one["strength" if part == "transformer" else "strength_te"] for one in run["stack"]]


def error(name: str, key: str, change: Tensor) -> float:
    """The largest relative L2 error of a change [rows, inputs] against what is recorded of it; -1 of nothing."""
    change = change.double().reshape(len(change), -1)
    found = {
        "dv": change @ _direction("v", key, change.shape[1]),
        "ud": _direction("u", key, change.shape[0]) @ change,
        "d": change,
    }
    wanted = {kind: golden()[f"{name}|{key}|{kind}"].double() for kind in found if f"{name}|{key}|{kind}" in golden()}
    errors = ((found[kind].reshape(value.shape) - value).norm() / value.norm() for kind, value in wanted.items())
    return max(map(float, errors), default=-1.0)


def _direction(letter: str, key: str, count: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(zlib.crc32(f"{letter}:{key}".encode())).randn(count))


def formula_input(model: str, name: str, shape: tuple[int, ...]) -> Tensor:
    seed = zlib.crc32(f"input:{model}:{name}".encode())
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float()


def _weight(key: str, shape: list[int]) -> Tensor:
    values = np.random.RandomState(zlib.crc32(key.encode())).randn(*shape).astype(np.float32) * np.float32(0.06)
    if len(shape) == 1 and key.endswith("weight") and any(word in key for word in ("ln_", "norm", "layer_norm")):
        values = values + 1
    return torch.from_numpy(values).half().float()
