"""Fine-tunes the embedded model for float8: `python -m mmdit.demo.train_float8 --out FOLDER --seconds 700`.

For each recipe, a copy of the transformer that computes in float8 learns the velocities of the one in 16 bits, on the
latents that this one meets when it draws prompts; no pictures are used. `FOLDER/RECIPE` is the quantized model in the
library's layout, which `mmdit bench quality --tuned RECIPE=FOLDER/RECIPE` measures. The state is saved every minute,
and an interrupted run resumes from it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.checkpoints.load_pipeline import Components
from mmdit.demo.captions import prompts
from mmdit.demo.evaluate import MAIN, SEED
from mmdit.demo.export import export
from mmdit.demo.progress import save_whole
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.calibration import calibrate
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.seeds import generators
from mmdit.training.distil import States, distil, states_of
from mmdit.training.journal import Journal, mean_of
from mmdit.training.rates import Every
from mmdit.utils import markdown_table, write_text
from quant.quantize import quantize_, snr
from quant.recipe import RECIPES
from quant.scaling import scale_of
from quant.training import fake_quantize_, quantize_trained_

__all__ = ["Float8Recipe", "main", "train"]

_TRAINED, _CALIBRATED, _CHECKED = SEED + 31, SEED + 7, SEED + 47  # seeds of prompts; those of the table have `SEED`


@dataclass(frozen=True)
class Float8Recipe:
    """Every number of a run."""

    prompts: int = 2048  # whose drawings give the latents
    calibration: int = 32  # prompts for static scales
    checked: int = 256  # held-out prompts whose drawings are compared at the end
    batch: int = 64  # latents in a step, each with and without its prompt
    drawn: int = 256  # drawings at a time
    rate: float = 6e-5
    steps: int = MAIN.steps  # of a drawing
    seed: int = 0
    log_seconds: float = 20.0
    save_seconds: float = 60.0


CPU = Float8Recipe(prompts=96, calibration=16, checked=16, batch=6, drawn=16)


def train(
    folder: Path,
    seconds: float,
    recipes: Sequence[str] = ("fp8-static", "fp8-tensor"),
    *,
    recipe: Float8Recipe | None = None,
    device: str = "cpu",
    model: Path = EMBEDDED,
) -> dict[str, Path]:
    """Fine-tune the model of a folder for each recipe, in so many seconds in all; returns the folders of the models.

    Args:
        folder: of states, log, table and models.
        seconds: of the clock, without the table at the end.
        recipes: names of `quant.RECIPES`.
        recipe: None is the device's.
        device: of the training.
        model: the folder of the model in 16 bits.
    """
    recipe = recipe or (CPU if device == "cpu" else Float8Recipe())
    journal, start = Journal(folder), time.monotonic()
    pipe = Pipeline.from_pretrained(model, device=device, dtype=torch.float32)
    teacher = pipe.transformer.requires_grad_(False)
    scales = input_scales(pipe, recipe) if any(RECIPES[name].activation == "static" for name in recipes) else {}
    given: dict[str, Any] = {"num_inference_steps": recipe.steps, "guidance_scale": MAIN.guidance}
    texts = prompts(recipe.prompts, _TRAINED, held_out=False)
    states = states_of(pipe, texts, **given, seed=10_000, batch=recipe.drawn)
    journal.say(f"{recipe.prompts} prompts drawn; first {texts[0]!r}")
    left = max(1.0, seconds - (time.monotonic() - start)) / len(recipes)
    found, rows, base = {}, [], drawn(pipe, teacher, recipe)
    for name in recipes:
        static = scales if RECIPES[name].activation == "static" else None
        student = copy.deepcopy(teacher)
        quantize_(student, name, input_scales=static)
        plain = closeness(base, drawn(pipe, student, recipe))
        student = _tuned(name, teacher, states, static, left, folder, journal, recipe)
        rows.append((name, f"{plain:.2f}", f"{closeness(base, drawn(pipe, student, recipe)):.2f}"))
        found[name] = _written(pipe, student, folder / name)
    table = "\n".join(markdown_table(("recipe", "SNR of latents in dB, plain", "fine-tuned"), rows)) + "\n"
    write_text(folder / "float8.md", table)
    journal.say("finished\n" + table)
    return found


def input_scales(pipe: Pipeline, recipe: Float8Recipe) -> dict[str, Tensor]:
    """Static scales of the activations, from drawings of prompts that are not held out."""
    texts = prompts(recipe.calibration, _CALIBRATED, held_out=False)
    seen = calibrate(pipe, texts, recipe.steps, guidance_scale=MAIN.guidance, batch=min(32, recipe.drawn))
    return {name: scale_of(amax, "e4m3") for name, amax in seen.amax().items()}


@torch.no_grad()
def drawn(pipe: Pipeline, model: MMDiT, recipe: Float8Recipe) -> Tensor:
    """The latents that a model of the pipeline draws of held-out prompts, [b, c, h, w]."""
    texts = prompts(recipe.checked, _CHECKED, held_out=True)
    before, pipe.transformer = pipe.transformer, model
    nothing, found = pipe.encode([""]), []
    try:
        for first in range(0, len(texts), recipe.drawn):
            some = texts[first : first + recipe.drawn]
            drawn_by = generators(list(range(first, first + len(some))), None, len(some))
            noise = pipe.noise(count=len(some), generator=drawn_by)
            given: dict[str, Any] = {"num_inference_steps": recipe.steps, "guidance_scale": MAIN.guidance}
            *_, last = pipe.sample(pipe.encode(some), nothing.repeat(len(some)), noise, **given)
            found.append(last.x.float())
    finally:
        pipe.transformer = before
    return torch.cat(found)


def closeness(base: Tensor, other: Tensor) -> float:
    """The median over drawings of the SNR of the latents, in dB."""
    return float(torch.tensor([snr(a, b) for a, b in zip(base, other, strict=True)]).median())


def _tuned(
    name: str,
    teacher: MMDiT,
    states: States,
    scales: dict[str, Tensor] | None,
    seconds: float,
    folder: Path,
    journal: Journal,
    recipe: Float8Recipe,
) -> MMDiT:
    """The student after its training, in float8; a state in the folder is where it goes on."""
    student, path = copy.deepcopy(teacher).requires_grad_(True), folder / f"{name}.pt"
    fake_quantize_(student, name, input_scales=scales)
    done = 0.0
    if path.exists():
        state: dict[str, Any] = torch.load(path, map_location=states.x.device)
        student.load_state_dict(state["student"])
        done = state["done"]
        journal.say(f"{name}: going on, {done:.0%} done")
    log, save, losses = Every(recipe.log_seconds), Every(recipe.save_seconds), list[Tensor]()
    given: dict[str, Any] = {"rate": recipe.rate, "batch": recipe.batch, "seed": recipe.seed, "done": done}
    if done < 1:
        for found in distil(student, teacher, states, seconds=max(1.0, (1 - done) * seconds), **given):
            losses.append(found.loss)
            if log.due() or found.share >= 1 or found.step == 1:
                journal.row(name, step=found.step, done=found.share, loss=mean_of(losses))
                losses = []
            if save.due() or found.share >= 1:
                save_whole({"student": student.state_dict(), "done": found.share}, path)
    student.requires_grad_(False)
    quantize_trained_(student)
    return student


def _written(pipe: Pipeline, student: MMDiT, folder: Path) -> Path:
    texts = (pipe.clip_l, pipe.clip_g, pipe.t5)
    export(Components(student, pipe.vae, *texts, pipe.tokenizers, pipe.shift), folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mmdit.demo.train_float8", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of states, log, table and models")
    parser.add_argument("--seconds", type=float, default=700.0, help="of all training")
    parser.add_argument("--recipes", nargs="+", default=["fp8-static", "fp8-tensor"], choices=sorted(RECIPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="in 16 bits (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")  # the mantissa of TF32 holds every float8 code
    train(options.out, options.seconds, options.recipes, device=options.device, model=options.model)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
