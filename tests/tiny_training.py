"""A tiny transformer with encoded data, and a folder of pictures of the embedded model's world."""

from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from encoders import Conditioning
from mmdit import ControlNet, MMDiT, MMDiTConfig
from mmdit.checkpoints.load_pipeline import Components
from mmdit.demo.captions import training_captions
from mmdit.demo.scenes import render, sample
from mmdit.pipeline.control import Control
from mmdit.pipeline.passes import Branch
from mmdit.pipeline.pipeline import Pipeline
from mmdit.pipeline.predict import predict_branches
from mmdit.pipeline.profiles import Profile
from mmdit.training.batches import Batch, InMemory, Sample
from mmdit.training.config import TrainingConfig

CONFIG = MMDiTConfig(depth=2, hidden_size=64, context_dim=32, pooled_dim=16, pos_embed_size=8, sample_size=8)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_model(dtype: torch.dtype = torch.float32) -> MMDiT:
    """Random weights everywhere, so that every gradient is one."""
    model = MMDiT(CONFIG)
    for place, one in enumerate(model.parameters()):
        scale = 0.3 if one.ndim < 2 else 0.7 * one[0].numel() ** -0.5
        one.data = scale * noise(place, *one.shape)
    return model.to(dtype).eval().requires_grad_(False)


def samples(count: int = 5, *, hints: bool = False) -> InMemory:
    """Latents of two shapes."""
    shapes = [(16, 8, 8) if i % 3 else (16, 4, 12) for i in range(count)]
    texts = [(noise(50 + i, 6, 32), noise(80 + i, 16)) for i in range(count + 1)]
    drawn = [noise(120 + i, *shape) if hints else None for i, shape in enumerate(shapes)]
    made = [Sample(noise(i, *shape), None, *texts[i], drawn[i]) for i, shape in enumerate(shapes)]
    return InMemory(made, texts[count])


@cache
def demo() -> Pipeline:
    return Pipeline.demo()


def tiny_pipe(dtype: torch.dtype = torch.float32) -> Pipeline:
    """A pipeline whose transformer is tiny; its other models are the embedded ones."""
    others = demo()
    return Pipeline(
        Components(tiny_model(dtype), others.vae, others.clip_l, others.clip_g, others.t5, others.tokenizers, 3.0)
    )


def drawn_velocity(transformer: MMDiT, net: ControlNet, profile: Profile, batch: Batch, x: Tensor) -> Tensor:
    """The velocity that a drawing computes for the inputs of a training step, whose times are equal."""
    sigma, hint = float(batch.t[0]), batch.hint
    dtype = transformer.pos_embed.dtype
    branch = Branch(Conditioning(batch.context.to(dtype), batch.pooled.to(dtype)), control=(Control(net, hint, hint),))
    (predicted,) = predict_branches(transformer, profile, x, sigma, [branch], lambda _: None)
    return (x - predicted) / sigma


def settings(output: object, **changes: object) -> TrainingConfig:
    plain = {"output": str(output), "batch_size": 2, "steps": 6, "dtype": "float32", "rank": 2, "device": "cpu"}
    plain |= {"learning_rate": 1e-2, "schedule": "cosine", "warmup": 2, "log_every": 1}
    return TrainingConfig.from_json(plain | changes)


def write_pictures(root: Path, count: int = 3) -> Path:
    """Pictures with captions, of two sizes."""
    scenes = sample(count, 0)
    for i, (picture, texts) in enumerate(zip(render(scenes), training_captions(scenes, 1, 0), strict=True)):
        image = Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy())
        (image if i else image.crop((0, 20, 128, 108))).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(texts[0])
    return root
