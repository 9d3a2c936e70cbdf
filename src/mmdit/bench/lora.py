"""What an attached LoRA costs in a step, and how long merging one takes: `mmdit bench lora`.

Weights, inputs and LoRAs are random. A LoRA changes every Linear of the blocks. A step of the model's own forward takes
as long as the host launches or as the GPU computes, whichever is longer, so that both are measured as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit.bench.random_models import MODELS, TIMESTEP, Inputs, check_names, check_size, fill, quantized
from mmdit.bench.rows import Cells, attempted, step_time
from mmdit.checkpoints.lora import load_lora
from mmdit.models.lora import beside, without
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.patched_weights import Adapter, PatchedWeights
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.lora_products import PRODUCTS
from mmdit.runtime.profiler import kernels_of
from quant.quantize import linears_of
from quant.recipe import RECIPES

STEPS = ["step", "ms without", "ms with the LoRA", "more", "host", "kernels", "CUDA graph"]
TURNS = 4  # in each of which steps without and with the LoRA are timed
MERGES = ["merge", "file", "s to load", "s to merge", "s to restore", "restored"]


def steps(
    model: str = "large",
    *,
    recipes: Sequence[str] = ("fp8",),
    rank: int = 16,
    size: int | None = None,
    text: int = 333,
    batch: int = 2,
    repeats: int = 8,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = float("inf"),
) -> Iterator[Cells]:
    """Rows of `STEPS`: a step of the model's own forward and of the accelerated one, in 16 bits and by each recipe.

    "host" and "kernels" are milliseconds of the model's own forward on a GPU, without and with the LoRA: the time in
    which the host launches the blocks while nothing waits for the GPU, and the sum of all kernels.

    Args:
        model: one of `MODELS`.
        recipes: names of `quant.RECIPES`.
        rank: rank of the LoRA.
        size, text, batch: see `mmdit.bench.step.bench`.
        repeats: steps without the LoRA, and steps with it: a quarter of them, at least one, in each of four turns.
        device, dtype: the device and dtype of the model.
        seconds: time limit, after which no further row is started.

    Raises:
        ValueError: a name or a size is unknown.
    """
    check_names((model,), MODELS)
    check_names(recipes, RECIPES)
    device = torch.device(device)
    inputs = Inputs.random(MODELS[model], check_size(model, size), text, batch, device, dtype)
    tasks: dict[str, Callable[[], Cells]] = {}
    for recipe in (None, *recipes):
        name = recipe or str(dtype).removeprefix("torch.")
        make = partial(model_of, model, recipe, device, dtype)
        tasks[f"{name} fast"] = partial(_fast, make, rank, inputs, repeats, device)
        tasks[f"{name} eager"] = partial(_eager, make, rank, inputs, repeats, device)
    return attempted(tasks, len(STEPS), seconds)


def merges(
    model: str = "large",
    *,
    recipes: Sequence[str] = ("fp8",),
    rank: int = 32,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = float("inf"),
) -> Iterator[Cells]:
    """Rows of `MERGES`: load a file and merge it into the weights as a pipeline does, and restore the weights.

    Args:
        model, recipes, rank, device, dtype, seconds: see `steps`.

    Raises:
        ValueError: a name is unknown.
    """
    check_names((model,), MODELS)
    check_names(recipes, RECIPES)
    tasks: dict[str, Callable[[], Cells]] = {
        f"rank {rank} into {recipe or str(dtype).removeprefix('torch.')}": partial(
            _merge, partial(model_of, model, recipe, torch.device(device), dtype), rank, torch.device(device)
        )
        for recipe in (*recipes, None)
    }
    return attempted(tasks, len(MERGES), seconds)


def model_of(name: str, recipe: str | None, device: torch.device, dtype: torch.dtype) -> MMDiT:
    """A model of `MODELS` with random weights, quantized by the recipe of a name, or not by None."""
    with torch.device("meta"):
        model = MMDiT(MODELS[name])
    fill(model.to_empty(device=device).to(dtype).requires_grad_(False).eval())
    if recipe is not None:
        quantized(model, recipe)
    return model


def _targets(model: MMDiT) -> list[tuple[str, nn.Linear]]:
    return [(name, linear) for name, linear in linears_of(model) if name.startswith("joint_blocks.")]


def attach(model: MMDiT, rank: int) -> None:
    """Attach random factors to every Linear of the blocks."""
    table = model.pos_embed
    for name, linear in _targets(model):
        down, up = table.new_empty(rank, linear.in_features), table.new_empty(linear.out_features, rank)
        beside(model, name, factors=(down.normal_(std=0.02), up.normal_(std=0.02)), products=PRODUCTS)


def detach(model: MMDiT) -> None:
    """Take away what `attach` has attached."""
    for name, _ in _targets(model):
        without(model, name)


def in_turns(*sides: Callable[[], Sequence[float]], turns: int = TURNS) -> list[list[float]]:
    """The median of each number that a side measures; all sides measure once in each of `turns` turns.

    The clocks of GPUs and the speed of hosts drift within seconds by more than a LoRA costs. In turns, both sides meet
    the same drift.
    """
    found: list[list[Sequence[float]]] = [[] for _ in sides]
    for _ in range(turns):
        for side, measured in zip(sides, found, strict=True):
            measured.append(side())
    return [[median(numbers) for numbers in zip(*measured, strict=True)] for measured in found]


@torch.no_grad()
def _eager(make: Callable[[], MMDiT], rank: int, inputs: Inputs, repeats: int, device: torch.device) -> Cells:
    model, each = make(), max(1, repeats // TURNS)

    def step() -> Tensor:
        found: Tensor = model(inputs.latent, inputs.timestep, inputs.context, inputs.pooled)
        return found

    def timed(prepare: Callable[[], None]) -> tuple[float, ...]:
        prepare()
        return step_time(step, device, each), host_time(model, step, each)

    plain, with_lora = partial(detach, model), partial(attach, model, rank)
    (before, host), (after, more_host) = in_turns(partial(timed, plain), partial(timed, with_lora))
    kernels = []
    for prepare in (plain, with_lora):  # after all times are taken, because a profiler may slow later launches
        prepare()
        kernels.append(kernel_time(step, device))
    pairs = ((host, more_host), kernels)
    return _cells(before, after, *(f"{one:.1f}, {other:.1f}" if one else "-" for one, other in pairs), "no graph")


def host_time(model: MMDiT, step: Callable[[], object], repeats: int) -> float:
    """Median milliseconds in which the host launches the blocks of a step; 0 on a CPU, which does the work too.

    Before each block the host waits for the GPU, outside of this time, so that it never waits for a full queue in it.
    """
    device = model.pos_embed.device
    if device.type != "cuda":
        return 0.0
    times: list[float] = []

    def begin(*_: object) -> None:
        torch.cuda.synchronize(device)
        times[-1] -= time.perf_counter()

    def end(*_: object) -> None:
        times[-1] += time.perf_counter()

    with ExitStack() as stack:
        for block in model.joint_blocks:
            for handle in (block.register_forward_pre_hook(begin), block.register_forward_hook(end)):
                stack.callback(handle.remove)
        for _ in range(repeats):
            times.append(0.0)
            step()
    return 1000 * median(times)


def kernel_time(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of all kernels of a step, by the profiler; 0 on a CPU."""
    return sum(took for _, _, took in kernels_of(step, device)) if device.type == "cuda" else 0.0


