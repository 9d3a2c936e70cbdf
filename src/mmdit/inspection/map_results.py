"""What `mmdit.attention_maps` found: labelled arrays, and single maps picked out of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.inspection.attention import Call, Direction, Source
from mmdit.inspection.words import Encoder
from samplers import pick

Which = int | Collection[int] | None


@dataclass(frozen=True)
class Seen:
    """One pass of the transformer; NaN where a block did not run, or a prompt does not have the word."""

    step: int | None
    sigma: float
    maps: dict[tuple[Direction, Encoder], Tensor]  # blocks heads samples words patches
    masses: Tensor | None  # blocks heads samples 4


class AttentionMaps:
    """Maps of all passes that were watched, filled while the pipeline runs. The first axis is one pass: a step, or,
    with solvers that predict several times in a step, one of these; `axes` says which.

    Attributes:
        blocks: numbers of the joint blocks, as on the second axis.
        directions, encoders: what was asked for; the first of each is what `words` holds.
        how: where the log-sum-exp came from, by kind of call; see `mmdit.inspection.attention.LogSumExp`.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        directions: tuple[Direction, ...],
        encoders: tuple[Encoder, ...],
        *,
        each_head: bool,
    ) -> None:
        self.blocks, self.directions, self.encoders, self.each_head = blocks, directions, encoders, each_head
        self.names: tuple[str, ...] = ()
        self.passes: list[Seen] = []
        self.grid = (0, 0)  # patches of the picture: rows, columns
        self.text = 0  # text tokens
        self.others: dict[str, None] = {}  # branches and steps of passes that were not asked for
        self.how: Mapping[Call, Source] = {}

    @property
    def words(self) -> Mapping[str, Tensor]:
        """By word, [passes, blocks, (heads,) samples, rows, columns]; see `axes`."""
        return _Words(self)

    @property
    def quadrants(self) -> Tensor:
        """Attention summed by who reads whom, [passes, blocks, heads, samples, 4]: I2I, I2T, T2I, T2T.

        I2I + I2T is the number of patches, T2I + T2T that of text tokens: every row of attention sums to 1.

        Raises:
            ValueError: they were not asked for, or nothing was drawn.
        """
        masses = [seen.masses for seen in self._passes() if seen.masses is not None]
        if not masses:
            raise ValueError("quadrants were not asked for: attention_maps(..., quadrants=True)")
        return torch.stack(masses)

    @property
    def shares(self) -> Tensor:
        """`quadrants` as shares of a row, the mean over rows: [..., 0] + [..., 1] = 1 and [..., 2] + [..., 3] = 1."""
        patches = self.grid[0] * self.grid[1]
        return self.quadrants / torch.tensor([patches, patches, self.text, self.text], device=self.quadrants.device)

    @property
    def axes(self) -> dict[str, list[int | None]]:
        """The labels of the axes of `words`, in their order."""
        samples, (rows, columns) = self._first().shape[2], self.grid
        heads = {"head": self._first().shape[1]} if self.each_head else {}
        labels: dict[str, list[int | None]] = {"step": [seen.step for seen in self.passes], "block": [*self.blocks]}
        sizes = {**heads, "sample": samples, "row": rows, "column": columns}
        return labels | {name: list(range(size)) for name, size in sizes.items()}

    @property
    def sigmas(self) -> list[float]:
        """The noise level of each pass."""
        return [seen.sigma for seen in self.passes]

    def word(self, word: str, *, encoder: Encoder | None = None, direction: Direction | None = None) -> Tensor:
        """All maps of a word, [passes, blocks, (heads,) samples, rows, columns].

        Args:
            word: one that was asked for.
            encoder, direction: of those that were asked for; None is the first.

        Raises:
            ValueError: it was not asked for, or nothing was drawn.
        """
        passes, key = self._passes(), (direction or self.directions[0], encoder or self.encoders[0])
        if key not in passes[0].maps:
            asked = ", ".join(f"{one}, {other}" for one, other in passes[0].maps)
            raise ValueError(f"direction and encoder {', '.join(key)} were not asked for; there are: {asked}")
        index = pick({name: i for i, name in enumerate(self.names)}, word, "word")
        found = torch.stack([seen.maps[key][..., index, :] for seen in passes]).unflatten(-1, self.grid)
        return found if self.each_head else found[:, :, 0]

    def of(
        self,
        word: str,
        *,
        block: Which = None,
        step: Which = None,
        head: Which = None,
        sample: int = 0,
        encoder: Encoder | None = None,
        direction: Direction | None = None,
    ) -> Tensor:
        """One heat map [rows, columns]: the mean over blocks, steps and heads, all or those that are given.

        Args:
            word: one that was asked for.
            block, step, head: one number or several; None is all.
            sample: which picture.
            encoder, direction: see `word`.

        Raises:
            ValueError: a number was not watched, or the word is not in the prompt of that picture.
        """
        maps = self.word(word, encoder=encoder, direction=direction)
        maps = maps if self.each_head else maps[:, :, None]
        if head is not None and not self.each_head:
            raise ValueError('the mean over heads was kept, so none can be picked: attention_maps(..., heads="each")')
        steps: list[int | None] = [seen.step for seen in self.passes]
        labels: dict[str, tuple[Which, Sequence[int | None]]] = {
            "step": (step, steps),
            "block": (block, self.blocks),
            "head": (head, range(maps.shape[2])),
        }
        for axis, (name, (which, known)) in enumerate(labels.items()):
            maps = maps.index_select(axis, torch.tensor(_places(name, which, known), device=maps.device))
        (place,) = _places("sample", sample, range(maps.shape[3]))
        found = maps[:, :, :, place].flatten(0, 2).float().nanmean(0)
        if found.isnan().any():
            raise ValueError(f"{word!r} has no map there: the prompt of sample {sample} is without it, or no block ran")
        return found

    def upsampled(self, word: str, height: int, width: int, *, smooth: bool = True, **where: Any) -> Tensor:
        """`of(word, **where)` at the size of the picture, [height, width].

        Args:
            word: see `of`.
            height, width: in pixels.
            smooth: bilinear; else every patch keeps its one value.
            **where: see `of`.
        """
        found = self.of(word, **where)[None, None]
        mode: dict[str, Any] = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
        return F.interpolate(found, (height, width), **mode)[0, 0]

    @property
    def nbytes(self) -> int:
        """What is kept."""
        kept = [part for seen in self.passes for part in (*seen.maps.values(), seen.masses) if part is not None]
        return sum(part.nbytes for part in kept)

    def __repr__(self) -> str:
        words = ", ".join(self.names) or "no words"
        return (
            f"AttentionMaps of {words}: {len(self.passes)} passes, {len(self.blocks)} blocks, "
            f"{self.grid[0]} x {self.grid[1]} patches, {self.nbytes / 1e6:.1f} MB"
        )

    def _first(self) -> Tensor:
        return self._passes()[0].maps[self.directions[0], self.encoders[0]]

    def _passes(self) -> list[Seen]:
        if not self.passes:
            ran = f"; there were passes of {', '.join(self.others)}" if self.others else ""
            raise ValueError(
                f"nothing was watched: draw inside of attention_maps, with the half and steps that were asked for{ran}"
            )
        return self.passes


class _Words(Mapping[str, Tensor]):
    """Puts the passes of a word together when it is asked for."""

    def __init__(self, maps: AttentionMaps) -> None:
        self.maps = maps

    def __getitem__(self, word: str) -> Tensor:
        if word not in self.maps.names:
            raise KeyError(f"{word!r} was not asked for, but {', '.join(self.maps.names)}")
        return self.maps.word(word)

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps.names)

    def __len__(self) -> int:
        return len(self.maps.names)


def _places(name: str, which: Which, known: Sequence[int | None]) -> list[int]:
    """Where the asked-for labels stand on an axis."""
    if which is None:
        return list(range(len(known)))
    wanted = {which} if isinstance(which, int) else set(which)
    if absent := sorted(wanted - set(known)):
        labels = ", ".join(dict.fromkeys(map(str, known)))
        raise ValueError(f"{name} {', '.join(map(str, absent))} was not watched; there are {labels}")
    return [place for place, label in enumerate(known) if label in wanted]
