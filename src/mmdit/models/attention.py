"""The slot for attention: what computes it, and what sees or changes it, is a stack of small strategies.

    with attending([(model.joint_blocks[1].attend, SelfOnly(text=77))]):
        model(latent, timestep, context, pooled)

Without a strategy the slot is one call of its kernel. Strategies act only in the thread that added them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from threading import get_ident
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.utils import taken

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v), each [b, n, l, d] -> [b, n, l, d]
Below = Callable[[Tensor, Tensor, Tensor], "Attended"]  # the rest of the stack


class Rank(IntEnum):
    """The place of a strategy in the stack, outermost first, whatever the order in which strategies are added."""

    TOKENS = 0  # adds tokens that nothing below sees; one at a time
    INPUTS = 1  # sees or changes queries, keys and values; the one that was added first acts first
    OUTPUTS = 2  # sees or changes pattern and output; the one that was added first acts first
    DEVICES = 3  # exchanges tokens for heads with other devices; one at a time
    WEIGHTS = 4  # computes attention; one at a time


class Strategy(ABC):
    """One entry of the stack. A strategy of rank WEIGHTS ignores what is below it."""

    rank: ClassVar[Rank]

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, below: Below) -> Attended:
        """The attention of one call.

        Args:
            q, k, v: [b, n, l, d].
            below: attention by the rest of the stack.
        """


class Joint(Strategy):
    """Softmax attention without a mask, scores scaled by head_dim**-0.5.

    Args:
        kernel: computes the output; its result must be that of the pattern, up to rounding.
    """

    rank = Rank.WEIGHTS

    def __init__(self, kernel: Kernel = F.scaled_dot_product_attention) -> None:
        self.kernel = kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, below: Below) -> Attended:
        return Attended(self, q, k, v)

    def output(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the tokens gather, [b, n, l, d]."""
        return self.kernel(q, k, v)

    def pattern(self, q: Tensor, k: Tensor, queries: Tensor) -> Tensor:
        """The probabilities softmax(q k^T / sqrt(d)) of some queries, [b, n, queries, keys].

        Args:
            q: the queries that are meant, [b, n, queries, d]; the result is float32, or float64 if they are.
            k: all keys.
            queries: the numbers of these queries among all tokens, [queries] or [b, queries].
        """
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * q.shape[-1] ** -0.5
        return self.masked(scores, queries).softmax(dim=-1)

    def masked(self, scores: Tensor, queries: Tensor) -> Tensor:
        """The scores [b, n, queries, keys], with -inf where a query does not see a key."""
        return scores


