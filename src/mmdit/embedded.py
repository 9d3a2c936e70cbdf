"""Where the embedded model, its LoRA and its ControlNets are."""

from pathlib import Path
from typing import Final

EMBEDDED: Final = Path(__file__).parent / "demo" / "weights"  # the folder that `Pipeline.demo()` loads
OUTLINES: Final = Path(__file__).parent / "demo" / "loras" / "outlines.safetensors"
"""A LoRA of the embedded model that draws outlined shapes, in kohya's names; `outlines_diffusers.safetensors` beside
it is the same in diffusers' names."""
CANNY_NET: Final = Path(__file__).parent / "demo" / "controlnets" / "controlnet_canny.safetensors"
"""A ControlNet of the embedded model that follows edges, see `mmdit.canny`."""
DEPTH_NET: Final = Path(__file__).parent / "demo" / "controlnets" / "controlnet_depth.safetensors"
"""A ControlNet of the embedded model that follows a depth map: black ground, and objects the brighter, the larger."""
