"""The result of a call: the pictures and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

from mmdit.pipeline.settings import Settings, grid


@dataclass(frozen=True, repr=False)
class PipelineOutput:
    """The pictures of a call, which notebooks display.

    `images`: a list of PIL pictures, an array [b, h, w, 3], a tensor [b, 3, h, w] in [0, 1], or latents [b, c, h, w].
    `settings`: the settings of each picture, for `mmdit.save_png`. There are none where they could not describe the
    drawing: with embeddings, latents, sigmas, a callback, or a sampler or guidance of your own.
    """

    images: Any
    settings: tuple[Settings, ...] = ()

    def __repr__(self) -> str:
        count = len(self.images)
        kind = (
            "pictures" if isinstance(self.images, list) else f"{type(self.images).__name__} {list(self.images.shape)}"
        )
        said = f"{count} {kind}" if isinstance(self.images, list) else kind
        seeds = [one.seed for one in self.settings]
        return f"PipelineOutput({said}{f', seeds {seeds}' if seeds else ''})"

    def _repr_png_(self) -> bytes | None:
        """The pictures side by side, for notebooks; None where they are not PIL pictures."""
        if not isinstance(self.images, list):
            return None
        with BytesIO() as file:
            grid(self.images).save(file, format="png")
            return file.getvalue()
