"""Fine-tunes the embedded model for float8: `python -m mmdit.demo.train_float8 --out FOLDER --seconds 700`.

For each recipe, a copy of the transformer is calibrated: means are folded, weights rounded by the second moments of
their inputs (`quant.rounding`). Then it learns the velocities of the one in 16 bits, on the latents that this one meets
when it draws prompts; errors count as much as the VAE's decoder shows them, and no pictures are used. `fp8-static` is
trained as `fp8-tensor`, once for both, and gets the scales of the trained model's activations. A training that diverges
ends with its best weights, and a model that training has taken further from the one in 16 bits is not written.

`FOLDER/RECIPE` is the quantized model in the library's layout, and `FOLDER/RECIPE-calibrated` the one before the
training; `mmdit bench quality --tuned NAME=FOLDER` measures them.
The state is saved every minute, and an interrupted run resumes from it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from mmdit.checkpoints.load_pipeline import Components
from mmdit.demo.captions import prompts
from mmdit.demo.evaluate import MAIN, SEED
from mmdit.demo.export import export
from mmdit.demo.progress import save_whole
from mmdit.embedded import EMBEDDED
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.calibration import Calibration, calibrate, fold
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.seeds import generators
from mmdit.training.blocks import compile_blocks
from mmdit.training.distil import (
    Distilled,
    DivergedError,
    RecordedError,
    States,
    distil,
    guided,
    guided_loss,
    picture_channels,
    states_of,
    wanted_of,
)
from mmdit.training.journal import Journal, mean_of
from mmdit.training.rates import Every
from mmdit.utils import markdown_table, write_text
from quant.observers import observe
from quant.quantize import quantize_, snr
from quant.recipe import RECIPES
from quant.scaling import scale_of
from quant.tensor import Float8Tensor
from quant.training import fake_quantize_, quantize_trained_

__all__ = ["Float8Recipe", "main", "train"]

_TRAINED, _CALIBRATED, _CHECKED = SEED + 31, SEED + 7, SEED + 47  # seeds of prompts; those of the table have `SEED`


_STAGES = ("plain", "calibrated", "fine-tuned")


@dataclass(frozen=True)
class Float8Recipe:
    """Every number of a run."""

    prompts: int = 4608  # whose drawings give the latents
    held: int = 96  # of them, which are not trained on: their loss stands beside the other in the log
    calibration: int = 128  # prompts for static scales and second moments
    checked: int = 256  # held-out prompts whose drawings are compared at the end
    decoded: int = 32  # pictures that tell how much each channel of the latents counts
    followed: int = 32  # drawings that tell how much each step counts
    compiled: bool = False  # blocks, on a GPU
    batch: int = 60  # latents in a step, each with and without its prompt
    along: int = 5  # of them of each drawing
    drawn: int = 256  # drawings at a time
    rate: float = 5e-6  # small: codes that flip make most of a gradient chance, over which many small steps average
    steps: int = MAIN.steps  # of a drawing
    seed: int = 0
    log_seconds: float = 20.0
    save_seconds: float = 60.0


CPU = Float8Recipe(
    rate=1e-5, prompts=96, held=8, calibration=16, checked=16, decoded=2, followed=1, batch=8, along=4, drawn=16
)


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

    On a GPU calibration, the drawings that are learned from and compiling take one to two minutes of them.

    Args:
        folder: of states, log, table and models; RECIPE-calibrated is a model before its training.
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
    decode = partial(pictures, pipe)
    plain_seen, (folded, seen) = calibrated(pipe, recipe)
    journal.say(f"calibrated with {recipe.calibration} prompts")
    given: dict[str, Any] = {"num_inference_steps": recipe.steps, "guidance_scale": MAIN.guidance}
    texts = prompts(recipe.prompts, _TRAINED, held_out=False)
    drawing = pipe if device == "cpu" else Pipeline.from_pretrained(model, device=device, dtype=torch.bfloat16)
    states = states_of(drawing, texts, **given, seed=10_000, batch=recipe.drawn)
    states = states.with_velocities(drawing.transformer, recipe.drawn)
    states = states._replace(channels=picture_channels(decode, states.ends(recipe.decoded)))
    rounded = copy.deepcopy(teacher)
    quantize_(rounded, dynamic(recipes[0]))
    states = states.with_growth(teacher, rounded, recipe.followed)
    del drawing, rounded
    for what, of in (("weights", states.weight), ("chances", states.chance)):
        journal.say(f"{what} of the steps: {[] if of is None else [round(float(one), 2) for one in of]}")
    journal.say(f"{recipe.prompts} prompts drawn; first {texts[0]!r}")
    states, held = states.split(recipe.held)
    left = max(1.0, seconds - (time.monotonic() - start)) / len({dynamic(name) for name in recipes})
    found, rows, base = {}, [], drawn(pipe, teacher, recipe)
    trained: dict[str, MMDiT] = {}
    for name in recipes:
        plain, start_from = copy.deepcopy(teacher), copy.deepcopy(folded)
        quantize_(plain, name, input_scales=_static(name, input_scales(plain_seen)))
        quantize_(start_from, name, input_scales=_static(name, input_scales(seen)), moments=seen.moments())
        _written(pipe, start_from, folder / f"{name}-calibrated")
        if (by := dynamic(name)) not in trained:
            begin = with_activations(start_from, by)
            told = partial(held_out, teacher, decode, held, recipe)
            trained[by] = _tuned(by, begin, teacher, states, left, folder, journal, recipe, told)
        tuned = copy.deepcopy(trained[by])
        scales = _static(name, seen_scales(tuned, states, recipe))
        quantize_trained_(tuned)
        students = (plain, start_from, with_activations(tuned, name, scales))
        made = [drawn(pipe, student, recipe) for student in students]
        latents, close = [closeness(base, one) for one in made], [picture_psnr(decode, base, one) for one in made]
        journal.say(f"{name}, plain, calibrated, fine-tuned: SNR of latents {latents} dB, PSNR of pictures {close} dB")
        rows.append((name, *(f"{value:.2f}" for value in (*close, *latents))))
        found[name] = _written(pipe, students[_closer(name, close, journal)], folder / name)
    titles = ("recipe", *(f"{what}, {of}" for what in ("PSNR, dB", "SNR of latents, dB") for of in _STAGES))
    table = "\n".join(markdown_table(titles, rows)) + "\n"
    write_text(folder / "float8.md", table)
    journal.say("finished\n" + table)
    return found


def calibrated(pipe: Pipeline, recipe: Float8Recipe) -> tuple[Calibration, tuple[MMDiT, Calibration]]:
    """Statistics of the transformer over prompts that are not held out; a copy with folded means, and its own."""
    texts = prompts(recipe.calibration, _CALIBRATED, held_out=False)
    given: dict[str, Any] = {"guidance_scale": MAIN.guidance, "batch": min(32, recipe.drawn), "second": True}
    before = pipe.transformer
    seen, folded = calibrate(pipe, texts, recipe.steps, **given), copy.deepcopy(before)
    fold(folded, seen, mean=True)
    pipe.transformer = folded
    try:
        return seen, (folded, calibrate(pipe, texts, recipe.steps, **given))
    finally:
        pipe.transformer = before


def input_scales(seen: Calibration) -> dict[str, Tensor]:
    """Static scales of the activations."""
    return {name: scale_of(amax, "e4m3") for name, amax in seen.amax().items()}


def _static(name: str, scales: dict[str, Tensor]) -> dict[str, Tensor] | None:
    return scales if RECIPES[name].activation == "static" else None


def _closer(name: str, close: Sequence[float], journal: Journal) -> int:
    """Which of the plain, calibrated and fine-tuned models is written: the last, unless training made it worse."""
    if close[2] > close[1]:
        return 2
    journal.say(f"!!! {name}: THE TRAINING HAS MADE IT WORSE, AND THE CALIBRATED MODEL IS WRITTEN !!!")
    return 1


def dynamic(name: str) -> str:
    """The recipe that a recipe is trained as: one with a scale for each call, where its own scales are static.

    One training then serves both, and its activations may outgrow the ranges of before.
    """
    return "fp8-tensor" if RECIPES[name].activation == "static" else name


@torch.no_grad()
def seen_scales(student: MMDiT, states: States, recipe: Float8Recipe) -> dict[str, Tensor]:
    """Static scales of a student's activations, over the states of so many prompts as a calibration has."""
    with observe(student) as seen:
        for batch in states.parts(recipe.drawn, recipe.calibration):
            guided(student, batch, states.guidance)
    return {name: scale_of(one.amax, "e4m3") for name, one in seen.items()}


