"""What each float8 recipe costs in quality: `mmdit bench quality --output FOLDER`.

Every recipe draws the same prompts from the same noise as the model that is not quantized. A row says how much of what
prompts state is in the pictures, how close they are to that model's pictures, and how far their distribution is from
that of rendered scenes.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.bench.metrics import bootstrap, features, frechet_distance, psnr, ssim
from mmdit.demo.captions import prompts as make_prompts
from mmdit.demo.data import workers
from mmdit.demo.evaluate import MAIN, SEED, Setting, draw
from mmdit.demo.grammar import KINDS
from mmdit.demo.scenes import render, sample
from mmdit.demo.score import accuracies, macro_average, score_batch
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.calibration import calibrate, fold, quantize_calibrated
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.hooks import Hook, hooks
from mmdit.utils import make_folder, markdown_table, write_text
from quant.quantize import linears_of, quantize_, snr
from quant.recipe import Recipe

THEORY = 28.5  # dB of float8 activations and weights on normal data


@dataclass(frozen=True)
class Row:
    """One recipe, with the options of `quantize_static`."""

    name: str
    recipe: str | Recipe | None
    options: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # of a model in float8, which is measured instead of a recipe

    @property
    def static(self) -> bool:
        """Whether it needs a calibration."""
        return self.recipe == "fp8-static"


ROWS = (
    Row("not quantized", None),
    Row("weight-only, per row", "fp8-weight-only"),
    Row("dynamic, per tensor", "fp8-tensor"),
    Row("dynamic, per token and row", "fp8"),
    Row("static, per tensor", "fp8-static"),
    Row("static + smoothing 0.5", "fp8-static", {"smooth": 0.5}),
    Row("static + mean folding", "fp8-static", {"mean": True}),
    Row("static + bias correction", "fp8-static", {"bias": True}),
    Row("static + percentile 99.99", "fp8-static", {"percentile": 99.99}),
    Row("static + mean, smoothing, bias", "fp8-static", {"smooth": 0.5, "mean": True, "bias": True}),
    Row("E5M2, weight-only", "fp8-e5m2"),
    Row("E5M2 weights, dynamic", Recipe(format="e5m2")),
)


@dataclass(frozen=True)
class Drawn:
    """The pictures of a row, uint8 [n, 3, h, w], and what is computed of each."""

    pictures: Tensor
    verdicts: list[dict[Any, bool]]
    features: Tensor


@dataclass(frozen=True)
class Quality:
    """A line of the table; intervals are of 95 %."""

    name: str
    accuracy: float  # share of the statements that hold
    accuracy_interval: tuple[float, float]
    accuracy_ratio: tuple[float, float, float]  # to the model that is not quantized: value, low, high
    psnr: float  # median over pictures, dB
    ssim: float  # mean
    block_snr: float | None  # mean over blocks and streams, dB; None for the fast forward, which no hook sees into
    frechet_ratio: tuple[float, float, float]
    layers: dict[str, float]  # SNR of each Linear's output from its own inputs, dB
    seconds: float


def built(
    row: Row, device: str, dtype: torch.dtype, calibration: Sequence[str], steps: int = MAIN.steps
) -> tuple[MMDiT, Pipeline]:
    """The transformer before its weights are rounded, and the pipeline with the quantized one."""
    pipe = Pipeline.demo(device=device, dtype=dtype)
    if row.folder is not None:
        return pipe.transformer, Pipeline.from_pretrained(row.folder, device=device, dtype=dtype)
    options = dict(row.options)
    smooth, mean = options.pop("smooth", None), options.pop("mean", False)
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": MAIN.guidance, "batch": 32}
    seen = calibrate(pipe, calibration, **settings) if row.static else None
    if seen is not None and (smooth is not None or mean):
        fold(pipe.transformer, seen, smooth=smooth, mean=mean)
        seen = calibrate(pipe, calibration, **settings)
    before = copy.deepcopy(pipe.transformer)
    if seen is not None:
        quantize_calibrated(pipe.transformer, seen, **options)
    elif row.recipe is not None:
        quantize_(pipe.transformer, row.recipe)
    return before, pipe


@torch.no_grad()
def inner_snr(before: MMDiT, after: MMDiT, pipe: Pipeline, texts: Sequence[str]) -> tuple[float, dict[str, float]]:
    """The SNR inside the quantized model, in dB: the mean over block outputs, and that of each Linear's own output.

    Both models see pictures of the prompts' own kind under noise at three levels.
    """
    scenes = render(sample(len(texts), 5)).to(pipe.device, pipe.dtype)
    latent = pipe.vae.encode(2 * scenes - 1).mode()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    read = pipe.encode(texts)
    sums: dict[str, list[float]] = {}
    for sigma in (0.9, 0.6, 0.3):
        x = sigma * noise + (1 - sigma) * latent
        call = (x, torch.full((len(x),), 1000 * sigma, device=x.device), read.context, read.pooled)
        inputs, blocks = _traced(before, call)
        _, other_blocks = _traced(after, call)
        for name, value in blocks.items():
            sums.setdefault(f"block {name}", []).append(snr(value, other_blocks[name]))
        for name, seen in inputs.items():
            linears = before.get_submodule(name), after.get_submodule(name)
            outputs = [linear(seen) for linear in linears]
            sums.setdefault(name, []).append(snr(*outputs))
    means = {name: statistics.fmean(values) for name, values in sums.items()}
    of_blocks = [value for name, value in means.items() if name.startswith("block ")]
    return statistics.fmean(of_blocks), {name: value for name, value in means.items() if not name.startswith("block ")}


def _traced(model: MMDiT, call: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of the Linears that are float8 in some recipe, and both outputs of every block."""
    inputs: dict[str, Tensor] = {}
    blocks: dict[str, Tensor] = {}

    def keep_input(name: str) -> Any:
        return lambda _, args, __: inputs.__setitem__(name, args[0])

    def keep_outputs(name: str) -> Any:
        return lambda _, __, ___, outputs: blocks.update(
            {
                f"{name} {stream}": part
                for stream, part in zip(("context", "x"), outputs, strict=True)
                if part is not None
            }
        )

    chosen = {name: linear for name, linear in linears_of(model) if "attn" in name or "mlp.fc" in name}
    wanted = [Hook(linear, "input", keep_input(name)) for name, linear in chosen.items()]
    wanted += [Hook(block, "output", keep_outputs(str(i))) for i, block in enumerate(model.joint_blocks)]
    with hooks(wanted):
        model(*call)
    return inputs, blocks


