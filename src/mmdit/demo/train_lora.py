"""Train the embedded model's LoRA, which draws outlined shapes: `python -m mmdit.demo.train_lora OUT.safetensors`.

Rank 4 beside the Linears of the image stream; base weights stay as they are. Ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import write_tensors
from mmdit.demo.captions import training_captions
from mmdit.demo.outlines import outlined, sample_outlined
from mmdit.models.lora import beside
from mmdit.pipeline.pipeline import Pipeline
from quant.quantize import linears_of
from samplers.training import logit_normal, noised, shifted, velocity_loss

__all__ = ["train", "write"]

Factors = dict[str, tuple[Tensor, Tensor]]  # down [r, in] and up [out, r] by the name of the Linear
RANK, BATCH, RATE, SCENES = 4, 8, 2e-3, 512
METADATA = {"ss_network_module": "networks.lora_sd3", "ss_network_dim": str(RANK), "ss_network_alpha": str(RANK)}


def train(seconds: float, *, seed: int = 0, scenes: int = SCENES) -> Factors:
    """The factors after so many seconds of CPU time; up starts at zero, so that training starts at the base model."""
    pipe = Pipeline.demo()
    torch.manual_seed(seed)
    factors = _attached(pipe.transformer)
    latents, conditions = _data(pipe, seed, scenes)
    parameters = [part for pair in factors.values() for part in pair]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    started, step, losses = time.process_time(), 0, []
    while (done := (time.process_time() - started) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
        loss = _loss(pipe.transformer, latents, conditions)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            sys.stderr.write(f"step {step}, {done:.0%}, loss {sum(losses[-50:]) / 50:.4f}\n")
    return factors


def write(factors: Factors, path: Path) -> None:
    """The factors in kohya's names, in float16, with an alpha that makes the scale 1."""
    tensors = {}
    for name, (down, up) in factors.items():
        module = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{module}.lora_down.weight"] = down.detach().half()
        tensors[f"{module}.lora_up.weight"] = up.detach().half()
        tensors[f"{module}.alpha"] = torch.tensor(float(RANK)).half()
    write_tensors(path, {key: LazyTensor.of(tensor) for key, tensor in tensors.items()}, METADATA)


def _attached(model: nn.Module) -> Factors:
    factors: Factors = {}
    for name, linear in list(linears_of(model)):
        if ".x_block." in name and "adaLN" not in name:
            down = torch.randn(RANK, linear.in_features) / linear.in_features**0.5
            up = torch.zeros(linear.out_features, RANK)
            factors[name] = down.requires_grad_(), up.requires_grad_()
            beside(model, name, factors=factors[name])
    return factors


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
