"""Pictures within memory budgets, at full size on random weights: time, measured memory, and what was streamed."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from encoders import VAE, CLIPText, T5Encoder, Tokenizers
from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.bench.random_models import MODELS, check_names, check_size, fill, quantized
from mmdit.bench.rows import FAILURES, said_of
from mmdit.checkpoints.load import NoInitialValues
from mmdit.checkpoints.load_pipeline import Components
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.plan import parse_bytes
from mmdit.utils import markdown_table, weight_bytes
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
    fast: bool = False
    seconds: float = 0.0  # of all steps
    step_ms: float = 0.0  # of a step after the first one, the median
    longest_ms: float = 0.0  # of these steps
    peak_gb: float = 0.0  # of torch's allocator
    outside_gb: float = 0.0  # context and libraries
    host_gb: float = 0.0  # anonymous memory of the process, which holds the weights
    base_gb: float = 0.0  # that it had before there was a model: Python, torch, the CUDA context and its libraries
    weights_gb: float = 0.0  # of all models
    planned_gb: float = 0.0
    step_gb: float = 0.0  # that are copied to the device in each step
    link_gb: float = 0.0  # a second, copied from the memory of a model on the host and nothing else done
    streamed: str = ""
    equal: str = ""  # whether the latent is that of the resident model, bit for bit
    failed: str = ""

    @property
    def name(self) -> str:
        """The model and the way in which it is drawn with."""
        return f"{self.model}, fast" if self.fast else self.model


@dataclass(frozen=True)
class Picture:
    """What is drawn: a picture of `steps` steps, of which only the first `run` may be run, with a side in pixels."""

    steps: int = 20
    run: int = 20
    size: int | None = None


def budgets(
    models: Sequence[str] = ("large", "medium"),
    recipes: Sequence[str] = ("fp8", "16"),
    sizes: Sequence[str] = BUDGETS,
    picture: Picture = Picture(),
    *,
    fast: Collection[bool] = (False,),
    seconds: float = 240.0,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    """Draw with everything resident, then within each budget; text encoders run in every picture.

    Weights are made on the device and wait in host memory. One model is used for all its budgets: before each one it
    leaves the device, torch gives back all memory that it keeps, and its statistics begin anew. While a model computes,
    torch is capped at the budget less what is set aside for the context (`mmdit.runtime.device_memory.context_of`), and
    raises where more is asked for; "peak" is what torch had reserved at most, and what the whole device holds beside
    that at the end, so that nothing else may run on it.

    The first drawing of a row has two steps; the second one, of another prompt, counts. Where not all of its steps are
    run, it is planned for all of them, the steps that are left out are taken to last as long as the median of those
    after the first one, and the latent is decoded as it is.

    Args:
        models: of `mmdit.bench.random_models.MODELS`.
        recipes: names of `quant.RECIPES`, for transformer and T5; "16" is the dtype.
        sizes: budgets, or "stages" for `offload="stages"`.
        picture: what is drawn.
        fast: whether to draw with the plain forward (False), with the fast one (True), or with both; where both are
            asked for, the fast one draws with float8 only.
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
    device, end = torch.device(device), time.monotonic() + seconds
    base = _base(device, dtype)
    for recipe in recipes:
        encoders: dict[str, torch.nn.Module] = {}
        pipe: Pipeline | None = None
        for model in models:
            if time.monotonic() > end:
                return
            encoders = encoders or _encoders(model, recipe, device, dtype)
            pipe = _pipeline(model, recipe, encoders, device, dtype, pipe)  # the one before is freed here
            for is_fast in sorted(fast):
                if is_fast and len(fast) > 1 and recipe == "16":
                    continue
                for row in _rows(pipe, model, recipe, sizes, picture, is_fast, end):
                    row.base_gb = base
                    yield row
            pipe._leave()
            _emptied(device)


def _rows(
    pipe: Pipeline, model: str, recipe: str, sizes: Sequence[str], picture: Picture, fast: bool, end: float
) -> Iterator[Row]:
    resident: Tensor | None = None
    for budget in ("resident", *sizes):
        if time.monotonic() > end:
            return
        row, latent = _row(pipe, model, recipe, budget, picture, fast)
        if resident is None:
            resident = latent
        elif latent is not None:
            row.equal = "yes" if torch.equal(latent, resident) else "no"
        yield row


