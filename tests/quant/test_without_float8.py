"""Devices whose torch has no float8 dtypes and no float64, such as MPS: codes are bytes, and our codec decodes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quant import matmul, operations, quantize, scaling, tensor
from quant.formats import FLOAT8
from quant.quantize import dequantize_, quantize_, report
from quant.recipe import RECIPES
from quant.tensor import Float8Tensor

RECIPE_NAMES = ["fp8", "fp8-tensor", "fp8-weight-only", "fp8-e5m2"]


class Poor(TorchDispatchMode):
    """Operations on a CPU, which refuses what MPS refuses."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor) and one.dtype in (*FLOAT8, torch.float64):
                raise TypeError(f"{func} gives {one.dtype}, which this device does not have")
        return found


@pytest.fixture
def poor(monkeypatch):
    for module in (scaling, tensor, operations):
        monkeypatch.setattr(module, "has_float8", lambda device: False)
    # `_energies` goes to the CPU for float64 where the device is MPS, which a CPU cannot pretend to be.
    monkeypatch.setattr(quantize, "_energies", lambda *pair: torch.ones(2))
    return Poor()


def net(dtype):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 16, bias=False)).to(dtype).requires_grad_(False)
    return made, torch.randn(2, 5, 40).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_model_runs_on_bytes(poor, monkeypatch, name, dtype):
    model, x = net(dtype)
    quantize_(model, name)
    with monkeypatch.context() as rich:
        rich.setattr(tensor, "has_float8", lambda device: True)
        other, _ = net(dtype)
        quantize_(other, name)
        wanted = other(x)
    weight = model[0].weight
    assert weight.qdata.dtype == torch.uint8
    assert torch.equal(weight.qdata, other[0].weight.qdata.view(torch.uint8))
    for piece in (2**22, 100):  # at once, and piece by piece
        monkeypatch.setattr(matmul, "PIECE", piece)
        with poor:
            found = model(x)
            assert {one.arithmetic for one in report(model)} == {
                "float32" if RECIPES[name].activation != "none" else str(dtype).removeprefix("torch.")
            }
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(found, wanted, **tolerance)
    with poor:
        dequantize_(model)
    assert torch.equal(model[0].weight, other[0].weight.dequantize())


def test_moves_and_parts_of_bytes(poor):
    with poor:
        weight = Float8Tensor.quantize(torch.randn(24, 40), recipe="fp8")
        rows, cast, copy = weight[3:9], weight.to(torch.float16), weight.clone()
        assert rows.qdata.dtype == cast.qdata.dtype == torch.uint8
        assert torch.equal(rows.dequantize(), weight.dequantize()[3:9])
        assert torch.equal(cast.dequantize(torch.float32), weight.dequantize())
        copy.copy_(torch.zeros(24, 40))
        assert not copy.dequantize().any()
        x = torch.randn(3, 40, requires_grad=True)
        F.linear(x, weight).sum().backward()
    assert torch.isfinite(x.grad).all()
