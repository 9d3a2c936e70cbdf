"""What is quantized and how a quantized Linear computes, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from quant.formats import Format

Granularity = Literal["tensor", "row"]
Activation = Literal["none", "tensor", "token", "static"]
Backend = Literal["auto", "native", "emulated"]
Gradient = Literal["full", "e5m2"]


@dataclass(frozen=True)
class Recipe:
    """How a weight is stored, and what `F.linear` does with it.

    Raises:
        ValueError: A field has a value that is none of its choices, or two fields do not go together.
    """

    format: Format = "e4m3"  # of the weight
    granularity: Granularity = "row"  # of the weight's scale: one for the whole weight, or one per output channel
    # How activations enter the matmul. "none": they stay as they are and the weight is dequantized (weight-only).
    # "tensor" and "token": they are rounded to float8, with one scale per call or one per token, found in every call.
    # "static": they are rounded to float8 with the one scale that calibration found.
    activation: Activation = "token"
    activation_format: Format = "e4m3"
    # "native" is the device's own float8 matmul, "emulated" multiplies the same qdata and scales in float32; "auto"
    # takes native where it runs.
    backend: Backend = "auto"
    # The gradient of the input: "full" multiplies by the dequantized weight in the input's dtype, "e5m2" rounds the
    # gradient to E5M2 with one scale and multiplies in float8. It is for training, and no part of files.
    gradient: Gradient = "full"
    fast_accum: bool = False  # native sums of large products in fewer bits, a little faster and less exact

    def __post_init__(self) -> None:
        choices = {
            "format": get_args(Format),
            "granularity": get_args(Granularity),
            "activation": get_args(Activation),
            "activation_format": get_args(Format),
            "backend": get_args(Backend),
            "gradient": get_args(Gradient),
            "fast_accum": (False, True),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if not isinstance(value, type(known[0])) or value not in known:
                raise ValueError(f"Recipe.{name} must be one of {', '.join(map(repr, known))}; got {value!r:.100}")
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


def as_recipe(recipe: Recipe | str, argument: str = "recipe") -> Recipe:
    """The recipe, or the entry of `RECIPES` of that name.

    Args:
        recipe: A recipe or a name.
        argument: The name of the caller's argument, for the error.

    Raises:
        ValueError: The name is unknown; the nearest names and all names are listed.
        TypeError: It is neither a recipe nor a name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(
            f"{argument} is a quant.Recipe or one of the names {', '.join(RECIPES)}; got {type(recipe).__name__}"
        )
    if recipe in RECIPES:
        return RECIPES[recipe]
    near = get_close_matches(recipe, RECIPES, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {argument} {recipe!r}; {hint}Known: {', '.join(RECIPES)}, or give a quant.Recipe")


def as_static_recipe(recipe: Recipe | str) -> Recipe:
    """`as_recipe`, for callers that calibrate.

    Raises:
        ValueError: The recipe has no static activations, which is all that calibration is for; see `as_recipe`.
    """
    recipe = as_recipe(recipe)
    if recipe.activation != "static":
        raise ValueError(
            f"calibration is for activation='static'; the recipe has activation={recipe.activation!r}: give a static "
            "one, such as 'fp8-static', or quantize without calibration by quant.quantize_"
        )
    return recipe


def recipe_name(recipe: Recipe) -> str:
    """The name of the recipe in `RECIPES`, or "custom" where it has none."""
    return next((name for name, known in RECIPES.items() if known == recipe), "custom")
