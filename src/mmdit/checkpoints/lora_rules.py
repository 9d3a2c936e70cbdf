"""Rules for LoRA files where programs disagree, and the scales in a file's header.

There are two sets of rules. `TRAINED` applies the strength and the formula of the trainer, as diffusers and peft do for
their own files. `COMFYUI` reproduces ComfyUI 0.3.64, including the tensors that it ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Final, Protocol, runtime_checkable

from encoders.json_files import JSONError, described, parse_json
from mmdit.checkpoints.lora_kinds import DoraRule
from mmdit.checkpoints.lora_names import Part
from mmdit.checkpoints.safetensors_io import CheckpointError
from samplers import pick

HEADER: Final = "lora_adapter_metadata"  # of diffusers: JSON with flat keys, `transformer.lora_alpha`
_COMPONENTS: Final[dict[Part, str]] = {
    "transformer": "transformer",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
}


@dataclass(frozen=True)
class LoraRules:
    """A set of rules for reading LoRA files."""

    name: str
    reads_header: bool  # whether the header's lora_alpha is used for modules without an alpha tensor
    reads_peft_extras: bool  # `lora_magnitude_vector`, and biases of `lora_B`
    reads_ia3: bool
    cuts_biases: bool  # whether `.diff_b` is applied to thirds of the rows, and to exchanged halves
    exchanges_magnitude: bool  # whether DoRA's norms of rows are exchanged with the rows
    zero_alpha_is_rank: bool  # whether alpha 0 means scale 1 (trainers) or 0
    dora: DoraRule
    orthogonal_twice: bool  # whether OFT and BOFT apply the strength twice
    float8: str  # how float8 weights are rounded after merging: see `mmdit.merge_lora`


TRAINED: Final = LoraRules("trained", True, True, True, True, True, True, "trained", False, "nearest")
COMFYUI: Final = LoraRules("comfyui", False, False, False, False, False, False, "comfyui", True, "comfyui")
_BY_PROFILE: Final = {"diffusers": TRAINED, "reference": TRAINED, "comfyui": COMFYUI}


@runtime_checkable
class HasName(Protocol):
    """A profile; only its name is used here."""

    @property
    def name(self) -> str: ...


def rules_of(profile: str | HasName | None) -> LoraRules:
    """The rules of a profile; None is `TRAINED`.

    Raises:
        ValueError: the profile is unknown.
    """
    if profile is None:
        return TRAINED
    if not isinstance(profile, str):
        return _BY_PROFILE.get(profile.name, TRAINED)
    return pick(_BY_PROFILE, profile, "profile")


class HeaderScales:
    """The scales in the header of a file, for modules without an alpha tensor.

    Raises:
        CheckpointError: the entry is not a JSON object, or one of its values is not a number.
    """

    def __init__(self, source: str, metadata: Mapping[str, str]) -> None:
        self.source = source
        self.entries: dict[str, Any] = {}
        if HEADER in metadata:
            try:
                self.entries = parse_json(metadata[HEADER], f"{source}: {HEADER}", kind=dict)
            except JSONError as error:
                raise CheckpointError(str(error)) from error

    def scale(self, part: Part, module: str, rank: int) -> float | None:
        """The scale of a module; None if the header has none.

        Args:
            part: the model.
            module: the module's name in diffusers' spelling, without the component.
            rank: the rank of the module in the file.
        """
        component = _COMPONENTS[part]
        alpha = self._by_pattern(component, module, "alpha_pattern", self.entries.get(f"{component}.lora_alpha"))
        if alpha is None:
            return None
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise CheckpointError(
                f"{self.source}: {HEADER} has lora_alpha {described(alpha)} for {component}.{module}; expected a number"
            )
        uses_root = self.entries.get(f"{component}.use_rslora") is True  # arXiv 2312.03732
        return float(alpha) / (sqrt(rank) if uses_root else rank)

    def _by_pattern(self, component: str, module: str, field: str, default: object) -> Any:
        patterns = self.entries.get(f"{component}.{field}") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self.source}: {HEADER} has {field} {described(patterns)}; expected an object")
        matching = (value for key, value in patterns.items() if module == key or module.endswith(f".{key}"))
        return next(matching, default)
