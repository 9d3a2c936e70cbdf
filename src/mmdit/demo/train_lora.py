"""Train the embedded model's LoRA, which draws outlined shapes: `python -m mmdit.demo.train_lora OUT.safetensors`.

Rank 4 beside the Linears of the image stream; base weights stay as they are. Ten minutes on one CPU core, or one
minute on a GPU (`--device cuda --seconds 60 --batch 64 --scenes 4096`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdit.demo.captions import training_captions
from mmdit.demo.outlines import outlined, sample_outlined
from mmdit.pipeline.pipeline import Pipeline
from mmdit.training.adapters import Adapter, attach
from mmdit.training.config import TrainingConfig
from mmdit.training.export import write_lora
from mmdit.training.loop import clipped
from mmdit.training.rates import set_rate
from samplers.training import logit_normal, noised, shifted, velocity_loss

__all__ = ["train", "write"]

BATCH, RATE, SCENES = 8, 2e-3, 512
CONFIG = TrainingConfig(
    rank=4,
    targets=("joint_blocks.*.x_block.attn*", "joint_blocks.*.x_block.mlp.*"),
    split_qkv=False,
    naming="kohya",
    learning_rate=RATE,
    dtype="float32",
)


def train(
    seconds: float, *, seed: int = 0, scenes: int = SCENES, batch: int = BATCH, device: str = "cpu"
) -> dict[str, Adapter]:
    """The adapters after so many seconds (on a CPU, of its time); they start without a change of the base model."""
    pipe = Pipeline.demo(device=device, dtype=torch.float32)
    torch.manual_seed(seed)
    adapters = attach(pipe.transformer, replace(CONFIG, seed=seed))
    latents, context, pooled = _data(pipe, seed, scenes)
    parameters = [part for one in adapters.values() for part in one.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    clock: Callable[[], float] = time.process_time if device == "cpu" else time.monotonic
    started, step, losses = clock(), 0, []
    while (done := (clock() - started) / seconds) < 1:
        set_rate(optimizer, RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done)))
        loss = _loss(pipe.transformer, latents, context, pooled, batch)
        optimizer.zero_grad()
        loss.backward()
        clipped(parameters, CONFIG.clip)
        optimizer.step()
        step += 1
        losses.append(loss.detach())
        if step % 50 == 0:
            sys.stderr.write(f"step {step}, {done:.0%}, loss {float(torch.stack(losses[-50:]).mean()):.4f}\n")
    return adapters


def write(adapters: Mapping[str, Adapter], path: Path) -> None:
    """The adapters in kohya's names, in float16, with an alpha that makes the scale 1."""
    write_lora(adapters, path, CONFIG, dtype=torch.float16)


def _data(pipe: Pipeline, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of outlined scenes, and contexts and pooled vectors of a caption of each; the last are of no caption."""
    scenes = sample_outlined(count, seed)
    captions = [texts[0] for texts in training_captions(scenes, 1, seed)]
    with torch.no_grad():
        pictures = outlined(scenes).split(32)
        latents = torch.cat([pipe.vae.encode(2 * part.to(pipe.device) - 1).mode() for part in pictures])
        parts = [captions[first : first + 32] for first in range(0, count, 32)]
        found = [pipe.encode(part, max_sequence_length=77) for part in [*parts, [""]]]
    return latents, torch.cat([one.context for one in found]), torch.cat([one.pooled for one in found])


def _loss(model: nn.Module, latents: Tensor, context: Tensor, pooled: Tensor, batch: int) -> Tensor:
    """The plain velocity loss of a batch; a tenth of the captions is left out, and T5's part of some batches."""
    index = torch.randint(len(latents), (batch,))
    shown = torch.where(torch.rand(batch) < 0.1, len(latents), index).to(latents.device)
    tokens = 77 if float(torch.rand(())) < 0.5 else context.shape[1]
    x0 = latents[index.to(latents.device)]
    noise, t = torch.randn_like(x0), shifted(logit_normal(batch), 3.0).to(x0.device)
    return velocity_loss(model(noised(x0, noise, t), 1000 * t, context[shown, :tokens], pooled[shown]), x0, noise)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600, help="on a CPU, of its time (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    how = {"scenes": options.scenes, "batch": options.batch}
    write(train(options.seconds, seed=options.seed, device=options.device, **how), options.out)


if __name__ == "__main__":
    main()
