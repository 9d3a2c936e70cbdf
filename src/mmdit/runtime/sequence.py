"""One forward over several ranks: each holds a part of the image tokens, and in attention a part of the heads.

Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509) for joint attention. Every rank computes the text
stream, which is short, and its part of the image stream. Before attention, one all-to-all exchanges queries, keys and
values, so that a rank has all tokens of some heads; after it, another one brings the outputs back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.models.attention import Attend, Attended, Below, Rank, Strategy, attending
from mmdit.models.controlnet import ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.mesh import Team, shares, starts
from mmdit.runtime.rows import Attention


class SequenceParallel:
    """Forwards of MMDiTs and ControlNets over the ranks of a team.

    Args:
        team: the ranks that share the tokens.
    """

    def __init__(self, team: Team) -> None:
        self.team = team

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
        x, context = part.own(tokens), model.context_embedder(context)
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
            context, tokens = net.context_embedder(context), net.pos_embed(latent)
        assert tokens is not None, "checked above"
        part = self.part(tokens.shape[1])
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
        return Part(self.team, shares(tokens, self.team.size))


class Part:
    """One rank's part of the image tokens.

    Args:
        team: the ranks.
        sizes: the number of tokens of each.
    """

    def __init__(self, team: Team, sizes: list[int]) -> None:
        self.team, self.sizes, self.starts = team, sizes, starts(sizes)
        self.size, self.start = sizes[team.rank], self.starts[team.rank]

    def own(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b m d"]:
        """This rank's tokens of all."""
        return tokens[:, self.start : self.start + self.size]

    def whole(self, tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b l d"]:
        """All tokens, of which each rank gives its own."""
        return self.team.joined(tokens, self.sizes, 1)

    @contextmanager
    def attending(self, model: nn.Module) -> Iterator[None]:
        """Within the context, all attention of the model goes over the ranks."""
        with attending([(slot, _Exchanged(self)) for slot in model.modules() if isinstance(slot, Attend)]):
            yield

    def attention(self, inner: Attention) -> Attention:
        """Attention over the ranks; [b, tokens, heads, head_dim] in and out, this rank's tokens of all heads."""
        return lambda q, k, v: self.attend(q, k, v, inner)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inner: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Exchange tokens for heads, attend, and exchange back.

        Args:
            q, k, v: [b, n + m, heads, head_dim]: the text tokens, if there are any, and this rank's m image tokens.
            inner: attention of all tokens with this rank's heads, in the same layout.
        """
        heads = shares(q.shape[2], self.team.size)
        return self._back(inner(*self._forth(q, k, v, heads)), heads)

    def _forth(self, q: Tensor, k: Tensor, v: Tensor, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of this rank's heads, each [b, n + l, own heads, head_dim]."""
        (samples, tokens, _, width), rank = q.shape, self.team.rank
        text, places = tokens - self.size, starts(heads)
        joint = q.new_empty(samples, text + sum(self.sizes), 3, heads[rank], width)
        own = [one[:, :, places[rank] : places[rank] + heads[rank]] for one in (q, k, v)]
        if text:
            _put(joint[:, :text], [one[:, :text] for one in own])
        targets = [
            joint[:, text + start : text + start + size] for start, size in zip(self.starts, self.sizes, strict=True)
        ]
        _put(targets[rank], [one[:, text:] for one in own])
        parts = [
            joint if i == rank else torch.stack([one[:, text:, place : place + count] for one in (q, k, v)], dim=2)
            for i, (place, count) in enumerate(zip(places, heads, strict=True))
        ]
        arrived = targets if samples == 1 else [torch.empty_like(one) for one in targets]
        self.team.exchanged(arrived, parts)
        for i, (target, one) in enumerate(zip(targets, arrived, strict=True)):
            if one is not target and i != rank:
                target.copy_(one)
        found = joint.unbind(2)
        return found[0], found[1], found[2]

    def _back(self, z: Tensor, heads: list[int]) -> Tensor:
        """This rank's tokens of all heads, [b, n + m, heads, head_dim]; every rank gets all text tokens."""
        (samples, tokens, _, width), rank = z.shape, self.team.rank
        text = tokens - sum(self.sizes)
        parts = [
            torch.cat([z[:, :text], z[:, text + start : text + start + size]], dim=1)
            for start, size in zip(self.starts, self.sizes, strict=True)
        ]
        arrived = [
            parts[i] if i == rank else z.new_empty(samples, text + self.size, count, width)
            for i, count in enumerate(heads)
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

        def attend(*parts: Tensor) -> Tensor:
            inner.append(below(*map(_turned, parts)))
            return _turned(inner[0].output)

        output = self.part.attend(_turned(q), _turned(k), _turned(v), attend)
        return Attended(inner[0].how, q, k, v, _turned(output))


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
    own, mine = shares(tokens, ranks)[0], shares(heads, ranks)[0]
    forth = 3 * own * (heads - mine)
    back = (tokens - own) * mine
    of_text = (ranks - 1) * text * mine
    return ((depth + second) * (forth + back) + depth * of_text) * head_dim * itemsize
