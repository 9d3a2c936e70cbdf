"""Every number of the training of ControlNets for the embedded model, on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPU", "ControlRecipe"]


@dataclass(frozen=True)
class ControlRecipe:
    """Every number of a run. Shares are of a net's time that is left after its pictures are encoded."""

    depth: int = 1  # blocks of a net
    mlp_dim: int | None = None  # width of the hidden layer of its MLPs; None is four times that of tokens
    scenes: int = 1024
    captions_per_scene: int = 2
    full_captions: float = 0.3  # share of captions that say shapes and positions too
    hard: float = (
        2.0  # how much each small object of a shape in `HARD` adds to the weight of a scene, which is 1 without
    )
    dropped: float = 0.1  # captions replaced by the empty one
    seed: int = 0
    alone_share: float = 0.25  # share of the first stage, which trains without the transformer
    alone_batch: int = 64
    batch: int = 32
    rate: float = 1.5e-3
    warmup: int = 40
    decay: float = 0.5
    ema: float = 0.99
    shift: float = 3.0
    moves: int = 4  # cells by which pictures and hints are shifted at most, with wraparound, which augments few scenes
    profiles: tuple[str, ...] = ("diffusers", "diffusers", "comfyui", "reference")  # each step takes one at random
    context_gradients: bool = False  # whether gradients also go through the text tokens of the transformer
    recorded: bool = False  # whether steps are recorded as CUDA graphs, one for each profile; needs a GPU
    compiled: bool = False  # whether blocks are compiled, which takes about a minute at the start
    keeps_data: bool = True  # whether encoded pictures are saved, so that a resumed run does not encode them again
    save_seconds: float = 60.0
    log_seconds: float = 20.0


GPU = ControlRecipe(
    scenes=49_152,
    captions_per_scene=1,
    full_captions=0.1,
    dropped=0.15,  # guidance multiplies errors of the velocity without the caption, too
    alone_share=0.1,
    alone_batch=512,
    batch=512,
    warmup=500,
    decay=0.8,
    ema=0.9995,
    moves=0,
    context_gradients=True,
    profiles=("diffusers", "diffusers", "diffusers", "comfyui", "reference"),
    recorded=True,
    keeps_data=False,
)
