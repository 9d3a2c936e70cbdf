"""One pass of the transformer: which rows of its batch belong to which branch, for guidance and inspection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from encoders import Conditioning
from mmdit.models.attention import SelfOnly, attending
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import Control


class Branch(NamedTuple):
    """One conditioning of a step, its name in guidance, and the changes of the transformer for it.

    Branches with the same number of text tokens and the same change share a batch.
    """

    conditioning: Conditioning
    name: str | None = "cond"  # "cond", "uncond", "skip", "perturbed", or a name of your own; None for no name
    skip_layers: tuple[int, ...] = ()  # numbers of the blocks that are skipped
    perturbed_layers: tuple[int, ...] = ()  # numbers of the blocks that attend with `mmdit.models.attention.SelfOnly`
    control: tuple[Control, ...] = ()  # ControlNets that act on it

    @property
    def kind(self) -> tuple[object, ...]:
        """A key that is equal for branches that can share a batch."""
        return (self.conditioning.context.shape, self.skip_layers, self.perturbed_layers, self.control)


@dataclass(frozen=True)
class Pass:
    """A run of the transformer in `Pipeline.predict`. The batch holds `samples` rows of each branch in turn.

    `step` is the number of steps that the solver has finished, so all calls of a step have one number. It is None where
    `predict` was called without a step. All passes of one call of `predict` have the same number `prediction`.
    """

    step: int | None
    sigma: float
    branches: tuple[Branch, ...]
    samples: int
    prediction: int = 0

    def rows(self, branch: str) -> slice:
        """The rows of the first branch of that name.

        Raises:
            KeyError: there is none.
        """
        for i, one in enumerate(self.branches):
            if one.name == branch:
                return slice(i * self.samples, (i + 1) * self.samples)
        raise KeyError(f"this pass has no branch {branch!r}, but {', '.join(str(one.name) for one in self.branches)}")


@dataclass(frozen=True)
class Drawing:
    """The passes of a drawing, known before the transformer runs, so that memory can be computed from them."""

    sigmas: tuple[float, ...]  # the noise levels of the steps, then 0
    branches: tuple[tuple[Branch, ...], ...]  # the branches of each step
    shape: tuple[int, ...]  # the shape of the latents, [b, c, h, w]


Watcher = Callable[[Pass], None]
Planner = Callable[[Drawing], None]


@contextmanager
def perturbed(model: MMDiT, layers: Sequence[int], text: int) -> Iterator[None]:
    """Within the context and in this thread, these blocks attend with `mmdit.models.attention.SelfOnly`.

    The second attention of MMDiT-X (`attend2`), which has image tokens only, becomes the identity: its output is v.

    Args:
        model: the transformer.
        layers: numbers of the blocks.
        text: number of text tokens, which come before those of the image.

    Raises:
        ValueError: the attention of such a block is perturbed already.
        TypeError: another module has replaced an `Attend`.
    """
    blocks: list[Any] = [model.joint_blocks[i] for i in layers]
    slots = [(block.attend, SelfOnly(text)) for block in blocks]
    slots += [(block.attend2, SelfOnly(0)) for block in blocks if hasattr(block, "attend2")]
    with attending(slots):
        yield
