"""Recipes of every kind, and weights that are quantized by them."""

import torch

from quant.recipe import RECIPES, Recipe
from quant.tensor import Float8Tensor

RECIPES_OF_ALL = {
    **RECIPES,
    "e5m2 weights": Recipe(format="e5m2"),
    "e5m2 activations": Recipe(activation_format="e5m2"),
    "e5m2 both": Recipe("e5m2", "tensor", "tensor", "e5m2"),
    "row x tensor": Recipe(activation="tensor"),
    "row x static": Recipe(activation="static", activation_format="e5m2"),
}


def weight_of(recipe, *shape, dtype=torch.float32, values=None, input_scale=0.01):
    values = torch.randn(*shape) if values is None else values
    scale = torch.tensor(input_scale) if recipe.activation == "static" else None
    return Float8Tensor.quantize(values.to(dtype), recipe=recipe, input_scale=scale)
