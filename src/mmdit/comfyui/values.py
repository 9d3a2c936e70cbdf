"""What travels on the wires of a workflow. Latents are at the VAE's scale, u = z / 1.5305 + 0.0609 of model space z.

IMAGE is a float tensor [b, h, w, c] in [0, 1], MASK [b, h, w], SIGMAS float64 [n]; the others are the classes below.
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

CHANNELS = 16  # of a latent of SD3


class Latent(TypedDict):
    """LATENT, ComfyUI's dict."""

    samples: Tensor  # [b, c, h, w]
    noise_mask: NotRequired[Tensor]  # [b, 1, height, width]; 1 is repainted
    batch_index: NotRequired[list[int]]  # which of many single draws of noise each sample takes


class Area(NamedTuple):
    """A rectangle of a latent, in cells, or in shares of its sides."""

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
        vae: what encodes it; without one, the sampler fails.
        strength: of the net.
        start, end: the shares of the way between which it acts.
        mask: of an inpainting net, [b, h, w]; 1 is drawn anew.
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
    """One entry of a CONDITIONING, which is a tuple of these; several count together, see `mmdit.comfyui.conditions`.

    Args:
        conditioning: of one prompt.
        start, end: the shares of the way from noise to picture between which it counts.
        strength: its weight beside other entries.
        area: where it counts; None is everywhere.
        mask: [b, h, w], how much it counts at each place, times `mask_strength`.
        mask_bounds: whether the model sees only the rectangle around the mask.
        hints: ControlNets that act on it, in this order.
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
    """CLIP: the text encoders that a file or several files hold, the layer whose output counts, and LoRAs on them."""

    clip_l: CLIPText | None
    clip_g: CLIPText | None
    t5: T5Encoder | None
    tokenizers: Tokenizers
    layer: int | None = None  # counted from the end, -1 is the last; None is -2 for CLIP, and T5's last
    base: Clip | None = None  # without LoRAs; None where there is none
    loras: tuple[tuple[Lora, float], ...] = ()


class Predicted(NamedTuple):
    """What guidance knows at a noise level; x, cond and uncond are latents [b, c, h, w], the last two predicted x0."""

    x: Tensor
    sigma: float
    cond: Tensor
    uncond: Tensor
    scale: float
    weaker: Callable[[Sequence[int]], Tensor]  # the prediction with the prompt, without these layers


Before = Callable[[Predicted], Tensor]  # -> another conditional prediction
Mixing = Callable[[Predicted], Tensor]  # -> the guided prediction, in the place of plain guidance
After = Callable[[Predicted, Tensor], Tensor]  # (predicted, guided prediction) -> guided prediction
MaskRule = Callable[[Tensor, float, Tensor], Tensor]  # (mask, sigma, the drawing's sigmas) -> mask


@dataclass(frozen=True, eq=False)
class Model:
    """MODEL: a transformer, the shift of its schedules, and what model patches do around its predictions.

    The patches are made anew for each drawing, because some remember the step before. LoRAs act on the weights of
    `base`, all together, so that 16-bit and float8 weights are rounded once.
    """

    transformer: MMDiT
    base: MMDiT | None = None  # without LoRAs; None where there is none
    loras: tuple[tuple[Lora, float], ...] = ()  # with their strengths
    shift: float = 3.0
    before: tuple[Callable[[], Before], ...] = ()
    mixing: Mixing | None = None
    after: tuple[After, ...] = ()
    mask_rule: MaskRule | None = None

    def and_after(self, patch: After) -> Model:
        """With one more patch of the guided prediction."""
        return replace(self, after=(*self.after, patch))


@dataclass(frozen=True)
class Noise:
    """NOISE: a seed, and whether the noise of a latent is drawn with it or is zeros."""

    seed: int = 0
    drawn: bool = True


@dataclass(frozen=True, eq=False)
class Guider:
    """GUIDER: the prompts of a drawing, and how their predictions are combined."""

    model: Model
    positive: Prompts
    negative: Prompts | None = None
    scale: float = 1.0
    middle: Prompts | None = None  # of DualCFGGuider: its second prompt
    middle_scale: float = 1.0
    nested: bool = False


@dataclass(frozen=True, eq=False)
class Sampler:
    """SAMPLER: a solver and its options."""

    name: str
    solver: Solver
    options: dict[str, float | int] = field(default_factory=dict)
