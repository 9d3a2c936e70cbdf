"""A user's own weights, here and in diffusers: token ids, encoders, every block, sampler steps and pixels compared.

Each side runs from the prompts to the picture on its own, so an error shows first in the stage that makes it.
Needs the extra `test`, for diffusers and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from encoders import Tokenizers
from mmdit.checkpoints.load import open_model
from mmdit.checkpoints.locate import Found, locate, open_weights, with_neighbours
from mmdit.checkpoints.write import write_checkpoint
from mmdit.parity.traces import GUIDANCE, Job, Trace, trace_ours, trace_theirs
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.precision import full_float32
from quant.quantize import dequantize_
from quant.spellings import FLOAT8

PROMPT, NEGATIVE = 'A photo of a red fox beside 3 blue birds, and a sign that says "wow!"', "blurry, Low quality"
DTYPES = (torch.float32, torch.float64)


class Limit(NamedTuple):
    """The largest relative L2 error that passes, and why it is that."""

    value: float
    reason: str


_MODEL = "rounding of float32 layers; in float64 too, where diffusers computes parts in float32"
LIMITS = {  # by group, in the order in which they are computed
    "tokens": Limit(0, "ids are right or wrong"),
    "encoders": Limit(1e-5, _MODEL),
    "conditioning": Limit(1e-5, "the encoders' outputs, only moved"),
    "noise": Limit(0, "the same draws of the same generator"),
    "schedule": Limit(1e-6, "diffusers keeps its levels in float32"),
    "embedders": Limit(1e-5, _MODEL),
    "blocks": Limit(1e-5, _MODEL),
    "velocity": Limit(1e-5, _MODEL),
    "latents": Limit(1e-4, "each step adds the velocities' errors, times the guidance"),
    "pixels": Limit(1e-4, "the last latent's error, and rounding in the VAE"),
}
GROUPS = tuple(LIMITS)
_STEP_FLOAT64 = 1e-6  # instead of 1e-4 for latents and pixels; diffusers' scheduler steps in float32


@dataclass(frozen=True)
class Stage:
    """One comparison."""

    group: str  # one of GROUPS
    name: str
    error: float  # relative L2; inf where shapes differ, a number is not finite, or one side has nothing
    limit: Limit
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit.value


@dataclass(frozen=True)
class Report:
    """All stages, in the order in which they are computed."""

    subject: str
    settings: tuple[str, ...]
    stages: tuple[Stage, ...]

    @property
    def first_failure(self) -> Stage | None:
        """The first stage beyond its tolerance; those after it inherit its error."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def passed(self) -> bool:
        """Whether every stage is within its tolerance."""
        return self.first_failure is None

    def text(self) -> str:
        """Settings, a table of all stages, the reasons of the limits, and the verdict in the last lines."""
        reasons = {stage.group: stage.limit.reason for stage in self.stages}
        return "\n".join(
            [
                self.subject,
                *(f"  {line}" for line in self.settings),
                "",
                f"{'stage':<32} {'error':>8}  {'limit':>7}",
                *map(_row, self.stages),
                "",
                "Errors are relative L2. Limits:",
                *(f"  {group:<13} {reason}" for group, reason in reasons.items()),
                "",
                *self._verdict(),
            ]
        )

    def _verdict(self) -> list[str]:
        first = self.first_failure
        if first is None:
            return [f"PASS: all {len(self.stages)} stages are within tolerance"]
        failed = sum(not stage.passed for stage in self.stages)
        found = first.note or f"error {first.error:.1e}, limit {first.limit.value:.0e}"
        return [
            f"FAIL: {failed} of {len(self.stages)} stages are beyond tolerance",
            f"First: {first.group} {first.name}: {found}",
            "Where it is only a few times the limit, run again in float64: rounding nearly vanishes, a fault stays.",
        ]


