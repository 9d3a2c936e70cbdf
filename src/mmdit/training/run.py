"""A whole run: the loop with its log, checkpoints and sample pictures, from a config to a file.

path = train(TrainingConfig.from_json("config.json"))
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders import Conditioning
from mmdit.training.batches import Samples
from mmdit.training.checkpointing import checkpoints, load, save
from mmdit.training.config import TrainingConfig
from mmdit.training.data import Cache, CachedSamples, on_device, read_text
from mmdit.training.journal import Journal, Unwritten
from mmdit.training.loop import Processes, StepResult, Training, training_step
from mmdit.training.setup import Trained, device_of, load_base, start
from mmdit.utils import replacing, write_text


def train(
    config: TrainingConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    pipe: Any = None,
    samples: Samples | None = None,
    processes: Processes | None = None,
) -> Path:
    """Train to the config's last step; returns the written LoRA, transformer or ControlNet.

    Args:
        config: all settings.
        resume: go on from the newest checkpoint of the output's folder; without one, the run begins.
        quiet: write the log to files alone.
        pipe: the base model, a `mmdit.Pipeline`, instead of the config's; its transformer is changed.
        samples: encoded data, instead of the config's folder.
        processes: the place of this process among others.

    Raises:
        FileExistsError: the output has checkpoints, and `resume` is not set.
        ImportError: tensorboard or torchao are asked for and missing.
        DataError, ConfigError, CheckpointError: the data, a setting, or a checkpoint cannot be used.
        FloatingPointError: a loss is not finite.
        OSError: something cannot be written, such as on a full disk.
    """
    found = checkpoints(config.output)
    if found and not resume:
        raise FileExistsError(
            f"{found[-1].folder} is a checkpoint of step {found[-1].step}; go on from it with resume (--resume), or "
            "give another output"
        )
    processes = processes or Processes()
    first = not processes.rank
    events = _events(config) if first else None
    pipe = load_base(config) if pipe is None else pipe
    with processes.in_turn():
        texts = _sample_texts(pipe, config)
    run, trained = start(config, pipe=pipe, samples=samples, processes=processes)
    log = Log(run, Journal(Path(config.output), quiet=quiet) if first else Unwritten(), events)
    if found:
        load(run, found[-1])
        log.journal.rewind(run.step)
        log.journal.say(f"going on from {found[-1].folder}")
    if first:
        write_text(Path(config.output) / "config.json", config.commented())
    for step in range(run.step, config.steps):
        log.take(training_step(run, step))
        if run.step % config.save_every == 0 or run.step == config.steps:
            save(run)
        if config.sample_every and run.step % config.sample_every == 0 and first:
            draw_samples(run, trained, texts)
    with _averaged(run):
        if processes.sharded:
            _gather(run, trained)
        with processes.in_turn():
            return trained.write(config) if first else trained.file(config)


@dataclass
class Log:
    """Means of the steps since the last row, by timestep and by block."""

    run: Training
    journal: Journal
    events: Any = None  # a SummaryWriter
    since: list[StepResult] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def take(self, result: StepResult) -> None:
        """Note a step; every `config.log_every` steps write a row."""
        self.since.append(result)
        if (result.step + 1) % self.run.config.log_every and result.step + 1 < self.run.config.steps:
            return
        row = self.row()
        if not self.run.processes.rank:
            self.journal.row("train", **row)
            if self.events is not None:
                for name, value in row.items():
                    self.events.add_scalar(name, value, row["step"])
        self.since, self.started = [], time.monotonic()

    def row(self) -> dict[str, Any]:
        """The row of the steps since the last one; a bin of times without a sample has no entry."""
        steps, mean = self.since, self.run.processes.mean
        found: dict[str, Any] = {
            "step": steps[-1].step,
            "loss": float(mean(torch.stack([one.loss for one in steps]).mean())),
            "rate": steps[-1].rate,
            "ms": 1000 * (time.monotonic() - self.started) / len(steps),
        }
        norms = [one.norm for one in steps if one.norm is not None]
        found |= {"norm": float(torch.stack(norms).mean())} if norms else {}
        times, losses = (torch.cat([getattr(one, name) for one in steps]) for name in ("times", "losses"))
        found |= loss_by_time(times, losses, self.run.config.time_bins)
        for block in steps[-1].norms:
            found[f"norm {block}"] = float(torch.stack([one.norms[block] for one in steps]).mean())
        return found


def loss_by_time(times: Tensor, losses: Tensor, bins: int) -> dict[str, float]:
    """The mean loss of the samples whose time is in each of the equal bins of [0, 1], by "t 0.3-0.4".

    Args:
        times: [n].
        losses: [n].
        bins: their number; those without a sample are left out.
    """
    place = (times * bins).long().clamp(0, bins - 1)
    rows = [(i, losses[place == i]) for i in range(bins)]
    return {f"t {i / bins:.2g}-{(i + 1) / bins:.2g}": float(some.mean()) for i, some in rows if len(some)}


def draw_samples(run: Training, trained: Trained, texts: list[Conditioning]) -> list[Path]:
    """Draw the config's sample prompts with the model as it is, or its average; returns the files."""
    config, pipe, found = run.config, trained.pipe, []
    folder = Path(config.output) / "samples"
    *prompts, empty = texts
    hints = _hints(run, trained)
    with _averaged(run), _own_modulation(trained), on_device({"vae": pipe.vae}, run.device):
        for i, text in enumerate(prompts):
            more: dict[str, Any] = {"controlnet": trained.net, "control_image": hints[i % len(hints)]} if hints else {}
            output = pipe(
                text.to(run.device, run.dtype),
                empty.to(run.device, run.dtype),
                height=config.size // 16 * 16,
                width=config.size // 16 * 16,
                num_inference_steps=config.sample_steps,
                seed=config.seed % 2**32 + i,
                progress=False,
                **more,
            )
            path = folder / f"step-{run.step:08}-{i}.png"
            with replacing(path) as part:
                output.images[0].save(part, format="PNG")
            found.append(path)
    return found


