"""Stable Diffusion 3 / 3.5 from scratch, for research. Names are loaded when they are first used (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdit import reducers as reducers
    from mmdit.budget import BudgetError
    from mmdit.calibration import Calibration, calibrate, quantize_static
    from mmdit.captured import Captured
    from mmdit.captures import capture
    from mmdit.checkpoint import load_clip, load_mmdit, load_t5, load_vae
    from mmdit.comparison import compare
    from mmdit.concepts import Concepts, concept_tokens
    from mmdit.config import MMDiTConfig
    from mmdit.float8_inside import float8_blame, float8_errors
    from mmdit.guides import Guidance
    from mmdit.labelled import Labelled
    from mmdit.listing import points
    from mmdit.maps import attention_maps
    from mmdit.model import MMDiT
    from mmdit.patches import patch
    from mmdit.pipeline import Pipeline, PipelineOutput
    from mmdit.png import read_settings, save_png
    from mmdit.previews import preview
    from mmdit.profiles import PROFILES, Profile
    from mmdit.quantize import quantize_checkpoint
    from mmdit.ranges import Ranged
    from mmdit.safetensors_file import CheckpointError
    from mmdit.spool import load_capture
    from mmdit.stages import Comparison
    from mmdit.sweeps import sweep

__version__ = "0.1.0"
__all__ = [
    "PROFILES",
    "BudgetError",
    "Calibration",
    "Captured",
    "CheckpointError",
    "Comparison",
    "Concepts",
    "Guidance",
    "Labelled",
    "MMDiT",
    "MMDiTConfig",
    "Pipeline",
    "PipelineOutput",
    "Profile",
    "Ranged",
    "__version__",
    "attention_maps",
    "calibrate",
    "capture",
    "compare",
    "concept_tokens",
    "float8_blame",
    "float8_errors",
    "load_capture",
    "load_clip",
    "load_mmdit",
    "load_t5",
    "load_vae",
    "patch",
    "points",
    "preview",
    "quantize_checkpoint",
    "quantize_static",
    "read_settings",
    "save_png",
    "sweep",
]

_SUBMODULES = ("reducers",)  # that are used as mmdit.reducers.norm()
_HOME = {
    "Calibration": "mmdit.calibration",
    "BudgetError": "mmdit.budget",
    "Captured": "mmdit.captured",
    "CheckpointError": "mmdit.safetensors_file",
    "Comparison": "mmdit.stages",
    "Concepts": "mmdit.concepts",
    "Labelled": "mmdit.labelled",
    "Guidance": "mmdit.guides",
    "MMDiT": "mmdit.model",
    "MMDiTConfig": "mmdit.config",
    "PROFILES": "mmdit.profiles",
    "Pipeline": "mmdit.pipeline",
    "PipelineOutput": "mmdit.pipeline",
    "Profile": "mmdit.profiles",
    "calibrate": "mmdit.calibration",
    "attention_maps": "mmdit.maps",
    "capture": "mmdit.captures",
    "Ranged": "mmdit.ranges",
    "compare": "mmdit.comparison",
    "concept_tokens": "mmdit.concepts",
    "float8_blame": "mmdit.float8_inside",
    "float8_errors": "mmdit.float8_inside",
    "load_capture": "mmdit.spool",
    "load_clip": "mmdit.checkpoint",
    "load_mmdit": "mmdit.checkpoint",
    "load_t5": "mmdit.checkpoint",
    "load_vae": "mmdit.checkpoint",
    "patch": "mmdit.patches",
    "points": "mmdit.listing",
    "preview": "mmdit.previews",
    "quantize_checkpoint": "mmdit.quantize",
    "quantize_static": "mmdit.calibration",
    "read_settings": "mmdit.png",
    "save_png": "mmdit.png",
    "sweep": "mmdit.sweeps",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"mmdit.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'mmdit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
