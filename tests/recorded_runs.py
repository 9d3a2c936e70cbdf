"""Recorded runs of the references with pictures: the tiny models, whose weights are a formula, and what was recorded.

tests/data/images/runs.safetensors holds latents (ComfyUI's at the scale of the VAE), pictures, and the encoded prompts.
"""

import zlib
from functools import cache

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from encoders import VAE, Conditioning, Tokenizers, VAEConfig
from golden import DATA
from mmdit import MMDiT, MMDiTConfig, Pipeline
from mmdit.checkpoints.load_pipeline import Components

FOLDER = DATA / "images"
LATENTS = 5e-4  # the relative error that a latent may have; right code has 4e-6
# The prompts of the runs.
FOX, CATS, HOUSE, BOWL = (
    "a photo of a red fox in the snow, sharp focus",
    "two cats on a blue sofa",
    "a lighthouse at dusk, oil painting",
    "a bowl of fruit, studio light",
)
BLURRY, MARKS = "blurry, low quality", "watermark, text"
_BASE = {"context_dim": 256, "pooled_dim": 192}
TRANSFORMERS = {
    "large": MMDiTConfig(depth=3, hidden_size=192, pos_embed_size=24, **_BASE),
    "medium": MMDiTConfig(depth=4, hidden_size=256, pos_embed_size=48, dual_attention_blocks=(0, 1), **_BASE),
}


@cache
def runs() -> dict[str, Tensor]:
    """Everything that was recorded, by name."""
    return load_file(FOLDER / "runs.safetensors")


@cache
def pipeline(model: str, profile: str) -> Pipeline:
    """A recorded model under a profile; it has no text encoders."""
    transformer = _filled(MMDiT(TRANSFORMERS[model]), "model.diffusion_model.")
    vae = _filled(VAE(VAEConfig(widths=(32, 64, 128, 128))), "first_stage_model.")
    parts = Components(transformer, vae, None, None, None, Tokenizers(None, None, None), None)
    return Pipeline(parts, profile=profile)


def text(prompt: str) -> Conditioning:
    """What the recorded text encoders made of a prompt, under ComfyUI's rules."""
    return Conditioning(runs()[f"text.{prompt}.context"][None], runs()[f"text.{prompt}.pooled"][None])


def embeddings() -> dict[str, Tensor]:
    """The embeddings that diffusers and Stability's code were given."""
    names = ("prompt_embeds", "pooled_prompt_embeds")
    return {name: runs()[f"embeds.{name}"].float() for one in names for name in (one, f"negative_{one}")}


def image(name: str) -> Image.Image:
    """A recorded input."""
    return Image.open(FOLDER / f"pub_{name}.png")


def _filled(model: nn.Module, prefix: str) -> nn.Module:
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: weight(prefix + key, shape).float() for key, shape in shapes.items()})
    return model.eval().requires_grad_(False)


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """What a tensor of a recorded model holds, in the float16 that it was rounded to."""
    drawn = np.random.RandomState(zlib.crc32(key.encode())).randn(*shape).astype(np.float32) * np.float32(0.06)
    if len(shape) == 1 and key.endswith("weight") and any(word in key for word in ("ln_", "norm")):
        drawn = drawn + 1
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32)).half()