def pictures_of(pipe: Pipeline, texts: Sequence[str], scored: int, batch: int, pool: Any, setting: Setting) -> Drawn:
    """Draw every prompt from the noise of its number; score the first `scored` pictures."""
    parts = list(draw(pipe, texts, range(len(texts)), setting, batch))
    pictures = torch.cat(parts)
    chunks = range(0, scored, 64)
    waiting = [
        pool.submit(
            _scored, pictures[first : min(first + 64, scored)].numpy(), list(texts[first : min(first + 64, scored)])
        )
        for first in chunks
    ]
    found = torch.cat([features(pipe.vae, part.float() / 255) for part in pictures.split(batch)])
    return Drawn(pictures, [verdict for future in waiting for verdict in future.result()], found)


def _scored(pictures: object, texts: list[str]) -> list[dict[Any, bool]]:
    return score_batch(torch.from_numpy(pictures).float() / 255, texts)


def quality(
    row: Row,
    drawn: Drawn,
    base: Drawn,
    rendered: Tensor,
    inner: tuple[float | None, dict[str, float]],
    seconds: float,
    device: str,
) -> Quality:
    """Compare the pictures of a row with the unquantized model's; `device` computes the differences."""
    closeness = []
    for pair in zip(drawn.pictures.split(128), base.pictures.split(128), strict=True):
        a, b = (pictures.to(device).float() / 255 for pictures in pair)
        closeness.append((psnr(a, b).cpu(), ssim(a, b).cpu()))
    ratios, similar = (torch.cat(parts) for parts in zip(*closeness, strict=True))

    counts = [tally(one.verdicts) for one in (drawn, base)]

    def accuracy(indices: Tensor, which: int = 0) -> float:
        right, said = counts[which]
        return float((right[indices].sum(0) / said[indices].sum(0)).nanmean())

    def accuracy_ratio(indices: Tensor) -> float:
        its = accuracy(indices, 1)
        return accuracy(indices) / its if its else float("nan")

    def frechet_ratio(indices: Tensor) -> float:
        return frechet_distance(drawn.features[indices], rendered) / frechet_distance(base.features[indices], rendered)

    scored, every = len(drawn.verdicts), len(drawn.features)
    return Quality(
        row.name,
        macro_average(accuracies(drawn.verdicts)),
        bootstrap(accuracy, scored, times=300),
        (accuracy_ratio(torch.arange(scored)), *bootstrap(accuracy_ratio, scored, times=300)),
        float(ratios.median()),
        float(similar.mean()),
        inner[0],
        (frechet_ratio(torch.arange(every)), *bootstrap(frechet_ratio, every, times=300)),
        inner[1],
        seconds,
    )


def tally(verdicts: Sequence[dict[Any, bool]]) -> tuple[Tensor, Tensor]:
    """Counts of statements by picture and kind, those that hold and all of them: two float64 [pictures, kinds]."""
    counts = torch.zeros(2, len(verdicts), len(KINDS), dtype=torch.float64)
    for i, verdict in enumerate(verdicts):
        for statement, holds in verdict.items():
            kind = KINDS.index(statement.kind)
            counts[0, i, kind] += holds
            counts[1, i, kind] += 1
    return counts[0], counts[1]


