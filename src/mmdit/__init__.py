"""Stable Diffusion 3 / 3.5 from scratch, for research. Names are loaded when they are first used (PEP 562)."""

from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mmdit._imports import without_collections

if TYPE_CHECKING:
    import encoders as encoders
    import quant as quant
    import samplers as samplers
    from encoders import Conditioning as Conditioning
    from mmdit._version import __version__ as __version__
    from mmdit.checkpoints.hub import HubError as HubError
    from mmdit.checkpoints.load import load_clip as load_clip
    from mmdit.checkpoints.load import load_controlnet as load_controlnet
    from mmdit.checkpoints.load import load_mmdit as load_mmdit
    from mmdit.checkpoints.load import load_t5 as load_t5
    from mmdit.checkpoints.load import load_vae as load_vae
    from mmdit.checkpoints.lora import Lora as Lora
    from mmdit.checkpoints.lora import load_lora as load_lora
    from mmdit.checkpoints.lora_describe import lora_norms as lora_norms
    from mmdit.checkpoints.lora_merge import merge_lora as merge_lora
    from mmdit.checkpoints.quantize import quantize_checkpoint as quantize_checkpoint
    from mmdit.checkpoints.safetensors_io import CheckpointError as CheckpointError
    from mmdit.comfyui.declare import workflow_node as workflow_node
    from mmdit.comfyui.errors import LimitError as LimitError
    from mmdit.comfyui.errors import NodeError as NodeError
    from mmdit.comfyui.errors import WorkflowError as WorkflowError
    from mmdit.comfyui.export import from_workflow as from_workflow
    from mmdit.comfyui.export import to_workflow as to_workflow
    from mmdit.comfyui.limits import WorkflowLimits as WorkflowLimits
    from mmdit.comfyui.run import WorkflowCache as WorkflowCache
    from mmdit.comfyui.run import WorkflowResult as WorkflowResult
    from mmdit.comfyui.run import run_workflow as run_workflow
    from mmdit.embedded import CANNY_NET as CANNY_NET
    from mmdit.embedded import DEPTH_NET as DEPTH_NET
    from mmdit.embedded import OUTLINES as OUTLINES
    from mmdit.inspection import plots as plots
    from mmdit.inspection import reducers as reducers
    from mmdit.inspection.addresses import Address as Address
    from mmdit.inspection.addresses import Word as Word
    from mmdit.inspection.attention_maps import attention_maps as attention_maps
    from mmdit.inspection.budget import BudgetError as BudgetError
    from mmdit.inspection.capture import capture as capture
    from mmdit.inspection.captured import Captured as Captured
    from mmdit.inspection.captured import load_capture as load_capture
    from mmdit.inspection.concepts import Concepts as Concepts
    from mmdit.inspection.concepts import concept_tokens as concept_tokens
    from mmdit.inspection.float8 import float8_blame as float8_blame
    from mmdit.inspection.float8 import float8_errors as float8_errors
    from mmdit.inspection.labelled import Labelled as Labelled
    from mmdit.inspection.listing import points as points
    from mmdit.inspection.lora import sweep_lora as sweep_lora
    from mmdit.inspection.patch import patch as patch
    from mmdit.inspection.sweep import sweep as sweep
    from mmdit.models.config import MMDiTConfig as MMDiTConfig
    from mmdit.models.controlnet import ControlNet as ControlNet
    from mmdit.models.controlnet import ControlNetConfig as ControlNetConfig
    from mmdit.models.mmdit import MMDiT as MMDiT
    from mmdit.parity.compare import compare as compare
    from mmdit.parity.report import Comparison as Comparison
    from mmdit.pictures import images as images
    from mmdit.pictures.edges import canny as canny
    from mmdit.pictures.outpaint import pad_for_outpaint as pad_for_outpaint
    from mmdit.pipeline.calibration import Calibration as Calibration
    from mmdit.pipeline.calibration import calibrate as calibrate
    from mmdit.pipeline.calibration import quantize_static as quantize_static
    from mmdit.pipeline.callbacks import OnStepEnd as OnStepEnd
    from mmdit.pipeline.guidance import Guidance as Guidance
    from mmdit.pipeline.hires import Hires as Hires
    from mmdit.pipeline.invert import Inversion as Inversion
    from mmdit.pipeline.output import PipelineOutput as PipelineOutput
    from mmdit.pipeline.parallelize import parallelize as parallelize
    from mmdit.pipeline.passes import Branch as Branch
    from mmdit.pipeline.pipeline import Pipeline as Pipeline
    from mmdit.pipeline.previews import preview as preview
    from mmdit.pipeline.profiles import PRESETS as PRESETS
    from mmdit.pipeline.profiles import PROFILES as PROFILES
    from mmdit.pipeline.profiles import Preset as Preset
    from mmdit.pipeline.profiles import Profile as Profile
    from mmdit.pipeline.prompts import Ranged as Ranged
    from mmdit.pipeline.settings import Settings as Settings
    from mmdit.pipeline.settings import SettingsError as SettingsError
    from mmdit.pipeline.settings import read_settings as read_settings
    from mmdit.pipeline.settings import save_png as save_png
    from mmdit.runtime.lifeline import ParallelError as ParallelError
    from mmdit.runtime.lifeline import RanksDifferError as RanksDifferError
    from mmdit.runtime.plan import MemoryPlan as MemoryPlan
    from mmdit.runtime.plan import TooLittleMemory as TooLittleMemory

