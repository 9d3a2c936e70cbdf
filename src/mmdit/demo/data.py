"""Training data: scenes, their captions, and the captions as token ids, made by all cores and kept as tensors."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.tokenize import CLIPTokenizer, T5Tokenizer, Tokenizers, pad
from mmdit.demo.captions import CaptionStyle, training_captions
from mmdit.demo.scenes import Scenes, sample
from mmdit.demo.vocab import write_tokenizers

__all__ = ["LENGTH", "Dataset", "TokenTable", "make_dataset", "own_tokenizers", "tokenize", "workers"]

LENGTH = 77  # tokens of every caption, in every tokenizer: the longest one has about 60 tokens
_CHUNK = 2000  # scenes of one task; each chunk has a seed of its own, so cores do not change the data


@dataclass(frozen=True)
class TokenTable:
    """Token ids of captions, each int16 [n, 77], padded as the three tokenizers pad."""

    clip_l: Tensor
    clip_g: Tensor
    t5: Tensor

    def __len__(self) -> int:
        return len(self.t5)

    def __getitem__(self, index: slice | Tensor) -> TokenTable:
        return TokenTable(self.clip_l[index], self.clip_g[index], self.t5[index])

    def to(self, device: torch.device | str) -> TokenTable:
        """A copy on a device."""
        return TokenTable(self.clip_l.to(device), self.clip_g.to(device), self.t5.to(device))


@dataclass(frozen=True)
class Dataset:
    """Scenes and `per_scene` captions of each: captions of scene i are rows i * per_scene and following."""

    scenes: Scenes
    tokens: TokenTable
    per_scene: int

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, for a file."""
        return (
            {"per_scene": torch.tensor(self.per_scene)}
            | vars(self.scenes)
            | {"tokens." + k: v for k, v in vars(self.tokens).items()}
        )

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Dataset:
        """Restore from what `state_dict` gave."""
        scenes = Scenes(**{f.name: state[f.name] for f in dataclasses.fields(Scenes)})
        tokens = TokenTable(**{f.name: state["tokens." + f.name] for f in dataclasses.fields(TokenTable)})
        return cls(scenes, tokens, int(state["per_scene"]))


@contextmanager
def workers(count: int | None = None) -> Iterator[Executor]:
    """A pool of processes of one thread each; spawned, because a forked process cannot share a GPU's context."""
    pool = ProcessPoolExecutor(
        count or os.cpu_count() or 1,
        multiprocessing.get_context("spawn"),
        initializer=_behind,
    )
    with pool:
        yield pool


@cache
def own_tokenizers() -> Tokenizers:
    """The embedded model's tokenizers, written and read back."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizers(folder)
        return Tokenizers.from_folder(folder)


def tokenize(captions: Sequence[str]) -> TokenTable:
    """Captions as ids, cut and padded exactly as `encoders.Conditioner` does at length 77."""
    own = own_tokenizers()
    assert own.clip_l and own.clip_g and own.t5, "the embedded model has all three"
    return TokenTable(*(_ids(tokenizer, captions) for tokenizer in (own.clip_l, own.clip_g, own.t5)))


def make_dataset(
    scenes: int,
    per_scene: int,
    seed: int,
    pool: Executor,
    style: CaptionStyle = CaptionStyle(),  # noqa: B008 (frozen)
    odds: Sequence[float] | None = None,
) -> Callable[[], Dataset]:
    """Start to sample, describe and tokenize scenes; call the returned function for the result.

    The result depends on the seed and not on the number of cores.

    Args:
        scenes, per_scene: the number of scenes, and of the captions of each.
        seed: of both.
        pool: processes that do it.
        style: what the captions say.
        odds: of scenes of 1, 2, 3 and 4 objects; None are those of `scenes.sample`.
    """
    counts = [min(_CHUNK, scenes - first) for first in range(0, scenes, _CHUNK)]
    # Generators read 32 bits of a seed, so seeds of chunks must differ there.
    seeds = [(seed * 1_000_003 + i) % 2**32 for i in range(len(counts))]
    n = len(counts)
    waiting = pool.map(_chunk, counts, [per_scene] * n, seeds, [style] * n, [odds] * n)

    def gather() -> Dataset:
        chunks = list(waiting)
        joined = {name: torch.from_numpy(np.concatenate([chunk[name] for chunk in chunks])) for name in chunks[0]}
        return Dataset.from_state_dict(joined | {"per_scene": torch.tensor(per_scene)})

    return gather


def _behind() -> None:
    """Use one thread, at a lower priority than the main process, which compiles meanwhile on a single core."""
    torch.set_num_threads(1)
    os.nice(10)


def _chunk(count: int, per_scene: int, seed: int, style: CaptionStyle, odds: Sequence[float] | None) -> dict[str, Any]:
    """Return NumPy arrays: tensors are sent between processes as open files, whose number is limited."""
    scenes = sample(count, seed) if odds is None else _with_odds(count, seed, odds)
    captions = [text for texts in training_captions(scenes, per_scene, seed, style) for text in texts]
    state = Dataset(scenes, tokenize(captions), per_scene).state_dict()
    return {name: value.numpy() for name, value in state.items() if name != "per_scene"}


def _with_odds(count: int, seed: int, odds: Sequence[float]) -> Scenes:
    """Choose among four times as many scenes, so that these shares of them have 1, 2, 3 and 4 objects."""
    g = torch.Generator().manual_seed(seed)
    many = sample(4 * count, g)
    ends = [round(count * sum(odds[:i]) / sum(odds)) for i in range(len(odds) + 1)]
    chosen = [(many.count == i + 1).nonzero()[: end - start, 0] for i, (start, end) in enumerate(pairwise(ends))]
    rows = torch.cat(chosen)
    if len(rows) < count:
        raise ValueError(f"odds of objects {tuple(odds)} differ too much from those of `scenes.sample` to choose by")
    return many[rows[torch.randperm(count, generator=g)]]


def _ids(tokenizer: CLIPTokenizer | T5Tokenizer, captions: Sequence[str]) -> Tensor:
    rows = [pad(tokenizer.encode(text), LENGTH, tokenizer.pad).ids for text in captions]
    return torch.tensor(rows, dtype=torch.int16)
