"""The floor of a step: how long its products, its attention and the bytes between them take at measured rates alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdit.bench.layers import Shape, shapes_of, timed
from mmdit.bench.random_models import MODELS
from mmdit.runtime.attention import BestAttention
from quant.matmul import multiply_into, quantize_activation
from quant.recipe import RECIPES
from quant.tensor import Float8Tensor

_COPIED = 2**29  # bytes of the tensor whose copy gives the rate of the memory


def floor_of(
    model: str,
    recipe: str | None,
    *,
    size: int = 1024,
    text: int = 333,
    batch: int = 2,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Milliseconds below which no step falls whose kernels are those of the libraries and read and write at copy speed.

    The sum of three times: every Linear of the blocks by the device's own matmul; every attention by the quickest exact
    kernel that is installed; and what lies between them, read and written once, at the rate of a copy. A block moves
    34 d values of 16 bits a token less what it rounds: two norms that add an update to the residual stream, queries,
    keys and values into the joint layout, the output of attention, and GELU.

    Args:
        model: one of `MODELS`.
        recipe: a name of `quant.RECIPES` with float8 activations, or None for 16 bits.
        size, text, batch: see `mmdit.bench.step.bench`.
        device, dtype: the device and dtype of the measurement; the result is 0 on devices other than GPUs.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return 0.0
    config = MODELS[model]
    shapes = shapes_of(model, size, text, batch)
    products = sum(product_floor(one, recipe, device, dtype) for one in shapes)
    image = (size // 8 // config.patch_size) ** 2
    joint = attention_floor((batch, text + image, config.heads, config.head_dim), device, dtype)
    alone = attention_floor((batch, image, config.heads, config.head_dim), device, dtype)
    attention = config.depth * joint + len(config.dual_attention_blocks) * alone
    per_value = 34 + 7 * (2 if recipe is None else 1)  # bytes
    moved = batch * (text + image) * config.hidden_size * config.depth * per_value
    return products + attention + 1000 * moved / copy_rate(device)


def product_floor(shape: Shape, recipe: str | None, device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds of all Linears of a shape by the device's own matmul, in 16 bits or on codes."""
    sizes = (shape.rows, shape.width), (shape.out, shape.width)
    x, weight = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
    result = torch.empty(shape.rows, shape.out, device=device, dtype=dtype)
    bias = result[0].clone()
    if recipe is None:
        return shape.count * timed(lambda: torch.addmm(bias, x, weight.t(), out=result), device)
    static = torch.tensor(0.01, device=device)
    how = RECIPES[recipe]
    float8 = Float8Tensor.quantize(weight, recipe=how, input_scale=static if how.activation == "static" else None)
    codes, scale = quantize_activation(x, how, float8.input_scale, as_bytes=False)

    def multiply() -> None:
        multiply_into(codes, scale, float8.qdata, float8.scale, bias, how, out=result)

    return shape.count * timed(multiply, device)


def attention_floor(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds of one attention of [b, tokens, heads, head_dim] by the quickest exact kernel that is installed."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    best = BestAttention()
    best(q, k, v)  # chooses
    return timed(lambda: best(q, k, v), device)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a kernel that does nothing else."""
    source = torch.randn(_COPIED // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return torch.neg(source, out=target)

    return 2 * _COPIED / timed(copy, device) * 1000
