"""Where the embedded model and its LoRA are."""

from pathlib import Path
from typing import Final

EMBEDDED: Final = Path(__file__).parent / "demo" / "weights"  # the folder that `Pipeline.demo()` loads
OUTLINES: Final = Path(__file__).parent / "demo" / "loras" / "outlines.safetensors"
"""A LoRA of the embedded model that draws outlined shapes, in kohya's names; `outlines_diffusers.safetensors` beside
it is the same in diffusers' names."""
