"""One forward over several ranks: each holds a part of the image tokens, and in attention a part of the heads.

Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509) for joint attention. Every rank computes its part of
the text stream and of the image stream. Before attention, one all-to-all exchanges queries, keys and values, so that a
rank has all tokens of some heads; after it, another one brings the outputs back. Between the two, tokens are in the
order of the ranks, each with its text first, which softmax attention without a mask does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.models.attention import Attend, Attended, Below, Rank, Strategy, attending
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.runtime import plain_kernels
from mmdit.runtime.mesh import Team, shares, starts
from mmdit.runtime.peers import Exchanging, Peers
from mmdit.runtime.rows import Attention, AttentionInputs


class SequenceParallel:
    """Forwards of MMDiTs and ControlNets over the ranks of a team.

    Args:
        team: the ranks that share the tokens.
        peers: exchanges the heads and tokens of fast forwards; None does so by the collectives of `team`.
    """

    def __init__(self, team: Team, peers: Peers | None = None) -> None:
        self.team, self.peers = team, peers

    def velocity(
        self,
        model: MMDiT,
        latent: Float[Tensor, "b c h w"],
        timestep: Float[Tensor, " b"],
        context: Float[Tensor, "b n k"],
        pooled: Float[Tensor, "b p"],
        *,
        control: Sequence[Tensor | None] | None = None,
        skip_layers: Collection[int] = (),
    ) -> Float[Tensor, "b o h w"]:
        """What `MMDiT.forward` computes, on every rank; `control` has this rank's tokens, as `residuals` gives them."""
        model.check(latent, context, pooled, control, skip_layers)
        c = model.t_embedder(timestep) + model.y_embedder(pooled)
        tokens = model.x_embedder(latent) + model.cropped_pos_embed(*latent.shape[2:])
        part = self.part(tokens.shape[1])
        x, context = part.own(tokens), model.context_embedder(part.own_text(context))
        with part.attending(model):
            for i, block in enumerate(model.joint_blocks):
                if i not in skip_layers:
                    context, x = block(context, x, c)
                if control is not None and (residual := control[i]) is not None:
                    x = x + residual
        return model.unpatchify(part.whole(model.final_layer(x, c)), *latent.shape[2:])

    def residuals(
        self,
        net: ControlNet,
        latent: Float[Tensor, "b c h w"],
        timestep: Float[Tensor, " b"],
        context: Float[Tensor, "b n k"],
        pooled: Float[Tensor, "b p"],
        hint: Float[Tensor, "b e h w"],
        tokens: Float[Tensor, "b l d"] | None = None,
    ) -> list[Tensor]:
        """This rank's tokens of what `ControlNet.forward` computes."""
        net.check(latent, context, pooled, hint, tokens)
        c = net.time_text_embed(timestep, pooled)
        if net.config.is_joint:
            tokens = net.pos_embed(latent)
        assert tokens is not None, "checked above"
        part = self.part(tokens.shape[1])
        if net.config.is_joint:
            context = net.context_embedder(part.own_text(context))
        x, found = part.own(tokens + net.pos_embed_input(hint)), []
        with part.attending(net):
            for block, project in zip(net.transformer_blocks, net.controlnet_blocks, strict=True):
                context, x = block(context, x, c)
                found.append(project(x))
        return found

    def part(self, tokens: int) -> Part:
        """This rank's part of so many image tokens.

        Raises:
            ValueError: there are fewer tokens than ranks.
        """
        if tokens < self.team.size:
            raise ValueError(
                f"the picture has {tokens} tokens for the {self.team.size} ranks of a sequence, and each needs one: "
                "draw a larger picture, or on fewer ranks"
            )
        return Part(self.team, shares(tokens, self.team.size), self.peers)


