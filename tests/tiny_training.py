"""A tiny transformer, its encoded data, and settings of short runs."""

import torch
from torch import Tensor

from mmdit import MMDiT, MMDiTConfig
from mmdit.checkpoints.load_pipeline import Components
from mmdit.pipeline.pipeline import Pipeline
from mmdit.training.batches import InMemory, Sample
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


def samples(count: int = 5) -> InMemory:
    """Latents of two shapes."""
    shapes = [(16, 8, 8) if i % 3 else (16, 4, 12) for i in range(count)]
    texts = [(noise(50 + i, 6, 32), noise(80 + i, 16)) for i in range(count + 1)]
    made = [Sample(noise(i, *shape), None, *texts[i]) for i, shape in enumerate(shapes)]
    return InMemory(made, texts[count])


def tiny_pipe(dtype: torch.dtype = torch.float32) -> Pipeline:
    """A pipeline whose transformer is tiny; its other models are the embedded ones, and do not fit."""
    demo = Pipeline.demo()
    return Pipeline(Components(tiny_model(dtype), demo.vae, demo.clip_l, demo.clip_g, demo.t5, demo.tokenizers, 3.0))


def settings(output: object, **changes: object) -> TrainingConfig:
    plain = {"output": str(output), "batch_size": 2, "steps": 6, "dtype": "float32", "rank": 2, "device": "cpu"}
    return TrainingConfig.from_json(plain | {"learning_rate": 1e-2, "schedule": "cosine", "warmup": 2} | changes)