def table(found: Sequence[Row]) -> str:
    """The rows as Markdown; ratios are to the resident model of the same kind."""
    base = {(one.name, one.recipe): one.seconds for one in found if one.budget == "resident"}
    rows = []
    for one in found:
        resident = base.get((one.name, one.recipe), 0.0)
        ratio = f"{one.seconds / resident:.3f}" if resident else "-"
        peak = one.peak_gb + one.outside_gb
        least = 1000 * one.step_gb / one.link_gb if one.link_gb else 0.0
        linked = f"{one.step_gb:.2f} / {one.link_gb:.1f} = {least:.1f}" if least else "-"
        numbers: tuple[str, ...] = (f"{one.planned_gb:.2f}", f"{peak:.2f}", f"{one.outside_gb:.2f}")
        numbers += (f"{one.seconds:.2f}", ratio, f"{one.step_ms:.1f}", f"{one.longest_ms:.1f}", linked)
        numbers += (f"{one.host_gb:.1f}", f"{one.host_gb - one.weights_gb:.2f}", f"{one.base_gb:.2f}")
        if one.failed:
            numbers = ("failed", *["-"] * (len(numbers) - 1))
        rows.append((one.name, one.recipe, one.budget, *numbers, one.failed or one.streamed, one.equal or "-"))
    return "\n".join(markdown_table(_TITLES, rows))


_TITLES = (
    "model",
    "weights",
    "budget",
    "planned GB",
    "peak GB",
    "of it outside torch",
    "seconds",
    "to resident",
    "ms a step",
    "longest",
    "GB a step / link GB/s = ms",
    "host GB",
    "above weights",
    "before models",
    "streamed",
    "bit-equal",
)


