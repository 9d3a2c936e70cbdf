"""The models that benches run: sizes, random weights and inputs; ours, diffusers' and torchao's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.checkpoints.components import to_diffusers
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.accelerate import Accelerated
from quant.quantize import linears_of, quantize_
from quant.recipe import RECIPES, Recipe

TIMESTEP = 500.0  # of the step that is measured
MODELS: dict[str, MMDiTConfig] = {
    "large": MMDiTConfig(38, 2432, 4096, 2048, 192),
    "medium": MMDiTConfig(24, 1536, 4096, 2048, 384, dual_attention_blocks=tuple(range(13))),
    "demo": MMDiTConfig(4, 256, 256, 192, 32, sample_size=16),
}


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for the first name that is not known."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]!r} is unknown; known are {', '.join(known)}")


def check_peers(peers: Iterable[str], known: Collection[str]) -> None:
    """Raise, before anything is measured, ValueError for an unknown peer and ImportError for one that is missing."""
    peers = list(peers)
    check_names(peers, known)
    for peer in peers:
        for package in ("diffusers", "torchao") if peer.startswith("torchao") else ("diffusers",):
            if find_spec(package) is None:
                extra = '"mmdit-lab[test]"' if package == "diffusers" else "torchao"
                raise ImportError(f"--against {peer} needs {package}: pip install {extra}")


def default_size(model: str) -> int:
    """The side of the picture that a bench draws by default, in pixels: 1024, or what a smaller model draws."""
    return min(1024, 8 * (MODELS[model].sample_size or 128))


def check_size(model: str, size: int | None) -> int:
    """The side of a picture in pixels, by default that of the model; ValueError where the model cannot draw it."""
    config = MODELS[model]
    if size is None:
        return default_size(model)
    unit = 8 * config.patch_size
    if size < unit or size % unit or size > config.max_pixels:
        raise ValueError(
            f"--size {size}: the model {model} draws pictures of a multiple of {unit} pixels, at most "
            f"{config.max_pixels}; its default is {default_size(model)}"
        )
    return size


@dataclass(frozen=True)
class Inputs:
    """The inputs of a step: both branches of the guidance in one batch."""

    latent: Tensor
    timestep: Tensor
    context: Tensor
    pooled: Tensor

    @classmethod
    def random(cls, config: MMDiTConfig, size: int, text: int, batch: int, device: Any, dtype: torch.dtype) -> Inputs:
        """Normally distributed inputs for a picture of `size` pixels a side and `text` tokens."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        cells = size // 8
        return cls(
            draw(batch, config.in_channels, cells, cells),
            torch.full((batch,), TIMESTEP, device=device),
            draw(batch, text, config.context_dim),
            draw(batch, config.pooled_dim),
        )


Step = Callable[[Inputs], Any]
Built = tuple[nn.Module, Step]


def ours(
    config: MMDiTConfig, *, recipe: str | None, compiled: bool, device: Any, dtype: torch.dtype, fast: bool = False
) -> Built:
    """Our transformer with random weights; `compiled` compiles its blocks, `fast` runs its second forward."""
    with torch.device("meta"):
        model = MMDiT(config)
    fill(model.to(dtype).to_empty(device=device).requires_grad_(False).eval())
    if recipe is not None:
        quantized(model, recipe)
    if compiled:
        for block in model.joint_blocks:
            block.compile(fullgraph=True)
    if fast:
        accelerated = Accelerated(model)
        accelerated.begin([TIMESTEP])
        return model, lambda inputs: accelerated.velocity(inputs.latent, TIMESTEP, [inputs.context], [inputs.pooled])
    return model, lambda inputs: model(inputs.latent, inputs.timestep, inputs.context, inputs.pooled)


def theirs(
    config: MMDiTConfig, *, float8: bool, compiled: bool, device: object, dtype: torch.dtype, tuned: bool = False
) -> Built:
    """diffusers' transformer with random weights.

    Args:
        config: The sizes of the model.
        float8: Quantize it by torchao, with dynamic scales per row.
        compiled: Compile the blocks, and fuse the qkv projections where diffusers can: not in SD3.5-Medium.
        device, dtype: The device and dtype of the weights.
        tuned: Let torchao set the compiler's options.

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
    if compiled and not config.dual_attention_blocks:  # diffusers' fused processor has no second attention
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


def recipe_of(name: str) -> Recipe:
    """A recipe by a bench's name of it: NAME, NAME+exact (no fast accumulation) or NAME:emulated (no float8 units).

    Raises:
        ValueError: the name is none of these.
    """
    known, exact, emulated = name.removesuffix("+exact").removesuffix(":emulated"), "+exact" in name, ":" in name
    check_names([known], RECIPES)
    recipe = RECIPES[known]
    recipe = replace(recipe, fast_accum=recipe.fast_accum and not exact)
    return replace(recipe, backend="emulated") if emulated else recipe


def quantized(model: nn.Module, name: str) -> None:
    """Quantize in place by a name of `recipe_of`; static input scales are arbitrary numbers."""
    recipe = recipe_of(name)
    scale = torch.tensor(6 / 448)
    scales = {linear: scale for linear, _ in linears_of(model)} if recipe.activation == "static" else None
    quantize_(model, recipe, input_scales=scales)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Fill with random weights on the model's device: matrices of standard deviation 0.02, norms 1, biases 0."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if tensor.ndim < 2:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            tensor.normal_(std=0.02)