def markdown(found: Sequence[Quality]) -> str:
    """The table, and for the layers that static scales serve worst, how much of the gap to theory others close."""
    titles = ("recipe", "statements", "to not quantized", "PSNR dB", "SSIM", "blocks dB", "Fréchet to not quantized")
    lines = markdown_table(titles, map(_row, found))
    static = next((one for one in found if one.name == "static, per tensor"), None)
    if static is not None:
        lines += [
            "",
            *_worst_layers(
                static, [one for one in found if one.name.startswith(("static +", "dynamic")) and one.layers]
            ),
        ]
    return "\n".join(lines) + "\n"


def _row(one: Quality) -> tuple[str, ...]:
    accuracy, frechet = (
        f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in (one.accuracy_ratio, one.frechet_ratio)
    )
    inside = "-" if one.block_snr is None else f"{one.block_snr:.1f}"
    close = (f"{one.psnr:.1f}", f"{one.ssim:.4f}", inside)
    low, high = (100 * end for end in one.accuracy_interval)
    return (one.name, f"{100 * one.accuracy:.1f} ({low:.1f} to {high:.1f})", accuracy, *close, frechet)


def _worst_layers(static: Quality, others: Sequence[Quality]) -> Iterator[str]:
    worst = {name: value for name, value in static.layers.items() if value <= THEORY - 1}
    yield f"Layers that static per tensor leaves 1 dB or more under {THEORY} dB: {len(worst)} of {len(static.layers)}."
    if not worst or not others:
        return
    rows = []
    for name, value in sorted(worst.items(), key=lambda item: item[1]):
        best = max(others, key=lambda other: other.layers[name])
        closed = (best.layers[name] - value) / (THEORY - value)
        rows.append((name, f"{value:.1f}", f"{best.layers[name]:.1f}", best.name, f"{100 * closed:.0f} %"))
    yield ""
    yield from markdown_table(("layer", "static dB", "best dB", "with", "of the gap"), rows)


def run(
    folder: Path,
    *,
    rows: Sequence[int] = tuple(range(len(ROWS))),
    fast: bool = False,
    prompts: int = 512,
    seeds: int = 4,
    pictures: int = 4000,
    steps: int = MAIN.steps,
    calibration: int = 32,
    batch: int = 256,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    processes: int | None = None,
    tuned: Mapping[str, str | Path] | None = None,
) -> Iterator[Quality]:
    """Measure rows of `ROWS`, and write fp8_quality.json and fp8_quality.md into the folder after each.

    Args:
        folder: The folder of the table and the numbers; made where it is missing.
        rows: Numbers of the rows; the first is 0, the model that is not quantized, which the others are held against.
        fast: Whether to draw with each row's accelerated pipeline too, as a row of its own.
        prompts: Number of held-out prompts whose pictures are scored.
        seeds: Pictures of each prompt.
        pictures: Number of pictures for the Fréchet distance; the scored ones are among them.
        steps: Sampler steps of each picture.
        calibration: Number of prompts, of no held-out combination, that static scales are calibrated with.
        batch: Pictures drawn at once.
        device, dtype: The device and dtype of the models.
        processes: Processes that score pictures; None takes one per core.
        tuned: Folders of fine-tuned models in float8, measured after the rows, by the names that they get.

    Raises:
        ValueError: the first row is not 0, or a row does not exist.
    """
    if not rows or rows[0] != 0 or not all(0 <= row < len(ROWS) for row in rows):
        said = f"the first must be 0, the model that is not quantized, the others at most {len(ROWS) - 1}"
        raise ValueError(f"rows {list(rows)}: {said}")
    make_folder(folder)
    count = -(-max(pictures, prompts * seeds) // seeds)
    texts = [text for text in make_prompts(count, SEED, held_out=True) for _ in range(seeds)]
    calibrating = make_prompts(calibration, SEED + 7, held_out=False)
    setting = replace(MAIN, steps=steps)
    more = [Row(name, None, folder=Path(at)) for name, at in (tuned or {}).items()]
    found: list[Quality] = []
    base: Drawn | None = None
    rendered: Tensor | None = None
    with workers(processes) as pool:
        for row in [*(ROWS[i] for i in rows), *more]:
            start = time.monotonic()
            before, pipe = built(row, device, dtype, calibrating, steps)
            if rendered is None:
                scenes = render(sample(len(texts), 11))
                rendered = torch.cat([features(pipe.vae, part) for part in scenes.split(batch)])
            inner: tuple[float | None, dict[str, float]] = inner_snr(before, pipe.transformer, pipe, calibrating)
            for name in (row.name, f"{row.name}, fast") if fast else (row.name,):
                if name != row.name:
                    start, inner = time.monotonic(), (None, {})
                    pipe.accelerate()
                drawn = pictures_of(pipe, texts, prompts * seeds, batch, pool, setting)
                base = base or drawn
                seconds = time.monotonic() - start
                found.append(quality(replace(row, name=name), drawn, base, rendered, inner, seconds, device))
                write_text(folder / "fp8_quality.json", json.dumps([asdict(one) for one in found], indent=1) + "\n")
                write_text(folder / "fp8_quality.md", markdown(found))
                yield found[-1]
