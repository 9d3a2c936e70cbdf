"""Pictures within memory budgets, at full size on random weights: time, measured memory, and what was streamed."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders import VAE, CLIPText, T5Encoder, Tokenizers
from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.bench.random_models import MODELS, check_names, check_size, fill, quantized
from mmdit.bench.rows import FAILURES, said_of
from mmdit.checkpoints.load_pipeline import Components
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.plan import parse_bytes
from mmdit.utils import markdown_table
from quant.recipe import RECIPES

PROMPTS = ("two green triangles", "a large red circle above a blue star, on a white background")
BUDGETS = ("8GB", "6GB", "4GB", "12GB", "16GB", "24GB")  # in the order of what they tell
STAGES = "stages"  # in place of a budget: offload="stages"


@dataclass
class Row:
    """One budget: seconds of a picture, and gigabytes (1e9 bytes) of the device's memory."""

    model: str
    recipe: str  # or the dtype
    budget: str
    seconds: float = 0.0
    peak_gb: float = 0.0  # of torch's allocator
    outside_gb: float = 0.0  # context and libraries
    host_gb: float = 0.0  # anonymous memory of the process, which holds the weights
    planned_gb: float = 0.0
    streamed: str = ""
    equal: str = ""  # whether the latent is that of the resident model, bit for bit
    failed: str = ""


