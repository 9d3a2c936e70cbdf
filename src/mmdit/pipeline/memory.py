"""Running out of memory, explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from mmdit.checkpoints.components import TITLES, Component
from mmdit.utils import is_out_of_memory, weight_bytes


@contextmanager
def explained(models: Mapping[Component, nn.Module], what: str) -> Iterator[None]:
    """Turn a failed allocation into a MemoryError that says what is in memory, what was asked for and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        what_failed = (str(error) or type(error).__name__).splitlines()[0]
        weights = ", ".join(f"{TITLES[name]} {weight_bytes(model) / 1e9:.2f} GB" for name, model in models.items())
        raise MemoryError(
            f"out of memory while drawing {what}. Weights: {weights}. What failed: {what_failed}. "
            "What helps: a smaller height and width, fewer pictures at once (num_images_per_prompt), "
            "weights in 16 bits (dtype=torch.bfloat16), models that take turns on the device (offload='stages'), "
            "or decoding in tiles (vae_tile=512)"
        ) from error
