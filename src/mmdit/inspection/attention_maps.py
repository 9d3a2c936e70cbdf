"""Which word goes where: exact columns of the attention pattern, while attention itself stays fused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders import Conditioning
from mmdit.inspection.attention import (
    Direction,
    LogSumExp,
    quadrant_masses,
    quadrants_of_pattern,
    word_maps,
    word_maps_of_pattern,
)
from mmdit.inspection.map_results import AttentionMaps, Seen
from mmdit.inspection.words import ENCODERS, Encoder, Mix, check_words, mixed, token_positions, words_of
from mmdit.models.attention import Attended, Below, Joint, Rank, Strategy, attending
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.passes import Pass, Watcher
from mmdit.runtime.compiled import refuse_compiled
from mmdit.runtime.hooks import Hook, hooks, listening
from mmdit.runtime.precision import full_float32
from samplers import pick

Heads = Literal["mean", "each"]


@runtime_checkable
class Watched(Protocol):
    """What is watched: a `mmdit.Pipeline`, or anything that tells `watchers` of every run of its transformer."""

    transformer: MMDiT
    watchers: list[Watcher]


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
    """Watch the joint attention of everything that the pipeline draws inside:

        with mmdit.attention_maps(pipe, ["circle", "blue star"]) as maps:
            picture = pipe("a red circle above a blue star", seed=7).images[0]
        maps.of("circle", block=2)  # [rows, columns]

    Pictures stay the same bit by bit: attention runs in the same fused kernel, which gives its log-sum-exp too, and a
    probability is exp(q k / 8 - log-sum-exp), in float32. Kept are the words' columns only. The second, image-only
    attention of MMDiT-X reads no words and is not watched.

    Args:
        pipe: whose transformer is watched.
        words: words or phrases of the prompt, in any case; all occurrences and all tokens of one together. "word#2" is
            its second occurrence; "<bos>", "<eos>" and "<pad>" are the tokens around. None is every word of the
            prompts, () none.
        blocks, steps: numbers; None is all.
        branch: of guidance, "cond" or "uncond".
        heads: their mean, or each.
        direction: "i2t", which word does this patch read: the share of each patch's attention that goes to the word;
            "t2i", where does this word look: the share of the word's attention, the mean over its tokens, that goes to
            each patch. (Of the last block the model does not use what words read.) Several give both.
        encoder: whose tokens of the word: "clip", "t5" or "all" together. Several give each.
        quadrants: sum up who reads whom as well, image or text.
        dtype: what maps are kept in.
        device: where; None is the transformer's.

    Raises:
        ValueError: an unknown name, a block that does not exist, or one that is compiled or whose attention has been
            replaced. While drawing, a word that is not in the prompt (`WordError`), or pictures of another size.
        RuntimeError: while drawing, the transformer was not called by the pipeline.
    """
    asked = _several(direction, get_args(Direction), "direction"), _several(encoder, tuple(ENCODERS), "encoder")
    _several(heads, get_args(Heads), "heads")
    model = pipe.transformer
    numbers = _blocks(model, blocks)
    maps = AttentionMaps(numbers, *asked, each_head=heads == "each")
    wanted = (words,) if isinstance(words, str) else None if words is None else tuple(words)
    allowed = {steps} if isinstance(steps, int) else steps
    recorder = _Recorder(model, maps, wanted, allowed, branch, quadrants=quadrants, dtype=dtype, device=device)
    slots: list[tuple[Any, _Maps]] = [(model.joint_blocks[i].attend, _Maps(recorder, i)) for i in numbers]
    with (
        listening(pipe.watchers, recorder.announced),
        hooks([Hook(model, "input", recorder.begin)]),
        attending(slots),
    ):
        yield maps


class _Maps(Strategy):
    """Records what one block's attention shows, and leaves it as it is."""

    rank = Rank.OUTPUTS

    def __init__(self, recorder: _Recorder, block: int) -> None:
        self.recorder, self.block = recorder, block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, below: Below) -> Attended:
        return self.recorder.seen(self.block, below(q, k, v))


