"""One picture on several GPUs, and many pictures on many: times, memory, and bytes exchanged beside the links' speed.

Every process of a `torchrun` runs this; rank 0 has the table.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmdit.bench.links import Link
from mmdit.bench.picture import PROMPT, random_pipeline
from mmdit.bench.random_models import check_size, quantized
from mmdit.bench.rows import FAILURES, said_of
from mmdit.pipeline.parallelize import parallelize
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime import mesh
from mmdit.runtime.mesh import Layout, shares
from mmdit.runtime.peer_setup import Exchange
from mmdit.runtime.sequence import exchanged_bytes
from mmdit.utils import markdown_table

_SCALE = 4.5  # guidance
_TURBO_STEPS = 4
_GATHER = 60e-6  # seconds of the gather of predictions in a step, assumed by the prediction
_ATTENTION = 0.4  # share of attention in a step of SD3.5-Large at 1024 x 1024, assumed by the prediction


@dataclass(frozen=True)
class Setting:
    """What all rows draw."""

    model: str = "large"
    recipe: str | None = "fp8"
    size: int | None = None  # pixels of a side; None is the model's default
    steps: int = 28  # of a guided picture
    prompts: int = 64  # of the data-parallel row
    repeats: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    dtype: torch.dtype = torch.bfloat16

    @property
    def pixels(self) -> int:
        """Pixels of a side."""
        return check_size(self.model, self.size)


@dataclass
class Row:
    """One way to draw; times are medians of rank 0, memory is that of the rank which takes most.

    Attributes:
        seconds: of stages that are waited for one by one (text, steps, decode), and of a picture in one call, in which
            the host is ahead of the GPU.
    """

    name: str
    base: str = ""  # the name of the row that it is compared with
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    peak_gb: float = 0.0  # allocated by torch
    used_gb: float = 0.0  # of the device, with graphs, communicators and the driver
    exchanged: int = 0  # bytes that rank 0 sends in a step
    predicted_ms: float | None = None  # of a step
    difference: float | None = None  # relative, of the latents to those of the base row
    failed: str = ""
    choices: str = ""  # how tokens were exchanged, and pictures decoded; of one GPU, the step of each rank


def bench(setting: Setting, link: Link, *, seconds: float = 90.0, only: Sequence[str] = ()) -> Iterator[Row]:
    """Draw in every layout of the processes that are running; every rank calls this and iterates to the end.

    A row that fails is kept with its reason; the rows after it still run unless the processes can no longer talk.

    Args:
        setting: what is drawn.
        link: the measured links, for the prediction.
        seconds: no row begins after so many seconds.
        only: parts of names; rows that contain none of them are left out, and with them the comparison.
    """
    begin, world = time.monotonic(), dist.get_world_size()
    latents: dict[str, Tensor] = {}
    done: dict[str, Row] = {}
    torch.manual_seed(0)
    pipe = _build(setting)
    for name, base, run in _plans(pipe, setting, world, link):
        if only and not any(part in name for part in only):
            continue
        row, broken = Row(name, base), False
        if mesh.from_first(time.monotonic() - begin) > seconds:
            row.failed = f"not measured: {seconds:.0f} s were over"
        else:
            try:
                run(row, latents)
            except FAILURES as error:
                row.failed = said_of(error, 200)
                broken = pipe.parallel is not None
            finally:
                _released(pipe)
        done[name] = row
        if base in latents and name in latents:
            row.difference = float((latents[name] - latents[base]).norm() / latents[base].norm())
        yield row
        if broken:
            return


def table(rows: Sequence[Row], link: Link | None = None) -> str:
    """Times beside those of one GPU, memory, and what the exchanges take at the measured speed of the links."""
    known = {row.name: row for row in rows}
    found = []
    for row in rows:
        if row.failed:
            found.append((row.name, *["-"] * 5, row.failed, *["-"] * 6))
            continue
        base = known.get(row.base)
        picture = row.seconds["picture"]
        faster = f"{base.seconds['picture'] / picture:.3f}" if base is not None and not base.failed else "-"
        step_faster = f"{_step_ms(base) / _step_ms(row):.3f}" if faster != "-" and base and row.steps else "-"
        stages = [f"{row.seconds[stage]:.3f}" if stage in row.seconds else "-" for stage in ("text", "steps", "decode")]
        wire = "-" if link is None or not row.exchanged else f"{1000 * row.exchanged / link.exchange:.2f}"
        found.append(
            (
                row.name,
                *stages,
                f"{picture:.3f}",
                f"{_step_ms(row):.2f}" if row.steps else "-",
                faster,
                step_faster,
                "-" if row.predicted_ms is None else f"{row.predicted_ms:.2f}",
                f"{row.peak_gb:.2f} / {row.used_gb:.2f}",
                f"{row.exchanged / 1e6:.2f}" if row.exchanged else "-",
                wire,
                "-" if row.difference is None else f"{row.difference:.1e}",
            )
        )
    return "\n".join(markdown_table(_TITLES, found))


def _step_ms(row: Row) -> float:
    return 1000 * row.seconds["steps"] / row.steps


_TITLES = (
    *("", "text s", "steps s", "decode s", "picture s", "step ms", "times faster", "step times faster"),
    *("predicted step ms", "allocated / used GB", "MB sent a step", "ms at link speed", "difference"),
)


def predicted_step(one: float, layout: Layout, *, tokens: int, text: int, heads: int, exchanged: int, link: Link,
                   exchanges: int) -> float:  # fmt: skip
    """Predict the seconds of a step from those of one branch on one GPU.

    Linears and norms go with the tokens of a rank, attention with its heads, and the exchanges with their bytes at the
    link's speed and a latency each. Kernels of half the size are assumed to be as efficient, and nothing overlaps.

    Args:
        one: seconds of a step of one branch on one GPU.
        layout: the layout of the mesh.
        tokens, text: numbers of image and text tokens.
        heads: attention heads.
        exchanged: bytes that a rank sends in a step.
        link: measured speeds.
        exchanges: number of exchanges in a step.
    """
    ranks = layout.sequence
    rows = (shares(text, ranks)[-1] + shares(tokens, ranks)[0]) / (text + tokens)
    share = shares(heads, ranks)[0] / heads
    wire = exchanged / link.exchange + exchanges * link.latency if ranks > 1 else 0.0
    return one * ((1 - _ATTENTION) * rows + _ATTENTION * share) + wire + (_GATHER if layout.cfg > 1 else 0.0)


def stop_after(seconds: float, rows: Sequence[Row], say: Callable[[str], None]) -> threading.Timer:
    """Print what is measured and end the process after so many seconds, even if it waits for a rank for ever."""

    def stop() -> None:
        with suppress(KeyError, ValueError):
            say(table(rows))
        say(f"stopped after {seconds:.0f} s")
        os._exit(1)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    return timer


Run = Callable[[Row, dict[str, Tensor]], None]


def _plans(pipe: Pipeline, setting: Setting, world: int, link: Link) -> Iterator[tuple[str, str, Run]]:
    """The rows: name, name of the row to compare with, and what runs them; in order of value."""
    times: dict[str, float] = {}

    def drawing(layout: Layout | None, guided: bool, exchange: Exchange = "auto") -> Run:
        return partial(_draw_row, pipe, setting, layout, guided, exchange, link, times)

    guided, turbo = f"guided, {setting.steps} steps, one GPU", f"Turbo, {_TURBO_STEPS} steps, one GPU"
    yield guided, "", drawing(None, True)
    yield turbo, "", drawing(None, False)
    together = Layout(2, world // 2)
    if world % 2 == 0:
        yield f"guided, {together}", guided, drawing(together, True)
    alone = Layout(1, world)
    yield f"Turbo, {alone}", turbo, drawing(alone, False)
    if setting.device.type == "cuda":
        yield f"Turbo, {alone}, NCCL", turbo, drawing(alone, False, "nccl")
        if world % 2 == 0 and together.sequence > 1:
            yield f"guided, {together}, NCCL", guided, drawing(together, True, "nccl")
    if world > 2:
        yield f"guided, {alone}", guided, drawing(alone, True)
    one = f"{setting.prompts} prompts, one GPU"
    yield one, "", partial(_many_row, pipe, setting, False)
    yield f"{setting.prompts} prompts, {world} GPUs, data parallel", one, partial(_many_row, pipe, setting, True)


def _build(setting: Setting) -> Pipeline:
    pipe = random_pipeline(setting.model, setting.device, setting.dtype)
    if setting.recipe is not None:
        assert pipe.t5 is not None
        for part in (pipe.transformer, pipe.t5):
            quantized(part, setting.recipe)
    return pipe


@torch.no_grad()
def _draw_row(
    pipe: Pipeline,
    setting: Setting,
    layout: Layout | None,
    guided: bool,
    exchange: Exchange,
    link: Link,
    times: dict[str, float],
    row: Row,
    latents: dict[str, Tensor],
) -> None:
    """Measure pictures in a layout; None draws on every rank alone."""
    pipe.accelerate()
    together = None if layout is None else parallelize(pipe, *layout, exchange=exchange)
    row.steps = setting.steps if guided else _TURBO_STEPS
    options: dict[str, Any] = {"guidance_scale": _SCALE if guided else 1.0}
    for draw in (_drawn, _in_one_call):
        draw(pipe, setting, options | {"num_inference_steps": 2})  # compiles, measures attention, records graphs
    _reset_peak(setting.device)
    options["num_inference_steps"] = row.steps
    found = [_drawn(pipe, setting, options) for _ in range(setting.repeats)]
    row.seconds = {stage: median(one[0][stage] for one in found) for stage in found[0][0]}
    row.seconds["picture"] = median(_in_one_call(pipe, setting, options) for _ in range(setting.repeats + 1))
    if together is not None:
        row.choices = together.choices
    latents[row.name] = found[-1][1].float().cpu()
    row.peak_gb, row.used_gb = (max(each) for each in zip(*mesh.of_all(_memory(setting.device)), strict=True))
    step = row.seconds["steps"] / row.steps
    if layout is None:
        each = ", ".join(f"{1000 * one:.2f}" for one in mesh.of_all(step))
        row.choices = f"a step takes {each} ms on the ranks, each alone"
        times.setdefault("branch", step / (2 if guided else 1))
        if not guided:
            times["branch"] = step
        return
    config = pipe.transformer.config
    tokens, text = (setting.pixels // 8 // config.patch_size) ** 2, pipe.encode(PROMPT).context.shape[1]
    second, branches = len(config.dual_attention_blocks), -(-(2 if guided else 1) // layout.cfg)
    sizes = {"tokens": tokens, "text": text, "heads": config.heads}
    if layout.sequence > 1:
        row.exchanged = branches * exchanged_bytes(
            **sizes,
            head_dim=config.head_dim,
            depth=config.depth,
            second=second,
            ranks=layout.sequence,
            itemsize=setting.dtype.itemsize,
        )
    exchanges = 2 * (config.depth + second)
    if "branch" in times:
        row.predicted_ms = 1000 * predicted_step(
            branches * times["branch"], layout, **sizes, exchanged=row.exchanged, link=link, exchanges=exchanges
        )
    if layout.cfg > 1:
        row.exchanged += (layout.cfg - 1) * latents[row.name].nbytes


def _drawn(pipe: Pipeline, setting: Setting, options: dict[str, Any]) -> tuple[dict[str, float], Tensor]:
    """Draw one picture; the seconds of each stage, and its latent."""
    watch = _Watch(setting.device)
    texts = [watch("text", partial(pipe.encode, PROMPT))]
    if options["guidance_scale"] != 1:
        texts.append(watch("text", partial(pipe.encode, "")))
    noise = pipe.noise(0, height=setting.pixels, width=setting.pixels)

    def every_step() -> Tensor:
        *_, last = pipe.sample(texts[0], texts[1] if texts[1:] else None, noise, **options)
        return last.x

    latent = watch("steps", every_step)
    watch("decode", partial(pipe.decode, latent))
    return watch.seconds, latent


def _in_one_call(pipe: Pipeline, setting: Setting, options: dict[str, Any]) -> float:
    """Seconds of a picture, from the call to its last pixel; all ranks begin together."""
    dist.barrier()
    watch = _Watch(setting.device)
    sizes: dict[str, Any] = {"height": setting.pixels, "width": setting.pixels, "seed": 0, "progress": False}
    watch("picture", partial(pipe, PROMPT, output_type="pt", **sizes, **options))
    return watch.seconds["picture"]


@torch.no_grad()
def _many_row(pipe: Pipeline, setting: Setting, together: bool, row: Row, latents: dict[str, Tensor]) -> None:
    """Draw prompts one after the other: all ranks their share at the same time, or rank 0 a share alone, scaled up."""
    pipe.accelerate()
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    rank, world = dist.get_rank(), dist.get_world_size()
    share = shares(setting.prompts, world)[rank]
    _drawn(pipe, setting, options)
    if together:
        dist.barrier()
    start = time.perf_counter()
    for _ in range(share if together or rank == 0 else 0):
        _drawn(pipe, setting, options)
    own = time.perf_counter() - start
    times = mesh.of_all(own)
    row.seconds["picture"] = max(times) if together else times[0] * setting.prompts / shares(setting.prompts, world)[0]
    row.peak_gb, row.used_gb = (max(each) for each in zip(*mesh.of_all(_memory(setting.device)), strict=True))


class _Watch:
    """Runs stages and adds up their seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def __call__(self, stage: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        return found


def _memory(device: torch.device) -> tuple[float, float]:
    """Gigabytes that torch allocated at most, and that are in use on the device."""
    if device.type != "cuda":
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.max_memory_allocated(device) / 1e9, (total - free) / 1e9


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _released(pipe: Pipeline) -> None:
    if pipe.parallel is not None:
        pipe.parallel.close()
    pipe.plain()
    gc.collect()
    if pipe.device.type == "cuda":
        torch.cuda.empty_cache()