@torch.no_grad()
def _fast(make: Callable[[], MMDiT], rank: int, inputs: Inputs, repeats: int, device: torch.device) -> Cells:
    model = make()
    fast = Accelerated(model)

    def velocity(of: Accelerated) -> Tensor:
        return of.velocity(inputs.latent, TIMESTEP, [inputs.context], [inputs.pooled])

    def measured(prepare: Callable[[], None]) -> list[float]:
        prepare()
        fast.begin([TIMESTEP])
        return [step_time(lambda: velocity(fast), device, max(1, repeats // TURNS))]

    plain, with_lora = partial(detach, model), partial(attach, model, rank)
    measured(plain)
    without_lora = velocity(fast)
    (before,), (after,) = in_turns(partial(measured, plain), partial(measured, with_lora))
    found = velocity(fast)
    if torch.equal(found, without_lora):
        raise AssertionError("the LoRA changes nothing: the graph of the model without it was replayed")
    said = "no graph"
    if fast.graph:
        said = "bit-equal" if torch.equal(found, velocity(fast.without_graphs())) else "DIFFERS"
    fast.close()
    return _cells(before, after, "-", "-", said)


def _cells(before: float, after: float, *others: str) -> Cells:
    return [f"{before:.2f}", f"{after:.2f}", f"{after / before - 1:+.1%}", *others]


@torch.no_grad()
def _merge(make: Callable[[], MMDiT], rank: int, device: torch.device) -> Cells:
    model, patched = make(), PatchedWeights()
    linear = model.joint_blocks[0].get_submodule("x_block.mlp.fc1")
    assert isinstance(linear, nn.Linear), "every block has this Linear"
    weight = linear.weight
    with TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_file(_tensors(model, rank), file)
        megabytes = file.stat().st_size / 1e6
        start = time.perf_counter()
        lora = load_lora(file)
        loaded = time.perf_counter()
        patched.apply({"transformer": model}, [Adapter(lora, "merged")])
        _wait(device)
        merged = time.perf_counter()
    if linear.weight is weight:
        raise AssertionError("the weights are not changed")
    patched.restore({"transformer": model})
    _wait(device)
    restored = time.perf_counter()
    same = torch.equal(linear.weight, weight)
    times = (f"{one:.2f}" for one in (loaded - start, merged - loaded, restored - merged))
    return [f"{megabytes:.0f} MB", *times, "bit for bit" if same else "DIFFERS"]


def _tensors(model: MMDiT, rank: int) -> dict[str, Tensor]:
    """A LoRA of every Linear of the blocks but the modulations, as files mostly have them, in bfloat16."""
    tensors = {}
    for name, linear in _targets(model):
        if "adaLN" not in name:
            key = f"diffusion_model.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.02 * torch.randn(rank, linear.in_features)
            tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(linear.out_features, rank)
    return {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