class Part:
    """One rank's part of the tokens.

    Args:
        team: the ranks.
        sizes: the number of image tokens of each.
        peers: see `SequenceParallel`.
    """

    def __init__(self, team: Team, sizes: list[int], peers: Peers | None = None) -> None:
        self.team, self.peers, self.sizes, self.start = team, peers, sizes, starts(sizes)[team.rank]
        self.size, self.text = sizes[team.rank], [0] * team.size

    def own(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b m d"]:
        """This rank's image tokens of all."""
        return tokens[:, self.start : self.start + self.size]

    def own_text(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """This rank's text tokens of all; attention counts on that many from now on.

        Raises:
            ValueError: there are fewer text tokens than ranks.
        """
        if tokens.shape[1] < self.team.size:
            raise ValueError(
                f"the text has {tokens.shape[1]} tokens for {self.team.size} ranks of a sequence, and each needs one"
            )
        self.text = shares(tokens.shape[1], self.team.size)[::-1]  # ranks with more image tokens have less text
        start = starts(self.text)[self.team.rank]
        return tokens[:, start : start + self.text[self.team.rank]]

    def whole(self, tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b l d"]:
        """All image tokens, of which each rank gives its own."""
        return self.team.joined(tokens, self.sizes, 1)

    @contextmanager
    def attending(self, model: nn.Module) -> Iterator[None]:
        """Within the context, all attention of the model goes over the ranks."""
        with attending([(slot, _Exchanged(self)) for slot in model.modules() if isinstance(slot, Attend)]):
            yield

    def exchanging(
        self, kernels: ModuleType, inner: Attention, like: Float[Tensor, "b m d"], heads: int
    ) -> tuple[ModuleType, Attention]:
        """The kernels and the attention of a fast forward over the ranks, which sees this rank's tokens of all heads.

        Args:
            kernels: those of one rank.
            inner: attention of all tokens with this rank's heads, [b, tokens, heads, head_dim] in and out.
            like: tokens, in the dtype and on the device of the model.
            heads: attention heads of the model.
        """
        direct = self.peers
        if direct is None or not direct.takes(like, like.shape[-1] // heads) or kernels is plain_kernels:
            return kernels, lambda q, k, v: self.attend(q, k, v, inner)
        over = Exchanging(kernels, direct, inner, heads, self.text, self.sizes)
        return _Kernels(kernels, over.pack), over.attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inner: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Exchange tokens for heads, attend, and exchange back.

        Args:
            q, k, v: [b, t, heads, head_dim]: this rank's text tokens, if the attention reads any, and image tokens.
            inner: attention of all tokens with this rank's heads, in the same layout; see `counts` for their order.
        """
        heads, counts = shares(q.shape[2], self.team.size), self.counts(q.shape[1])
        return self._back(inner(*self._forth(q, k, v, heads, counts)), heads, counts)

    def counts(self, tokens: int) -> list[int]:
        """The tokens of each rank in an attention for which this rank has so many: of both streams, or of the image."""
        return self.sizes if tokens == self.size else [sum(pair) for pair in zip(self.text, self.sizes, strict=True)]

    def _forth(
        self, q: Tensor, k: Tensor, v: Tensor, heads: list[int], counts: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of this rank's heads, each [b, tokens of all ranks, own heads, head_dim]."""
        (samples, _, _, width), rank = q.shape, self.team.rank
        joint = q.new_empty(samples, sum(counts), 3, heads[rank], width)
        targets = [joint[:, start : start + size] for start, size in zip(starts(counts), counts, strict=True)]
        parts = [targets[i] if i == rank else None for i in range(self.team.size)]
        for i, (place, count) in enumerate(zip(starts(heads), heads, strict=True)):
            given = [one[:, :, place : place + count] for one in (q, k, v)]
            if i == rank:
                _put(targets[i], given)
            else:
                parts[i] = torch.stack(given, dim=2)
        arrived = targets if samples == 1 else [torch.empty_like(one) for one in targets]
        self.team.exchanged(arrived, [one for one in parts if one is not None])
        for i, (target, one) in enumerate(zip(targets, arrived, strict=True)):
            if one is not target and i != rank:
                target.copy_(one)
        found = joint.unbind(2)
        return found[0], found[1], found[2]

    def _back(self, z: Tensor, heads: list[int], counts: list[int]) -> Tensor:
        """This rank's tokens of all heads, [b, t, heads, head_dim]."""
        (samples, _, _, width), rank = z.shape, self.team.rank
        parts = [one.contiguous() for one in z.split(counts, dim=1)]  # nothing is copied for one sample
        arrived = [
            parts[i] if i == rank else z.new_empty(samples, counts[rank], count, width) for i, count in enumerate(heads)
        ]
        self.team.exchanged(arrived, parts)
        return torch.cat(arrived, dim=2)


def _put(target: Tensor, parts: Sequence[Tensor]) -> None:
    """Write queries, keys and values, each [b, t, heads, head_dim], side by side into [b, t, 3, heads, head_dim]."""
    if len(target) == 1:
        torch.stack([one[0] for one in parts], dim=1, out=target[0])
    else:
        target.copy_(torch.stack(list(parts), dim=2))


class _Exchanged(Strategy):
    """Attention over the ranks, in the slot of a block."""

    rank = Rank.DEVICES

    def __init__(self, part: Part) -> None:
        self.part = part

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, below: Below) -> Attended:
        inner: list[Attended] = []
        order = self.order(self.part.counts(q.shape[2])).to(q.device)

        def attend(*parts: Tensor) -> Tensor:
            inner.append(below(*(_turned(one[:, order]) for one in parts)))
            return _turned(inner[0].output)[:, order.argsort()]

        output = self.part.attend(_turned(q), _turned(k), _turned(v), attend)
        return Attended(inner[0].how, q, k, v, _turned(output))

    def order(self, counts: list[int]) -> Tensor:
        """Where the tokens are among those of the ranks: text first, as strategies expect it."""
        text = self.part.text if counts is not self.part.sizes else [0] * len(counts)
        first = [range(start, start + size) for start, size in zip(starts(counts), text, strict=True)]
        rest = [range(start + own, start + size) for start, own, size in zip(starts(counts), text, counts, strict=True)]
        return torch.tensor([place for part in (*first, *rest) for place in part], device="cpu")


class _Kernels(ModuleType):
    """The kernels of a fast forward, with another `pack`."""

    def __init__(self, kernels: ModuleType, pack: Callable[..., AttentionInputs]) -> None:
        super().__init__(kernels.__name__)
        self.__dict__.update(vars(kernels))
        self.pack = pack


def _turned(x: Tensor) -> Tensor:
    """Swap heads and tokens."""
    return x.transpose(1, 2)


def exchanged_bytes(
    *, tokens: int, text: int, heads: int, head_dim: int, depth: int, second: int, ranks: int, itemsize: int = 2
) -> int:
    """Bytes that rank 0 sends in a forward of one sample, without the gathering of the result.

    Args:
        tokens, text: numbers of image and text tokens.
        heads, head_dim: of the model.
        depth, second: numbers of blocks, and of blocks with a second attention.
        ranks: the ranks that share the tokens.
        itemsize: bytes of a value.
    """
    mine, image = shares(heads, ranks)[0], shares(tokens, ranks)[0]
    both, all_tokens = image + shares(text, ranks)[-1], tokens + text
    joint = 3 * both * (heads - mine) + (all_tokens - both) * mine
    alone = 3 * image * (heads - mine) + (tokens - image) * mine
    return (depth * joint + second * alone) * head_dim * itemsize