@torch.no_grad()
def _row(
    pipe: Pipeline, model: str, recipe: str, budget: str, picture: Picture, fast: bool
) -> tuple[Row, Tensor | None]:
    row = Row(model, recipe if recipe != "16" else str(pipe.dtype).removeprefix("torch."), budget, fast)
    device, size = pipe.device, check_size(model, picture.size)
    how: dict[str, Any] = {"height": size, "width": size, "guidance_scale": 4.5, "seed": 0, "progress": False}
    try:
        pipe.plain()
        pipe._set_budget(_bytes_of(budget))
        _emptied(device)
        if fast:
            pipe.accelerate()
        pipe(PROMPTS[0], num_inference_steps=2, **how)
        pipe._texts.clear()
        steps = _Steps(device, min(picture.run, picture.steps))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        how |= {"num_inference_steps": picture.steps, "output_type": "latent", "callback_on_step_end": steps}
        output = pipe(PROMPTS[1], **how)
        pipe.decode(output.images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row.seconds = time.perf_counter() - start
        row.step_ms, row.longest_ms = steps.milliseconds()
        row.seconds += (picture.steps - steps.most) * row.step_ms / 1000
        row.peak_gb, row.outside_gb = _memory(device)
        row.host_gb, row.weights_gb = host_bytes() / 1e9, sum(map(weight_bytes, pipe.models.values())) / 1e9
        plan = pipe.memory_plan
        row.streamed = "models by turns" if plan is None else plan.streams()
        if plan is not None:
            row.planned_gb = plan.sum / 1e9
            row.step_gb = sum(plan.models["transformer"].blocks[i] for i in plan.streamed) / 1e9
            row.link_gb = _link(pipe) if plan.streamed else 0.0
        return row, output.images.cpu()
    except FAILURES as error:
        row.failed = said_of(error, 600)
        return row, None
    finally:
        _emptied(device)


class _Steps:
    """A callback that ends a drawing after so many steps, and measures how long a step lasts after the first one."""

    def __init__(self, device: torch.device, most: int) -> None:
        self.device, self.most = device, most
        self.times: list[Any] = []

    def __call__(self, pipe: Any, index: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        """As pipelines call it after each step."""
        if self.device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
        else:
            now = time.perf_counter()
        self.times.append(now)
        pipe._interrupt = index + 1 >= self.most
        return {}

    def milliseconds(self) -> tuple[float, float]:
        """Of a step after the first one: the median and the most."""
        cuda = self.device.type == "cuda"
        took = [one.elapsed_time(other) if cuda else 1000 * (other - one) for one, other in pairwise(self.times)]
        return (float(median(took)), float(max(took))) if took else (0.0, 0.0)


def _link(pipe: Pipeline) -> float:
    """Gigabytes a second that the device copies from host memory of the transformer, with nothing else going on."""
    assert pipe._turns is not None, "a budget comes with turns"
    units = pipe._turns._units[pipe.transformer].values()
    source = max((unit.memory for unit in units), key=len)
    target = torch.empty_like(source, device=pipe.device)
    repeats = max(1, 2**30 // max(len(source), 1)) if pipe.device.type == "cuda" else 1
    target.copy_(source, non_blocking=True)
    _synchronized(pipe.device)
    start = time.perf_counter()
    for _ in range(repeats):
        target.copy_(source, non_blocking=True)
    _synchronized(pipe.device)
    return repeats * len(source) / (time.perf_counter() - start) / 1e9


def _synchronized(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def host_bytes() -> int:
    """Anonymous memory of this process (RssAnon); 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def _base(device: torch.device, dtype: torch.dtype) -> float:
    """Gigabytes of host memory of a process that has used torch for a product and a convolution, but has no model."""
    ones = torch.ones(1, 16, 16, 16, dtype=dtype, device=device)
    torch.nn.functional.conv2d(ones @ ones, ones[:, :, :3, :3])
    _synchronized(device)
    return host_bytes() / 1e9


def encoders_of(model: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Text encoders and VAE of official size on the meta device; those of the embedded model, loaded, for "demo"."""
    if model == "demo":
        pipe = Pipeline.demo(dtype=dtype)
        assert pipe.clip_l is not None and pipe.clip_g is not None and pipe.t5 is not None
        return {"clip_l": pipe.clip_l, "clip_g": pipe.clip_g, "t5": pipe.t5, "vae": pipe.vae}
    with torch.device("meta"), NoInitialValues():
        return {
            "clip_l": CLIPText(CLIPConfig(768, 12, 3072, "quick_gelu", 12)),
            "clip_g": CLIPText(CLIPConfig(1280, 32, 5120, "gelu", 20, projection_dim=1280)),
            "t5": T5Encoder(T5Config(4096, 24, 64, 64, 10240)),
            "vae": VAE(VAEConfig()),
        }


def transformer_of(model: str) -> MMDiT:
    """The transformer on the meta device."""
    with torch.device("meta"), NoInitialValues():
        return MMDiT(MODELS[model])


def _encoders(model: str, recipe: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    parts = encoders_of(model, dtype)
    return {name: _random(part, recipe if name == "t5" else "16", device, dtype) for name, part in parts.items()}


def _pipeline(
    model: str,
    recipe: str,
    encoders: dict[str, torch.nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    before: Pipeline | None,
) -> Pipeline:
    """A pipeline whose weights go to pinned host memory; those of encoders may be there for the one before."""
    parts = Components(
        _random(transformer_of(model), recipe, device, dtype),  # type: ignore[arg-type]
        tokenizers=Tokenizers.from_folder(EMBEDDED),
        shift=3.0,
        **encoders,  # type: ignore[arg-type]
    )
    pipe = Pipeline(parts, memory="1000GB", device=device, name="random weights")
    assert pipe._turns is not None, "a budget comes with turns"
    if before is not None and before._turns is not None:
        before._leave()
        for part in encoders.values():
            pipe._turns._units[part] = before._turns._units.pop(part, {})
    return pipe


def _random(part: torch.nn.Module, recipe: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Random weights, made and quantized on the device."""
    if next(part.parameters()).is_meta:
        with torch.device(device):
            make_empty(part, dtype)
        fill(part.requires_grad_(False).eval())
    if recipe != "16":
        quantized(part, recipe)
    return part


def make_empty(part: torch.nn.Module, dtype: torch.dtype) -> None:
    """Memory for the tensors on the meta device, as `to_empty` makes it without 80 MB of host memory for a compiler."""
    made: dict[int, Any] = {}
    for module in part.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                    made[id(tensor)] = torch.nn.Parameter(new) if isinstance(tensor, torch.nn.Parameter) else new
                tensors[name] = made[id(tensor)]


def _emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
