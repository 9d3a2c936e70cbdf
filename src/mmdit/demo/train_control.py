"""Trains two ControlNets for the embedded model: `python -m mmdit.demo.train_control FOLDER --seconds 900`.

Scenes of `mmdit.demo.scenes` are drawn, their hints made (Canny edges, or a map that is the brighter the larger an
object is), and both encoded: pictures as the mode of the VAE's distribution, hints as drawings encode them. Each step
takes the rules of one profile of the pipeline (value range, sample or mean, positions, the last residual), so that a
net works in all of them. A net first learns to predict the picture from the hint alone, with a linear read-out in
place of the transformer; then its residuals are trained through the frozen transformer, on captions most of which leave
shapes and positions out. The state is saved every minute, and an interrupted run resumes from it. On a CPU, seconds are
those of the processor. On a GPU (`--device cuda`), which has a recipe of its own, they are those of the clock,
and steps are recorded as CUDA graphs; `mmdit.demo.bench_control` measures them. Both compute in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.checkpoints.load import model_in_memory
from mmdit.checkpoints.safetensors_io import write_tensors
from mmdit.checkpoints.write import METADATA, official
from mmdit.demo.control_data import Data, make_data
from mmdit.demo.control_recipe import GPU, ControlRecipe
from mmdit.demo.control_step import Stepper, Trainer, net_file, trainer_of
from mmdit.demo.progress import save_whole
from mmdit.embedded import EMBEDDED
from mmdit.models.controlnet import ControlKind, ControlNet
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.profiles import PROFILES
from mmdit.training.journal import Journal
from mmdit.training.rates import Every, learning_rate

__all__ = ["KINDS", "main", "train"]

KINDS: tuple[ControlKind, ...] = ("canny", "depth")


def train(
    folder: Path,
    seconds: float,
    recipe: ControlRecipe | None = None,
    *,
    device: str = "cpu",
    model: Path = EMBEDDED,
    start_from: Path | None = None,
    kinds: Sequence[ControlKind] = KINDS,
) -> dict[ControlKind, Path]:
    """Train the nets one after the other; returns their files, in official names.

    Args:
        folder: of states, log and nets.
        seconds: for all nets together, of the processor on a CPU, of the clock on a GPU.
        recipe: None is the device's.
        device: of the training.
        model: the folder of the model that the nets are for.
        start_from: a folder of nets of an earlier run, which are trained further without the first stage.
        kinds: of the hints; one net each.
    """
    recipe = recipe or (ControlRecipe() if device == "cpu" else GPU)
    run = _Run(folder, recipe, Journal(folder), time.process_time if device == "cpu" else time.monotonic)
    pipe = Pipeline.from_pretrained(model, device=device, dtype=torch.float32)
    return {kind: run.train(pipe, kind, seconds / len(kinds), start_from) for kind in kinds}


@dataclass
class _Run:
    """What the nets of a run share."""

    folder: Path
    recipe: ControlRecipe
    journal: Journal
    ticks: Callable[[], float]

    def train(self, pipe: Pipeline, kind: ControlKind, seconds: float, start_from: Path | None) -> Path:
        """Train one net, or go on with it; returns its file."""
        torch.manual_seed(self.recipe.seed)
        state, clock = self.state(kind)
        data = self.data(pipe, kind, state, clock).to(pipe.device)
        left = max(seconds - state["begun"], 1e-3)  # for the stages
        trainer = trainer_of(pipe, kind, self.recipe, start_from)
        if "net" in state:
            trainer.net.load_state_dict(state["net"])
        start, before, file = 0.0, (clock() - state["begun"]) / left, net_file(self.folder, kind)
        for stage, end in (("alone", 0.0 if start_from else self.recipe.alone_share), ("together", 1.0)):
            if before < end or (stage == "together" and not file.exists()):
                rounds = _rounds(lambda: (clock() - state["begun"]) / left, start, end)
                _stage(trainer, stage, kind, data, rounds, _Keeper(state, self.file(kind, "state"), clock, self))
            start = end
        return write_net(trainer.net, kind, self.folder)

    def file(self, kind: ControlKind, what: str) -> Path:
        """The file of a net's state or data."""
        return self.folder / f"{kind}_{what}.pt"

    def state(self, kind: ControlKind) -> tuple[dict[str, Any], Callable[[], float]]:
        """The state of a net, and the clock of its seconds over all runs."""
        path, started = self.file(kind, "state"), self.ticks()
        state: dict[str, Any] = torch.load(path, map_location="cpu") if path.exists() else {"done": 0.0}
        earlier: float = state["done"]
        return state, lambda: earlier + self.ticks() - started

    def data(self, pipe: Pipeline, kind: ControlKind, state: dict[str, Any], clock: Callable[[], float]) -> Data:
        """The data of a net, saved where the recipe says so; `begun` in the state is the clock's seconds for them."""
        path = self.file(kind, "data")
        if path.exists():
            state.setdefault("begun", 0.0)
            return Data(**torch.load(path, map_location="cpu"))
        data = make_data(pipe, kind, self.recipe, self.journal)
        if self.recipe.keeps_data:
            save_whole(vars(data), path)
        trained = state["done"] - state.get("begun", 0.0)  # by earlier runs, whose data were not saved
        state |= {"begun": clock() - trained, "done": clock()}
        save_whole(state, self.file(kind, "state"))
        return data


