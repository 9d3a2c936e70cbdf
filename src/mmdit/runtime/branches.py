"""Guidance over several ranks: each predicts some of a step's branches, and one exchange brings all to every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mmdit.runtime.mesh import Team, shares, starts

T = TypeVar("T")


def split_branches(
    branches: Sequence[T], run: Callable[[Sequence[T]], list[Tensor]], x: Tensor, team: Team
) -> list[Tensor]:
    """The predictions of all branches, on every rank; branches that are neighbours stay together.

    With fewer branches than ranks some ranks predict nothing; with more, some predict several: three on two ranks are
    two and one.

    Args:
        branches: the branches of a step, equal on all ranks.
        run: predicts branches, each a tensor with the shape, dtype and device of `x`.
        x: the latents of the step.
        team: the ranks.
    """
    counts = shares(len(branches), team.size)
    first, count = starts(counts)[team.rank], counts[team.rank]
    own = run(branches[first : first + count]) if count else []
    part = x.new_zeros((max(counts), *x.shape))
    if own:
        torch.stack(own, out=part[:count])
    return [one for found, size in zip(team.gathered(part), counts, strict=True) for one in found[:size]]
