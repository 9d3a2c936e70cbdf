"""A second forward of a ControlNet that uses the same parameters and the kernels of the transformer's fast forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from mmdit.models.blocks import JointBlock
from mmdit.models.controlnet import ControlNet, SingleBlock
from mmdit.models.layers import timestep_sinusoid
from mmdit.runtime.fast import FastBlock, norms_of
from mmdit.runtime.products import Pair, Product
from mmdit.runtime.rows import Attention, Columns, Output, Result, Rounding, Rows, Update
from mmdit.runtime.sequence import SequenceParallel


class FastControlNet:
    """What `net` computes, without gradients and hooks. It holds parts of the net, so that the net itself can be freed.

    Args:
        net: its weights are read where they lie; norms of queries and keys are copied.
        kernels: `mmdit.runtime.kernels`, or `mmdit.runtime.plain_kernels` where there is no Triton.
        attention: softmax attention without mask, [b, tokens, heads, head_dim] in and out.
        sequence: the ranks that share the image tokens; None computes all of them here.
    """

    def __init__(
        self,
        net: ControlNet,
        *,
        kernels: ModuleType,
        attention: Attention,
        sequence: SequenceParallel | None = None,
    ) -> None:
        self.config, self.kernels, self.attention, self.sequence = net.config, kernels, attention, sequence
        self.embed, self.embed_hint = net.time_text_embed, net.pos_embed_input
        self.embed_text, self.embed_latent = None, None
        if net.config.is_joint:
            self.embed_text, self.embed_latent = net.context_embedder, net.pos_embed
        self.width, self.dtype = net.config.hidden_size, net.pos_embed_input.proj.weight.dtype
        self.blocks: list[FastBlock | FastSingleBlock] = []
        self.vectors = 0
        for block in net.transformer_blocks:
            assert isinstance(block, JointBlock | SingleBlock)
            fast = FastBlock if isinstance(block, JointBlock) else FastSingleBlock
            self.blocks.append(fast(block, self.vectors))  # type: ignore[arg-type]
            self.vectors += sum(stream.chunks for stream in self.blocks[-1].streams)
        self.projections = [Pair(None, Product(one)) for one in net.controlnet_blocks]  # type: ignore[arg-type]

    @property
    def products(self) -> list[tuple[str, Rounding, Product]]:
        """Every Linear of the blocks and the one after each, by its official name, with what it reads."""
        found: list[tuple[str, Rounding, Product]] = []
        for i, (block, after) in enumerate(zip(self.blocks, self.projections, strict=True)):
            found += [(f"transformer_blocks.{i}.{name}", reads, product) for name, reads, product in block.products]
            found.append((f"controlnet_blocks.{i}", after.rounding, after.image))
        return found

    def table(self, timesteps: Float[Tensor, " s"], pooled: Float[Tensor, "b p"]) -> Float[Tensor, "s b v d"]:
        """The modulation vectors of all blocks at each timestep.

        Args:
            timesteps: 1000 x sigma.
            pooled: pooled text vector of each sample.
        """
        pooled = pooled.to(self.dtype)
        of_time = self.embed.timestep_embedder(timestep_sinusoid(timesteps).to(self.dtype))
        c = of_time[:, None] + self.embed.text_embedder(pooled)  # s b d
        parts = [stream.adaLN_modulation(c) for block in self.blocks for stream in block.streams]
        return torch.cat(parts, dim=-1).unflatten(-1, (self.vectors, self.width))

    def tokens(self, context: Float[Tensor, "b n k"]) -> Float[Tensor, "b m d"]:
        """The text tokens as the first block reads them; of single-stream blocks, none."""
        if self.embed_text is None:
            return context.new_empty((len(context), 0, self.width), dtype=self.dtype)
        return self.embed_text(context.to(self.dtype))

    def __call__(
        self,
        latent: Float[Tensor, "b c h w"],
        tokens: Float[Tensor, "b l d"] | None,
        text: Float[Tensor, "b n d"],
        hint: Float[Tensor, "b l d"],
        vectors: Float[Tensor, "b v d"],
        scale: float = 1.0,
    ) -> list[Tensor]:
        """The residuals as `ControlNet.forward` gives them, times `scale`; of this rank's tokens, each [b, l, d].

        Args:
            latent: the transformer's input.
            tokens: the latent's tokens as the transformer embeds them; for nets without their own embedder.
            text: see `tokens`.
            hint: the embedded hint.
            vectors: a row of `table`.
            scale: factor of the residuals.
        """
        if self.embed_latent is not None:
            tokens = self.embed_latent(latent.to(self.dtype))
        assert tokens is not None, "nets without an embedder are given tokens"
        image, kernels, attention = tokens.to(self.dtype) + hint, self.kernels, self.attention
        if self.sequence is not None:
            part = self.sequence.part(image.shape[1])
            image, text = part.own(image), part.own_text(text) if text.shape[1] else text
            kernels, attention = part.exchanging(kernels, attention, image, self.config.heads)
        rows = Rows(len(image), text.shape[1], image.shape[1])
        x = torch.cat([text.flatten(0, 1), image.flatten(0, 1)])
        found = []
        for block, projection in zip(self.blocks, self.projections, strict=True):
            rows, x, updates = block(x, rows, vectors, (), kernels, attention)
            for update in updates:
                _add(x, update, rows, vectors)
            alone = rows.only_image()
            result = projection(kernels.rounded(x[rows.split :], alone, projection.rounding), alone, kernels)
            found.append(result.value.unflatten(0, (rows.samples, -1)))
        return found if scale == 1 else [one.mul_(scale) for one in found]


class FastSingleBlock:
    """A single-stream block made of the kernels.

    Args:
        block: its Linears are read where they lie.
        place: index of its first vector in the modulation table.
    """

    def __init__(self, block: SingleBlock, place: int) -> None:
        self.streams, self.place, self.head_dim = (block,), place, block.attn.head_dim
        self.norms = norms_of(block.attn, block.attn)
        attn, mlp = block.attn, block.mlp
        self.qkv, self.fc1 = (Pair(None, Product(one), leaves=True) for one in (attn.qkv, mlp.fc1))
        self.proj, self.fc2 = (Pair(None, Product(one)) for one in (attn.proj, mlp.fc2))

    @property
    def products(self) -> list[tuple[str, Rounding, Product]]:
        """Its Linears by their official names, with what each reads."""
        pairs = {"attn.qkv": self.qkv, "attn.proj": self.proj, "mlp.fc1": self.fc1, "mlp.fc2": self.fc2}
        return [(name, pair.rounding, pair.image) for name, pair in pairs.items()]

    def __call__(
        self,
        x: Tensor,
        rows: Rows,
        vectors: Tensor,
        updates: Sequence[Update],
        kernels: ModuleType,
        attention: Attention,
    ) -> tuple[Rows, Tensor, list[Update]]:
        """The rows, the residual stream (changed in place), and what is still to be added to it."""
        (read,) = kernels.norm_modulate(x, vectors, rows, [self._output(0, self.qkv.rounding)], updates)
        qkv = self.qkv(read, rows, kernels)
        z = attention(*kernels.pack(qkv.value, self.norms, rows, self.head_dim, qkv.added))
        update = self._update(2, self.proj(kernels.unpack(z, rows, self.proj.rounding), rows, kernels))
        (read,) = kernels.norm_modulate(x, vectors, rows, [self._output(3, self.fc1.rounding)], [update])
        inner = self.fc1(read, rows, kernels)
        activation = kernels.gelu(inner.value, rows, self.fc2.rounding, inner.added, self.fc2.down)
        return rows, x, [self._update(5, self.fc2(activation, rows, kernels))]

    def _update(self, chunk: int, result: Result) -> Update:
        return Update(result.value, self._columns(chunk))

    def _columns(self, chunk: int) -> Columns:
        return Columns(self.place + chunk, self.place + chunk)

    def _output(self, chunk: int, rounding: Rounding) -> Output:
        return Output(self._columns(chunk), self._columns(chunk + 1), rounding)


def _add(x: Tensor, update: Update, rows: Rows, vectors: Tensor) -> None:
    """Add a gated update to the residual stream, in place, because the residual reads it before the next norm."""
    for start, end, column in ((0, rows.split, update.gate.text), (rows.split, rows.total, update.gate.image)):
        if start < end:
            target, value = (one[start:end].unflatten(0, (rows.samples, -1)) for one in (x, update.value))
            target.addcmul_(vectors[:, column].unsqueeze(1), value)


def summed(given: Sequence[Sequence[Tensor]], places: Sequence[Sequence[int | None]]) -> list[Tensor | None]:
    """The sum of the nets' residuals after each block; blocks that get the same residuals share one tensor.

    Args:
        given: the residuals of each net.
        places: for each net, which of its residuals is added after each block of the transformer, None for none.
    """
    sums: dict[tuple[int | None, ...], Tensor | None] = {}
    spread = list(zip(*places, strict=True))
    for of_block in spread:
        if of_block not in sums:
            parts = [each[place] for each, place in zip(given, of_block, strict=True) if place is not None]
            sums[of_block] = reduce(torch.add, parts) if parts else None
    return [sums[of_block] for of_block in spread]
