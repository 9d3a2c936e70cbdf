"""Tiny random pipelines built with diffusers and transformers: the live reference of the parity tests."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from mmdit.demo.vocab import write_tokenizers

HIDDEN, DEPTH, SIDE, T5_WIDTH, CLIP_L, CLIP_G = 128, 3, 16, 256, 64, 128


@dataclass(frozen=True)
class Variant:
    """What tells the official transformers apart."""

    name: str
    qk_norm: str | None
    dual: tuple[int, ...] = ()
    sample_size: int = 8


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("sd3-medium", None),
        Variant("sd3.5-medium", "rms_norm", (0, 1)),
        Variant("sd3.5-large", "rms_norm"),
        Variant("sd3.5-large-turbo", "rms_norm"),
    )
}


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Random weights of a size that keeps activations near one, everywhere: nothing stays at an init of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and id(parameter) not in tables:
            noise = noise / parameter[0].numel() ** 0.5
        elif parameter.ndim == 1:
            noise = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        parameter.data = noise.to(parameter.dtype)
    return module.eval()


def transformer(variant: Variant) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=variant.sample_size,
        patch_size=2,
        in_channels=16,
        num_layers=DEPTH,
        attention_head_dim=64,
        num_attention_heads=HIDDEN // 64,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=CLIP_L + CLIP_G,
        out_channels=16,
        pos_embed_max_size=SIDE,
        dual_attention_layers=variant.dual,
        qk_norm=variant.qk_norm,
    )
    table = torch.randn(model.pos_embed.pos_embed.shape, generator=torch.Generator().manual_seed(5))
    model.pos_embed.pos_embed.copy_(table)
    return randomize(model, 0)


def vae() -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    )
    return randomize(model, 1)


def clip(width: int, activation: str, vocabulary: int, seed: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act=activation,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return randomize(CLIPTextModelWithProjection(config), seed)


def t5(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        d_model=T5_WIDTH,
        d_kv=64,
        d_ff=320,
        num_layers=2,
        num_heads=4,
        vocab_size=vocabulary,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return randomize(T5EncoderModel(config), 4)


def pipeline(variant: Variant, tokenizers: Path) -> StableDiffusion3Pipeline:
    """A whole random pipeline; `tokenizers` holds the three tokenizer folders."""
    one, two = (CLIPTokenizer.from_pretrained(tokenizers / name) for name in ("tokenizer", "tokenizer_2"))
    three = T5TokenizerFast.from_pretrained(tokenizers / "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(variant),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip(CLIP_L, "quick_gelu", len(one), 2),
        tokenizer=one,
        text_encoder_2=clip(CLIP_G, "gelu", len(two), 3),
        tokenizer_2=two,
        text_encoder_3=t5(len(three)),
        tokenizer_3=three,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def tokenizer_files() -> dict[str, bytes]:
    """What `write_tokenizers` writes; learning the merges takes a second."""
    with TemporaryDirectory() as made:
        write_tokenizers(made)
        return {str(file.relative_to(made)): file.read_bytes() for file in Path(made).rglob("*.*") if file.is_file()}


def save(variant: Variant, folder: Path) -> Path:
    """A diffusers folder of a tiny random pipeline of this variant."""
    for name, content in tokenizer_files().items():
        (folder / ".tokenizers" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / ".tokenizers" / name).write_bytes(content)
    pipeline(variant, folder / ".tokenizers").save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        for file in (folder / ".tokenizers" / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    return folder


def rewrite_config(folder: Path, name: str, **changes: object) -> None:
    """Change entries of a config.json."""
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The reference pipeline of a folder."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder).to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 error; NaN is infinitely wrong."""
    found, wanted = found.detach().double(), wanted.detach().double()
    value = float((found - wanted).norm() / wanted.norm())
    return float("inf") if math.isnan(value) else value
