"""What runs in one pass of the transformer: which rows of its batch are whose. For guidance, and for looking inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from encoders import Conditioning
from mmdit.models.mmdit import MMDiT


class Branch(NamedTuple):
    """One conditioning of a step, its name in guidance, and how the transformer is changed for it.

    Branches with the same number of text tokens and the same change share a batch.
    """

    conditioning: Conditioning
    name: str = "cond"  # "cond", "uncond", "skip", "perturbed"
    skip_layers: tuple[int, ...] = ()  # blocks that are left out
    perturbed_layers: tuple[int, ...] = ()  # blocks that attend as `AttendSelf`

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for branches that can share a batch."""
        return (self.conditioning.context.shape, self.skip_layers, self.perturbed_layers)


@dataclass(frozen=True)
class Pass:
    """A run of the transformer within a drawing. The batch holds `samples` rows of each branch in turn.

    `step` counts steps that the solver has finished, so that all calls of a step have one number; None outside of
    `sample`.
    """

    step: int | None
    sigma: float
    branches: tuple[Branch, ...]
    samples: int

    def rows(self, branch: str) -> slice:
        """The rows of the first branch of that name.

        Raises:
            KeyError: there is none.
        """
        for i, one in enumerate(self.branches):
            if one.name == branch:
                return slice(i * self.samples, (i + 1) * self.samples)
        raise KeyError(f"this pass has no branch {branch!r}, but {', '.join(one.name for one in self.branches)}")


@dataclass(frozen=True)
class Drawing:
    """What `sample` is about to do: known before the transformer runs, so that what it will take can be computed."""

    sigmas: tuple[float, ...]  # the noise levels of the steps, and 0
    branches: tuple[tuple[Branch, ...], ...]  # of each step
    shape: tuple[int, ...]  # of the latents


Watcher = Callable[[Pass], None]
Planner = Callable[[Drawing], None]


class AttendSelf(nn.Module):
    """Attention whose image tokens see themselves and the text, but no other image token.

    The identity in the place of the image's self-attention map: perturbed attention (Ahn et al. 2024, arXiv
    2403.17377, section 4.2), for joint attention as in diffusers' `PAGJointAttnProcessor2_0`.

    Args:
        text: tokens that come before those of the image; they attend to all.
    """

    def __init__(self, text: int) -> None:
        super().__init__()
        self.text = text

    def forward(
        self, q: Float[Tensor, "b n l d"], k: Float[Tensor, "b n m d"], v: Float[Tensor, "b n m d"]
    ) -> Float[Tensor, "b n l d"]:
        """What each token gathers, as `Attend` does."""
        seen = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        seen[: self.text] = seen[:, : self.text] = True
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@contextmanager
def perturbed(model: MMDiT, layers: Sequence[int], text: int) -> Iterator[None]:
    """Inside, these blocks attend as `AttendSelf`, after `text` text tokens; then they have their own attention back.

    The second attention of MMDiT-X (`attend2`), which is the image's alone, is the identity there: v.
    """
    places = [(model.joint_blocks[i].attend, text) for i in layers]
    places += [(model.joint_blocks[i].attend2, 0) for i in layers if hasattr(model.joint_blocks[i], "attend2")]
    before = [vars(attend).get("forward") for attend, _ in places]
    try:
        for attend, count in places:  # the module stays, so that its hooks run
            vars(attend)["forward"] = AttendSelf(count).forward
        yield
    finally:
        for (attend, _), own in zip(places, before, strict=True):
            if own is None:
                vars(attend).pop("forward", None)
            else:
                vars(attend)["forward"] = own
