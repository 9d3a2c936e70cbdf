"""What runs in one pass of the transformer: which rows of its batch are whose. For guidance, and for looking inside."""

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
    """One conditioning of a step, its name in guidance, and how the transformer is changed for it.

    Branches with the same number of text tokens and the same change share a batch.
    """

    conditioning: Conditioning
    name: str | None = "cond"  # "cond", "uncond", "skip", "perturbed", or a name of your own; None is no name
    skip_layers: tuple[int, ...] = ()  # blocks that are left out
    perturbed_layers: tuple[int, ...] = ()  # blocks that attend by `mmdit.models.attention.SelfOnly`
    control: tuple[Control, ...] = ()  # ControlNets that act on it

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for branches that can share a batch."""
        return (self.conditioning.context.shape, self.skip_layers, self.perturbed_layers, self.control)


@dataclass(frozen=True)
class Pass:
    """A run of the transformer that `Pipeline.predict` makes. The batch holds `samples` rows of each branch in turn.

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
    """What `sample` is about to do. It is known before the transformer runs, so memory can be computed from it."""

    sigmas: tuple[float, ...]  # the noise levels of the steps, and 0
    branches: tuple[tuple[Branch, ...], ...]  # of each step
    shape: tuple[int, ...]  # of the latents


Watcher = Callable[[Pass], None]
Planner = Callable[[Drawing], None]


@contextmanager
def perturbed(model: MMDiT, layers: Sequence[int], text: int) -> Iterator[None]:
    """Inside, in this thread alone, these blocks attend by `mmdit.models.attention.SelfOnly`.

    The second attention of MMDiT-X (`attend2`), which is the image's alone, is the identity there: its output is v.

    Args:
        model: the transformer.
        layers: numbers of the blocks.
        text: number of text tokens, which come before those of the image.

    Raises:
        ValueError: attention of such a block is perturbed already.
        TypeError: another module has been put in the place of an `Attend`.
    """
    blocks: list[Any] = [model.joint_blocks[i] for i in layers]
    slots = [(block.attend, SelfOnly(text)) for block in blocks]
    slots += [(block.attend2, SelfOnly(0)) for block in blocks if hasattr(block, "attend2")]
    with attending(slots):
        yield