def budgets(
    models: Sequence[str] = ("large", "medium"),
    recipes: Sequence[str] = ("fp8", "16"),
    sizes: Sequence[str] = BUDGETS,
    *,
    steps: int = 20,
    size: int | None = None,
    fast: bool = False,
    seconds: float = 240.0,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    """Draw with everything resident, then within each budget; text encoders run in every picture.

    Weights are made on the device and wait in host memory. The first drawing of a row has two steps; the second one, of
    another prompt, counts.

    Args:
        models: of `mmdit.bench.random_models.MODELS`.
        recipes: names of `quant.RECIPES`, for transformer and T5; "16" is the dtype.
        sizes: budgets, or "stages" for `offload="stages"`.
        steps: sampler steps of the picture that counts.
        size: side of the picture in pixels; None is the model's default.
        fast: whether to draw with the fast forward.
        seconds: time limit, after which no further row is started.
        device, dtype: of all models.

    Raises:
        ValueError: an unknown name, or no size.
    """
    check_names(models, MODELS)
    check_names([name for name in recipes if name != "16"], RECIPES)
    for one in sizes:
        if one != STAGES:
            parse_bytes(one)
    device, start = torch.device(device), time.monotonic()
    for recipe in recipes:
        encoders: dict[str, torch.nn.Module] = {}
        for model in models:
            if time.monotonic() - start > seconds:
                return
            encoders = encoders or _encoders(model, recipe, device, dtype)
            pipe = _pipeline(model, recipe, encoders, device, dtype)
            resident: Tensor | None = None
            for budget in ("resident", *sizes):
                if time.monotonic() - start > seconds:
                    return
                row, latent = _row(pipe, model, recipe, budget, steps, check_size(model, size), fast)
                if resident is None:
                    resident = latent
                elif latent is not None:
                    row.equal = "yes" if torch.equal(latent, resident) else "no"
                yield row
            del pipe
            _emptied(device)


def table(found: Sequence[Row]) -> str:
    """The rows as Markdown; ratios are to the resident model of the same kind."""
    base = {(one.model, one.recipe): one.seconds for one in found if one.budget == "resident"}
    rows = []
    for one in found:
        ratio = one.seconds / base.get((one.model, one.recipe), 0.0) if base.get((one.model, one.recipe)) else 0.0
        peak = one.peak_gb + one.outside_gb
        numbers: tuple[str, ...] = (f"{one.planned_gb:.2f}", f"{peak:.2f}", f"{one.seconds:.2f}", f"{ratio:.3f}")
        numbers += (f"{one.host_gb:.1f}",)
        if one.failed:
            numbers = ("failed", "-", "-", "-", "-")
        rows.append((one.model, one.recipe, one.budget, *numbers, one.failed or one.streamed, one.equal or "-"))
    return "\n".join(markdown_table(_TITLES, rows))


_TITLES = (
    "model",
    "weights",
    "budget",
    "planned GB",
    "peak GB",
    "seconds",
    "to resident",
    "host GB",
    "streamed",
    "bit-equal",
)


@torch.no_grad()
def _row(
    pipe: Pipeline, model: str, recipe: str, budget: str, steps: int, size: int, fast: bool
) -> tuple[Row, Tensor | None]:
    row = Row(model, recipe if recipe != "16" else str(pipe.dtype).removeprefix("torch."), budget)
    device = pipe.device
    how: dict[str, Any] = {"height": size, "width": size, "guidance_scale": 4.5, "seed": 0, "progress": False}
    try:
        pipe.plain()
        pipe._set_budget(_bytes_of(budget))
        _emptied(device)
        if fast:
            pipe.accelerate()
        pipe(PROMPTS[0], num_inference_steps=2, **how)
        pipe._texts.clear()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        output = pipe(PROMPTS[1], num_inference_steps=steps, output_type="latent", **how)
        pipe.decode(output.images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row.seconds = time.perf_counter() - start
        row.peak_gb, row.outside_gb = _memory(device)
        row.host_gb = _host_bytes() / 1e9
        plan = pipe.memory_plan
        row.planned_gb = 0.0 if plan is None else plan.sum / 1e9
        row.streamed = "models by turns" if plan is None else plan.streams()
        return row, output.images.cpu()
    except FAILURES as error:
        row.failed = said_of(error, 600)
        return row, None
    finally:
        _emptied(device)


def _bytes_of(budget: str) -> int | None:
    """A budget in bytes; None has the models take turns."""
    if budget == STAGES:
        return None
    return 10**12 if budget == "resident" else parse_bytes(budget)


def _memory(device: torch.device) -> tuple[float, float]:
    """The most that torch has reserved, and what the process takes beside it, in gigabytes."""
    if device.type != "cuda":
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_reserved(device) / 1e9, outside / 1e9


def _host_bytes() -> int:
    """Anonymous memory of this process (RssAnon); 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def _encoders(model: str, recipe: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Text encoders and VAE of official size on the host; of the embedded model's size for "demo"."""
    if model == "demo":
        pipe = Pipeline.demo(dtype=dtype)
        assert pipe.clip_l is not None and pipe.clip_g is not None and pipe.t5 is not None
        parts: dict[str, torch.nn.Module] = {"clip_l": pipe.clip_l, "clip_g": pipe.clip_g, "t5": pipe.t5}
        parts["vae"] = pipe.vae
    else:
        with torch.device("meta"):
            parts = {
                "clip_l": CLIPText(CLIPConfig(768, 12, 3072, "quick_gelu", 12)),
                "clip_g": CLIPText(CLIPConfig(1280, 32, 5120, "gelu", 20, projection_dim=1280)),
                "t5": T5Encoder(T5Config(4096, 24, 64, 64, 10240)),
                "vae": VAE(VAEConfig()),
            }
    return {name: _on_host(part, recipe if name == "t5" else "16", device, dtype) for name, part in parts.items()}


def _pipeline(
    model: str, recipe: str, encoders: dict[str, torch.nn.Module], device: torch.device, dtype: torch.dtype
) -> Pipeline:
    with torch.device("meta"):
        transformer = MMDiT(MODELS[model])
    parts = Components(
        _on_host(transformer, recipe, device, dtype),  # type: ignore[arg-type]
        tokenizers=Tokenizers.from_folder(EMBEDDED),
        shift=3.0,
        **encoders,  # type: ignore[arg-type]
    )
    return Pipeline(parts, memory="1000GB", device=device, name="random weights")


def _on_host(part: torch.nn.Module, recipe: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Random weights, made and quantized on the device, on the host."""
    if next(part.parameters()).is_meta:
        part = part.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        fill(part)
    if recipe != "16":
        quantized(part, recipe)
    return part.to("cpu")


def _emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
