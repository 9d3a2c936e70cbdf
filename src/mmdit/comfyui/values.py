"""The types of the values on the wires of a workflow.

IMAGE is a float tensor [b, h, w, c] in [0, 1], MASK [b, h, w], SIGMAS float64 [n]; the others are the classes below.
Latents are at the VAE's scale, u = z / 1.5305 + 0.0609 for a latent z in model space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NotRequired, TypedDict

from torch import Tensor

from encoders import VAE, CLIPText, Conditioning, T5Encoder, Tokenizers
from mmdit.checkpoints.lora import Lora
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from samplers import Solver

CHANNELS = 16  # channels of an SD3 latent


class Latent(TypedDict):
    """LATENT, ComfyUI's dict."""

    samples: Tensor  # [b, c, h, w]
    noise_mask: NotRequired[Tensor]  # [b, 1, height, width]; 1 is drawn anew
    batch_index: NotRequired[list[int]]  # the index of the noise draw that each sample takes


class Area(NamedTuple):
    """A rectangle of a latent, in cells or in shares of the latent's sides."""

    height: float
    width: float
    y: float
    x: float
    in_shares: bool = False


@dataclass(frozen=True, eq=False)
class Hint:
    """A ControlNet with its hint, as a node applies it.

    Args:
        net: the ControlNet.
        image: the hint, [b, h, w, c] in [0, 1].
        vae: the VAE that encodes the hint. Sampling raises an error without one.
        strength: the factor of the net's residuals.
        start, end: the range in which the net is applied, as shares of the way from noise to picture.
        mask: the mask for an inpainting net, [b, h, w]; 1 is drawn anew.
    """

    net: ControlNet
    image: Tensor
    vae: VAE | None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Prompt:
    """One entry of a CONDITIONING, which is a tuple of entries; `mmdit.comfyui.conditions` combines their predictions.

    Args:
        conditioning: the encoded prompt.
        start, end: the range in which the entry is used, as shares of the way from noise to picture.
        strength: the weight of the entry relative to the other entries.
        area: the area in which the entry is used; None is the whole picture.
        mask: the weight of the entry at each position, [b, h, w]; it is multiplied by `mask_strength`.
        mask_bounds: whether the model runs only on the bounding rectangle of the mask.
        hints: the ControlNets that are applied to this entry, in this order.
    """

    conditioning: Conditioning
    start: float = 0.0
    end: float = 1.0
    strength: float = 1.0
    area: Area | None = None
    mask: Tensor | None = None
    mask_strength: float = 1.0
    mask_bounds: bool = False
    hints: tuple[Hint, ...] = ()


Prompts = tuple[Prompt, ...]  # CONDITIONING


@dataclass(frozen=True, eq=False)
class Clip:
    """CLIP: the text encoders from one or more files, the layer whose output is used, and their LoRAs."""

    clip_l: CLIPText | None
    clip_g: CLIPText | None
    t5: T5Encoder | None
    tokenizers: Tokenizers
    layer: int | None = None  # counted from the end: -1 is the last; None is -2 for CLIP and -1 for T5
    base: Clip | None = None  # the encoders without LoRAs; None if there are no LoRAs
    loras: tuple[tuple[Lora, float], ...] = ()


class Predicted(NamedTuple):
    """The input of guidance patches at a sigma: latents x, and the predicted x0 cond and uncond, each [b, c, h, w]."""

    x: Tensor
    sigma: float
    cond: Tensor
    uncond: Tensor
    scale: float
    weaker: Callable[[Sequence[int]], Tensor]  # (layers) -> the conditional prediction with these layers skipped


Before = Callable[[Predicted], Tensor]  # -> the conditional prediction to use instead
Mixing = Callable[[Predicted], Tensor]  # -> the guided prediction; it replaces plain guidance
After = Callable[[Predicted, Tensor], Tensor]  # (predicted, guided prediction) -> guided prediction
MaskRule = Callable[[Tensor, float, Tensor], Tensor]  # (mask, sigma, the drawing's sigmas) -> mask


@dataclass(frozen=True, eq=False)
class Model:
    """MODEL: a transformer, the shift of its schedules, and the model patches that change its predictions.

    The patches are created anew for each drawing, because some keep state between steps. All LoRAs are merged together
    into the weights of `base`, so that 16-bit and float8 weights are rounded only once.
    """

    transformer: MMDiT
    base: MMDiT | None = None  # the transformer without LoRAs; None if there are no LoRAs
    loras: tuple[tuple[Lora, float], ...] = ()  # LoRAs with their strengths
    shift: float = 3.0
    before: tuple[Callable[[], Before], ...] = ()
    mixing: Mixing | None = None
    after: tuple[After, ...] = ()
    mask_rule: MaskRule | None = None

    def and_after(self, patch: After) -> Model:
        """Return the model with one more patch of the guided prediction."""
        return replace(self, after=(*self.after, patch))


@dataclass(frozen=True)
class Noise:
    """NOISE: a seed, and whether noise is drawn with it or is zeros."""

    seed: int = 0
    drawn: bool = True


@dataclass(frozen=True, eq=False)
class Guider:
    """GUIDER: the prompts of a drawing, and how their predictions are combined."""

    model: Model
    positive: Prompts
    negative: Prompts | None = None
    scale: float = 1.0
    middle: Prompts | None = None  # the second prompt of DualCFGGuider
    middle_scale: float = 1.0
    nested: bool = False


@dataclass(frozen=True, eq=False)
class Sampler:
    """SAMPLER: a solver and its options."""

    name: str
    solver: Solver
    options: dict[str, float | int] = field(default_factory=dict)
