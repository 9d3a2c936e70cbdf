"""Concept tokens (ConceptAttention): words beside the prompt that read the picture and are read by no other token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.inspection.addresses import Address, Numbers, whole_numbers
from mmdit.inspection.hooks import Inspected, Tracker, models_of, tracking
from mmdit.inspection.labelled import Labelled
from mmdit.inspection.words import token_positions
from mmdit.models.attention import Attended, Below, Joint, Rank, Strategy, attending
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.steps import PipelineSteps
from mmdit.runtime.compiled import refuse_compiled
from mmdit.runtime.hooks import Hook, hooks
from mmdit.utils import checks_names


class Concepts:
    """Maps that show where the picture contains each concept.

    Args:
        names: names of the concepts.
        blocks: numbers of the blocks whose maps are computed.
    """

    def __init__(self, names: Sequence[str], blocks: Sequence[int]) -> None:
        self.names, self.blocks = tuple(names), tuple(blocks)
        self._sums: dict[tuple[str | None, int], Tensor] = {}  # by branch and block: [samples, concepts, patches]
        self._calls: dict[tuple[str | None, int], int] = {}
        self._grid = (0, 0)

    def maps(self, branch: str | None = "cond") -> Labelled:
        """The share of each concept in each patch, averaged over calls: [block, sample, concept, row, column].

        Args:
            branch: a branch of guidance; None for a model that was called without a pipeline.

        Raises:
            ValueError: that branch did not run.
        """
        branches = list(dict.fromkeys(one for one, _ in self._sums))
        if branch not in branches:
            raise ValueError(
                f"no maps of branch {branch!r}; there are some of {', '.join(map(repr, branches)) or 'none'}"
            )
        blocks = [block for block in self.blocks if (branch, block) in self._sums]
        values = torch.stack([self._sums[branch, block] / self._calls[branch, block] for block in blocks])
        axes: dict[str, tuple[Any, ...]] = {"block": tuple(blocks), "sample": tuple(range(values.shape[1]))}
        places = {"row": tuple(range(self._grid[0])), "column": tuple(range(self._grid[1]))}
        return Labelled(values.unflatten(-1, self._grid), axes | {"concept": self.names} | places)

    def begin(self, grid: tuple[int, int]) -> None:
        """Note the rows and columns of patches that the transformer runs on."""
        if self._sums and grid != self._grid:
            raise ValueError(
                f"a drawing of {grid} patches follows one of {self._grid}: use concept_tokens once for each"
            )
        self._grid = grid

    def add(self, branch: str | None, block: int, shares: Tensor) -> None:
        """Add the maps of a call, [samples, concepts, patches]."""
        key = branch, block
        self._sums[key] = shares if key not in self._sums else self._sums[key] + shares
        self._calls[key] = self._calls.get(key, 0) + 1


class ConceptTokens(Strategy):
    """Attention over [text, concepts, image]: concepts read the image and themselves, and no other token reads them.

    Args:
        concepts: number of concepts.
        see: called with the output [b, heads, tokens, d] of every call and the number of text tokens.
    """

    rank = Rank.TOKENS

    def __init__(self, concepts: int, see: Callable[[Tensor, int], None]) -> None:
        self.concepts, self.see, self.text = concepts, see, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, below: Below) -> Attended:
        first, last = self.text, self.text + self.concepts
        others = [torch.cat([part[:, :, :first], part[:, :, last:]], dim=2) for part in (q, k, v)]
        z = below(*others).output
        of_concepts = F.scaled_dot_product_attention(q[:, :, first:last], k[:, :, first:], v[:, :, first:])
        whole = torch.cat([z[:, :, :first], of_concepts, z[:, :, first:]], dim=2)
        self.see(whole, first)
        return Attended(Joint(), q, k, v, whole)


@checks_names
@contextmanager
def concept_tokens(
    model: Inspected,
    concepts: str | Sequence[str] | Tensor,
    *,
    blocks: Numbers | None = None,
    steps: Numbers | None = None,
    sigmas: tuple[float, float] | None = None,
) -> Iterator[Concepts]:
    """Within the context, concept tokens run through the text stream of all blocks; pictures change by rounding only.

        with mmdit.concept_tokens(pipe, ["circle", "star", "background"]) as concepts:
            pipe("a red circle above a blue star", seed=1)
        concepts.maps().mean("block")  # [sample, concept, row, column]

    A map is a softmax over concepts of the inner products between the attention outputs at each patch and at each
    concept, over all heads: Helbling et al. 2025, arXiv 2502.04320, section 4. `attention_maps` and the points of
    `attend` see text and image only, in whatever order the contexts are entered. At points of the text stream, the
    concepts follow the text tokens.

    Args:
        model: a pipeline; or a transformer, with concepts as a tensor.
        concepts: words, each represented by the first T5 token (without T5, CLIP token) of a prompt of this word alone;
            or vectors [concepts, context_dim].
        blocks, steps, sigmas: the blocks, steps and noise levels whose maps are computed; None for all.

    Raises:
        ValueError: words are given without a pipeline, or there are fewer than two concepts.
    """
    names, vectors = _vectors(model, concepts)
    address = Address(steps=steps, sigmas=sigmas)
    transformer = next(one for one in models_of(model).values() if isinstance(one, MMDiT))
    refuse_compiled(transformer, "the transformer")
    numbers, blocks = list(range(len(transformer.joint_blocks))), whole_numbers("blocks", blocks)
    wanted = [blocks] if isinstance(blocks, int) else numbers[blocks] if isinstance(blocks, slice) else blocks
    found = Concepts(names, numbers if wanted is None else [numbers[i] for i in wanted])

    def began(_: nn.Module, given: tuple[Any, ...], __: Tracker) -> None:
        patch = transformer.config.patch_size
        found.begin((given[0].shape[2] // patch, given[0].shape[3] // patch))

    with tracking(model, [transformer], began) as trackers:
        (tracker,) = trackers.values()

        def note(block: int, z: Tensor, text: int) -> None:
            for rows in tracker.rows if block in found.blocks else ():
                if address.meets(rows.label, rows.steps):
                    part = z[rows.first : rows.first + rows.samples].detach()
                    found.add(rows.label.branch, block, _shares(part, text, len(vectors)))

        with _with_concepts(transformer, vectors, note):
            yield found


@contextmanager
def _with_concepts(transformer: MMDiT, vectors: Tensor, note: Callable[[int, Tensor, int], None]) -> Iterator[None]:
    """Add the concepts after the text tokens, and the strategy of their attention."""
    slots: list[tuple[Any, ConceptTokens]] = [
        (block.attend, ConceptTokens(len(vectors), partial(note, i)))
        for i, block in enumerate(transformer.joint_blocks)
    ]

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        context = args[0]
        for _, strategy in slots:
            strategy.text = context.shape[1]
        return (torch.cat([context, vectors.to(context).expand(len(context), -1, -1)], dim=1), *args[1:]), kwargs

    with hooks([Hook(transformer.context_embedder, "input", add)]), attending(slots):
        yield


def _vectors(model: Inspected, concepts: str | Sequence[str] | Tensor) -> tuple[list[str], Tensor]:
    if isinstance(concepts, Tensor):
        names, vectors = [str(i) for i in range(len(concepts))], concepts
    else:
        names = [concepts] if isinstance(concepts, str) else list(concepts)
        if not isinstance(model, PipelineSteps):
            raise ValueError("words are read by a pipeline; with a model alone, give vectors [concepts, context_dim]")
        vectors = torch.stack([_vector(model, name) for name in names]) if names else torch.empty(0, 0)
    if len(names) < 2:
        raise ValueError(f"maps compare concepts: give at least two, such as 'background' for the rest; got {names}")
    return names, vectors


@torch.no_grad()
def _vector(pipe: PipelineSteps, word: str) -> Tensor:
    read = pipe.encode(word)
    places = token_positions(read, 0, word, "t5") or token_positions(read, 0, word, "clip")
    if not places:
        raise ValueError(f"no encoder reads anything of the concept {word!r}")
    return read.context[0, places[0]]


def _shares(z: Tensor, text: int, concepts: int) -> Tensor:
    """The shares of the concepts [b, concepts, patches], from the attention output [b, heads, tokens, d]."""
    flat = z.transpose(1, 2).flatten(2).to(torch.promote_types(z.dtype, torch.float32))
    return (flat[:, text : text + concepts] @ flat[:, text + concepts :].transpose(1, 2)).softmax(dim=1)
