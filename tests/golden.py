"""Recorded numbers of the references, and the formula weights that they were recorded with."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def recorded(name: str) -> dict:
    return json.loads((DATA / "golden" / f"{name}.json").read_text())


def manifest(name: str) -> dict:
    return json.loads((DATA / "manifests" / f"{name}.json").read_text())


def official_config(folder: str, name: str = "config.json") -> dict:
    return json.loads((DATA / "configs" / folder / name).read_text())


def formula_input(shape: tuple[int, ...], a: float, b: float) -> Tensor:
    """cos(a j + b) over the flat index j."""
    count = torch.Size(shape).numel()
    return torch.cos(a * torch.arange(count, dtype=torch.float64) + b).reshape(shape)


def formula_weights(keys_and_shapes: dict[str, torch.Size], keys: list[str] | None = None) -> dict[str, Tensor]:
    """Weights by position of the key in sorted order: see `weights` in golden/tiny_models.json."""
    order = sorted(keys if keys is not None else keys_and_shapes)
    return {key: _formula_weight(key, order.index(key), shape) for key, shape in keys_and_shapes.items()}


def _formula_weight(key: str, k: int, shape: torch.Size) -> Tensor:
    wave = torch.sin(0.37 * torch.arange(shape.numel(), dtype=torch.float64) + 1.1 * k).reshape(shape)
    if len(shape) >= 2:
        return 0.05 * wave
    return 1 + 0.1 * wave if key.endswith(".weight") else 0.02 * wave


def fill(module: nn.Module, keys: list[str] | None = None) -> nn.Module:
    """The module in float64 with formula weights; `keys` where the recorded module had others beside ours."""
    module = module.double()
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    module.load_state_dict(formula_weights(shapes, keys))
    return module.eval()


def agrees(found: Tensor, wanted: dict, tolerance: float = 1e-8) -> None:
    """Compare a tensor with a recorded summary; the record carries 10 decimals."""
    assert list(found.shape) == wanted["shape"]
    flat = found.detach().double().flatten()
    summary = {"mean": flat.mean(), "absmean": flat.abs().mean(), "rms": flat.square().mean().sqrt()}
    for name, value in summary.items():
        assert abs(float(value) - wanted[name]) <= tolerance, f"{name}: {float(value)} against {wanted[name]}"
    for name, part in (("first", flat[: len(wanted["first"])]), ("last", flat[-len(wanted["last"]) :])):
        torch.testing.assert_close(part, torch.tensor(wanted[name], dtype=torch.float64), rtol=0, atol=tolerance)
