"""Stable Diffusion 3 / 3.5 from scratch, for research. Names are loaded when they are first used (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdit.checkpoint import load_clip, load_mmdit, load_t5, load_vae
    from mmdit.comparison import compare
    from mmdit.config import MMDiTConfig
    from mmdit.guides import Guidance
    from mmdit.model import MMDiT
    from mmdit.pipeline import Pipeline, PipelineOutput
    from mmdit.png import read_settings, save_png
    from mmdit.previews import preview
    from mmdit.profiles import PROFILES, Profile
    from mmdit.ranges import Ranged
    from mmdit.safetensors_file import CheckpointError
    from mmdit.stages import Comparison

__version__ = "0.1.0"
__all__ = [
    "PROFILES",
    "CheckpointError",
    "Comparison",
    "Guidance",
    "MMDiT",
    "MMDiTConfig",
    "Pipeline",
    "PipelineOutput",
    "Profile",
    "Ranged",
    "__version__",
    "compare",
    "load_clip",
    "load_mmdit",
    "load_t5",
    "load_vae",
    "preview",
    "read_settings",
    "save_png",
]

_HOME = {
    "CheckpointError": "mmdit.safetensors_file",
    "Comparison": "mmdit.stages",
    "Guidance": "mmdit.guides",
    "MMDiT": "mmdit.model",
    "MMDiTConfig": "mmdit.config",
    "PROFILES": "mmdit.profiles",
    "Pipeline": "mmdit.pipeline",
    "PipelineOutput": "mmdit.pipeline",
    "Profile": "mmdit.profiles",
    "Ranged": "mmdit.ranges",
    "compare": "mmdit.comparison",
    "load_clip": "mmdit.checkpoint",
    "load_mmdit": "mmdit.checkpoint",
    "load_t5": "mmdit.checkpoint",
    "load_vae": "mmdit.checkpoint",
    "preview": "mmdit.previews",
    "read_settings": "mmdit.png",
    "save_png": "mmdit.png",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmdit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
