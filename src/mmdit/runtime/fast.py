"""A second forward of an MMDiT that uses the same parameters and a few fused kernels.

Tokens of both streams are rows of one matrix, so that each kernel runs once for both. What a sublayer adds to the
residual stream waits until the next norm, which adds it, norms, modulates and rounds in one pass. The modulation of
all blocks is a table that is computed ahead for many steps, and read here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmdit.models.blocks import JointBlock
from mmdit.models.layers import SelfAttention
from mmdit.models.mmdit import MMDiT
from mmdit.runtime.mesh import shares, starts
from mmdit.runtime.products import Pair, Product, common_kind
from mmdit.runtime.rows import Activation, Attention, Columns, Output, Result, Rounding, Rows, Update
from mmdit.runtime.sequence import SequenceParallel
from mmdit.runtime.streaming import arrive


class FastMMDiT:
    """What `model` computes, without gradients and hooks.

    Args:
        model: its weights are read where they lie; norms of queries and keys are copied.
        kernels: `mmdit.runtime.kernels`, or `mmdit.runtime.plain_kernels` where there is no Triton.
        attention: softmax attention without mask, [b, tokens, heads, head_dim] in and out.
        sequence: the ranks that share the image tokens; None computes all of them here.
    """

    def __init__(
        self,
        model: MMDiT,
        *,
        kernels: ModuleType,
        attention: Attention,
        sequence: SequenceParallel | None = None,
    ) -> None:
        self.model, self.kernels, self.attention, self.sequence = model, kernels, attention, sequence
        self.width = model.config.hidden_size
        self.blocks: list[FastBlock] = []
        width = 0
        for block in model.joint_blocks:
            assert isinstance(block, JointBlock)
            self.blocks.append(FastBlock(block, width))
            width += sum(stream.chunks for stream in self.blocks[-1].streams)
        self.vectors = width + 2  # and those of the final layer

    def table(self, timesteps: Float[Tensor, " s"], pooled: Float[Tensor, "b p"]) -> Float[Tensor, "s b v d"]:
        """The modulation vectors of all blocks and of the final layer at each timestep.

        Ranks that share the image tokens share this work too: each computes the vectors of some blocks.

        Args:
            timesteps: 1000 x sigma.
            pooled: pooled text vector of each sample.
        """
        model = self.model
        c = model.t_embedder(timesteps)[:, None] + model.y_embedder(pooled)  # s b d
        layers = [stream.adaLN_modulation for block in self.blocks for stream in block.streams]
        layers.append(model.final_layer.adaLN_modulation)
        chunks = [stream.chunks for block in self.blocks for stream in block.streams] + [2]
        if self.sequence is None:
            return _vectors(c, layers, chunks, range(len(layers)))
        team = self.sequence.team
        counts = shares(len(layers), team.size)
        parts = [range(start, start + count) for start, count in zip(starts(counts), counts, strict=True)]
        own = _vectors(c, layers, chunks, parts[team.rank])
        return team.joined(own, [sum(chunks[i] for i in part) for part in parts], 2)

    def tokens(self, context: Float[Tensor, "b n k"]) -> Float[Tensor, "b n d"]:
        """The text tokens as the first block reads them."""
        return self.model.context_embedder(context)

    def __call__(
        self,
        latent: Float[Tensor, "b c h w"],
        tokens: Float[Tensor, "b n d"],
        vectors: Float[Tensor, "b v d"],
        skip_layers: Collection[int] = (),
        control: Sequence[Tensor | None] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """The velocity, as `MMDiT.forward` gives it.

        Args:
            latent: in the model's dtype.
            tokens: see `tokens`.
            vectors: a row of `table`.
            skip_layers: blocks that both streams pass by.
            control: one residual [b, l, hidden_size] or None per block, added to the image tokens after it.
        """
        model, sides = self.model, latent.shape[2:]
        image = model.x_embedder(latent) + model.cropped_pos_embed(*sides)
        part, kernels, attention = None, self.kernels, self.attention
        if self.sequence is not None:
            part = self.sequence.part(image.shape[1])
            image, tokens = part.own(image), part.own_text(tokens)
            kernels, attention = part.exchanging(kernels, attention, image, model.config.heads)
        rows = Rows(len(latent), tokens.shape[1], image.shape[1])
        x = torch.cat([tokens.flatten(0, 1), image.flatten(0, 1)])
        updates: list[Update] = []
        for i, block in enumerate(self.blocks):
            if i not in skip_layers:
                arrive(block.block)
                rows, x, updates = block(x, rows, vectors, updates, kernels, attention)
            if control is not None and (residual := control[i]) is not None:
                x[rows.split :].add_(residual.flatten(0, 1))
        x, updates, rows = _image_of(x, updates, rows)
        shift, scale = self.vectors - 2, self.vectors - 1
        output = Output(Columns(shift, shift), Columns(scale, scale), Rounding())
        (found,) = self.kernels.norm_modulate(x, vectors, rows, [output], updates)
        patches = model.final_layer.linear(found.image.data).unflatten(0, (rows.samples, -1))
        return model.unpatchify(patches if part is None else part.whole(patches), *sides)


class FastBlock:
    """A joint block made of the kernels.

    Args:
        block: its Linears are read where they lie.
        place: index of its first vector in the modulation table.
    """

    def __init__(self, block: JointBlock, place: int) -> None:
        self.block = block
        text, image = self.streams = block.context_block, block.x_block
        self.ends_context, self.head_dim = block.ends_context, image.attn.head_dim
        self.text_place, self.image_place = place, place + text.chunks
        second = Product(image.attn2.qkv) if block.dual_attention else None
        first = Product(text.attn.qkv), Product(image.attn.qkv)
        kind = common_kind([*first, *([] if second is None else [second])])
        self.qkv = Pair(*first, kind=kind, leaves=True)
        self.norms = norms_of(text.attn, image.attn)
        self.qkv2 = None if second is None else Pair(None, second, kind=kind, leaves=True)
        if second is not None:
            self.norms2 = norms_of(image.attn2, image.attn2)
            self.proj2 = Pair(None, Product(image.attn2.proj))
        ends = block.ends_context
        self.proj = Pair(None if ends else Product(text.attn.proj), Product(image.attn.proj))
        self.fc1 = Pair(None if ends else Product(text.mlp.fc1), Product(image.mlp.fc1), leaves=True)
        self.fc2 = Pair(None if ends else Product(text.mlp.fc2), Product(image.mlp.fc2))

    @property
    def products(self) -> list[tuple[str, Rounding, Product]]:
        """Its Linears by their official names, with what each reads."""
        pairs = {"attn.qkv": self.qkv, "attn.proj": self.proj, "mlp.fc1": self.fc1, "mlp.fc2": self.fc2}
        if self.qkv2 is not None:
            pairs |= {"attn2.qkv": self.qkv2, "attn2.proj": self.proj2}
        return [
            (f"{stream}.{name}", pair.rounding, product)
            for name, pair in pairs.items()
            for stream, product in (("context_block", pair.text), ("x_block", pair.image))
            if product is not None
        ]

    def __call__(
        self,
        x: Tensor,
        rows: Rows,
        vectors: Tensor,
        updates: Sequence[Update],
        kernels: ModuleType,
        attention: Attention,
    ) -> tuple[Rows, Tensor, list[Update]]:
        """The rows that are left, the residual stream (changed in place), and what is still to be added to it."""
        read, read2 = self._first_norm(x, rows, vectors, updates, kernels)
        qkv = self.qkv(read, rows, kernels)
        z = attention(*kernels.pack(qkv.value, self.norms, rows, self.head_dim, qkv.added))
        of_attention = kernels.unpack(z, rows, self.proj.rounding, text=not self.ends_context)
        if self.ends_context:
            x, _, rows = _image_of(x, (), rows)
        updates = [self._update(2, self.proj(of_attention, rows, kernels))]
        if self.qkv2 is None:
            (mlp_reads,) = kernels.norm_modulate(x, vectors, rows, [self._output(3, self.fc1.rounding)], updates)
        else:
            assert read2 is not None
            alone = rows.only_image()
            qkv = self.qkv2(read2, alone, kernels)
            z = attention(*kernels.pack(qkv.value, self.norms2, alone, self.head_dim, qkv.added))
            of_second = kernels.unpack(z, alone, self.proj2.rounding)
            second = self._update(8, self.proj2(of_second, alone, kernels))
            mlp_reads = self._second_norm(x, rows, vectors, updates[0], second, kernels)
        inner = self.fc1(mlp_reads, rows, kernels)
        activation = kernels.gelu(inner.value, rows, self.fc2.rounding, inner.added, self.fc2.down)
        return rows, x, [self._update(5, self.fc2(activation, rows, kernels))]

    def _first_norm(
        self, x: Tensor, rows: Rows, vectors: Tensor, updates: Sequence[Update], kernels: ModuleType
    ) -> tuple[Activation, Activation | None]:
        """Inputs of the joint attention and of the second attention, which only the image stream has."""
        one = self._output(0, self.qkv.rounding)
        if self.qkv2 is None:
            return kernels.norm_modulate(x, vectors, rows, [one], updates)[0], None
        two, split = self._output(6, self.qkv2.rounding), rows.split
        text_updates = [update.text(split) for update in updates]
        (text,) = kernels.norm_modulate(x[:split], vectors, rows.only_text(), [one], text_updates)
        x, image_updates, alone = _image_of(x, updates, rows)
        image, second = kernels.norm_modulate(x, vectors, alone, [one, two], image_updates)
        return Activation(text.text, image.image), second

    def _second_norm(
        self, x: Tensor, rows: Rows, vectors: Tensor, update: Update, second: Update, kernels: ModuleType
    ) -> Activation:
        """Inputs of the MLPs, for blocks in which the image has two updates."""
        output, text = [self._output(3, self.fc1.rounding)], None
        if not self.ends_context:
            of_text = [update.text(rows.split)]
            text = kernels.norm_modulate(x[: rows.split], vectors, rows.only_text(), output, of_text)[0].text
        x, (of_image,), alone = _image_of(x, [update], rows)
        (image,) = kernels.norm_modulate(x, vectors, alone, output, [of_image, second])
        return Activation(text, image.image)

    def _update(self, chunk: int, result: Result) -> Update:
        return Update(result.value, self._columns(chunk))

    def _columns(self, chunk: int) -> Columns:
        return Columns(self.text_place + chunk, self.image_place + chunk)

    def _output(self, chunk: int, rounding: Rounding) -> Output:
        return Output(self._columns(chunk), self._columns(chunk + 1), rounding)


def _vectors(
    c: Float[Tensor, "s b d"], layers: Sequence[nn.Sequential], chunks: Sequence[int], wanted: range
) -> Float[Tensor, "s b v d"]:
    """What the wanted ones of these modulation layers give, each so many vectors, side by side."""
    table, place = c.new_empty(*c.shape[:2], sum(chunks[i] for i in wanted), c.shape[2]), 0
    once = F.silu(c)  # of all layers but those whose activation somebody has replaced
    for i, (layer, count) in enumerate(zip(layers, chunks, strict=True)):
        arrive(layer)  # also where it is not wanted: the weights come one after the other
        if i in wanted:
            usual = type(layer) is nn.Sequential and len(layer) == 2 and type(layer[0]) is nn.SiLU
            found = layer[1](once) if usual else layer(c)
            table[:, :, place : place + count] = found.unflatten(-1, (count, -1))
            place += count
    return table


def _image_of(x: Tensor, updates: Sequence[Update], rows: Rows) -> tuple[Tensor, list[Update], Rows]:
    """The image's rows of the residual stream and of its updates."""
    split = rows.split
    return x[split:], [update.image(split) for update in updates], rows.only_image()


def norms_of(text: SelfAttention, image: SelfAttention) -> Tensor | None:
    """Weights of the norms, [2 (text, image), 2 (queries, keys), head_dim]; None where there are none."""
    norms = [norm for stream in (text, image) for norm in (stream.ln_q, stream.ln_k)]
    if not all(isinstance(norm, nn.RMSNorm) for norm in norms):
        return None
    return torch.stack([norm.weight.detach() for norm in norms if isinstance(norm, nn.RMSNorm)]).unflatten(0, (2, 2))
