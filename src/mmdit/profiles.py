"""Profiles: every small thing on which the reference pipelines disagree, in one place.

No other module asks which profile runs. More rows and the profiles of ComfyUI and Stability's own code join this table
as the features they speak of are built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from encoders import TextRules


@dataclass(frozen=True)
class Profile:
    """How a reference draws; the defaults are those of diffusers' `StableDiffusion3Pipeline`."""

    name: str = "diffusers"
    text: TextRules = field(default_factory=TextRules)
    schedule: str = "normal"
    shift: float = 3.0  # where no scheduler config says otherwise
    steps: int = 28
    guidance_scale: float = 7.0
    noise_dtype: Literal["model", "float32"] = "model"  # what the initial noise is drawn in
    state_dtype: Literal["model", "float32"] = "model"  # what the latent is rounded to after each step
    to_uint8: Literal["round", "truncate"] = "round"


PROFILES: dict[str, Profile] = {"diffusers": Profile()}