def _gather(run: Training, trained: Trained) -> None:
    """Give the first process whole weights in place of its shares, to be written; the model computes no more.

    Beside adapters all other weights stay sharded: they are not written, and gloo gathers no float8.
    """
    for part in trained.model.modules():
        for key, one in part._parameters.items():
            if one is not None and (one.requires_grad or not trained.adapters):
                whole = run.processes.whole(one.detach())
                if not run.processes.rank:
                    part._parameters[key] = nn.Parameter(whole.cpu(), requires_grad=False)


def _averaged(run: Training) -> AbstractContextManager[None]:
    """Inside, the trained weights are those that are written: their average, where there is one."""
    return nullcontext() if run.ema is None else run.ema.applied()


def _own_modulation(trained: Trained) -> AbstractContextManager[None]:
    """Inside, adaLN is in its place, for other times than those of the passes to come."""
    return nullcontext() if trained.ahead is None else trained.ahead.restored()


def _hints(run: Training, trained: Trained) -> list[Path]:
    """The hints of the first samples, for a ControlNet's pictures."""
    if trained.net is None or not isinstance(run.samples, CachedSamples):
        return []
    return [one.record.hint for one in run.samples.samples[:8] if one.record.hint is not None]


def _sample_texts(pipe: Any, config: TrainingConfig) -> list[Conditioning]:
    """The sample prompts and the empty one, encoded before the text encoders leave the device."""
    if not config.sample_every:
        return []
    cache = Cache(config.cache_folder, pipe, config)
    encoders = {name: model for name, model in pipe.models.items() if name in ("clip_l", "clip_g", "t5")}
    with on_device(encoders, device_of(config)):
        texts = [read_text(cache.text(prompt)) for prompt in (*config.sample_prompts, "")]
    return [Conditioning(context[None], pooled[None]) for context, pooled in texts]


def _events(config: TrainingConfig) -> Any:
    if not config.tensorboard:
        return None
    if find_spec("tensorboard") is None:
        raise ImportError('tensorboard is set, and is not installed: pip install "mmdit-lab[tensorboard]"')
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 # optional

    return SummaryWriter(Path(config.output) / "events")
