"""Time and memory of a training step, beside diffusers and peft: `mmdit bench training`.

All rows run in one process on random weights and random, already encoded data, with gradient checkpointing, clipping
and AdamW. Ours are steps of `mmdit.training.loop`, which also draw the noise and check the loss; the peer's step is
that of diffusers' `train_dreambooth_lora_sd3.py` on a batch that lies on the device.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmdit.bench.random_models import MODELS, check_names, check_size, fill, theirs
from mmdit.bench.rows import FAILURES, said_of
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.training.adapters import attach
from mmdit.training.batches import Batch, InMemory, Sample
from mmdit.training.blocks import compile_blocks, recompute
from mmdit.training.config import TrainingConfig
from mmdit.training.loop import Training, training_step
from mmdit.training.setup import ahead_of, make_optimizer
from mmdit.utils import markdown_table
from quant.quantize import quantize_
from quant.recipe import RECIPES, Recipe, as_recipe
from samplers.training import noised

Step = Callable[[int], Any]
_TARGETS = (  # of diffusers' script
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measured steps."""

    model: str = "large"
    full: str = "medium"  # the model that is trained in full
    size: int | None = None  # pixels; None is the default of each model
    text: int = 333
    batch: int = 1
    rank: int = 16
    ahead: int = 32
    repeats: int = 5


@dataclass(frozen=True)
class Measured:
    """A row of the table; a row that failed or was left out says why in `note`."""

    name: str
    milliseconds: float = 0.0  # median of a step
    peak_gb: float = 0.0
    weights_gb: float = 0.0  # allocated before the first step
    first_seconds: float = 0.0  # the first step, with compiling
    loss: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Built:
    """A step, and milliseconds that it costs beside its own time: a visit of adaLN, shared by its steps."""

    step: Step
    extra: Callable[[], float] = lambda: 0.0


def bench(
    sizes: Sizes | None = None,
    *,
    only: Sequence[str] = ("*",),
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 85.0,
) -> Iterator[Measured]:
    """Measure the rows one after the other; each frees its memory. A row that fails is a row that says why.

    Args:
        sizes: models, picture, rank and repeats.
        only: globs over names of rows.
        device, dtype: of weights and arithmetic.
        seconds: rows that would start later are left out.
    """
    sizes, device, started = sizes or Sizes(), torch.device(device), time.monotonic()
    check_names((sizes.model, sizes.full), MODELS)
    for name, build in _rows(sizes, device, dtype).items():
        if not any(fnmatchcase(name, glob) for glob in only):
            continue
        if time.monotonic() - started > seconds:
            yield Measured(name, note=f"left out after {seconds:g} s")
            continue
        try:
            yield _measured(name, build, sizes.repeats, device)
        except FAILURES as error:
            yield Measured(name, note=said_of(error, 100))
        finally:
            _free(device)


def _rows(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Built]]:
    """The rows by name, those that matter most first."""
    lora = partial(_ours, sizes, device=device, dtype=dtype)
    e5m2 = replace(RECIPES["fp8"], gradient="e5m2")
    return {
        "lora: diffusers + peft": partial(_peer, sizes, device=device, dtype=dtype),
        "lora: fp8 base, compiled, ahead": partial(lora, quant="fp8", compiled=True, ahead=sizes.ahead),
        "lora: fp8 base": partial(lora, quant="fp8"),
        "lora: fp8 base, E5M2 gradients": partial(lora, quant=e5m2),
        "lora: bf16 base": lora,
        "lora: fp8 base, ahead": partial(lora, quant="fp8", ahead=sizes.ahead),
        "full: diffusers": partial(_peer, sizes, device=device, dtype=dtype, full=True),
        "full: ours, compiled, fused backward": partial(lora, full=True, compiled=True, fused=True),
        "full: ours, compiled": partial(lora, full=True, compiled=True),
        "full: ours": partial(lora, full=True),
        "full: ours, fused backward": partial(lora, full=True, fused=True),
        "lora: fp8 base, compiled": partial(lora, quant="fp8", compiled=True),
        "lora: fp8 base, E5M2 gradients, compiled, ahead": partial(lora, quant=e5m2, compiled=True, ahead=sizes.ahead),
        "lora: bf16 base, compiled": partial(lora, compiled=True),
    }


def _ours(
    sizes: Sizes,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quant: str | Recipe | None = None,
    compiled: bool = False,
    ahead: int = 0,
    full: bool = False,
    fused: bool = False,
) -> Built:
    recipe = None if quant is None else as_recipe(quant)
    model = _random(MODELS[sizes.full if full else sizes.model], recipe, device, dtype)
    config = TrainingConfig(
        method="full" if full else "lora",
        steps=10**6,
        batch_size=sizes.batch,
        rank=sizes.rank,
        caption_dropout=0.0,
        clip=None if full else 1.0,
        fused_backward=fused,
        ahead=ahead,
        shift=3.0,
        learning_rate=1e-4,
    )
    if full:
        parameters = dict(model.requires_grad_(True).named_parameters())
    else:
        adapters = attach(model, config)
        parameters = {f"{name}.{key}": one for name, part in adapters.items() for key, one in part.named_parameters()}
    recompute(model.joint_blocks, keep_attention=True)
    if compiled:
        compile_blocks(model.joint_blocks[:-1])  # the last one differs, and would double the time of compiling
    optimizer = make_optimizer(parameters.values(), config)
    samples = _samples(model.config, sizes, full)
    run = Training(config, model, parameters, samples, optimizer, 3.0, device, dtype)
    if not ahead:
        return Built(partial(training_step, run))
    table = ahead_of(run, model)

    def visit() -> float:
        table.table = []
        started = _now(device)
        table.enter(0)
        return 1000 * (_now(device) - started) / ahead

    return Built(partial(training_step, run), visit)


