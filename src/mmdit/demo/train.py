"""Train the embedded model from nothing: `python -m mmdit.demo.train --out FOLDER --minutes 24`.

Data, VAE, latents, transformer with text encoders, export, evaluation; each stage ends by its share of the minutes.
Results are in FOLDER: `embedded/` (the model), `pieces/` (the same to carry), `evaluation.md`, `contact_sheet.png`,
`log.txt`, `progress.jsonl`. The same command on the same folder goes on where a killed run stopped.

On several GPUs of one host: `torchrun --nproc-per-node 3 -m mmdit.demo.train --further --start-from MODEL --batch 512`.
Every process has its own part of the scenes and its own batches; gradients are averaged.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from mmdit.checkpoints.load import load_vae
from mmdit.checkpoints.load_pipeline import Components, load
from mmdit.demo.data import Dataset, make_dataset, workers
from mmdit.demo.evaluate import MAIN, SETTINGS, Setting, evaluate, evaluate_all, write_sheet
from mmdit.demo.export import cast_copy, export, write_pieces
from mmdit.demo.mistakes import mistaken
from mmdit.demo.progress import save_whole
from mmdit.demo.recipe import FULL, FURTHER, smoke
from mmdit.demo.run import Run
from mmdit.demo.train_mmdit import Batches, Engine, rehearse, train_mmdit
from mmdit.demo.train_vae import latents_of, train_vae
from mmdit.demo.trainee import QUICK, REGIONS, initial_parts, load_compiled, save_compiled
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.pipeline import Pipeline
from mmdit.runtime.mesh import own_device
from mmdit.runtime.mesh import start as start_group
from mmdit.training.journal import Journal, Unwritten

__all__ = ["main", "train"]

DEFAULT_REGIONS = ("blocks", "text", "vae")
FASTEST = ("graphs", "bf16", "lookup")


def train(run: Run, start_from: Path | None = None, vae: Path | None = None, cache: Path | None = None) -> Pipeline:
    """All stages; returns the exported model as the library loads it.

    Args:
        run: what every stage needs.
        start_from: a model folder to take VAE and starting weights from.
        vae: a trained VAE, safetensors in official names; its stage is then skipped.
        cache: folder of `save_compiled`, of an earlier run on the same kind of GPU.

    Raises:
        ValueError: one of several processes would have to train a VAE.
    """
    recipe = run.recipe
    numbers = (recipe.scenes // run.world, recipe.captions_per_scene, recipe.seed + 100 * run.rank)
    gather = make_dataset(*numbers, run.pool, recipe.style, recipe.object_odds)
    parts, averaged = (initial_parts(run.recipe.architecture, run.recipe.seed) for _ in range(2))
    if start_from is not None:
        parts, averaged = (load(start_from, "cpu", torch.float32) for _ in range(2))
        save_whole(parts.vae.state_dict(), run.folder / "vae.pt")
        run.journal.say(f"weights of {start_from} instead of new ones; its VAE is kept")
    elif vae is not None:
        save_whole(load_vae(vae, dtype=torch.float32).state_dict(), run.folder / "vae.pt")
        run.journal.say(f"VAE of {vae} instead of a new one")
    if run.world > 1 and not (run.folder / "vae.pt").exists():
        raise ValueError(
            f"one of {run.world} processes trains no VAE: give the one of a model by --start-from or --vae"
        )
    for each in (parts, averaged):
        _move(each, run.device)
    if cache is not None:
        run.journal.say(f"{load_compiled(cache)} bytes of compiled code from {cache}")
    engine = Engine(run, parts)
    if run.compiled or run.device.type == "cuda":
        rehearse(run, engine)
    if run.rank == 0 and run.compiled:
        run.journal.say(f"{save_compiled(run.folder / 'compiled')} bytes of compiled code kept for other machines")
    data = _gathered(run, gather)
    averaged.vae = train_vae(run, data.scenes)
    start = time.monotonic()
    latents = latents_of(run, averaged.vae, data.scenes)
    mean, std = float(latents[:4096].float().mean()), float(latents[:4096].float().std())
    run.journal.row("latents", shape=str(list(latents.shape)), mean=mean, std=std, took=time.monotonic() - start)
    tokens = data.tokens.to(run.device)
    wrong = mistaken(data.scenes, run.generator(5)) if recipe.mistaken else None
    batches = Batches(
        latents,
        tokens,
        data.per_scene,
        recipe.dropped,
        recipe.shift,
        run.generator(3),
        mistakes=None if wrong is None else latents_of(run, averaged.vae, wrong),
        mistaken=recipe.mistaken,
        mistaken_from=recipe.mistaken_from,
    )
    train_mmdit(
        run,
        batches,
        engine,
        averaged,
        run.agreed(max(run.left - recipe.finish_seconds, 1.0)),
        checked=lambda model: _check(run, model),
        saved=lambda model: _export(run, model),
    )
    del latents, batches, tokens
    return _finish(run, averaged) if run.rank == 0 else _pipeline(run, averaged)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _parser().parse_args(arguments)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # set by torchrun
    device = own_device(torch.device(args.device)) if several else torch.device(args.device)
    if several:
        start_group(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # shapes are static
    # Flash attention where there is no bias; the memory-efficient one for T5's bias, which needs a gradient.
    torch.backends.cuda.enable_cudnn_sdp(False)
    journal = Unwritten() if rank else Journal(args.out)
    journal.say(f"{' '.join(sys.argv)}: torch {torch.__version__}, {_hardware(device)}")
    cores = args.workers or max((os.cpu_count() or 1) // world, 1)
    with nullcontext() if rank else _marked(args.out / "pid"), workers(cores) as pool:
        recipe = FURTHER if args.further else FULL
        recipe = smoke(recipe) if args.smoke else recipe
        recipe = recipe if args.batch is None else replace(recipe, batch=args.batch)
        compiled = () if args.no_compile else args.compile or (() if args.smoke else DEFAULT_REGIONS)
        quick = (FASTEST if device.type == "cuda" else ()) if args.quick is None else tuple(args.quick)
        run = Run(recipe, device, args.out, journal, pool, 60 * args.minutes, compiled, quick, rank, world)
        train(run, args.start_from, None if args.train_vae else args.vae, args.cache)
    if several:
        dist.destroy_process_group()
    return 0


@contextmanager
def _marked(path: Path) -> Iterator[None]:
    """Keep the process id in a file while the run lasts: a search by name would also find the searching shell."""
    path.write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmdit.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of states and results")
    parser.add_argument("--minutes", type=float, default=24.0, help="of the whole run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--smoke", action="store_true", help="every stage with tiny numbers; compiles nothing unless told"
    )
    parser.add_argument("--further", action="store_true", help="the recipe for going on from a trained model")
    parser.add_argument("--batch", type=int, default=None, help="captions of a step of each process")
    parser.add_argument("--compile", nargs="+", default=None, choices=sorted(REGIONS), help="only these; default all")
    parser.add_argument("--no-compile", action="store_true", help="compile nothing")
    parser.add_argument("--start-from", type=Path, help="a model folder to take VAE and starting weights from")
    parser.add_argument(
        "--quick", nargs="*", default=None, choices=sorted(QUICK), help="on a GPU: " + " ".join(FASTEST)
    )
    parser.add_argument("--cache", type=Path, help="folder `compiled` of a run on the same kind of GPU and torch")
    parser.add_argument(
        "--vae", type=Path, default=EMBEDDED, help="take the VAE of this checkpoint (default: %(default)s)"
    )
    parser.add_argument("--train-vae", action="store_true", help="train a new VAE in spite of --vae")
    parser.add_argument("--workers", type=int, default=None, help="processes for data and scoring; default all cores")
    return parser


def _gathered(run: Run, gather: Callable[[], Dataset]) -> Dataset:
    start = time.monotonic()
    data = gather()
    run.journal.row("data", scenes=len(data.scenes), captions=len(data.tokens), waited=time.monotonic() - start)
    return Dataset(data.scenes.to(run.device), data.tokens, data.per_scene)


def _check(run: Run, parts: Components) -> None:
    """A quick evaluation during training; the numbers are for a person to judge."""
    recipe, setting = run.recipe, _capped(MAIN, run.recipe.most_eval_steps)
    result = evaluate(_pipeline(run, parts), setting, recipe.check_prompts, 1, batch=recipe.eval_batch, pool=run.pool)
    shares = {kind: share for kind, (share, _) in result.by_kind.items()}
    run.journal.row("check", macro=result.macro, **shares, took=result.seconds)


def _export(run: Run, parts: Components) -> int:
    size = export(parts, run.folder / "embedded")
    write_pieces(run.folder / "embedded", run.folder / "pieces")
    return size


def _finish(run: Run, parts: Components) -> Pipeline:
    """Export, load what was written, and evaluate that."""
    run.journal.row("export", bytes=_export(run, parts), left=run.left)
    dtype = torch.float32 if run.device.type == "cpu" else torch.float16
    pipe = Pipeline.from_pretrained(run.folder / "embedded", device=run.device, dtype=dtype)
    recipe = run.recipe
    settings = [_capped(setting, recipe.most_eval_steps) for setting in SETTINGS]
    write_sheet(pipe, run.folder / "contact_sheet.png", settings[0], 32 if recipe.steps is None else 2)
    results = evaluate_all(
        pipe,
        run.folder,
        settings,
        prompts=recipe.prompts,
        seeds=recipe.seeds,
        batch=recipe.eval_batch,
        pool=run.pool,
        seconds=run.left if recipe.steps is None else math.inf,
    )
    for result in results:
        shares = {kind: share for kind, (share, _) in result.by_kind.items()}
        run.journal.row("result", setting=result.setting.name, macro=result.macro, **shares, took=result.seconds)
    run.journal.say("finished\n" + (run.folder / "evaluation.md").read_text(encoding="utf-8"))
    return pipe


def _pipeline(run: Run, parts: Components) -> Pipeline:
    dtype = torch.float32 if run.device.type == "cpu" else torch.float16
    return Pipeline(cast_copy(parts, run.device, dtype))


def _capped(setting: Setting, most: int | None) -> Setting:
    return setting if most is None else replace(setting, steps=min(setting.steps, most))


def _move(parts: Components, device: torch.device) -> None:
    for model in (parts.transformer, parts.vae, parts.clip_l, parts.clip_g, parts.t5):
        assert model is not None
        model.to(device).train().requires_grad_(True)


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    raise SystemExit(main())
