"""What is quantized and how a quantized Linear computes, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["e4m3", "e5m2"]
Granularity = Literal["tensor", "row"]
Activation = Literal["none", "tensor", "token", "static"]
Backend = Literal["auto", "native", "emulated"]


@dataclass(frozen=True)
class Recipe:
    """How a weight is stored, and what `F.linear` does with it.

    Raises:
        ValueError: a word that is no choice of its field.
    """

    format: Format = "e4m3"  # of the weight
    granularity: Granularity = "row"  # of its scale: one number, or one per output channel
    # What is multiplied with the float8 weight: the activation as it is, the weight widened ("none", weight-only); or
    # the activation in float8 with a scale of the whole batch ("tensor") or of each token ("token"), both found anew in
    # every call; or with the one scale that calibration found ("static").
    activation: Activation = "token"
    activation_format: Format = "e4m3"
    # "native" is the device's own float8 matmul, "emulated" the same codes and scales multiplied in float32; "auto"
    # takes native where it runs.
    backend: Backend = "auto"
    fast_accum: bool = False  # native sums of large products in fewer bits, a little faster and less exact

    def __post_init__(self) -> None:
        choices = {
            "format": Format,
            "granularity": Granularity,
            "activation": Activation,
            "activation_format": Format,
            "backend": Backend,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"Recipe.{name} must be one of {known}; got {getattr(self, name)!r}")
        if self.activation == "none" and self.backend == "native":
            raise ValueError("Recipe: weight-only (activation='none') has no float8 matmul; backend='native' needs one")
        if self.activation == "token" and self.granularity == "tensor":
            raise ValueError(
                "Recipe: a scale per token goes with one per row of the weight (granularity='row'), because float8 "
                "matmuls take no other pair; give activation='tensor' for granularity='tensor'"
            )


# Sums in fewer bits cost 0.03 dB beside the 28.5 that rounding to float8 leaves, and make a matmul a tenth quicker.
RECIPES: dict[str, Recipe] = {
    "fp8": Recipe(fast_accum=True),
    "fp8-weight-only": Recipe(activation="none"),
    "fp8-tensor": Recipe(granularity="tensor", activation="tensor", fast_accum=True),
    "fp8-static": Recipe(granularity="tensor", activation="static", fast_accum=True),
    "fp8-e5m2": Recipe(format="e5m2", activation="none"),
}
