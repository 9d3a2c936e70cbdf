"""How long a step takes and what it holds, beside what must be computed and moved: `mmdit bench`.

All rows run in one process on the same random weights and inputs: ours in 16 bits and float8, eager and with compiled
blocks, and, where asked for, diffusers and torchao. A step is the transformer on both halves of the guidance as one
batch. Weights are random, because time and memory do not depend on their values.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.configs import to_diffusers
from mmdit.model import MMDiT
from quant.convert import linears_of, quantize_
from quant.recipe import RECIPES

MODELS: dict[str, MMDiTConfig] = {
    "large": MMDiTConfig(38, 2432, 4096, 2048, 192),
    "medium": MMDiTConfig(24, 1536, 4096, 2048, 384, dual_attention_blocks=tuple(range(13))),
    "demo": MMDiTConfig(4, 256, 256, 192, 32, sample_size=16),
}
PEERS = ("diffusers", "torchao")


@dataclass(frozen=True)
class Work:
    """What one step must do at least."""

    linear_flops: float  # of Linears in the blocks, which float8 makes quicker
    other_flops: float  # attention, and Linears once per picture
    weight_bytes: float  # read once, 2 bytes each
    tokens: int

    @classmethod
    def of(cls, model: MMDiT, size: int, text: int, batch: int) -> Work:
        """Counted from the model: 2 operations per weight and token; 4 per pair of tokens and channel in attention."""
        config = model.config
        image = (size // 8 // config.patch_size) ** 2
        linear = other = 0.0
        for name, layer in linears_of(model):
            flops = 2.0 * layer.in_features * layer.out_features * _rows_of(name, image, text) * batch
            if "joint_blocks" in name and "adaLN" not in name:
                linear += flops
            else:
                other += flops
        other += 4.0 * batch * config.depth * config.hidden_size * (image + text) ** 2
        other += 4.0 * batch * len(config.dual_attention_blocks) * config.hidden_size * image**2
        size_of = sum(parameter.numel() for parameter in model.parameters())
        return cls(linear, other, 2.0 * size_of, image + text)


def _rows_of(layer: str, image: int, text: int) -> int:
    """Tokens of a sample that a Linear reads; 1 for what reads the conditioning vector."""
    if "adaLN" in layer:
        return 1
    if ".x_block." in layer or layer == "final_layer.linear":
        return image
    return text if ".context_block." in layer or layer == "context_embedder" else 1


@dataclass(frozen=True)
class Timed:
    """A row of the table."""

    name: str
    milliseconds: float  # median of a step
    spread: float  # from the first to the third quartile
    peak_gb: float  # of the device's memory, weights included
    weights_gb: float
    first_seconds: float  # the first step, with compiling
    teraflops: float  # of all operations of a step, a second


@dataclass(frozen=True)
class Inputs:
    """Of a step: both halves of the guidance in one batch."""

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


def bench(
    model: str = "large",
    *,
    size: int = 1024,
    text: int = 333,
    batch: int = 2,
    recipes: Sequence[str] = ("fp8", "fp8-tensor", "fp8-weight-only"),
    against: Sequence[str] = (),
    compiled: bool = True,
    repeats: int = 20,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = float("inf"),
) -> tuple[Work, list[Timed]]:
    """Measure all rows, one after the other; each frees its memory.

    Args:
        model: one of `MODELS`.
        size: of the picture in pixels.
        text: tokens, 333 with T5 at 256.
        batch: samples of a step; 2 are the halves of the guidance.
        recipes: names of `quant.RECIPES`, without static activations.
        against: of `PEERS`; "torchao" is diffusers with torchao's float8 of dynamic scales per row.
        compiled: whether to measure with compiled blocks too.
        repeats: steps of which the median is taken.
        device, dtype: of the models.
        seconds: no row is started after so many.

    Raises:
        ValueError: an unknown name.
        ImportError: a peer is not installed.
    """
    for names, known in ((recipes, RECIPES), (against, PEERS), ([model], MODELS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{unknown[0]!r} is unknown; known are {', '.join(known)}")
    device, config = torch.device(device), MODELS[model]
    inputs = Inputs.random(config, size, text, batch, device, dtype)
    with torch.device("meta"):
        work = Work.of(MMDiT(config), size, text, batch)
    found: list[Timed] = []
    start = time.monotonic()
    for name, build in _rows(config, recipes, against, compiled, device, dtype):
        if time.monotonic() - start > seconds:
            break
        found.append(_timed(name, build, inputs, work, repeats, device))
        print(f"{name}: {found[-1].milliseconds:.1f} ms", flush=True)  # noqa: T201
    return work, found


def table(work: Work, found: Sequence[Timed]) -> str:
    """The rows beside the counted work; ratios are to the first row."""
    flops = work.linear_flops + work.other_flops
    lines = [
        f"{flops / 1e12:.2f} TFLOP a step ({work.linear_flops / 1e12:.2f} in Linears of the blocks), "
        f"{work.weight_bytes / 1e9:.2f} GB of 16-bit weights, {work.tokens} tokens a sample",
        "",
        "| | ms a step | to the first | quartiles | TFLOP/s | peak GB | weights GB | first step s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        ratio = one.milliseconds / found[0].milliseconds
        lines.append(
            f"| {one.name} | {one.milliseconds:.2f} | {ratio:.3f} | {one.spread:.2f} | {one.teraflops:.0f} | "
            f"{one.peak_gb:.2f} | {one.weights_gb:.2f} | {one.first_seconds:.1f} |"
        )
    return "\n".join(lines)


def save(path: Path, work: Work, found: Sequence[Timed]) -> None:
    """All numbers as JSON."""
    path.write_text(json.dumps({"work": asdict(work), "rows": [asdict(one) for one in found]}, indent=1) + "\n")


Step = Callable[[Inputs], Any]
Build = Callable[[], tuple[nn.Module, Step]]


def _rows(
    config: MMDiTConfig, recipes: Sequence[str], against: Sequence[str], compiled: bool, device: Any, dtype: torch.dtype
) -> Iterator[tuple[str, Build]]:
    word = str(dtype).removeprefix("torch.")
    modes = (False, True) if compiled else (False,)
    for mode in modes:
        suffix = "compiled" if mode else "eager"
        ours, theirs = (partial(build, config, compiled=mode, device=device, dtype=dtype) for build in (_ours, _theirs))
        yield f"mmdit {word} {suffix}", partial(ours, recipe=None)
        for recipe in recipes:
            yield f"mmdit {recipe} {suffix}", partial(ours, recipe=recipe)
        if "diffusers" in against:
            yield f"diffusers {word} {suffix}", partial(theirs, float8=False)
        if "torchao" in against:
            yield f"diffusers + torchao float8 {suffix}", partial(theirs, float8=True)


def _ours(config: MMDiTConfig, *, recipe: str | None, compiled: bool, device: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model = MMDiT(config)
    fill(model.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    if recipe is not None:
        quantize_(model, recipe)
    if compiled:
        for block in model.joint_blocks:
            block.compile(fullgraph=True)
    return model, lambda inputs: model(inputs.latent, inputs.timestep, inputs.context, inputs.pooled)


def _theirs(config: MMDiTConfig, *, float8: bool, compiled: bool, device: Any, dtype: torch.dtype) -> Any:
    try:
        from diffusers import SD3Transformer2DModel
    except ImportError as error:
        raise ImportError('--against diffusers needs diffusers: pip install "mmdit-lab[test]"') from error
    with torch.device("meta"):
        settings = {key: value for key, value in to_diffusers("transformer", config).items() if not key.startswith("_")}
        model = SD3Transformer2DModel(**settings)
    fill(model.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    if compiled:
        model.fuse_qkv_projections()
    if float8:
        try:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
            from torchao.quantization import quantize_ as their_quantize
        except ImportError as error:
            raise ImportError("--against torchao needs torchao: pip install torchao") from error
        their_quantize(
            model,
            Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
            filter_fn=lambda layer, name: (
                isinstance(layer, nn.Linear) and "transformer_blocks" in name and "norm1" not in name
            ),
        )
    if compiled:
        for block in model.transformer_blocks:  # what compile_repeated_blocks does where a model names its blocks
            block.compile(fullgraph=True)

    def step(inputs: Inputs) -> Any:
        return model(inputs.latent, inputs.context, inputs.pooled, inputs.timestep, return_dict=False)[0]

    return model, step


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


@torch.inference_mode()
def _timed(name: str, build: Build, inputs: Inputs, work: Work, repeats: int, device: torch.device) -> Timed:
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    with torch.inference_mode(False):
        model, step = build()
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    step(inputs)
    _wait(device)
    first = time.perf_counter() - start
    step(inputs)
    times = [_once(step, inputs, device) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    median = statistics.median(times)
    flops = work.linear_flops + work.other_flops
    del model, step
    torch.compiler.reset()
    return Timed(name, median, quarters[2] - quarters[0], peak / 1e9, weights / 1e9, first, flops / median / 1e9)


def _once(step: Step, inputs: Inputs, device: torch.device) -> float:
    """Milliseconds of a step, by the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        step(inputs)
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step(inputs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
