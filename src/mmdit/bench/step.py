"""Time and memory of a step, beside the operations and bytes that it needs at least: `mmdit bench`.

All rows run in one process on the same random weights and inputs: ours in 16 bits and float8, eager and with compiled
blocks, and, where asked for, diffusers and torchao. A step is the transformer on both branches of the guidance as one
batch. Weights are random, because time and memory do not depend on their values.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmdit.bench.floor import floor_of
from mmdit.bench.random_models import (
    MODELS,
    Built,
    Inputs,
    Step,
    check_names,
    check_peers,
    check_size,
    ours,
    recipe_of,
    theirs,
)
from mmdit.bench.rows import FAILURES, said_of
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.profiler import kernels_of
from mmdit.utils import markdown_table, weight_bytes, write_text
from quant.quantize import linears_of
from quant.recipe import RECIPES

Build = Callable[[], Built]
PEERS = ("diffusers", "torchao", "torchao-tuned")
# Words in names of kernels, of cuBLAS, CUTLASS, cuDNN and others.
_KINDS = {"attention": ("flash", "fmha", "sdpa", "attention"), "matmul": ("gemm", "nvjet", "cutlass", "xmma", "_mm")}


@dataclass(frozen=True)
class Work:
    """The least work of one step."""

    linear_flops: float  # operations of the blocks' Linears, which float8 makes quicker
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
    peak_gb: float  # peak of the device's memory, weights included
    weights_gb: float
    first_seconds: float  # the first step, with compiling
    teraflops: float  # operations per second
    parts: dict[str, float]  # milliseconds of the device in a step: "attention", "matmul", "rest"; empty on a CPU
    kernels: list[tuple[str, int, float]]  # those that take longest: name, how often, milliseconds
    host: float = 0.0  # milliseconds until the host has launched a step, median; 0 on a CPU, which does the work too
    floor: float = 0.0  # milliseconds, see `mmdit.bench.floor`; 0 where it was not measured
    failed: str = ""  # the error of a row that could not be measured, whose numbers are then 0


def bench(
    model: str = "large",
    *,
    size: int | None = None,
    text: int = 333,
    batch: int = 2,
    recipes: Sequence[str] = ("fp8", "fp8-static"),
    against: Sequence[str] = (),
    compiled: bool = True,
    fast: bool = False,
    only: Sequence[str] = ("*",),
    repeats: int = 20,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = float("inf"),
) -> Iterator[Timed]:
    """Measure all rows, one after the other; each frees its memory.

    Args:
        model: one of `MODELS`.
        size: Side of the picture in pixels; None is the model's default.
        text: number of text tokens, 333 with T5 at 256.
        batch: samples of a step; 2 are the branches of the guidance.
        recipes: names of `quant.RECIPES`; with "+exact" behind them, float8 sums are exact (`Recipe.fast_accum` off),
            with ":emulated" they run as on a GPU without float8 units.
        against: of `PEERS`; "torchao" is diffusers with torchao's float8 of dynamic scales per row, "torchao-tuned" the
            same with the compiler settings that torchao asks for (minutes of compiling more).
        compiled: whether to measure with compiled blocks too.
        fast: whether to measure `mmdit.Pipeline.accelerate`'s forward too, and the floor of each row.
        only: globs over names of rows; others are left out.
        repeats: steps of which the median is taken.
        device, dtype: The device and dtype of the models.
        seconds: time limit in seconds, after which no further row is started.

    Raises:
        ValueError: an unknown name, a glob that matches no row, a peer that has none.
        ImportError: a peer is not installed.
    """
    check_names((model,), MODELS)
    for name in recipes:
        recipe_of(name)
    check_names(against, PEERS)
    size = check_size(model, size)
    if "torchao-tuned" in against and not compiled:
        raise ValueError("torchao-tuned has compiled blocks only: leave it out, or measure compiled blocks too")
    check_peers(against, PEERS)
    device, config = torch.device(device), MODELS[model]
    inputs = Inputs.random(config, size, text, batch, device, dtype)
    work = work_of(model, size=size, text=text, batch=batch)
    start = time.monotonic()
    sizes: dict[str, Any] = {"size": size, "text": text, "batch": batch, "device": device, "dtype": dtype}
    floors: dict[str | None, float] = {}
    for name, build in _chosen(dict(_rows(config, recipes, against, compiled, fast, device, dtype)), only):
        if time.monotonic() - start < seconds:
            recipe = _multiplies_in(name)
            if fast and recipe not in floors:
                floors[recipe] = floor_of(model, recipe, **sizes)
            with own_compiler_settings():
                row = _timed_or_failed(name, build, inputs, work, repeats, device)
                yield replace(row, floor=floors.get(recipe, 0.0))


def work_of(model: str = "large", *, size: int | None = None, text: int = 333, batch: int = 2) -> Work:
    """The least work of a step of `bench`."""
    with torch.device("meta"):
        return Work.of(MMDiT(MODELS[model]), check_size(model, size), text, batch)


_TITLES = (
    *("", "ms a step", "to the first", "floor", "host ms", "quartiles", "TFLOP/s", "attention, matmul, rest"),
    *("peak GB", "weights", "first s"),
)


def table(work: Work, found: Sequence[Timed]) -> str:
    """The rows beside the counted work; ratios are to the first row that was measured."""
    flops = work.linear_flops + work.other_flops
    head = (
        f"{flops / 1e12:.2f} TFLOP a step ({work.linear_flops / 1e12:.2f} in Linears of the blocks), "
        f"{work.weight_bytes / 1e9:.2f} GB of 16-bit weights, {work.tokens} tokens a sample"
    )
    first = next((one.milliseconds for one in found if one.milliseconds), 1.0)
    rows = [
        (
            one.name,
            f"failed: {one.failed}" if one.failed else f"{one.milliseconds:.2f}",
            f"{one.milliseconds / first:.3f}",
            f"{one.floor:.1f}" if one.floor else "-",
            f"{one.host:.1f}" if one.host else "-",
            f"{one.spread:.2f}",
            f"{one.teraflops:.3g}",
            ", ".join(f"{value:.1f}" for value in one.parts.values()) or "-",
            f"{one.peak_gb:.2f}" if one.peak_gb else "-",  # a CPU does not count
            f"{one.weights_gb:.2f}",
            f"{one.first_seconds:.1f}",
        )
        for one in found
    ]
    return "\n".join([head, "", *markdown_table(_TITLES, rows)])


def save(path: Path, work: Work, found: Sequence[Timed]) -> None:
    """All numbers as JSON."""
    write_text(path, json.dumps({"work": asdict(work), "rows": [asdict(one) for one in found]}, indent=1) + "\n")


def _rows(
    config: MMDiTConfig,
    recipes: Sequence[str],
    against: Sequence[str],
    compiled: bool,
    fast: bool,
    device: object,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Build]]:
    word = str(dtype).removeprefix("torch.")
    if fast:
        mine = partial(ours, config, compiled=False, fast=True, device=device, dtype=dtype)
        for recipe in (None, *recipes):
            yield f"mmdit {recipe or word} fast", partial(mine, recipe=recipe)
    modes = (False, True) if compiled else (False,)
    for mode in modes:
        suffix = "compiled" if mode else "eager"
        mine, others = (partial(build, config, compiled=mode, device=device, dtype=dtype) for build in (ours, theirs))
        yield f"mmdit {word} {suffix}", partial(mine, recipe=None)
        for recipe in recipes:
            yield f"mmdit {recipe} {suffix}", partial(mine, recipe=recipe)
        if "diffusers" in against:
            yield f"diffusers {word} {suffix}", partial(others, float8=False)
        if "torchao" in against:
            yield f"diffusers + torchao float8 {suffix}", partial(others, float8=True)
        if "torchao-tuned" in against and mode:
            yield f"diffusers + torchao float8 {suffix}, tuned", partial(others, float8=True, tuned=True)


def _multiplies_in(row: str) -> str | None:
    """The recipe whose products a row has; None for 16 bits, and for recipes that multiply in 16 bits."""
    name = "fp8" if "torchao" in row else row.split()[1].removesuffix("+exact")
    return name if name in RECIPES and RECIPES[name].activation in ("token", "static") else None


def _chosen(rows: dict[str, Build], only: Sequence[str]) -> list[tuple[str, Build]]:
    for glob in only:
        if not any(fnmatchcase(name, glob) for name in rows):
            raise ValueError(f"{glob!r} matches no row; there are {', '.join(rows)}")
    return [(name, build) for name, build in rows.items() if any(fnmatchcase(name, glob) for glob in only)]


@contextmanager
def own_compiler_settings() -> Iterator[None]:
    """Restore the compiler's settings after a row, because torchao may change them."""
    import torch._inductor.config as settings

    before = settings.save_config()
    try:
        yield
    finally:
        settings.load_config(before)