def with_activations(model: MMDiT, name: str, scales: dict[str, Tensor] | None = None) -> MMDiT:
    """A copy of a quantized model, of the same codes, whose activations are rounded as in the recipe `name`."""
    made = copy.deepcopy(model)
    for path, linear in made.named_modules():
        weight = getattr(linear, "weight", None)
        if isinstance(linear, nn.Linear) and isinstance(weight, Float8Tensor):
            scale = None if scales is None else scales[path]
            new = weight._replace(recipe=RECIPES[name], input_scale=scale)
            new.snr = weight.snr
            linear.weight = new.as_parameter()
    return made


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


@torch.no_grad()
def pictures(pipe: Pipeline, latents: Tensor) -> Tensor:
    """The pictures of latents, [b, 3, h, w] in -1 to 1."""
    return pipe.vae.decode(latents).clamp(-1, 1)


def picture_psnr(decode: Callable[[Tensor], Tensor], base: Tensor, other: Tensor, batch: int = 32) -> float:
    """The median over drawings of the PSNR of the pictures, in dB, at most 120; from latents of both."""
    pairs = zip(base.split(batch), other.split(batch), strict=True)
    errors = [(decode(a) - decode(b)).square().mean((1, 2, 3)) / 4 for a, b in pairs]
    return float((-10 * torch.cat(errors).clamp(min=1e-12).log10()).median())


