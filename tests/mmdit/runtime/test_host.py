"""Copies of a GPU's tensors through small buffers are bit-equal."""

import pytest
import torch

from mmdit.runtime import host
from mmdit.runtime.host import HostCopies, through
from quant import Float8Tensor
from skips import SKIPS
from triton_device import DEVICE


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_equal_whatever_the_pieces(rows, dtype):
    buffers = tuple(torch.zeros(48, dtype=torch.uint8) for _ in range(2))
    tensor = torch.randn(5, rows).to(dtype).t()
    found = through(buffers, tensor.to(DEVICE))
    assert torch.equal(found, tensor)
    assert found.dtype == dtype
    assert found.is_contiguous()


def test_copies_in_huge_pages_are_equal_and_writable():
    tensor = torch.randn(host._SMALL // 4 + 1)
    found = through(tuple(torch.zeros(2**18, dtype=torch.uint8) for _ in range(2)), tensor)
    assert torch.equal(found, tensor)
    assert torch.equal(found.add_(1), tensor + 1)


def test_what_is_on_the_cpu_stays():
    tensor = torch.ones(3)
    assert HostCopies()(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason=SKIPS["gpu"])
def test_of_float8_and_of_large_tensors(monkeypatch):
    monkeypatch.setattr(host, "_SMALL", 100)
    monkeypatch.setattr(host, "_PIECE", 1000)
    weight = torch.randn(70, 64, device=DEVICE)
    for tensor in (weight, Float8Tensor.quantize(weight), weight.bfloat16().t()):
        found = HostCopies()(tensor)
        assert type(found) is type(tensor)
        assert found.device.type == "cpu"
        assert torch.equal(found, tensor.to("cpu"))