def _timed_or_failed(name: str, build: Build, inputs: Inputs, work: Work, repeats: int, device: torch.device) -> Timed:
    """A row; errors of what is measured are part of the table, so that the other rows are measured too."""
    try:
        return timed(name, build, inputs, work, repeats, device)
    except FAILURES as error:
        return Timed(name, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, {}, [], failed=said_of(error, 160))


@torch.no_grad()
def timed(name: str, build: Build, inputs: Inputs, work: Work, repeats: int, device: torch.device) -> Timed:
    """The row of a model: build it, take `repeats` steps after two that do not count, and forget what was compiled."""
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    model, step = build()
    weights = weight_bytes(model)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    step(inputs)
    if cuda:
        torch.cuda.synchronize(device)
    first = time.perf_counter() - start
    step(inputs)
    both = [_once(step, inputs, device) for _ in range(repeats)]
    times = [time for time, _ in both]
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    median = statistics.median(times)
    flops = work.linear_flops + work.other_flops
    kernels = kernels_of(lambda: step(inputs), device) if cuda else []
    del model, step
    torch.compiler.reset()
    rate = flops / median / 1e9
    spread = quarters[2] - quarters[0]
    sizes, host = (peak / 1e9, weights / 1e9), statistics.median(host for _, host in both)
    return Timed(name, median, spread, *sizes, first, rate, parts_of(kernels), kernels[:15], host)


def parts_of(kernels: Sequence[tuple[str, int, float]]) -> dict[str, float]:
    """Milliseconds by what kernels do, as far as their names say."""
    parts = dict.fromkeys((*_KINDS, "rest"), 0.0) if kernels else {}
    for name, _, milliseconds in kernels:
        kinds = [kind for kind, words in _KINDS.items() if any(word in name.lower() for word in words)]
        kind = kinds[0] if kinds and not name.startswith("triton") else "rest"  # the compiler names what it fused
        parts[kind] += milliseconds
    return parts


def _once(step: Step, inputs: Inputs, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step, by the device's own clock where it has one, and of the host until it is launched."""
    start = time.perf_counter()
    if device.type != "cuda":
        step(inputs)
        return 1000 * (time.perf_counter() - start), 0.0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(torch.cuda.current_stream(device))
    step(inputs)
    end.record(torch.cuda.current_stream(device))
    host = 1000 * (time.perf_counter() - start)
    end.synchronize()
    return begin.elapsed_time(end), host