def _random(config: MMDiTConfig, recipe: Recipe | None, device: torch.device, dtype: torch.dtype) -> MMDiT:
    """Random weights, made and quantized block by block."""
    with torch.device("meta"):
        model = MMDiT(config).to(dtype).requires_grad_(False).eval()
    for block in model.joint_blocks:
        fill(block.to_empty(device=device))
        if recipe is not None:
            quantize_(block, recipe)
    for name, part in model.named_children():
        if name != "joint_blocks":
            fill(part.to_empty(device=device))
    model.pos_embed = torch.randn(model.pos_embed.shape, device=device).to(dtype) * 0.02
    return model


def _samples(config: MMDiTConfig, sizes: Sizes, full: bool) -> InMemory:
    cells = check_size(sizes.full if full else sizes.model, sizes.size) // 8
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    text = draw(sizes.text, config.context_dim), draw(config.pooled_dim)
    return InMemory([Sample(draw(config.in_channels, cells, cells), None, *text) for _ in range(4)], text)


def _peer(sizes: Sizes, *, device: torch.device, dtype: torch.dtype, full: bool = False) -> Built:
    """diffusers' transformer; LoRAs are float32 under autocast, as its script has them."""
    from peft import LoraConfig

    config = MODELS[sizes.full if full else sizes.model]
    model: Any
    model, _ = theirs(config, float8=False, compiled=False, device=device, dtype=dtype)
    model.enable_gradient_checkpointing()
    model.train()
    if full:
        model.requires_grad_(True)
    else:
        model.add_adapter(LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=list(_TARGETS)))
        for one in model.parameters():
            one.data = one.data.float() if one.requires_grad else one.data
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = _batch(_samples(config, sizes, full), sizes.batch, device, dtype)

    def step(number: int) -> Tensor:
        noisy = noised(batch.x0, batch.noise, batch.t)
        with torch.autocast(device.type, dtype, enabled=not full and dtype != torch.float32):
            predicted = model(noisy, batch.context, batch.pooled, 1000 * batch.t, return_dict=False)[0]
        loss = ((predicted.float() - (batch.noise - batch.x0).float()) ** 2).reshape(len(batch.t), -1).mean(1).mean()
        loss.backward()
        if not full:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Built(step)


def _batch(samples: InMemory, size: int, device: torch.device, dtype: torch.dtype) -> Batch:
    read = [samples.read(i % len(samples.samples)) for i in range(size)]
    parts = [[one.mean for one in read], [one.context for one in read], [one.pooled for one in read]]
    x0, context, pooled = (torch.stack(part).to(device, dtype) for part in parts)
    return Batch(x0, torch.randn_like(x0), torch.full((size,), 0.6, device=device), context, pooled)


def _measured(name: str, build: Callable[[], Built], repeats: int, device: torch.device) -> Measured:
    built = build()
    _free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    weights = _allocated(device)
    started = _now(device)
    built.step(0)
    first = _now(device) - started
    built.step(1)
    times, loss = [], torch.zeros(())
    for number in range(2, 2 + repeats):
        started = _now(device)
        result = built.step(number)
        times.append(_now(device) - started)
        loss = result if isinstance(result, Tensor) else result.loss
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    milliseconds = 1000 * statistics.median(times) + built.extra()
    return Measured(name, milliseconds, peak, weights, first, float(loss))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _allocated(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def _free(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(rows: Sequence[Measured]) -> str:
    """A Markdown table; ratios are to the row of diffusers of the same kind."""
    peers = {row.name.split(":")[0]: row for row in rows if "diffusers" in row.name and not row.note}
    lines = []
    for row in rows:
        if row.note:
            lines.append([row.name, "failed", "", "", "", "", "", row.note])
            continue
        peer = peers.get(row.name.split(":")[0])
        ratios = [f"{one / other:.2f}" if other else "" for one, other in _pairs(row, peer)]
        numbers = [f"{row.milliseconds:.1f}", ratios[0], f"{row.peak_gb:.2f}", ratios[1], f"{row.weights_gb:.2f}"]
        lines.append([row.name, *numbers, f"{row.first_seconds:.1f}", f"loss {row.loss:.3f}"])
    header = ["step", "ms", "x peer", "peak GB", "x peer", "weights GB", "first s", "note"]
    return "\n".join(markdown_table(header, lines))


def _pairs(row: Measured, peer: Measured | None) -> list[tuple[float, float]]:
    if peer is None:
        return [(0.0, 0.0), (0.0, 0.0)]
    return [(row.milliseconds, peer.milliseconds), (row.peak_gb, peer.peak_gb)]