def _rounds(share: Callable[[], float], start: float, end: float) -> Iterator[tuple[int, float]]:
    step = 0
    while (now := share()) < end:
        yield step, max(0.0, (now - start) / (end - start))
        step += 1


@dataclass
class _Keeper:
    """Saves the net in training at regular intervals."""

    state: dict[str, Any]
    path: Path
    clock: Callable[[], float]
    run: _Run

    def keep(self, net: nn.Module, stage: str) -> None:
        """Write everything that is needed to resume the run."""
        weights = {name: tensor.cpu().clone() for name, tensor in net.state_dict().items()}
        self.state |= {"net": weights, "stage": stage, "done": self.clock()}
        save_whole(self.state, self.path)


def _stage(
    trainer: Trainer, stage: str, kind: ControlKind, data: Data, rounds: Iterator[tuple[int, float]], keeper: _Keeper
) -> None:
    """Train one stage; at its end the net holds its average."""
    recipe, losses, rng = keeper.run.recipe, list[Tensor](), random.Random(keeper.run.recipe.seed)
    stepper = Stepper(trainer, stage, data, recipe)
    log, save, since = Every(recipe.log_seconds), Every(recipe.save_seconds), time.monotonic()
    for step, fraction in rounds:
        rate = learning_rate(fraction, step, peak=recipe.rate, warmup=recipe.warmup, decay=recipe.decay)
        losses.append(stepper.step(PROFILES[rng.choice(recipe.profiles)], rate))
        if log.due():
            loss, ms = float(torch.stack(losses).nanmean()), 1000 * (time.monotonic() - since) / len(losses)
            left_out = int(stepper.left_out)
            keeper.run.journal.row(
                f"{kind} {stage}", step=step, done=fraction, ms=ms, loss=loss, rate=rate, left_out=left_out
            )
            losses, since = [], time.monotonic()
        if save.due():
            keeper.keep(trainer.net, stage)
    stepper.ema.write_to(trainer.net)
    keeper.keep(trainer.net, stage)


def write_net(net: ControlNet, kind: ControlKind, folder: Path) -> Path:
    """Write a net in float16 under official names."""
    stored = model_in_memory("controlnet", copy.deepcopy(net).cpu())
    half = replace(stored, tensors={key: lazy.as_dtype(torch.float16) for key, lazy in stored.tensors.items()})
    path = net_file(folder, kind)
    write_tensors(path, official(half, "comfyui"), METADATA)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where states, log and nets are written")
    parser.add_argument("--seconds", type=float, default=900.0, help="in all: of the processor, or a GPU's clock")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="of which model (default: %(default)s)")
    parser.add_argument("--start-from", type=Path, help="a folder of nets of an earlier run, to train them further")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of the hints (default: all)")
    parser.add_argument("--depth", type=int, help="blocks of a net (default: the recipe's)")
    parser.add_argument("--mlp-dim", type=int, help="width of the hidden layers of their MLPs (default: the recipe's)")
    parser.add_argument("--compiled", action="store_true", help="compile blocks, which takes about a minute")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    names = ("depth", "mlp_dim", "compiled")
    chosen = {name: value for name in names if (value := getattr(options, name))}
    recipe = replace(ControlRecipe() if options.device == "cpu" else GPU, **chosen)
    given = {name: getattr(options, name) for name in ("device", "model", "start_from", "kinds")}
    train(options.folder, options.seconds, recipe, **given)


if __name__ == "__main__":
    main()
