"""Parts of an attention pattern from queries, keys and the log-sum-exp, without the pattern itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmdit.inspection.attention import BYTES

Direction = Literal["i2t", "t2i"]
QUADRANTS = ("I2I", "I2T", "T2I", "T2T")  # who reads, and whom: image patches or text tokens


def word_maps(
    q: Tensor, k: Tensor, lse: Tensor, text: int, tokens: Tensor, mix: Tensor, direction: Direction, *, each: bool
) -> Tensor:
    """How much image patches and words have to do with each other, for one sample: [n or 1, words, patches].

    Args:
        q, k: queries and keys [n, l, d] of text tokens followed by image patches.
        lse: log-sum-exp of the scores of each query, [n, l].
        text: text tokens.
        tokens: positions of the text tokens that are read or read here, [m].
        mix: how much of each of these a word takes, [words, m].
        direction: "i2t": the share of a patch's reading that goes to the word; "t2i": the share of the word's reading
            that goes to the patch.
        each: keep the heads; else their mean, as one.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    of_words, of_image = (k, q) if direction == "i2t" else (q, k)
    less = lse[:, None, text:] if direction == "i2t" else lse[:, tokens, None]
    heads = max(1, BYTES // (max(1, len(tokens)) * (q.shape[1] - text) * wide.itemsize))
    chunks = zip(*(part.split(heads) for part in (of_words[:, tokens], of_image[:, text:], less)), strict=True)
    parts = []
    for words, patches, minus in chunks:
        scores = words.to(wide) @ patches.to(wide).mT * q.shape[-1] ** -0.5  # n tokens patches
        found = mix @ (scores - minus).exp()
        parts.append(found if each else found.sum(0, keepdim=True))
    return torch.cat(parts) if each else torch.cat(parts).sum(0, keepdim=True) / len(q)


def quadrant_masses(lse: Tensor, lse_of_text: Tensor, text: int) -> Tensor:
    """The attention of all queries summed by who reads whom, [b, n, 4] in the order of `QUADRANTS`.

    A row of attention sums to 1, so the two quadrants of image queries sum to the patches, those of text to the tokens.

    Args:
        lse: log-sum-exp of the scores of each query with all keys, [b, n, l], text tokens first.
        lse_of_text: the same with the text's keys alone; exp(lse_of_text - lse) is the mass on text.
        text: text tokens.
    """
    of_text, of_image = (lse_of_text - lse).exp().split([text, lse.shape[-1] - text], dim=-1)
    i2t, t2t = of_image.sum(-1), of_text.sum(-1)
    return torch.stack([of_image.shape[-1] - i2t, i2t, text - t2t, t2t], dim=-1)
