"""The models that benches run: sizes, random weights and inputs, ours and others'."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.checkpoints.config_json import to_diffusers
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from quant.quantize import linears_of, quantize_
from quant.recipe import RECIPES

MODELS: dict[str, MMDiTConfig] = {
    "large": MMDiTConfig(38, 2432, 4096, 2048, 192),
    "medium": MMDiTConfig(24, 1536, 4096, 2048, 384, dual_attention_blocks=tuple(range(13))),
    "demo": MMDiTConfig(4, 256, 256, 192, 32, sample_size=16),
}


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for the first that is not known."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]!r} is unknown; known are {', '.join(known)}")


@dataclass(frozen=True)
class Inputs:
    """Of a step: both branches of the guidance in one batch."""

    latent: Tensor
    timestep: Tensor
    context: Tensor
    pooled: Tensor

    @classmethod
    def random(cls, config: MMDiTConfig, size: int, text: int, batch: int, device: Any, dtype: torch.dtype) -> Inputs:
        """Normal numbers of the sizes of a picture of `size` pixels and `text` tokens."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        cells = size // 8
        return cls(
            draw(batch, config.in_channels, cells, cells),
            torch.full((batch,), 500.0, device=device),
            draw(batch, text, config.context_dim),
            draw(batch, config.pooled_dim),
        )


Step = Callable[[Inputs], Any]
Built = tuple[nn.Module, Step]


def ours(config: MMDiTConfig, *, recipe: str | None, compiled: bool, device: Any, dtype: torch.dtype) -> Built:
    """Ours, with the blocks compiled or not."""
    with torch.device("meta"):
        model = MMDiT(config)
    fill(model.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    if recipe is not None:
        quantized(model, recipe)
    if compiled:
        for block in model.joint_blocks:
            block.compile(fullgraph=True)
    return model, lambda inputs: model(inputs.latent, inputs.timestep, inputs.context, inputs.pooled)


def theirs(
    config: MMDiTConfig, *, float8: bool, compiled: bool, device: Any, dtype: torch.dtype, tuned: bool = False
) -> Built:
    """diffusers', in float8 by torchao or not; `tuned` leaves the compiler's settings to torchao.

    Raises:
        ImportError: diffusers or torchao is not installed.
    """
    try:
        from diffusers import SD3Transformer2DModel
    except ImportError as error:
        raise ImportError('--against diffusers needs diffusers: pip install "mmdit-lab[test]"') from error
    with torch.device("meta"):
        settings = {key: value for key, value in to_diffusers("transformer", config).items() if not key.startswith("_")}
        model = SD3Transformer2DModel(**settings)
    fill(model.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    if compiled:
        _fuse_qkv(model)
    if float8:
        _quantize_by_torchao(model, tuned)
    if compiled:
        for block in model.transformer_blocks:  # what compile_repeated_blocks does where a model names its blocks
            block.compile(fullgraph=True)

    def step(inputs: Inputs) -> Any:
        return model(inputs.latent, inputs.context, inputs.pooled, inputs.timestep, return_dict=False)[0]

    return model, step


def _fuse_qkv(model: Any) -> None:
    model.fuse_qkv_projections()
    for block in model.transformer_blocks:  # what it leaves behind would count as memory
        for attention in filter(None, (block.attn, getattr(block, "attn2", None))):
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                if hasattr(attention, name):
                    delattr(attention, name)


def _quantize_by_torchao(model: nn.Module, tuned: bool) -> None:
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
        from torchao.quantization import quantize_ as their_quantize
    except ImportError as error:
        raise ImportError("--against torchao needs torchao: pip install torchao") from error
    their_quantize(
        model,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=tuned),
        filter_fn=lambda layer, name: (
            isinstance(layer, nn.Linear) and "transformer_blocks" in name and "norm1" not in name
        ),
    )


def quantized(model: nn.Module, name: str) -> None:
    """Quantize in place by a name of `bench`; scales of static activations are made up: time is the same."""
    recipe = RECIPES[name.removesuffix("+exact")]
    recipe = replace(recipe, fast_accum=recipe.fast_accum and not name.endswith("+exact"))
    scale = torch.tensor(6 / 448)
    scales = {linear: scale for linear, _ in linears_of(model)} if recipe.activation == "static" else None
    quantize_(model, recipe, input_scales=scales)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Weights as a trained model's are spread, without a pass over the CPU."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if tensor.ndim < 2:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            tensor.normal_(std=0.02)


def bytes_of(model: nn.Module) -> int:
    """Of all weights as they are stored; a quantized one may say of itself what it stands for."""
    return sum(_stored(tensor) for tensor in model.state_dict().values())


def _stored(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
