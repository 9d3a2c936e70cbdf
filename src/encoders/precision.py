"""Layers that can compute in float32 while their weights are stored in 16 bits.

The dtype to compute in is an argument of an encoder's forward and, from there on, the dtype of the activations: a
layer upcasts its own weights, which is exact, while it runs. No pass changes a module, so threads may share a model and
an interrupt leaves nothing behind, and there is never a float32 copy of a whole model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upcast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast a float16 or bfloat16 tensor to `dtype` if that is wider; all others, and all with None, are unchanged."""
    is_narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(dtype) if is_narrow and dtype in (torch.float32, torch.float64) else tensor


class Linear(nn.Linear):
    """A Linear whose 16-bit weights are upcast to the dtype of its input [..., in_features]."""

    only_upcasts = True  # its forward differs from torch's in this alone, for whoever computes in its place

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else upcast(self.bias, x.dtype)
        return F.linear(x, upcast(self.weight, x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm whose 16-bit weights are upcast to the dtype of its input [..., width]."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = upcast(self.weight, x.dtype), upcast(self.bias, x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