# Public names by the module that they are loaded from. A test compares the table with the imports above.
_NAMES: dict[str, tuple[str, ...]] = {
    "encoders": ("Conditioning",),
    "mmdit._version": ("__version__",),
    "mmdit.checkpoints.hub": ("HubError",),
    "mmdit.checkpoints.load": ("load_clip", "load_controlnet", "load_mmdit", "load_t5", "load_vae"),
    "mmdit.checkpoints.lora": ("Lora", "load_lora"),
    "mmdit.checkpoints.lora_describe": ("lora_norms",),
    "mmdit.checkpoints.lora_merge": ("merge_lora",),
    "mmdit.checkpoints.quantize": ("quantize_checkpoint",),
    "mmdit.checkpoints.safetensors_io": ("CheckpointError",),
    "mmdit.comfyui.declare": ("workflow_node",),
    "mmdit.comfyui.errors": ("LimitError", "NodeError", "WorkflowError"),
    "mmdit.comfyui.export": ("from_workflow", "to_workflow"),
    "mmdit.comfyui.limits": ("WorkflowLimits",),
    "mmdit.comfyui.run": ("WorkflowCache", "WorkflowResult", "run_workflow"),
    "mmdit.embedded": ("CANNY_NET", "DEPTH_NET", "OUTLINES"),
    "mmdit.inspection.addresses": ("Address", "Word"),
    "mmdit.inspection.attention_maps": ("attention_maps",),
    "mmdit.inspection.budget": ("BudgetError",),
    "mmdit.inspection.capture": ("capture",),
    "mmdit.inspection.captured": ("Captured", "load_capture"),
    "mmdit.inspection.concepts": ("Concepts", "concept_tokens"),
    "mmdit.inspection.float8": ("float8_blame", "float8_errors"),
    "mmdit.inspection.labelled": ("Labelled",),
    "mmdit.inspection.listing": ("points",),
    "mmdit.inspection.lora": ("sweep_lora",),
    "mmdit.inspection.patch": ("patch",),
    "mmdit.inspection.sweep": ("sweep",),
    "mmdit.models.config": ("MMDiTConfig",),
    "mmdit.models.controlnet": ("ControlNet", "ControlNetConfig"),
    "mmdit.models.mmdit": ("MMDiT",),
    "mmdit.parity.compare": ("compare",),
    "mmdit.parity.report": ("Comparison",),
    "mmdit.pictures.edges": ("canny",),
    "mmdit.pictures.outpaint": ("pad_for_outpaint",),
    "mmdit.pipeline.calibration": ("Calibration", "calibrate", "quantize_static"),
    "mmdit.pipeline.callbacks": ("OnStepEnd",),
    "mmdit.pipeline.guidance": ("Guidance",),
    "mmdit.pipeline.output": ("PipelineOutput",),
    "mmdit.pipeline.hires": ("Hires",),
    "mmdit.pipeline.invert": ("Inversion",),
    "mmdit.pipeline.parallelize": ("parallelize",),
    "mmdit.pipeline.passes": ("Branch",),
    "mmdit.pipeline.pipeline": ("Pipeline",),
    "mmdit.pipeline.previews": ("preview",),
    "mmdit.pipeline.profiles": ("PRESETS", "PROFILES", "Preset", "Profile"),
    "mmdit.pipeline.prompts": ("Ranged",),
    "mmdit.pipeline.settings": ("Settings", "SettingsError", "read_settings", "save_png"),
    "mmdit.runtime.lifeline": ("ParallelError", "RanksDifferError"),
    "mmdit.runtime.plan": ("MemoryPlan", "TooLittleMemory"),
}
_MODULES = {
    "encoders": "encoders",
    "images": "mmdit.pictures.images",
    "plots": "mmdit.inspection.plots",
    "quant": "quant",
    "reducers": "mmdit.inspection.reducers",
    "samplers": "samplers",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES])  # noqa: PLE0605 # from the one table

if not TYPE_CHECKING:  # a type checker sees the imports above, and so a misspelt name

    def __getattr__(name: str) -> object:
        with without_collections():
            if name in _MODULES:
                return import_module(_MODULES[name])
            if name in _HOME:
                return getattr(import_module(_HOME[name]), name)
        near = get_close_matches(name, __all__, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise AttributeError(f"module 'mmdit' has no attribute {name!r}{hint}", name=name)


def __dir__() -> list[str]:
    return __all__


def _check_sisters() -> None:
    """Raise ImportError where another file takes the place of one of the packages that come with this one."""
    ours = Path(__file__).parent.parent
    for name in ("encoders", "quant", "samplers"):
        spec = find_spec(name)
        found = None if spec is None or spec.origin is None else Path(spec.origin)
        if found != ours / name / "__init__.py":
            raise ImportError(
                f"{found or 'nothing'} is found as {name!r}, but mmdit-lab needs its own package {ours / name}. "
                f"Rename your file or folder {name!r}, or start Python from another folder",
                name=name,
            )


_check_sisters()
