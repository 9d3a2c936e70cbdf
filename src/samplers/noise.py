"""Where a picture starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian(
    shape: Sequence[int], generators: torch.Generator | Sequence[torch.Generator] | None, dtype: torch.dtype
) -> Tensor:
    """Normal noise of `shape` [b, c, h, w], drawn in `dtype` on the generator's device.

    Args:
        shape: of the batch.
        generators: one for the whole batch, or one per sample; None draws from torch's global state on the CPU.
        dtype: what the draw itself is made in: float64 draws are other numbers than float32 ones.

    Raises:
        ValueError: there are as many generators neither as one nor as samples.
    """
    if generators is None or isinstance(generators, torch.Generator):
        device = "cpu" if generators is None else generators.device
        return torch.randn(tuple(shape), generator=generators, device=device, dtype=dtype)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} samples; give one, or one per sample")
    return torch.cat([gaussian((1, *shape[1:]), generator, dtype) for generator in generators])