def student_of(quantized: MMDiT, name: str) -> MMDiT:
    """A copy of a quantized model whose parameters all train, but not its scales."""
    student = copy.deepcopy(quantized)
    fakes = fake_quantize_(student, name).values()
    student.requires_grad_(True)
    for scale in (scale for fake in fakes for scale in (fake.weight_growth, fake.input_growth) if scale is not None):
        scale.requires_grad_(False)
    return student


def _tuned(
    name: str,
    start_from: MMDiT,
    teacher: MMDiT,
    states: States,
    seconds: float,
    folder: Path,
    journal: Journal,
    recipe: Float8Recipe,
    held: Callable[[MMDiT], dict[str, float]] = lambda _: {},
) -> MMDiT:
    """The student after its training, not yet in float8; a state in the folder is where it goes on.

    A training that diverges ends, and gives the weights of the best mean loss between two lines of the log.
    """
    student, path = student_of(start_from, name), folder / f"{name}.pt"
    done = 0.0
    if path.exists():
        state: dict[str, Any] = torch.load(path, map_location=states.x.device)
        student.load_state_dict(state["student"])
        done = state["done"]
        journal.say(f"{name}: going on, {done:.0%} done")
    log, save, losses = Every(recipe.log_seconds), Every(recipe.save_seconds), list[Tensor]()
    first = copy.deepcopy(student.state_dict())
    best, least = first, float("inf")
    left = max(1.0, (1 - done) * seconds)
    try:
        for found in _quickest(student, teacher, states, done, left, journal, recipe) if done < 1 else ():
            if found.step == 1:  # also of an attempt that follows one with wrong gradients, of which nothing is kept
                losses, best, least = [], first, float("inf")
                save_whole({"student": first, "done": done}, path)
            losses.append(found.loss)
            if found.apart is not None:
                journal.say(f"{name} step {found.step}: recorded gradients {found.apart:.2g} of their norm from eager")
            if log.due() or found.share >= 1 or found.step == 1:
                loss = mean_of(losses)
                journal.row(name, step=found.step, done=found.share, loss=loss, **held(student))
                losses = []
                if found.step > 1 and loss < least:
                    best, least = copy.deepcopy(student.state_dict()), loss
            if save.due() or found.share >= 1:
                save_whole({"student": student.state_dict(), "done": found.share}, path)
    except (DivergedError, FloatingPointError) as error:
        journal.say(f"!!! {name} DIVERGED, ITS BEST WEIGHTS ARE TAKEN: {error} !!!")
        student.load_state_dict(best)
        save_whole({"student": best, "done": 1.0}, path)
    return student.requires_grad_(False)


