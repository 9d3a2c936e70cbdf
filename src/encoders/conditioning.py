"""From prompts to what the transformer reads: three encoders side by side.

context = [CLIP-L | CLIP-G, channels padded with zeros] followed by the T5 tokens; pooled = [CLIP-L | CLIP-G].
Source: Stability-AI/sd3.5 `sd3_infer.get_cond`; diffusers `StableDiffusion3Pipeline.encode_prompt`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.clip import CLIPText
from encoders.t5 import T5Encoder
from encoders.tokenize import CLIPTokenizer, Padded, T5Tokenizer, Tokenizers, pad

EncoderName = Literal["clip_l", "clip_g", "t5"]


@dataclass(frozen=True)
class TextRules:
    """Where the references disagree on text; the defaults are diffusers' (`StableDiffusion3Pipeline`)."""

    clip_length: int = 77  # tokens of both towers, cut and padded to it
    t5_length: int = 256  # tokens of T5, cut and padded to it
    missing_t5: Literal["zeros", "omit"] = "zeros"  # tokens that stand for an encoder that is not there
    project_clip_l: bool = True  # pooled CLIP-L through its text_projection, where the file has one

    def __post_init__(self) -> None:
        """Raise ValueError for lengths that hold no token."""
        if self.clip_length < 2 or self.t5_length < 1:
            raise ValueError(
                f"TextRules need clip_length >= 2, t5_length >= 1; got {self.clip_length}, {self.t5_length}"
            )


class TokenSpan(NamedTuple):
    """Which characters of the prompt a context token stands for; start == stop for special tokens and padding."""

    position: int  # in the context
    encoder: EncoderName
    start: int
    stop: int


@dataclass(frozen=True)
class Conditioning:
    """What the transformer reads of a batch of prompts."""

    context: Tensor  # [b, n, context_dim]
    pooled: Tensor  # [b, pooled_dim]
    spans: tuple[tuple[TokenSpan, ...], ...] = ()  # one tuple per prompt; empty where embeddings were given

    def __len__(self) -> int:
        return len(self.context)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """The same on another device or in another dtype."""
        return Conditioning(self.context.to(device, dtype), self.pooled.to(device, dtype), self.spans)

    def repeat(self, times: int) -> Conditioning:
        """Each prompt `times` in a row."""
        spans = tuple(span for span in self.spans for _ in range(times))
        return Conditioning(self.context.repeat_interleave(times, 0), self.pooled.repeat_interleave(times, 0), spans)


class Conditioner:
    """Tokenizers and encoders under one set of rules.

    Args:
        clip_l, clip_g: the towers.
        t5: None where there is none; `rules.missing_t5` says what stands for it.
        tokenizers: theirs, in the same order.
        rules: padding, cuts, projection.
        context_dim: width of a context token, 4096 officially.
    """

    def __init__(
        self,
        clip_l: CLIPText,
        clip_g: CLIPText,
        t5: T5Encoder | None,
        tokenizers: Tokenizers,
        rules: TextRules | None = None,
        *,
        context_dim: int = 4096,
    ) -> None:
        self.clip_l, self.clip_g, self.t5, self.tokenizers = clip_l, clip_g, t5, tokenizers
        self.rules, self.context_dim = rules or TextRules(), context_dim

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of a batch of prompts; warns, with the text, where a prompt is cut.

        Raises:
            ValueError: there is no prompt.
            TypeError: a prompt is not a string.
        """
        prompts = checked_prompts(prompts)
        rules = self.rules
        l_tokens = self._tokens(self.tokenizers.clip_l, prompts, rules.clip_length, "CLIP-L")
        g_tokens = self._tokens(self.tokenizers.clip_g, prompts, rules.clip_length, "CLIP-G")
        out_l, out_g = self.clip_l(_ids(l_tokens, self.clip_l)), self.clip_g(_ids(g_tokens, self.clip_g))
        pooled_l = out_l.projected if rules.project_clip_l and out_l.projected is not None else out_l.pooled
        pooled_g = out_g.pooled if out_g.projected is None else out_g.projected

        context = torch.cat([out_l.penultimate, out_g.penultimate], dim=-1)
        context = F.pad(context, (0, self.context_dim - context.shape[-1]))
        t5_context, t5_spans = self._t5(prompts)
        spans = [_spans("clip_l", 0, l_tokens), _spans("clip_g", 0, g_tokens), t5_spans]
        return Conditioning(
            torch.cat([context, t5_context.to(context.device)], dim=1),
            torch.cat([pooled_l, pooled_g], dim=-1),
            tuple(tuple(chain(*of_prompt)) for of_prompt in zip(*spans, strict=True)),
        )

    def _t5(self, prompts: Sequence[str]) -> tuple[Tensor, list[tuple[TokenSpan, ...]]]:
        if self.t5 is None:
            length = self.rules.t5_length if self.rules.missing_t5 == "zeros" else 0
            dtype = next(self.clip_l.parameters()).dtype
            return torch.zeros(len(prompts), length, self.context_dim, dtype=dtype), [()] * len(prompts)
        if self.tokenizers.t5 is None:
            raise ValueError("there is a T5 encoder but no T5 tokenizer; give the folder that holds tokenizer_3")
        tokens = self._tokens(self.tokenizers.t5, prompts, self.rules.t5_length, "T5")
        return self.t5(_ids(tokens, self.t5)), _spans("t5", self.rules.clip_length, tokens)

    def _tokens(
        self, tokenizer: CLIPTokenizer | T5Tokenizer, prompts: Sequence[str], length: int, name: str
    ) -> list[Padded]:
        padded = [pad(tokenizer.encode(prompt), length, tokenizer.pad) for prompt in prompts]
        for cut in dict.fromkeys(part.cut for part in padded if part.cut):
            warnings.warn(f"{name} reads {length} tokens; this part of the prompt was cut: {cut!r}", stacklevel=4)
        return padded


def checked_prompts(prompts: Sequence[str], what: str = "prompt") -> list[str]:
    """The prompts as a list; `what` is what to call one in an error.

    Raises:
        ValueError: there is none.
        TypeError: one is not a string.
    """
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise TypeError(f"{what} is {type(prompts).__name__}, expected str or a list of str: {prompts!r}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError(f"the batch of {what}s is empty; give at least one {what}, which may be an empty string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"{what} {i} is {type(prompt).__name__}, expected str: {prompt!r}")
    return prompts


def _ids(tokens: Sequence[Padded], model: CLIPText | T5Encoder) -> Tensor:
    device = next(model.parameters()).device
    return torch.tensor([part.ids for part in tokens], device=device)


def _spans(encoder: EncoderName, first: int, tokens: Sequence[Padded]) -> list[tuple[TokenSpan, ...]]:
    return [
        tuple(TokenSpan(first + i, encoder, *offsets) for i, offsets in enumerate(part.tokens.offsets))
        for part in tokens
    ]
