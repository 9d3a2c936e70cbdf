"""The architecture of the embedded model and every number of its training.

The widths follow from the formats: head size 64 everywhere and width = 64 x depth, so that any SD3.5 reader infers the
transformer from its shapes; 32 groups in the VAE, which readers assume where no config.json says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from encoders.clip import CLIPConfig
from encoders.t5 import T5Config
from encoders.vae import VAEConfig
from mmdit.demo.captions import CaptionStyle
from mmdit.demo.vocab import SIZE
from mmdit.models.config import MMDiTConfig

__all__ = ["FULL", "FURTHER", "SMOKE", "Architecture", "T5Mix", "TrainingRecipe", "smoke"]


_TRANSFORMER = MMDiTConfig(depth=4, hidden_size=256, context_dim=256, pooled_dim=192, pos_embed_size=32, sample_size=16)
# 64 at full size too: with 32, each of the 32 groups is one channel, whose mean (the background) the norm removes.
_VAE = VAEConfig(widths=(64, 64, 64, 64))
# Without text_projection, so that its pooled vector is used as it is by every reference.
_CLIP_L = CLIPConfig(width=64, layers=4, mlp_dim=256, activation="quick_gelu", heads=1, vocabulary=SIZE)
_CLIP_G = CLIPConfig(width=128, layers=4, mlp_dim=512, activation="gelu", heads=2, vocabulary=SIZE, projection_dim=128)
_T5 = T5Config(width=256, layers=2, heads=4, head_dim=64, mlp_dim=512, vocabulary=SIZE)


@dataclass(frozen=True)
class Architecture:
    """The five configs."""

    transformer: MMDiTConfig = _TRANSFORMER
    vae: VAEConfig = _VAE
    clip_l: CLIPConfig = _CLIP_L
    clip_g: CLIPConfig = _CLIP_G
    t5: T5Config = _T5


@dataclass(frozen=True)
class T5Mix:
    """Shares of training steps by what stands where T5's tokens do; each profile of the pipeline meets one of them."""

    short: float = 0.70  # T5 at 77 tokens
    long: float = 0.20  # T5 at 256 tokens, the default of the diffusers profile
    zeros: float = 0.05  # no T5, 256 zero tokens
    omitted: float = 0.05  # no T5, no tokens


@dataclass(frozen=True)
class TrainingRecipe:
    """Every number of a run. Times are shares of the whole or seconds; `*_steps` end a stage early (dry runs)."""

    architecture: Architecture = field(default_factory=Architecture)
    seed: int = 0

    scenes: int = 400_000  # of all processes together
    captions_per_scene: int = 4
    style: CaptionStyle = field(default_factory=CaptionStyle)
    object_odds: tuple[float, ...] | None = None  # of scenes of 1, 2, 3 and 4 objects; None are those of all scenes
    held_out_scenes: int = 512  # scenes for the checks of the VAE, with a seed of their own

    vae_share: float = 0.20  # share of the minutes
    vae_batch: int = 128
    vae_rate: float = 1e-3
    vae_warmup: int = 200
    vae_ema: float = 0.999
    vae_kl: float = 1e-6  # weight of the KL divergence summed over a picture's latent
    vae_steps: int | None = None
    min_psnr: float = 32.0
    min_verdicts: float = 0.99

    batch: int = 1024  # of each process
    rate: float = 1e-3
    warmup: int = 500
    decay: float = 0.3  # the last share of the time, in which the rate falls to 0
    ema: float = 0.9995
    clip: float = 1.0
    shift: float = 3.0
    dropped: float = 0.10  # captions replaced by ""
    mistaken: float = 0.0  # share of captioned latents with a mistake of `mistakes.mistaken`, which the model mends
    mistaken_from: float = 0.5  # the earliest time of such latents
    mix: T5Mix = field(default_factory=T5Mix)
    late_mix: T5Mix = field(
        default_factory=lambda: T5Mix(short=0.40, long=0.50)
    )  # while the rate falls: the default length gets the finest steps
    check_at: float = 0.4  # share of the time at which a quick evaluation runs
    check_prompts: int = 256
    steps: int | None = None

    finish_seconds: float = 150.0  # kept for export and evaluation
    prompts: int = 512
    seeds: int = 4
    most_eval_steps: int | None = None  # a cap on the steps of every evaluation, for dry runs
    eval_batch: int = 256
    log_seconds: float = 20.0
    save_seconds: float = 60.0
    export_seconds: float = 120.0


FULL = TrainingRecipe()
# From a trained model on: other scenes, more of those that it draws worst, and mistakes for it to mend. The rate falls
# from the start, so that a run of any length ends well.
FURTHER = replace(
    FULL,
    seed=1,
    scenes=300_000,
    captions_per_scene=6,
    style=CaptionStyle(relation=0.92, second=0.55, inventory=0.15),
    object_odds=(0.07, 0.25, 0.29, 0.39),
    rate=8e-4,
    warmup=200,
    decay=1.0,
    mistaken=0.25,
    late_mix=T5Mix(short=0.5, long=0.35, zeros=0.05, omitted=0.10),
    check_at=1.0,
    finish_seconds=100.0,
)


def smoke(recipe: TrainingRecipe) -> TrainingRecipe:
    """The recipe with few enough numbers for a minute of two cores; models stay, because a dry run must try them."""
    return replace(
        recipe,
        scenes=16,
        held_out_scenes=4,
        vae_batch=2,
        vae_steps=2,
        batch=4,
        steps=4,
        check_prompts=1,
        finish_seconds=0.0,
        prompts=2,
        seeds=1,
        most_eval_steps=1,
        eval_batch=2,
        log_seconds=0.0,
        save_seconds=0.0,
        export_seconds=0.0,
    )


SMOKE = smoke(FULL)
