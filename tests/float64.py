"""The references' float32 parts, computed in float64, so that equal maths can be seen as equal to 1e-10."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from diffusers.models.normalization import RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm


def _rms_norm(self, x):
    eps = self.eps if isinstance(self, RMSNorm) else self.variance_epsilon
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.weight


@contextmanager
def references_in_float64() -> Iterator[None]:
    """Patch the two RMS norms, whose variance is float32 whatever the model's dtype."""
    with patch.object(RMSNorm, "forward", _rms_norm), patch.object(T5LayerNorm, "forward", _rms_norm):
        yield
