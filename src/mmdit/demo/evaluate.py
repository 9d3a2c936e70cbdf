"""The share of what prompts state that the model draws: `python -m mmdit.demo.evaluate --prompts 64 --seeds 1`.

`--table guidance` compares kinds of guidance, `--table steps` says how accuracy falls with few steps.

Pictures come from the library's own `Pipeline`, are rounded to 8 bits as a saved file is, and are read by
`mmdit.demo.score`, which never sees the prompt.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmdit.checkpoints.load_pipeline import Components
from mmdit.demo.captions import prompts as make_prompts
from mmdit.demo.data import workers
from mmdit.demo.grammar import KINDS, Statement
from mmdit.demo.score import accuracies, macro_average, score_batch
from mmdit.demo.sheet import contact_sheet
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.guidance import Guidance
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.seeds import generators
from mmdit.utils import markdown_table, replacing, write_text
from samplers import SOLVERS, pick

__all__ = [
    "GUIDES",
    "MAIN",
    "SETTINGS",
    "Result",
    "Setting",
    "draw",
    "evaluate",
    "evaluate_all",
    "few_steps",
    "main",
    "markdown",
]

SEED = 20_260_101  # seed of the prompts
_SCORED = 64  # pictures of one scoring task


@dataclass(frozen=True)
class Setting:
    """One row of the table. Defaults are the main row; t5 is the T5 length, or what stands for a missing T5."""

    name: str
    steps: int = 20
    guidance: float = 4.5
    t5: Literal["256", "77", "zeros", "omitted"] = "256"
    held_out: bool = True
    sampler: str | None = None  # None is the pipeline's
    schedule: str | None = None
    how: Guidance | None = None


MAIN = Setting("main: held-out prompts, 20 steps, guidance 4.5, T5 256")
SETTINGS: tuple[Setting, ...] = (  # in order of importance: an evaluation that runs out of time leaves out the last
    MAIN,
    Setting("T5 77", t5="77"),
    Setting("T5 missing: zeros", t5="zeros"),
    Setting("T5 missing: omitted", t5="omitted"),
    Setting("guidance 1", guidance=1.0),
    Setting("guidance 7", guidance=7.0),
    Setting("10 steps", steps=10),
    Setting("prompts as in training", held_out=False),
    Setting("50 steps", steps=50),
)
# The sizes of APG's threshold go with the latents: here 4096 numbers, in SDXL 65536.
GUIDES: tuple[Setting, ...] = (
    Setting("plain, 4.5"),
    Setting("none", guidance=1.0),
    Setting("plain, 12", guidance=12.0),
    Setting("rescaled 0.7, 4.5", how=Guidance(rescale=0.7)),
    Setting("rescaled 0.7, 12", guidance=12.0, how=Guidance(rescale=0.7)),
    Setting("APG, 4.5", how=Guidance(kind="apg", threshold=4.0, momentum=-0.5)),
    Setting("APG, 12", guidance=12.0, how=Guidance(kind="apg", threshold=4.0, momentum=-0.5)),
    Setting("interval 0.2 to 0.9, 4.5", how=Guidance(interval=(0.2, 0.9))),
    Setting("interval 0 to 0.9, 4.5", how=Guidance(interval=(0.0, 0.9))),
    Setting("CFG-Zero*, 4.5", how=Guidance(kind="zero_star", zero_init=1)),
    Setting("CFG-Zero* without zero-init, 4.5", how=Guidance(kind="zero_star")),
    Setting("skip layer 1, 4.5", how=Guidance(skip_guidance_layers=(1,))),
    Setting("skip layer 2, 4.5", how=Guidance(skip_guidance_layers=(2,))),
    Setting("perturbed layer 1, 4.5", how=Guidance(perturbed_layers=(1,), perturbed_scale=1.0)),
    Setting("perturbed layer 2, 4.5", how=Guidance(perturbed_layers=(2,), perturbed_scale=1.0)),
    Setting("perturbed layer 2 alone", guidance=1.0, how=Guidance(perturbed_layers=(2,))),
)
FEW = (1, 2, 3, 4, 6, 8, 12, 20)


@dataclass(frozen=True)
class Result:
    """The result of one setting: the share of fulfilled statements and their number, by kind."""

    setting: Setting
    by_kind: dict[str, tuple[float, int]]
    pictures: int
    seconds: float

    @property
    def macro(self) -> float:
        """The mean over kinds."""
        return macro_average(self.by_kind)


def draw(
    pipe: Pipeline, prompts: Sequence[str], seeds: Sequence[int], setting: Setting, batch: int
) -> Iterator[Tensor]:
    """Pictures of prompts with a seed each, uint8 [b, 3, h, w] on the CPU, `batch` at a time."""
    pipe, length = _with_t5(pipe, setting)
    guided = setting.guidance > 1
    uncond = pipe.encode([""], max_sequence_length=length) if guided else None
    for first in range(0, len(prompts), batch):
        texts = list(prompts[first : first + batch])
        cond = pipe.encode(texts, max_sequence_length=length)
        drawn_by = generators(list(seeds[first : first + batch]), None, len(texts))
        *_, last = pipe.sample(
            cond,
            uncond.repeat(len(texts)) if uncond is not None else None,
            pipe.noise(count=len(texts), generator=drawn_by),
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance,
            sampler=setting.sampler,
            schedule=setting.schedule,
            generator=drawn_by,
            guidance=setting.how,
        )
        yield (255 * pipe.decode(last.x)).round().to(torch.uint8).cpu()


def evaluate(
    pipe: Pipeline,
    setting: Setting,
    prompts: int,
    seeds: int,
    *,
    batch: int = 64,
    pool: Executor | None = None,
) -> Result:
    """Draw `prompts` prompts with `seeds` seeds each and score them.

    Args:
        pipe: the model.
        setting: how to draw.
        prompts: how many, the same ones for every setting with the same `held_out`.
        seeds: pictures of each prompt; no two pictures start from the same noise.
        batch: pictures drawn at once.
        pool: processes for the scoring; None scores in this one.
    """
    start = time.monotonic()
    texts = [text for text in make_prompts(prompts, SEED, held_out=setting.held_out) for _ in range(seeds)]
    verdicts: list[dict[Statement, bool]] = []
    waiting = []
    done = 0
    for pictures in draw(pipe, texts, range(len(texts)), setting, batch):
        for part in pictures.split(_SCORED):
            said = texts[done : done + len(part)]
            done += len(part)
            if pool is None:
                verdicts += _verdicts(part.numpy(), said)
            else:
                waiting.append(pool.submit(_verdicts, part.numpy(), said))
    verdicts += [verdict for future in waiting for verdict in future.result()]
    return Result(setting, accuracies(verdicts), len(texts), time.monotonic() - start)


def evaluate_all(
    pipe: Pipeline,
    folder: Path,
    settings: Sequence[Setting] = SETTINGS,
    *,
    prompts: int,
    seeds: int,
    batch: int,
    pool: Executor | None,
    seconds: float = float("inf"),
) -> list[Result]:
    """Evaluate settings until `seconds` are over (the first always); table and numbers in `folder` grow with each."""
    results: list[Result] = []
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        pace = sum(r.seconds for r in results) / max(sum(_cost(r.setting) for r in results), 1)
        if results and time.monotonic() - start + pace * _cost(setting) > seconds:
            continue
        results.append(evaluate(pipe, setting, prompts, seeds, batch=batch, pool=pool))
        left_out = [s.name for s in settings if s not in [r.setting for r in results]]
        write_text(folder / "evaluation.md", markdown(results, left_out, pipe))
        rows = [asdict(result) | {"macro": result.macro} for result in results]
        write_text(folder / "evaluation.json", json.dumps(rows, indent=1) + "\n")
    return results


def markdown(results: Sequence[Result], left_out: Sequence[str], pipe: Pipeline) -> str:
    """The results as a table in percent."""
    drawn = f"Drawn in {str(pipe.dtype).removeprefix('torch.')} on {pipe.device.type}; fulfilled statements in percent."
    rows = []
    for result in results:
        shares = (f"{100 * result.by_kind[kind][0]:.1f}" if kind in result.by_kind else "-" for kind in KINDS)
        scores = (f"{100 * result.macro:.1f}", *shares)
        rows.append((result.setting.name, *scores, result.pictures, f"{result.seconds:.1f}"))
    lines = [drawn, "", *markdown_table(("setting", "macro", *KINDS, "pictures", "seconds"), rows)]
    if results:
        counted = ", ".join(f"{kind} {n}" for kind, (_, n) in results[0].by_kind.items())
        lines += ["", f"Statements scored in the first row: {counted}."]
    if left_out:
        lines += ["", f"Not run, for want of time: {'; '.join(left_out)}."]
    return "\n".join(lines) + "\n"


def few_steps(solvers: Sequence[str]) -> tuple[Setting, ...]:
    """Each solver with 1 to 20 steps, without guidance, as Turbo models draw, and with it.

    Raises:
        ValueError: there is no such solver.
    """
    for sampler in solvers:
        pick(SOLVERS, sampler, "sampler")
    return tuple(
        Setting(f"{sampler}, {steps} steps, guidance {guidance:g}", steps, guidance, sampler=sampler)
        for sampler in solvers
        for guidance in (1.0, 4.5)
        for steps in FEW
    )


def write_sheet(pipe: Pipeline, path: Path, setting: Setting = MAIN, count: int = 32) -> None:
    """A contact sheet of held-out prompts, seeds 0, 1, ..."""
    texts = make_prompts(count, SEED + 1, held_out=True)
    pictures = torch.cat(list(draw(pipe, texts, range(count), setting, 32)))
    with replacing(path) as part:
        contact_sheet(pictures, texts).save(part, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mmdit.demo.evaluate", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=EMBEDDED, help="model folder")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt")
    tables = ("main", "guidance", "steps")
    parser.add_argument("--table", choices=tables, default="main", help="what its rows compare (default: %(default)s)")
    rows = f"of the table (default: 1 of {len(SETTINGS)} for main, all for others)"
    parser.add_argument("--rows", type=int, default=None, help=rows)
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m"], help="of --table steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row that would end later")
    parser.add_argument("--workers", type=int, default=None, help="scoring processes; all cores unless given")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of table and numbers")
    args = parser.parse_args(arguments)
    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    settings = {"main": SETTINGS, "guidance": GUIDES, "steps": few_steps(args.samplers)}[args.table]
    rows_of = args.rows or (1 if args.table == "main" else len(settings))
    with workers(args.workers) as pool:
        evaluate_all(
            pipe,
            args.out,
            settings[:rows_of],
            prompts=args.prompts,
            seeds=args.seeds,
            batch=args.batch,
            pool=pool,
            seconds=60 * args.minutes,
        )
    if args.table == "main":
        write_sheet(pipe, args.out / "contact_sheet.png")
    print((args.out / "evaluation.md").read_text(encoding="utf-8"))  # noqa: T201
    return 0


def _with_t5(pipe: Pipeline, setting: Setting) -> tuple[Pipeline, int | None]:
    """Return a pipeline with the setting's T5 choice, sharing all weights, and the T5 length."""
    if setting.t5 in ("256", "77"):
        return pipe, int(setting.t5)
    missing: Literal["zeros", "omit"] = "zeros" if setting.t5 == "zeros" else "omit"
    profile = replace(pipe.profile, text=replace(pipe.profile.text, missing_t5=missing))
    parts = Components(pipe.transformer, pipe.vae, pipe.clip_l, pipe.clip_g, None, pipe.tokenizers, pipe.shift)
    return Pipeline(parts, profile=profile), None


def _verdicts(pictures: np.ndarray, prompts: list[str]) -> list[dict[Statement, bool]]:
    return score_batch(torch.from_numpy(pictures).float() / 255, prompts)


def _cost(setting: Setting) -> float:
    passes = (2 if setting.guidance > 1 else 1) + bool(setting.how and setting.how.perturbed_layers)
    return 0.5 * passes * setting.steps


if __name__ == "__main__":
    warnings.simplefilter("default")
    raise SystemExit(main())