def verify(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prompt: str = PROMPT,
    negative_prompt: str = NEGATIVE,
    steps: int = 3,
    size: int | tuple[int, int] | None = None,
    ours: Pipeline | None = None,
) -> Report:
    """Compare our pipeline with diffusers' `StableDiffusion3Pipeline` on the same weights, stage by stage.

    It takes the memory of one side's models at `dtype`: ours are freed before theirs are read. A checkpoint that
    diffusers cannot read as it lies there is rewritten for it in a temporary folder, which takes its size on disk.

    Args:
        folder: a checkpoint that is enough for a picture, in any layout; or a single file.
        device: where both sides run.
        dtype: float32 or float64. Stored weights of any dtype are widened to it without loss.
        prompt, negative_prompt: what both sides read.
        steps: of the sampler, with guidance.
        size: of the picture in pixels: a side, or (height, width). None is 192 x 256, or less for a small model.
        ours: our pipeline, where it is loaded already; it must be on `device` and in `dtype`.

    Raises:
        ImportError: diffusers or transformers is missing; the message names the extra.
        ValueError: a dtype whose rounding would hide faults, or a size that does not fit.
        FileNotFoundError, mmdit.CheckpointError: see `Pipeline.from_pretrained`.
    """
    diffusers, transformers = _libraries()
    _check_dtype(dtype, ours)
    path = Path(folder)
    with torch.no_grad(), full_float32():
        job, found = _ours(path, ours, (prompt, negative_prompt), steps, size, device, dtype)
        where = with_neighbours(locate(path))
        with _for_diffusers(where, dtype) as (reference, how):
            theirs = _load(diffusers, reference, job, has_t5="t5" in where.weights)
            wanted = trace_theirs(theirs, job, found["noise", "latents"].to(job.device))
    name = str(dtype).removeprefix("torch.")
    settings = (
        f"{name} on {job.device}, {job.height} x {job.width} pixels, steps {steps}, guidance {GUIDANCE:g}",
        f"reference: diffusers {diffusers.__version__} with transformers {transformers.__version__}",
        f"its weights: {how}",
    )
    return Report(f"verify {folder}", settings, compare_traces(found, wanted, dtype))


def compare_traces(ours: Trace, theirs: Trace, dtype: torch.dtype) -> tuple[Stage, ...]:
    """A stage for everything that either side recorded, ordered by group."""
    keys = sorted(ours | theirs, key=lambda key: GROUPS.index(key[0]))
    return tuple(_stage(key, ours.get(key), theirs.get(key), dtype) for key in keys)


def _stage(key: tuple[str, str], ours: Tensor | None, theirs: Tensor | None, dtype: torch.dtype) -> Stage:
    group, name = key
    limit = _limit(group, name, dtype)
    if ours is None or theirs is None:
        return Stage(group, name, math.inf, limit, f"only {'diffusers' if ours is None else 'we'} have it")
    if ours.shape != theirs.shape:
        note = f"shape {list(ours.shape)} here, {list(theirs.shape)} in diffusers"
        return Stage(group, name, math.inf, limit, note)
    error = _error(ours.double(), theirs.double())
    return Stage(group, name, error, limit, _note(group, ours, theirs))


def _limit(group: str, name: str, dtype: torch.dtype) -> Limit:
    limit = LIMITS[group]
    if group not in ("latents", "pixels"):
        return limit
    per_step = limit.value if dtype == torch.float32 else _STEP_FLOAT64
    return limit._replace(value=per_step * (int(name.removeprefix("step ")) if group == "latents" else 1))


