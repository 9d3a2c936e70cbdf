"""Concept tokens: words beside the prompt that look at the picture while nothing looks at them (ConceptAttention)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.inspection.addresses import Address, Numbers
from mmdit.inspection.hooks import Inspected, Target, Tracker, hooked, models_of, selected
from mmdit.inspection.labelled import Labelled
from mmdit.inspection.views import Passing
from mmdit.inspection.words import token_positions
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.steps import PipelineSteps


class Concepts:
    """Where the picture shows each concept.

    Args:
        names: of the concepts.
        blocks: numbers.
    """

    def __init__(self, names: Sequence[str], blocks: Sequence[int]) -> None:
        self.names, self.blocks = tuple(names), tuple(blocks)
        self._sums: dict[tuple[str | None, int], Tensor] = {}  # by half and block: [samples, concepts, patches]
        self._calls: dict[tuple[str | None, int], int] = {}
        self._grid = (0, 0)

    def maps(self, branch: str | None = "cond") -> Labelled:
        """The share of each concept in each patch, the mean over calls: [block, sample, concept, row, column].

        Args:
            branch: of guidance; None of a model that was called without a pipeline.

        Raises:
            ValueError: nothing ran of that branch.
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
        """The transformer runs on that many rows and columns of patches."""
        if self._sums and grid != self._grid:
            raise ValueError(
                f"a drawing of {grid} patches follows one of {self._grid}: use concept_tokens once for each"
            )
        self._grid = grid

    def add(self, branch: str | None, block: int, shares: Tensor) -> None:
        """One more call's [samples, concepts, patches]."""
        key = branch, block
        self._sums[key] = shares if key not in self._sums else self._sums[key] + shares
        self._calls[key] = self._calls.get(key, 0) + 1


class ConceptAttend(nn.Module):
    """Attention over [text, concepts, image]: concepts read the image and themselves, and nothing reads them.

    Args:
        inner: attends for text and image, as if there were no concepts.
        concepts: how many.
    """

    def __init__(self, inner: nn.Module, concepts: int) -> None:
        super().__init__()
        self.inner, self.concepts, self.text = inner, concepts, 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, last = self.text, self.text + self.concepts
        others = [torch.cat([part[:, :, :first], part[:, :, last:]], dim=2) for part in (q, k, v)]
        z = self.inner(*others)
        of_concepts = F.scaled_dot_product_attention(q[:, :, first:last], k[:, :, first:], v[:, :, first:])
        return torch.cat([z[:, :, :first], of_concepts, z[:, :, first:]], dim=2)


@contextmanager
def concept_tokens(
    model: Inspected,
    concepts: str | Sequence[str] | Tensor,
    *,
    blocks: Numbers | None = None,
    steps: Numbers | None = None,
    sigmas: tuple[float, float] | None = None,
) -> Iterator[Concepts]:
    """Within it, concept tokens go through the text stream of all blocks; pictures stay the same up to rounding.

        with mmdit.concept_tokens(pipe, ["circle", "star", "background"]) as concepts:
            pipe("a red circle above a blue star", seed=1)
        concepts.maps().mean("block")  # [sample, concept, row, column]

    A map is the softmax over the concepts of the products of attention's output at each patch and at each concept, all
    heads together: Helbling et al. 2025, arXiv 2502.04320, section 4. Enter `capture` and `attention_maps` of attention
    before this, and they see text and image alone.

    Args:
        model: a pipeline; or a transformer, with concepts as a tensor.
        concepts: words, each as its first T5 token (without a T5, of CLIP) of a prompt of this word alone; or vectors
            [concepts, context_dim].
        blocks, steps, sigmas: of which maps are made.

    Raises:
        ValueError: words without a pipeline, or fewer than two concepts.
    """
    names, vectors = _vectors(model, concepts)
    targets = selected(model, "joint_blocks.*.attend.z")
    address = Address(steps=steps, sigmas=sigmas)
    numbers = list(range(len(targets)))
    wanted = [blocks] if isinstance(blocks, int) else numbers[blocks] if isinstance(blocks, slice) else blocks
    chosen = numbers if wanted is None else [numbers[i] for i in wanted]
    found = Concepts(names, chosen)
    transformer = next(one for one in models_of(model).values() if isinstance(one, MMDiT))

    def began(_: nn.Module, given: tuple[Any, ...], __: Tracker) -> None:
        patch = transformer.config.patch_size
        found.begin((given[0].shape[2] // patch, given[0].shape[3] // patch))

    def note(target: Target, passing: Passing, tracker: Tracker) -> None:
        for rows in tracker.rows:
            if address.meets(rows.label, rows.steps):
                z = passing.output[rows.first : rows.first + rows.samples].detach()
                found.add(rows.label.branch, _number(target), _shares(z, tracker.text_tokens, len(vectors)))

    with ExitStack() as stack:
        stack.enter_context(_with_concepts(transformer, vectors))
        stack.enter_context(hooked(model, [targets[i] for i in chosen], note, began))
        yield found


@contextmanager
def _with_concepts(transformer: MMDiT, vectors: Tensor) -> Iterator[None]:
    """Concepts after the text tokens, and attention that knows them."""
    blocks: Any = list(transformer.joint_blocks)
    attends = [block.attend for block in blocks]
    replaced = [ConceptAttend(attend, len(vectors)) for attend in attends]

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        context = args[0]
        for attend in replaced:
            attend.text = context.shape[1]
        return (torch.cat([context, vectors.to(context).expand(len(context), -1, -1)], dim=1), *args[1:])

    handle = transformer.context_embedder.register_forward_pre_hook(add)
    try:
        for block, attend in zip(blocks, replaced, strict=True):
            block.attend = attend
        yield
    finally:
        handle.remove()
        for block, attend in zip(blocks, attends, strict=True):
            block.attend = attend


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
    """[b, heads, tokens, d] of attention's output to [b, concepts, patches]."""
    flat = z.transpose(1, 2).flatten(2).to(torch.promote_types(z.dtype, torch.float32))
    return (flat[:, text : text + concepts] @ flat[:, text + concepts :].transpose(1, 2)).softmax(dim=1)


def _number(target: Target) -> int:
    return int(target.name.split(".")[1])