@torch.no_grad()
def held_out(
    teacher: MMDiT, decode: Callable[[Tensor], Tensor], held: States, recipe: Float8Recipe, student: MMDiT
) -> dict[str, float]:
    """What a student does with drawings that are not trained on: the loss, and the PSNR of its own pictures, in dB."""
    generator, found = torch.Generator(held.x.device).manual_seed(recipe.seed), list[Tensor]()
    shares, narrow = held.shares(recipe.along), torch.autocast(held.x.device.type, torch.bfloat16, held.x.is_cuda)
    with narrow, torch.compiler.set_stance("force_eager"):
        for _ in range(max(1, len(held.x) * len(held.sigma) // (2 * recipe.batch))):
            batch = held.draw(recipe.batch, generator, recipe.along, shares)
            wanted = wanted_of(teacher, batch, held.guidance)
            found.append(guided_loss(student, wanted, batch, held.guidance, recipe.along, held.channels))
        own = held.drawn(student)
    loss, close = torch.stack(found).mean(), picture_psnr(decode, held.ends(len(held.x)), own)
    return {"held_out_loss": float(loss), "held_out_psnr": close}


def _quickest(
    student: MMDiT,
    teacher: MMDiT,
    states: States,
    done: float,
    seconds: float,
    journal: Journal,
    recipe: Float8Recipe,
) -> Iterator[Distilled]:
    """The training, on a GPU in a CUDA graph, with compiled blocks if the recipe says so.

    The log says loudly what could not be had. A recorded step that is found wrong gives the attempt up: the next one
    starts from the first weights, with step 1.
    """
    given: dict[str, Any] = {"rate": recipe.rate, "batch": recipe.batch, "along": recipe.along, "seed": recipe.seed}
    given["autocast"] = torch.bfloat16 if states.x.is_cuda else None
    start, first_weights = time.monotonic(), copy.deepcopy(student.state_dict())
    ways = ((True, True), (False, True), (False, False)) if states.x.is_cuda else ((False, False),)
    for compiled, recorded in ways[0 if recipe.compiled else -2 :]:
        with ExitStack() as stack:
            left = max(1.0, seconds - (time.monotonic() - start))
            found = distil(student, teacher, states, seconds=left, done=done, recorded=recorded, **given)
            begun = False
            try:
                if compiled:
                    stack.enter_context(compiled_blocks(student))
                for one in found:
                    if not begun:
                        journal.say(f"{compiled=}, {recorded=}; first step after {time.monotonic() - start:.1f} s")
                    begun = True
                    yield one
                return
            except (RuntimeError, TorchDynamoException) as error:
                refused = isinstance(error, RecordedError) or (not begun and not isinstance(error, DivergedError))
                if (compiled, recorded) == ways[-1] or not refused:
                    raise
                journal.say(f"!!! NO TRAINING WITH {compiled=}, {recorded=}, GOING ON WITHOUT: {error} !!!")
                student.load_state_dict(first_weights)


@contextmanager
def compiled_blocks(model: MMDiT) -> Iterator[None]:
    """Inside, the blocks of the model are compiled, with static shapes."""
    compile_blocks(model.joint_blocks)
    try:
        yield
    finally:
        for block in model.joint_blocks:
            block._compiled_call_impl = None


def _written(pipe: Pipeline, student: MMDiT, folder: Path) -> Path:
    texts = (pipe.clip_l, pipe.clip_g, pipe.t5)
    export(Components(student, pipe.vae, *texts, pipe.tokenizers, pipe.shift), folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mmdit.demo.train_float8", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of states, log, table and models")
    parser.add_argument("--seconds", type=float, default=700.0, help="of the clock, with calibration and compiling")
    parser.add_argument("--recipes", nargs="+", default=["fp8-static", "fp8-tensor"], choices=sorted(RECIPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="in 16 bits (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="of Adam (default: that of the recipe)")
    parser.add_argument("--batch", type=int, help="latents in a step (default: that of the recipe)")
    parser.add_argument("--along", type=int, help="of them of each drawing (default: that of the recipe)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, on a GPU")
    options = parser.parse_args(arguments)
    given = {"rate": options.rate, "batch": options.batch, "along": options.along, "compiled": options.compile or None}
    recipe = CPU if options.device == "cpu" else Float8Recipe()
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    torch.set_float32_matmul_precision("high")  # the mantissa of TF32 holds every float8 code
    train(options.out, options.seconds, options.recipes, recipe=recipe, device=options.device, model=options.model)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