class _Recorder:
    """Follows the passes and stores what each block's attention shows."""

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
        self.told: Pass | None = None  # of a run that has not begun
        self.now: _Running | None = None  # the run that is watched
        self.known: tuple[Conditioning, list[dict[Encoder, Mix]]] | None = None  # of the last conditioning

    def announced(self, one: Pass) -> None:
        """The pipeline is about to run the transformer."""
        self.told = one

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The transformer runs."""
        told, self.told, self.now = self.told, None, None
        if told is None:
            raise RuntimeError(
                "the transformer was called without pipe.predict, so it is not known which rows are of which branch; "
                "inside of attention_maps draw with the pipeline, or tell its watchers of each call yourself"
            )
        if any(branch.name is None for branch in told.branches):
            raise ValueError(
                f"attention_maps of branch={self.branch!r} is asked for, but the branches of this pass have no names; "
                "name them: pipe.predictor(cond=..., uncond=...), or mmdit.Branch(conditioning, name)"
            )
        read = next((branch.conditioning for branch in told.branches if branch.name == self.branch), None)
        if read is None or (self.steps is not None and told.step not in self.steps):
            names = " and ".join(str(branch.name) for branch in told.branches)
            self.maps.others[f"{names} in step {told.step}"] = None
            return
        latent, patch = args[0] if args else kwargs["latent"], self.model.config.patch_size
        self._fit((latent.shape[2] // patch, latent.shape[3] // patch), read)
        mixes = self._mixes(read)
        self.now = _Running(read.context.shape[1], told.rows(self.branch), mixes, self._empty(told))
        self.maps.passes.append(self.now.seen)

    def seen(self, block: int, attended: Attended) -> Attended:
        """Store what a block's attention shows, and give it back.

        Of plain softmax attention by PyTorch's kernel the log-sum-exp is enough; of all else, the pattern is read.
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
        """Of the rows that are watched, by the log-sum-exp."""
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
        """Of the rows that are watched, by rows of the pattern."""
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
        """For each sample and encoder, which tokens the words have."""
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

    def _empty(self, told: Pass) -> Seen:
        """Room for a pass, filled with NaN."""
        maps, heads = self.maps, self.model.config.heads
        device = self.model.pos_embed.device if self.device is None else self.device

        def room(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.full((len(maps.blocks), *shape), float("nan"), dtype=dtype, device=device)

        wide = torch.promote_types(self.dtype, torch.float32)
        patches, kept = maps.grid[0] * maps.grid[1], heads if maps.each_head else 1
        pairs = [(direction, encoder) for direction in maps.directions for encoder in maps.encoders]
        found = {pair: room(kept, told.samples, len(maps.names), patches) for pair in pairs}
        masses = room(heads, told.samples, 4, dtype=wide) if self.quadrants else None
        return Seen(told.step, told.sigma, found, masses)


class _Running(NamedTuple):
    """A pass that is watched."""

    text: int
    rows: slice
    mixes: list[dict[Encoder, Mix]]
    seen: Seen


def _blocks(model: MMDiT, blocks: int | Collection[int] | None) -> tuple[int, ...]:
    """The numbers of the blocks, whose attention must be there to be watched."""
    depth = len(model.joint_blocks)
    numbers = range(depth) if blocks is None else sorted({blocks} if isinstance(blocks, int) else set(blocks))
    if outside := [i for i in numbers if not 0 <= i < depth]:
        raise ValueError(f"blocks {outside} do not exist; this model has blocks 0 to {depth - 1}")
    refuse_compiled(model, "the transformer")
    return tuple(numbers)


def _several(value: Any, known: Sequence[str], what: str) -> tuple[Any, ...]:
    """One name or several, each of them known."""
    names = (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))
    if not names:
        raise ValueError(f"no {what} is given; known are {', '.join(known)}")
    return tuple(pick({name: name for name in known}, name, what) for name in names)
