"""Maps of the attention between words and patches: exact columns of the pattern, while attention stays fused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders import Conditioning
from mmdit.inspection.addresses import Address, Rows, Word, whole_numbers
from mmdit.inspection.attention import (
    Call,
    Direction,
    LogSumExp,
    Source,
    quadrant_masses,
    quadrants_of_pattern,
    word_maps,
    word_maps_of_pattern,
)
from mmdit.inspection.hooks import Tracker
from mmdit.inspection.words import ENCODERS, Encoder, Mix, check_words, mixed, token_positions, words_of
from mmdit.models.attention import Attended, Below, Joint, Rank, Strategy, attending
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.passes import Watcher
from mmdit.runtime.compiled import refuse_compiled
from mmdit.runtime.hooks import Hook, hooks, is_repeated, listening
from mmdit.runtime.precision import full_float32
from mmdit.utils import checks_names
from samplers import pick

Heads = Literal["mean", "each"]
Which = int | Collection[int] | None


@runtime_checkable
class Watched(Protocol):
    """A `mmdit.Pipeline`, or any object that calls its `watchers` before every run of its transformer."""

    transformer: MMDiT

    @property
    def watchers(self) -> list[Watcher]:
        """Functions that are called before every run of the transformer."""


@checks_names
@contextmanager
def attention_maps(
    pipe: Watched,
    words: str | Sequence[str] | None = None,
    *,
    blocks: int | Collection[int] | None = None,
    steps: int | Collection[int] | None = None,
    branch: str = "cond",
    heads: Heads = "mean",
    direction: Direction | Sequence[Direction] = "i2t",
    encoder: Encoder | Sequence[Encoder] = "all",
    quadrants: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Iterator[AttentionMaps]:
    """Record maps of the joint attention for everything that the pipeline draws within the context:

        with mmdit.attention_maps(pipe, ["circle", "blue star"]) as maps:
            picture = pipe("a red circle above a blue star", seed=7).images[0]
        maps.of("circle", block=2)  # [rows, columns]

    Pictures stay bit-equal: attention runs in the same fused kernel, which also returns the log-sum-exp, and a
    probability is exp(q k / 8 - log-sum-exp) in float32. Only the columns of the words are kept. The second attention
    of MMDiT-X (`attend2`) reads no words and is not recorded. Where attention is not plain softmax (perturbed guidance,
    a patched pattern), the maps are computed from the pattern that was used.

    Args:
        pipe: a pipeline, whose transformer is watched.
        words: words or phrases of the prompt, in upper or lower case; all occurrences and tokens of a word are summed.
            "word#2" is its second occurrence; "<bos>", "<eos>" and "<pad>" are the special tokens. None means every
            word of the prompts, () means none.
        blocks, steps: numbers of blocks and steps; None for all.
        branch: the branch of guidance: "cond", "uncond", "skip" or "perturbed".
        heads: "mean" keeps the mean over heads, "each" keeps every head.
        direction: "i2t" for the share of each patch's attention that goes to the word; "t2i" for the share of the
            word's attention, averaged over its tokens, that goes to each patch. (The model does not use what words read
            in the last block.) Both can be given.
        encoder: the text encoder whose tokens of the word are used: "clip", "t5" or "all". Several can be given.
        quadrants: whether to sum up how much image and text read of each other.
        dtype: the dtype in which maps are kept.
        device: where maps are kept; None is the transformer's device.

    Raises:
        ValueError: a name is unknown; a block does not exist, is compiled, or has a replaced attention. While drawing:
            a word is not in the prompt (`WordError`), or pictures have another size than before.
        RuntimeError: while drawing, the transformer was not called by the pipeline.
    """
    asked = _several(direction, get_args(Direction), "direction"), _several(encoder, tuple(ENCODERS), "encoder")
    _several(heads, get_args(Heads), "heads")
    model = pipe.transformer
    numbers = _blocks(model, blocks)
    maps = AttentionMaps(numbers, *asked, each_head=heads == "each")
    wanted = None if words is None else _text_of(words)
    allowed = _whole_collection("steps", steps)
    recorder = _Recorder(model, maps, wanted, allowed, branch, quadrants=quadrants, dtype=dtype, device=device)
    slots: list[tuple[Any, _Maps]] = [(model.joint_blocks[i].attend, _Maps(recorder, i)) for i in numbers]
    with (
        listening(pipe.watchers, recorder.tracker.watch),
        hooks([Hook(model, "input", recorder.begin)]),
        attending(slots),
    ):
        yield maps


class _Maps(Strategy):
    """A strategy that records the attention of one block and does not change it."""

    rank = Rank.OUTPUTS

    def __init__(self, recorder: _Recorder, block: int) -> None:
        self.recorder, self.block = recorder, block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, below: Below) -> Attended:
        return self.recorder.seen(self.block, below(q, k, v))


class _Recorder:
    """Follows the passes, and stores the maps of each block."""

    def __init__(
        self,
        model: MMDiT,
        maps: AttentionMaps,
        words: tuple[str, ...] | None,
        steps: Collection[int] | None,
        branch: str,
        *,
        quadrants: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.model, self.maps, self.words, self.steps, self.branch = model, maps, words, steps, branch
        self.quadrants, self.dtype, self.device = quadrants, dtype, device
        self.log_sum_exp = LogSumExp()
        maps.how = self.log_sum_exp.found
        self.tracker = Tracker()
        self.now: _Running | None = None  # the pass that is recorded
        self.known: tuple[Conditioning, list[dict[Encoder, Mix]]] | None = None  # computed for the last conditioning

    def begin(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        """Begin a run of the transformer."""
        self.now = None
        if is_repeated():
            return
        latent, _timestep, context = (*args, *kwargs.values())[:3]
        self.tracker.enter(len(latent), context.shape[1])
        told = [rows for rows in self.tracker.rows if rows.conditioning is not None]
        if not told:
            raise RuntimeError(
                "the transformer was called without pipe.predict, so it is not known which rows are of which branch; "
                "inside of attention_maps draw with the pipeline, or tell its watchers of each call yourself"
            )
        address = Address(branch=self.branch)
        found = next((rows for rows in told if address.meets(rows.label, rows.steps)), None)
        if found is None or (self.steps is not None and found.label.step not in self.steps):
            names = " and ".join(str(rows.label.branch) for rows in told)
            self.maps.others[f"{names} in step {told[0].label.step}"] = None
            return
        read, patch = found.conditioning, self.model.config.patch_size
        assert read is not None
        self._fit((latent.shape[2] // patch, latent.shape[3] // patch), read)
        where = slice(found.first, found.first + found.samples)
        self.now = _Running(read.context.shape[1], where, self._mixes(read), self._empty(found))
        self.maps.passes.append(self.now.seen)

    def seen(self, block: int, attended: Attended) -> Attended:
        """Store the maps of a block's attention, and return the attention unchanged.

        For plain softmax attention by PyTorch's kernel, the log-sum-exp suffices; otherwise the pattern is used.
        """
        if self.now is None:
            return attended
        how, rows = attended.how, self.now.rows
        if type(attended) is Attended and type(how) is Joint and how.kernel is F.scaled_dot_product_attention:
            q, k, v = attended.q, attended.k, attended.v
            z, lse = self.log_sum_exp.attend(q, k, v, rows)
            with full_float32(), torch.no_grad():
                self._record(block, self.now, q[rows], k[rows], v[rows], lse)
            return attended.giving(z)
        with full_float32(), torch.no_grad():
            self._record_pattern(block, self.now, attended)
        return attended

    def _record(self, block: int, now: _Running, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        """Store the maps of the watched rows, computed from the log-sum-exp."""
        place, text, seen = self.maps.blocks.index(block), now.text, now.seen
        if seen.masses is not None:
            of_text = self.log_sum_exp.of(q, k[:, :, :text], v[:, :, :text])
            seen.masses[place] = quadrant_masses(lse, of_text, text).transpose(0, 1)
        for sample, mixes in enumerate(now.mixes):
            for (direction, encoder), kept in seen.maps.items():
                tokens, mix = self._mix_of(mixes[encoder], direction)
                if len(tokens):
                    kept[place, :, sample] = word_maps(
                        q[sample], k[sample], lse[sample], text, tokens, mix, direction, each=self.maps.each_head
                    )

    def _record_pattern(self, block: int, now: _Running, attended: Attended) -> None:
        """Store the maps of the watched rows, computed from rows of the pattern."""
        place, text, seen = self.maps.blocks.index(block), now.text, now.seen
        rows = range(now.rows.start, now.rows.stop)
        if seen.masses is not None:
            seen.masses[place] = quadrants_of_pattern(attended.part(rows), text).transpose(0, 1)
        for sample, mixes in enumerate(now.mixes):
            one = attended.part([rows[sample]])
            for (direction, encoder), kept in seen.maps.items():
                tokens, mix = self._mix_of(mixes[encoder], direction)
                if len(tokens):
                    found = word_maps_of_pattern(one, text, tokens, mix, direction, each=self.maps.each_head)
                    kept[place, :, sample] = found

    def _mix_of(self, mix: Mix, direction: Direction) -> tuple[Tensor, Tensor]:
        return mix.tokens, mix.counts if direction == "i2t" else mix.shares()

    def _fit(self, grid: tuple[int, int], read: Conditioning) -> None:
        """Note the sizes, which all passes share, or raise ValueError."""
        maps, found = self.maps, (*grid, read.context.shape[1], len(read))
        if not maps.passes:
            maps.grid, maps.text, self.sizes = grid, read.context.shape[1], found
        elif found != self.sizes:
            raise ValueError(
                f"a drawing of {found[0]} x {found[1]} patches, {found[2]} text tokens and {found[3]} samples follows "
                f"one of {self.sizes[0]} x {self.sizes[1]}, {self.sizes[2]} and {self.sizes[3]}; "
                "use attention_maps once for each"
            )

    def _mixes(self, read: Conditioning) -> list[dict[Encoder, Mix]]:
        """The tokens of the words, for each sample and encoder."""
        if self.known is not None and self.known[0] is read:
            return self.known[1]
        if not self.maps.passes:
            words = dict.fromkeys(word for prompt in read.prompts for word in words_of(prompt))
            self.maps.names = tuple(words) if self.words is None else self.words
        for encoder in self.maps.encoders:
            check_words(read, self.maps.names, encoder)
        found = [{encoder: self._mix(read, i, encoder) for encoder in self.maps.encoders} for i in range(len(read))]
        self.known = read, found
        return found

    def _mix(self, read: Conditioning, sample: int, encoder: Encoder) -> Mix:
        like = self.model.pos_embed
        positions = [token_positions(read, sample, word, encoder) for word in self.maps.names]
        return mixed(positions, like.device, torch.promote_types(like.dtype, torch.float32))

    def _empty(self, found: Rows) -> Seen:
        """Tensors for a pass, filled with NaN."""
        maps, heads = self.maps, self.model.config.heads
        device = self.model.pos_embed.device if self.device is None else self.device

        def room(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.full((len(maps.blocks), *shape), float("nan"), dtype=dtype, device=device)

        wide = torch.promote_types(self.dtype, torch.float32)
        patches, kept = maps.grid[0] * maps.grid[1], heads if maps.each_head else 1
        pairs = [(direction, encoder) for direction in maps.directions for encoder in maps.encoders]
        maps_of = {pair: room(kept, found.samples, len(maps.names), patches) for pair in pairs}
        masses = room(heads, found.samples, 4, dtype=wide) if self.quadrants else None
        assert found.label.sigma is not None
        return Seen(found.label.step, found.label.sigma, maps_of, masses)


class _Running(NamedTuple):
    """A pass that is being recorded."""

    text: int
    rows: slice
    mixes: list[dict[Encoder, Mix]]
    seen: Seen


def _blocks(model: MMDiT, blocks: int | Collection[int] | None) -> tuple[int, ...]:
    """The numbers of the blocks to watch, after a check that they exist."""
    depth = len(model.joint_blocks)
    given = _whole_collection("blocks", blocks)
    numbers = range(depth) if given is None else sorted(given)
    if outside := [i for i in numbers if not 0 <= i < depth]:
        raise ValueError(f"blocks {outside} do not exist; this model has blocks 0 to {depth - 1}")
    refuse_compiled(model, "the transformer")
    return tuple(numbers)


def _whole_collection(argument: str, given: Any) -> set[int] | None:
    if isinstance(given, slice):
        raise TypeError(f"{argument} takes a whole number or a list of them, got {given}; give a range")
    found = whole_numbers(argument, given)
    return None if found is None else {found} if isinstance(found, int) else set(found)


def _text_of(words: str | Sequence[str]) -> tuple[str, ...]:
    given: tuple[Any, ...] = (words,) if isinstance(words, str | Word) or not isinstance(words, Iterable) else (*words,)
    for one in given:
        if not isinstance(one, str):
            hint = ": give its text, and encoder= of the whole call" if isinstance(one, Word) else ""
            raise TypeError(f"words are strings, got {type(one).__name__}{hint}")
    return given


def _several(value: Any, known: Sequence[str], what: str) -> tuple[Any, ...]:
    """One name or several as a tuple; ValueError for unknown ones."""
    names = (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))
    if not names:
        raise ValueError(f"no {what} is given; known are {', '.join(known)}")
    return tuple(pick({name: name for name in known}, name, what) for name in names)


@dataclass(frozen=True)
class Seen:
    """The maps of one pass; NaN where a block did not run, or where the prompt does not have the word."""

    step: int
    sigma: float
    maps: dict[tuple[Direction, Encoder], Tensor]  # blocks heads samples words patches
    masses: Tensor | None  # blocks heads samples 4


class AttentionMaps:
    """The maps of all recorded passes, filled while the pipeline runs.

    The first axis of a map is the pass: a step, or one of the predictions of a step with solvers that make several; see
    `axes`.

    Attributes:
        blocks: numbers of the joint blocks along the second axis.
        directions, encoders: those that were requested; `words` holds the first of each.
        how: how the log-sum-exp was computed, by kind of call; see `mmdit.inspection.attention.LogSumExp`.
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
        self.grid = (0, 0)  # rows and columns of patches
        self.text = 0  # number of text tokens
        self.others: dict[str, None] = {}  # branches and steps of passes that were not requested
        self.how: Mapping[Call, Source] = {}

    @property
    def words(self) -> Mapping[str, Tensor]:
        """The maps by word, each [passes, blocks, (heads,) samples, rows, columns]; see `axes`."""
        return _Words(self)

    @property
    def quadrants(self) -> Tensor:
        """Attention summed over the quadrants I2I, I2T, T2I, T2T: [passes, blocks, heads, samples, 4].

        Every row of attention sums to 1, so I2I + I2T is the number of patches, and T2I + T2T that of text tokens.

        Raises:
            ValueError: quadrants were not requested, or nothing was drawn.
        """
        masses = [seen.masses for seen in self._passes() if seen.masses is not None]
        if not masses:
            raise ValueError("quadrants were not asked for: attention_maps(..., quadrants=True)")
        return torch.stack(masses)

    @property
    def shares(self) -> Tensor:
        """`quadrants` as shares of a row, averaged over rows: [..., 0] + [..., 1] = 1 and [..., 2] + [..., 3] = 1."""
        patches = self.grid[0] * self.grid[1]
        return self.quadrants / torch.tensor([patches, patches, self.text, self.text], device=self.quadrants.device)

    @property
    def axes(self) -> dict[str, list[int]]:
        """The labels of the axes of `words`, in their order."""
        samples, (rows, columns) = self._first().shape[2], self.grid
        heads = {"head": self._first().shape[1]} if self.each_head else {}
        labels: dict[str, list[int]] = {"step": [seen.step for seen in self.passes], "block": [*self.blocks]}
        sizes = {**heads, "sample": samples, "row": rows, "column": columns}
        return labels | {name: list(range(size)) for name, size in sizes.items()}

    @property
    def sigmas(self) -> list[float]:
        """The noise level of each pass."""
        return [seen.sigma for seen in self.passes]

    def word(self, word: str, *, encoder: Encoder | None = None, direction: Direction | None = None) -> Tensor:
        """All maps of a word, [passes, blocks, (heads,) samples, rows, columns].

        Args:
            word: a word that was requested.
            encoder, direction: an encoder and a direction that were requested; None is the first.

        Raises:
            ValueError: the word was not requested, or nothing was drawn.
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
        """One heat map [rows, columns], averaged over all blocks, steps and heads, or over those that are given.

        Args:
            word: a word that was requested.
            block, step, head: one number or several; None for all.
            sample: number of the picture in the batch.
            encoder, direction: see `word`.

        Raises:
            ValueError: a block, step or head was not recorded, or the picture's prompt does not have the word.
        """
        maps = self.word(word, encoder=encoder, direction=direction)
        maps = maps if self.each_head else maps[:, :, None]
        if head is not None and not self.each_head:
            raise ValueError('the mean over heads was kept, so none can be picked: attention_maps(..., heads="each")')
        steps = [seen.step for seen in self.passes]
        labels: dict[str, tuple[Which, Sequence[int]]] = {
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
            height, width: size of the result in pixels.
            smooth: whether to interpolate bilinearly; otherwise every patch keeps its single value.
            **where: see `of`.
        """
        found = self.of(word, **where)[None, None]
        mode: dict[str, Any] = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
        return F.interpolate(found, (height, width), **mode)[0, 0]

    @property
    def nbytes(self) -> int:
        """The size of all maps in bytes."""
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
                f"nothing was watched: draw inside attention_maps, with the branch and steps that were asked for{ran}"
            )
        return self.passes


class _Words(Mapping[str, Tensor]):
    """A mapping from words to maps, which are stacked over passes on access."""

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


def _places(name: str, which: Which, known: Sequence[int]) -> list[int]:
    """The indices of the requested labels along an axis."""
    if which is None:
        return list(range(len(known)))
    wanted = {which} if isinstance(which, int) else set(which)
    if absent := sorted(wanted - set(known)):
        labels = ", ".join(dict.fromkeys(map(str, known)))
        raise ValueError(f"{name} {', '.join(map(str, absent))} was not watched; there are {labels}")
    return [place for place, label in enumerate(known) if label in wanted]
