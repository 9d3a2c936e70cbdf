"""A CPU that is treated as a GPU without FP8 units, on which products with float8 weights run in 16 bits."""

import torch

from mmdit.runtime import products
from quant import emulation, matmul

CUDA = torch.device("cuda")


def pretend_half(monkeypatch, *, triton=True):
    """Products run as on a GPU; torch's 16-bit products with a float32 result are there only, and stood in for."""
    there = matmul.multiplies_by_half
    for module in (matmul, products):
        monkeypatch.setattr(module, "multiplies_by_half", lambda runs, device, dtype: there(runs, CUDA, dtype))

    def mm(a, b, *, out=None, out_dtype=None):
        y = a.double() @ b.double()
        return y.to(out_dtype) if out is None else out.copy_(y)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", lambda bias, a, b, *, out: out.copy_(a.double() @ b.double() + bias))
    monkeypatch.setattr(emulation, "HAS_TRITON", triton)
