"""Train the embedded model's LoRA, which draws outlined shapes: `python -m mmdit.demo.train_lora OUT.safetensors`.

Rank 4 beside the Linears of the image stream; base weights stay as they are. Ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping
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
    dtype="float32",
)


def train(seconds: float, *, seed: int = 0, scenes: int = SCENES) -> dict[str, Adapter]:
    """The adapters after so many seconds of CPU time; they start without a change of the base model."""
    pipe = Pipeline.demo()
    torch.manual_seed(seed)
    adapters = attach(pipe.transformer, replace(CONFIG, seed=seed))
    latents, conditions = _data(pipe, seed, scenes)
    parameters = [part for one in adapters.values() for part in one.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    started, step, losses = time.process_time(), 0, []
    while (done := (time.process_time() - started) / seconds) < 1:
        set_rate(optimizer, RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done)))
        loss = _loss(pipe.transformer, latents, conditions)
        optimizer.zero_grad()
        loss.backward()
        clipped(parameters, CONFIG.clip)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            sys.stderr.write(f"step {step}, {done:.0%}, loss {sum(losses[-50:]) / 50:.4f}\n")
    return adapters


def write(adapters: Mapping[str, Adapter], path: Path) -> None:
    """The adapters in kohya's names, in float16, with an alpha that makes the scale 1."""
    write_lora(adapters, path, CONFIG, dtype=torch.float16)


def _data(pipe: Pipeline, seed: int, count: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Latents of outlined scenes, and the context and pooled vector of a caption of each; the last is of no caption."""
    scenes = sample_outlined(count, seed)
    captions = [texts[0] for texts in training_captions(scenes, 1, seed)]
    with torch.no_grad():
        pictures = outlined(scenes).split(32)
        latents = torch.cat([pipe.vae.encode(2 * part - 1).mode() for part in pictures])
        conditions = []
        for first in range(0, count, 32):
            found = pipe.encode(captions[first : first + 32], max_sequence_length=77)
            conditions += list(zip(found.context, found.pooled, strict=True))
        empty = pipe.encode([""], max_sequence_length=77)
    return latents, [*conditions, (empty.context[0], empty.pooled[0])]


def _loss(model: nn.Module, latents: Tensor, conditions: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The plain velocity loss of a batch; a tenth of the captions is left out, and T5's part of some batches."""
    index = torch.randint(len(latents), (BATCH,))
    shown = [len(conditions) - 1 if float(torch.rand(())) < 0.1 else int(i) for i in index]
    context, pooled = (torch.stack([conditions[i][part] for i in shown]) for part in (0, 1))
    if float(torch.rand(())) < 0.5:
        context = context[:, :77]
    x0, noise = latents[index], torch.randn(BATCH, *latents.shape[1:])
    t = shifted(logit_normal(BATCH), 3.0)
    return velocity_loss(model(noised(x0, noise, t), 1000 * t, context, pooled), x0, noise)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600, help="of CPU time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(train(options.seconds, seed=options.seed), options.out)


if __name__ == "__main__":
    main()