def _error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, where wanted is not zero; NaN is infinitely wrong."""
    size = float(wanted.norm())
    error = float((found - wanted).norm()) / (size or 1.0)
    return error if math.isfinite(error) else math.inf


def _note(group: str, ours: Tensor, theirs: Tensor) -> str:
    """What an error does not say: which ids differ, and who has numbers that are not finite."""
    odd = [who for who, values in (("here", ours), ("in diffusers", theirs)) if not values.isfinite().all()]
    if odd:
        return f"not finite {' and '.join(odd)}"
    return _differing_ids(ours, theirs) if group == "tokens" else ""


def _differing_ids(ours: Tensor, theirs: Tensor) -> str:
    places = (ours != theirs).nonzero().tolist()
    if not places:
        return ""
    row, column = places[0]
    text = ("the prompt", "the negative prompt")[row]
    pair = f"{int(ours[row, column])} here, {int(theirs[row, column])} in diffusers"
    return f"{len(places)} of {ours.numel()} ids differ, the first at {column} of {text}: {pair}"


def _row(stage: Stage) -> str:
    mark = "ok" if stage.passed else f"BEYOND  {stage.note}".rstrip()
    label = f"{stage.group:<13} {stage.name}"
    return f"{label:<32} {stage.error:>8.1e}  {stage.limit.value:>7.0e}  {mark}"


def _ours(
    folder: Path,
    pipe: Pipeline | None,
    prompts: tuple[str, str],
    steps: int,
    size: int | tuple[int, int] | None,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[Job, Trace]:
    """What to draw, and what we compute; a pipeline that is loaded here is freed on return."""
    if pipe is None:
        load = Pipeline.from_single_file if folder.is_file() else Pipeline.from_pretrained
        pipe = load(folder, device=device, dtype=dtype)
        for model in pipe.models.values():  # the reference has no float8
            dequantize_(model)
    job = Job(prompts, steps, *_pixels(pipe, size), pipe.device, dtype)
    return job, trace_ours(pipe, job)


def _pixels(pipe: Pipeline, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width; by default they differ, so that exchanged axes show."""
    if size is not None:
        return (size, size) if isinstance(size, int) else size
    unit = pipe.vae.config.downscale * pipe.transformer.config.patch_size
    side = min(256, pipe.transformer.config.max_pixels)
    return side * 3 // 4 // unit * unit, side


@contextmanager
def _for_diffusers(found: Found, dtype: torch.dtype) -> Iterator[tuple[Path, str]]:
    """A folder that diffusers reads, and how it came to be."""
    if _is_readable(found):
        yield found.path, "the same files"
        return
    how = f"a copy of these ({found.layout}), under names from our own key map, which tests prove against recorded ones"
    with TemporaryDirectory(prefix="mmdit-verify-") as place:
        yield _rewritten(found, Path(place, "diffusers"), dtype), how


def _is_readable(found: Found) -> bool:
    """Whether diffusers finds all models where they are, in dtypes that it computes in."""
    if found.layout != "diffusers" or not (found.path / "model_index.json").is_file():
        return False
    return not _has_float8(found) and not any(".fp16." in file.name for file in found.weights.values())


def _has_float8(found: Found) -> bool:
    return any(lazy.dtype in FLOAT8 for file in set(found.weights.values()) for lazy in open_weights(file)[0].values())


def _rewritten(found: Found, target: Path, dtype: torch.dtype) -> Path:
    assert found.tokenizers is not None, "our pipeline has read them"
    tokenizers = Tokenizers.from_folder(found.tokenizers, t5="t5" in found.weights)
    return write_checkpoint(
        [open_model(found, component) for component in found.weights],
        target,
        "diffusers",
        shift=3.0 if found.shift is None else found.shift,
        tokenizers=tokenizers.save,
        dtype=dtype if _has_float8(found) else None,
    )


def _libraries() -> tuple[Any, Any]:
    """diffusers and transformers, which nothing else in the library imports."""
    try:
        return import_module("diffusers"), import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"verify compares with diffusers and transformers, which the extra `test` brings ({error}): "
            'pip install "mmdit-lab[test]"'
        ) from error


def _load(diffusers: Any, folder: Path, job: Job, *, has_t5: bool) -> Any:
    without = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    load = diffusers.StableDiffusion3Pipeline.from_pretrained
    pipe = load(folder, local_files_only=True, **without).to(job.device, job.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_dtype(dtype: torch.dtype, ours: Pipeline | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"verify runs in float32 or float64, got {dtype}: in 16 bits two right implementations differ by more than "
            "a faulty one would. Stored 16-bit weights are widened without loss"
        )
    if ours is not None and ours.dtype != dtype:
        raise ValueError(f"the given pipeline is in {ours.dtype}, verify was asked for {dtype}")
