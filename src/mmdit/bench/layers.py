"""Every Linear shape of a block by itself: time in 16 bits and in float8, and native against emulated float8."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.bench.random_models import MODELS, check_names, check_size
from mmdit.models.mmdit import MMDiT
from mmdit.utils import markdown_table
from quant.matmul import backend_of, quantize_activation
from quant.quantize import linears_of, snr
from quant.recipe import RECIPES
from quant.tensor import Float8Tensor

DYNAMIC = tuple(name for name, recipe in RECIPES.items() if recipe.activation in ("token", "tensor"))


@dataclass(frozen=True)
class Shape:
    """A Linear of shape [out, width] that reads `rows` tokens; `count` of a step's Linears are alike."""

    name: str
    rows: int
    out: int
    width: int
    count: int


@dataclass(frozen=True)
class Measured:
    """One shape under one recipe; times in milliseconds."""

    shape: Shape
    recipe: str
    runs: str  # the backend
    plain: float  # 16-bit matmul
    float8: float  # rounding of the activations and matmul
    rounding: float  # the time of rounding the activations alone
    snr: float  # SNR of the backend's output against the emulated one's, dB
    snr_fast: float  # the same with fast accumulation


def shapes_of(model: str = "large", size: int | None = None, text: int = 333, batch: int = 2) -> list[Shape]:
    """The Linears of a step that float8 recipes quantize, each shape once; ValueError for an unknown model."""
    check_names((model,), MODELS)
    size = check_size(model, size)
    config = MODELS[model]
    with torch.device("meta"):
        blocks = MMDiT(config).joint_blocks
    image = (size // 8 // config.patch_size) ** 2

    def rows_of(name: str) -> int | None:
        return None if "adaLN" in name else batch * (image if ".x_block." in name else text)

    return counted(blocks, rows_of)


def counted(module: nn.Module, rows_of: Callable[[str], int | None]) -> list[Shape]:
    """The Linears of a module's numbered blocks, each shape once.

    Args:
        module: the blocks, or the module that holds them.
        rows_of: the rows that the Linear of this name reads; None leaves it out.
    """
    counts: dict[tuple[str, int, int, int], int] = {}
    for name, linear in linears_of(module):
        if (rows := rows_of(name)) is not None:
            parts = name.split(".")
            number = next(i for i, part in enumerate(parts) if part.isdigit())
            key = ".".join(parts[number + 1 :] or parts[:number]), rows, linear.out_features, linear.in_features
            counts[key] = counts.get(key, 0) + 1
    return [Shape(*key, count) for key, count in counts.items()]


def layers(
    shapes: Sequence[Shape],
    recipes: Sequence[str] = ("fp8", "fp8-tensor"),
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Measured]:
    """Measure on normal numbers, with weights of standard deviation 0.02 and one channel in a hundred ten times larger.

    Args:
        shapes: What `shapes_of` gives.
        recipes: Names of `quant.RECIPES` with dynamic input scales (`DYNAMIC`).
        device, dtype: The device and dtype of inputs and weights.

    Raises:
        ValueError: a recipe is unknown or not dynamic.
    """
    check_names(recipes, DYNAMIC)
    generator = torch.Generator(device).manual_seed(0)
    for shape in shapes:
        x, weight, bias = (
            torch.randn(size, generator=generator, device=device, dtype=dtype)
            for size in ((shape.rows, shape.width), (shape.out, shape.width), (shape.out,))
        )
        x[:, ::100] *= 10
        for name in recipes:
            yield _measured(shape, name, x, 0.02 * weight, bias)


def _measured(shape: Shape, name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Measured:
    recipe = RECIPES[name]
    exact, fast, emulated = (
        Float8Tensor.quantize(weight, recipe=replace(recipe, **settings))
        for settings in ({"fast_accum": False}, {"fast_accum": True}, {"backend": "emulated"})
    )
    truth = F.linear(x, emulated, bias)
    return Measured(
        shape,
        name,
        backend_of(recipe, x.device, x.dtype, (shape.out, shape.width))[0],
        timed(lambda: F.linear(x, weight, bias), x.device),
        timed(lambda: F.linear(x, exact, bias), x.device),
        timed(lambda: quantize_activation(x, recipe, None, as_bytes=False), x.device),
        snr(truth, F.linear(x, exact, bias)),
        snr(truth, F.linear(x, fast, bias)),
    )


def timed(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Milliseconds of a run: on a GPU its work alone, without the launches, by a replayed graph; else by the clock."""
    if device.type != "cuda":
        return median(_clocked(run) for _ in range(4))
    with torch.cuda.device(device):
        return _replayed(run, repeats)


def _replayed(run: Callable[[], object], repeats: int) -> float:
    run()  # outside of the graph: libraries set themselves up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # torch's own is on the GPU of its first recording
        for _ in range(repeats):
            run()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return median(times[1:])


def _clocked(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def table(found: Sequence[Measured]) -> str:
    """A row per shape and recipe; rates are of operations alone."""
    return "\n".join(markdown_table(_TITLES, map(_row, found)))


_TITLES = (
    *("layer", "tokens x out x in", "times", "recipe", "runs", "16 bit ms", "float8 ms", "of it rounding", "TFLOP/s"),
    *("to emulated, dB", "fast, dB"),
)


def _row(one: Measured) -> tuple[object, ...]:
    shape, multiply = one.shape, one.float8 - one.rounding
    rate = 2e-9 * shape.rows * shape.out * shape.width / multiply if multiply > 0 else float("nan")
    size = f"{shape.rows} x {shape.out} x {shape.width}"
    times = (f"{value:.3f}" for value in (one.plain, one.float8, one.rounding))
    said = (shape.name, size, shape.count, one.recipe, one.runs, *times, f"{rate:.3g}")
    return (*said, f"{one.snr:.1f}", f"{one.snr_fast:.1f}")