class SelfOnly(Joint):
    """Image tokens see the text and themselves, but no other image token; text tokens see all.

    This is perturbed attention (Ahn et al. 2024, arXiv 2403.17377, section 4.2): the identity in place of the image's
    self-attention map, for joint attention as in diffusers' `PAGJointAttnProcessor2_0`.

    Args:
        text: number of text tokens, which come first. With 0 the output is v.
    """

    def __init__(self, text: int) -> None:
        super().__init__()
        self.text = text

    def output(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = torch.arange(q.shape[2], device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._seen(tokens, q.shape[2]))

    def masked(self, scores: Tensor, queries: Tensor) -> Tensor:
        seen = self._seen(queries.to(scores.device), scores.shape[-1])
        return scores.masked_fill(~(seen if seen.ndim == 2 else seen[:, None]), float("-inf"))

    def _seen(self, queries: Tensor, keys: int) -> Tensor:
        """Which keys each query sees, bool [queries, keys] or [b, queries, keys]."""
        every, one = torch.arange(keys, device=queries.device), queries[..., None]
        return (every < self.text) | (one < self.text) | (every == one)


class Attended:
    """The attention of one call and its two faces: `output` and `pattern`.

    Args:
        how: what computes them.
        q, k, v: [b, n, l, d].
        output: [b, n, l, d]; None computes it when it is first asked for.
    """

    def __init__(self, how: Joint, q: Tensor, k: Tensor, v: Tensor, output: Tensor | None = None) -> None:
        self.how, self.q, self.k, self.v, self._output = how, q, k, v, output

    @property
    def output(self) -> Tensor:
        """What the tokens gather, [b, n, l, d]."""
        if self._output is None:
            self._output = self.how.output(self.q, self.k, self.v)
        return self._output

    def giving(self, output: Tensor) -> Attended:
        """The same with another output, whose pattern stays as it was."""
        return Attended(self.how, self.q, self.k, self.v, output)

    def part(self, rows: Sequence[int], heads: Tensor | None = None) -> Attended:
        """The same attention of some rows of the batch and some heads alone.

        Args:
            rows: numbers of rows.
            heads: numbers of heads; None is all.
        """
        first = rows[0]
        together = (
            slice(first, first + len(rows)) if list(rows) == list(range(first, first + len(rows))) else list(rows)
        )
        return Attended(self.how, *(taken(part[together], 1, heads) for part in (self.q, self.k, self.v)))

    def pattern(self, queries: Tensor | None = None) -> Tensor:
        """The probabilities that the output is made of, [b, n, queries, keys], in float32, or float64 if q is that.

        Args:
            queries: numbers of tokens, [n], or [b, n] where the rows of the batch differ; None is all.
        """
        numbers = torch.arange(self.q.shape[2]) if queries is None else queries
        return self.how.pattern(taken(self.q, 2, queries), self.k, numbers)


class _Held(NamedTuple):
    thread: int
    strategy: Strategy


class Attend(nn.Module):
    """The slot for one attention of a block. It has no parameters.

    Attributes:
        kernel: computes plain attention, in all threads; see `Joint`.
    """

    def __init__(self, kernel: Kernel = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.kernel = kernel
        # Of all threads, in the order of adding. Single operations of a list need no lock, which an interrupt between
        # two lines could leave taken.
        self.held: list[_Held] = []

    def forward(
        self, q: Float[Tensor, "b n l d"], k: Float[Tensor, "b n m d"], v: Float[Tensor, "b n m d"]
    ) -> Float[Tensor, "b n l d"]:
        if not self.held:
            return self.kernel(q, k, v)
        if torch.compiler.is_compiling():
            # Strategies are no part of a graph. As a decorator of the method, `disable` would load the compiler, which
            # takes two seconds, with every import of this module.
            return torch.compiler.disable(self._stacked)(q, k, v)
        return self._stacked(q, k, v)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies of this thread, outermost first."""
        thread = get_ident()
        mine = [one.strategy for one in tuple(self.held) if one.thread == thread]
        order = {id(one): i if one.rank == Rank.INPUTS else -i for i, one in enumerate(mine)}
        return tuple(sorted(mine, key=lambda one: (one.rank, order[id(one)])))

    def _stacked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not (strategies := self.strategies):
            return self.kernel(q, k, v)
        return _attended((*strategies, Joint(self.kernel)), q, k, v).output


def _attended(strategies: Sequence[Strategy], q: Tensor, k: Tensor, v: Tensor) -> Attended:
    first, *rest = strategies
    return first(q, k, v, lambda q, k, v: _attended(rest, q, k, v))


@contextmanager
def attending(wanted: Iterable[tuple[nn.Module, Strategy]]) -> Iterator[None]:
    """Inside, in this thread alone, these slots attend with these strategies added; afterwards without them.

    Raises:
        ValueError: a slot already holds a strategy that cannot be combined with the new one; both are named.
        TypeError: a module is no `Attend`, because somebody put another module in its place.
    """
    thread = get_ident()
    added = [(slot, _Held(thread, strategy)) for slot, strategy in wanted]
    try:
        for slot, held in added:
            _add(slot, held)
        yield
    finally:
        for slot, held in added:
            _remove(slot, held)


def _add(slot: nn.Module, new: _Held) -> None:
    if not isinstance(slot, Attend):
        raise TypeError(
            f"{type(new.strategy).__name__} acts in an Attend, but a {type(slot).__name__} is in its place: what that "
            "computes is not known, so it cannot be watched or changed"
        )
    same = [one for one in slot.strategies if one.rank == new.strategy.rank]
    if same and new.strategy.rank in (Rank.TOKENS, Rank.DEVICES, Rank.WEIGHTS):
        raise ValueError(
            f"{type(new.strategy).__name__} cannot be combined with the {type(same[0]).__name__} that acts on the same "
            "attention already: leave that first"
        )
    slot.held.append(new)


def _remove(slot: nn.Module, held: _Held) -> None:
    """Take a strategy out of a slot that may not have it."""
    if isinstance(slot, Attend) and held in slot.held:
        slot.held.remove(held)
