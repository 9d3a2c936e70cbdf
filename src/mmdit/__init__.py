"""Stable Diffusion 3 / 3.5 from scratch, for research. Names are loaded when they are first used (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdit._version import __version__ as __version__
    from mmdit.checkpoints.load import load_clip, load_mmdit, load_t5, load_vae
    from mmdit.checkpoints.quantize import quantize_checkpoint
    from mmdit.checkpoints.safetensors_io import CheckpointError
    from mmdit.inspection import plots as plots
    from mmdit.inspection import reducers as reducers
    from mmdit.inspection.attention_maps import attention_maps
    from mmdit.inspection.budget import BudgetError
    from mmdit.inspection.capture import capture
    from mmdit.inspection.captured import Captured, load_capture
    from mmdit.inspection.concepts import Concepts, concept_tokens
    from mmdit.inspection.float8 import float8_blame, float8_errors
    from mmdit.inspection.labelled import Labelled
    from mmdit.inspection.listing import points
    from mmdit.inspection.patch import patch
    from mmdit.inspection.sweep import sweep
    from mmdit.models.config import MMDiTConfig
    from mmdit.models.mmdit import MMDiT
    from mmdit.parity.compare import compare
    from mmdit.parity.report import Comparison
    from mmdit.pipeline.calibration import Calibration, calibrate, quantize_static
    from mmdit.pipeline.guidance import Guidance
    from mmdit.pipeline.pipeline import Pipeline, PipelineOutput
    from mmdit.pipeline.previews import preview
    from mmdit.pipeline.profiles import PROFILES, Profile
    from mmdit.pipeline.prompts import Ranged
    from mmdit.pipeline.settings import read_settings, save_png

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

_SUBMODULES = {"plots": "mmdit.inspection.plots", "reducers": "mmdit.inspection.reducers"}
_HOME = {
    "__version__": "mmdit._version",
    "Calibration": "mmdit.pipeline.calibration",
    "BudgetError": "mmdit.inspection.budget",
    "Captured": "mmdit.inspection.captured",
    "CheckpointError": "mmdit.checkpoints.safetensors_io",
    "Comparison": "mmdit.parity.report",
    "Concepts": "mmdit.inspection.concepts",
    "Labelled": "mmdit.inspection.labelled",
    "Guidance": "mmdit.pipeline.guidance",
    "MMDiT": "mmdit.models.mmdit",
    "MMDiTConfig": "mmdit.models.config",
    "PROFILES": "mmdit.pipeline.profiles",
    "Pipeline": "mmdit.pipeline.pipeline",
    "PipelineOutput": "mmdit.pipeline.pipeline",
    "Profile": "mmdit.pipeline.profiles",
    "calibrate": "mmdit.pipeline.calibration",
    "attention_maps": "mmdit.inspection.attention_maps",
    "capture": "mmdit.inspection.capture",
    "Ranged": "mmdit.pipeline.prompts",
    "compare": "mmdit.parity.compare",
    "concept_tokens": "mmdit.inspection.concepts",
    "float8_blame": "mmdit.inspection.float8",
    "float8_errors": "mmdit.inspection.float8",
    "load_capture": "mmdit.inspection.captured",
    "load_clip": "mmdit.checkpoints.load",
    "load_mmdit": "mmdit.checkpoints.load",
    "load_t5": "mmdit.checkpoints.load",
    "load_vae": "mmdit.checkpoints.load",
    "patch": "mmdit.inspection.patch",
    "points": "mmdit.inspection.listing",
    "preview": "mmdit.pipeline.previews",
    "quantize_checkpoint": "mmdit.checkpoints.quantize",
    "quantize_static": "mmdit.pipeline.calibration",
    "read_settings": "mmdit.pipeline.settings",
    "save_png": "mmdit.pipeline.settings",
    "sweep": "mmdit.inspection.sweep",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(_SUBMODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'mmdit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
