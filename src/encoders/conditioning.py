"""From prompts to the context and the pooled vector of the transformer: three text encoders side by side.

context = [CLIP-L | CLIP-G, channels padded with zeros] followed by the T5 tokens; pooled = [CLIP-L | CLIP-G].
Source: Stability-AI/sd3.5 `sd3_infer.get_cond`; diffusers `StableDiffusion3Pipeline.encode_prompt`; ComfyUI
`comfy/text_encoders/sd3_clip.py`. Where they disagree, `TextRules` decide.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from reprlib import repr as shorten
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.chunks import Rows, read, shortened, to_the_shorter
from encoders.clip import CLIPOutput, CLIPText
from encoders.rules import TextRules
from encoders.t5 import T5Encoder
from encoders.tokenize import CLIPTokenizer, T5Tokenizer, Tokenizers
from encoders.weighting import weighted

EncoderName = Literal["clip_l", "clip_g", "t5"]
_TITLES: dict[EncoderName, str] = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}
_FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}


RunEncoder: TypeAlias = Callable[[CLIPText | T5Encoder, list[list[int]], torch.dtype | None], Any]
"""(model, rows of token ids, dtype to compute in or None) -> the output of the model."""


EncoderOutput: TypeAlias = CLIPOutput | Tensor


class EncoderCall(NamedTuple):
    """What is to be computed by an encoder, and the function that does."""

    model: CLIPText | T5Encoder
    rows: int  # of token ids
    length: int  # tokens of a row
    dtype: torch.dtype  # of the output
    run: Callable[[], Any]  # -> EncoderOutput


Place: TypeAlias = tuple[int, EncoderName]  # the number of a batch of prompts, and an encoder
RunAll: TypeAlias = Callable[[Mapping[Place, EncoderCall]], Mapping[Place, Any]]


class TokenSpan(NamedTuple):
    """The characters `prompt[start:stop]` that a context token stands for; start == stop for BOS and EOS."""

    position: int  # in the context
    encoder: EncoderName
    start: int
    stop: int


@dataclass(frozen=True, repr=False)
class Conditioning:
    """Context and pooled vector of a batch of prompts, as the transformer takes them."""

    context: Tensor  # [b, n, context_dim]
    pooled: Tensor  # [b, pooled_dim]
    spans: tuple[tuple[TokenSpan, ...], ...] = ()  # one tuple per prompt; empty where embeddings were given
    prompts: tuple[str, ...] = ()  # the prompts that the spans index

    def __repr__(self) -> str:
        """The prompts, cut, and the shape, dtype and range of both tensors."""
        texts = ", ".join(map(shorten, self.prompts[:3])) + (", ..." if len(self.prompts) > 3 else "")
        rows = "1 row" if len(self) == 1 else f"{len(self)} rows"
        of = f" of {texts}" if texts else ""
        return f"Conditioning({rows}{of}; context: {_summary(self.context)}, pooled: {_summary(self.pooled)})"

    def __len__(self) -> int:
        return len(self.context)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """A copy on another device or in another dtype."""
        return replace(self, context=self.context.to(device, dtype), pooled=self.pooled.to(device, dtype))

    def repeat(self, times: int) -> Conditioning:
        """A batch in which each prompt occurs `times` in a row."""
        context, pooled = (part.repeat_interleave(times, 0) for part in (self.context, self.pooled))
        spans = tuple(span for span in self.spans for _ in range(times))
        prompts = tuple(prompt for prompt in self.prompts for _ in range(times))
        return Conditioning(context, pooled, spans, prompts)

    def zeroed(self) -> Conditioning:
        """A conditioning of the same shapes, all zeros, as ComfyUI's ConditioningZeroOut makes it."""
        return Conditioning(torch.zeros_like(self.context), torch.zeros_like(self.pooled))


def _summary(value: Tensor) -> str:
    """The shape, dtype and range of a tensor."""
    found = f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if value.is_meta or not value.numel():
        return found
    least, most = value.detach().aminmax()
    return f"{found} from {float(least):.4g} to {float(most):.4g}"


class _Tower(NamedTuple):
    """The outputs that SD3 takes from one CLIP tower, or from both side by side."""

    hidden: Tensor  # [b, n, channels]
    pooled: Tensor  # [b, channels]


class Conditioner:
    """Tokenizers and encoders under one set of rules.

    Rules without cuts allow prompts of different lengths in one batch. The shorter ones are filled up to the longest:
    CLIP with empty chunks, T5 with padding. Several threads may call one Conditioner.

    Args:
        clip_l: The CLIP-L text tower, or None; `rules` say what stands in place of a missing encoder.
        clip_g: The CLIP-G text tower, or None.
        t5: The T5 encoder, or None.
        tokenizers: The tokenizers of the encoders; None for one that no encoder uses.
        rules: How prompts are read; None means diffusers' rules.
        context_dim: Channels of a context token, 4096 in the official models.
        pooled_dim: Channels of the pooled vector, 2048 in the official models. Used only where one CLIP tower is
            missing: the width of its zeros is `pooled_dim` less the pooled width of the other tower.
        faster: Functions `(ids, dtype)` that compute what the encoders of these names compute, and run instead.
        run: Computes the output of an encoder for token ids, as `run_encoder` does.
        run_all: Gives the outputs of all encoders, from what computes each of them; None runs one after the other.

    Raises:
        ValueError: an encoder is missing and the rules call that an error, or an encoder has no tokenizer.
    """

    def __init__(
        self,
        clip_l: CLIPText | None,
        clip_g: CLIPText | None,
        t5: T5Encoder | None,
        tokenizers: Tokenizers,
        rules: TextRules | None = None,
        *,
        context_dim: int = 4096,
        pooled_dim: int = 2048,
        faster: Mapping[EncoderName, Callable[..., Any]] | None = None,
        run: RunEncoder | None = None,
        run_all: RunAll | None = None,
    ) -> None:
        self.faster, self._run_all = faster or {}, _in_turn if run_all is None else run_all
        self.clip_l, self.clip_g, self.t5, self.tokenizers = clip_l, clip_g, t5, tokenizers
        self.rules, self.context_dim, self.pooled_dim = rules or TextRules(), context_dim, pooled_dim
        self._run_encoder = run_encoder if run is None else run
        self._check()

    @property
    def models(self) -> dict[EncoderName, CLIPText | T5Encoder]:
        """The encoders that are present, by name."""
        every: dict[EncoderName, CLIPText | T5Encoder | None] = {
            "clip_l": self.clip_l,
            "clip_g": self.clip_g,
            "t5": self.t5,
        }
        return {name: model for name, model in every.items() if model is not None}

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Encode a batch of prompts; warns where a prompt is cut, with the text that is not read.

        Raises:
            ValueError: the batch is empty, or a weight in a prompt is out of range or overflows the context.
            TypeError: a prompt is not a string.
        """
        return self.each([prompts])[0]

    def each(self, batches: Sequence[Sequence[str]]) -> list[Conditioning]:
        """Encode several batches of prompts, each as a call does; `run_all` gets the encoders of all of them at once.

        Raises:
            ValueError, TypeError: see `__call__`.
        """
        checked = [checked_prompts(batch) for batch in batches]
        rows = [self._rows(batch) for batch in checked]
        calls = {(i, name): self._call(name, one) for i, of_batch in enumerate(rows) for name, one in of_batch.items()}
        found = self._run_all(calls)
        return [
            self._conditioning(batch, of_batch, {name: found[i, name] for name in of_batch})
            for i, (batch, of_batch) in enumerate(zip(checked, rows, strict=True))
        ]

    def _conditioning(
        self, prompts: Sequence[str], rows: Mapping[EncoderName, Rows], outputs: Mapping[EncoderName, Any]
    ) -> Conditioning:
        batch, clip = len(prompts), self._clip(rows, outputs)
        t5 = _joined(outputs["t5"], rows["t5"]) if "t5" in rows else None
        if clip is None:
            like = torch.empty(0, device="cpu") if t5 is None else t5
            clip = _Tower(like.new_zeros(batch, 0, self.context_dim), like.new_zeros(batch, self.pooled_dim))
        if t5 is None:
            length = self.rules.t5_length if self.rules.missing_t5 == "zeros" else 0
            t5 = clip.hidden.new_zeros(batch, length, self.context_dim)
        context = torch.cat([clip.hidden, t5.to(clip.hidden.device)], dim=1)
        if context.shape[1] == 0:
            context = context.new_zeros(batch, self.rules.clip_length, self.context_dim)
        firsts: dict[EncoderName, int] = {"clip_l": 0, "clip_g": 0, "t5": clip.hidden.shape[1]}
        spans = [[_spans(name, firsts[name], i, one) for name, one in rows.items()] for i in range(batch)]
        return Conditioning(
            context, clip.pooled, tuple(tuple(chain(*of_prompt)) for of_prompt in spans), tuple(prompts)
        )

    def _check(self) -> None:
        """Raise ValueError where an encoder or a tokenizer is missing that the rules need."""
        for name, title in _TITLES.items():
            rule, choices = ("missing_t5", "'zeros' or 'omit'") if name == "t5" else ("missing_clip", "'zeros'")
            if name not in self.models and getattr(self.rules, rule) == "error":
                raise ValueError(
                    f"there is no {title} encoder, and {rule} is 'error' in the text rules; give the encoder, or rules "
                    f"with {rule} {choices}"
                )
        for name in self.models:
            self._tokenizer(name)

    def _tokenizer(self, name: EncoderName) -> tuple[CLIPTokenizer | T5Tokenizer, int]:
        """The tokenizer of an encoder, and the id of its padding."""
        borrowed = name == "clip_g" and self.rules.clip_g_tokenizer == "clip_l"
        owner: EncoderName = "clip_l" if borrowed else name
        tokenizer: CLIPTokenizer | T5Tokenizer | None = getattr(self.tokenizers, owner)
        if tokenizer is None:
            raise ValueError(
                f"there is a {_TITLES[name]} encoder but no {_TITLES[owner]} tokenizer for it; "
                f"give the folder that holds {_FOLDERS[owner]}"
            )
        return tokenizer, 0 if borrowed else tokenizer.pad

    def _rows(self, prompts: Sequence[str]) -> dict[EncoderName, Rows]:
        """Tokenize the prompts for each encoder, and warn of what an encoder does not read."""
        rules, found = self.rules, {}
        readings = {name: [read(prompt, self._tokenizer(name)[0], rules) for prompt in prompts] for name in self.models}
        if "clip_l" in readings and "clip_g" in readings:
            pairs = zip(readings["clip_l"], readings["clip_g"], strict=True)
            both = [to_the_shorter(one, other, rules.clip_length) for one, other in pairs]
            readings["clip_l"], readings["clip_g"] = ([pair[i] for pair in both] for i in (0, 1))
        for name, of_prompts in readings.items():
            for cut in dict.fromkeys(chain(*(reading.cuts for reading in of_prompts))):
                said = f"{_TITLES[name]} reads {cut.limit}; this part of the prompt was cut: {shortened(cut.text)}"
                warnings.warn(said, stacklevel=4)
            length = rules.t5_length if name == "t5" else rules.clip_length
            found[name] = Rows.of(of_prompts, *self._tokenizer(name), length)
        return found

    def _clip(self, rows: Mapping[EncoderName, Rows], outputs: Mapping[EncoderName, Any]) -> _Tower | None:
        """Both towers side by side, their channels padded to `context_dim`; None where both are missing."""
        project_l = self.rules.project_clip_l
        one = _tower(outputs["clip_l"], rows["clip_l"], project=project_l) if "clip_l" in rows else None
        other = _tower(outputs["clip_g"], rows["clip_g"], project=True) if "clip_g" in rows else None
        present = one or other
        if present is None:
            return None
        one, other = one or self._zeros(present), other or self._zeros(present)
        hidden, pooled = (torch.cat(parts, dim=-1) for parts in zip(one, other, strict=True))
        rest = self.context_dim - hidden.shape[-1]
        if rest < 0:
            raise ValueError(f"CLIP-L and CLIP-G give {hidden.shape[-1]} channels, context_dim is {self.context_dim}")
        return _Tower(F.pad(hidden, (0, rest)), pooled)

    def _zeros(self, present: _Tower) -> _Tower:
        """Zeros in place of the missing tower, as wide as the other tower leaves room for."""
        width = self.pooled_dim - present.pooled.shape[-1]
        if width < 0:
            raise ValueError(
                f"a CLIP tower gives {present.pooled.shape[-1]} pooled channels, pooled_dim is {self.pooled_dim}"
            )
        return _Tower(*(part.new_zeros(*part.shape[:-1], width) for part in present))

    def _call(self, name: EncoderName, rows: Rows) -> EncoderCall:
        model, ids = self.models[name], rows.ids()
        dtype = torch.float32 if self.rules.encoder_dtype == "float32" else next(model.parameters()).dtype
        return EncoderCall(model, len(ids), len(ids[0]), dtype, partial(self._run, name, rows))

    def _run(self, name: EncoderName, rows: Rows) -> Any:
        model, ids = self.models[name], rows.ids()
        dtype = torch.float32 if self.rules.encoder_dtype == "float32" else None
        if name in self.faster:
            return run_encoder(model, ids, dtype, self.faster[name])
        return self._run_encoder(model, ids, dtype)

    def run_ahead(self, batches: Sequence[Sequence[str]]) -> None:
        """Run each encoder on several batches before the next one, for a `run` that keeps the outputs."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is cut is said when the batches are encoded
            rows = [self._rows(checked_prompts(batch)) for batch in batches]
        for name in self.models:
            for one in rows:
                self._run(name, one[name])


def _in_turn(calls: Mapping[Place, EncoderCall]) -> dict[Place, Any]:
    return {place: call.run() for place, call in calls.items()}


def _tower(out: CLIPOutput, rows: Rows, *, project: bool) -> _Tower:
    pooled = out.projected if project and out.projected is not None else out.pooled
    return _Tower(_joined(out.penultimate, rows), pooled[: len(rows.tokens) : rows.chunks])


def run_encoder(
    model: CLIPText | T5Encoder,
    ids: list[list[int]],
    dtype: torch.dtype | None,
    forward: Callable[..., Any] | None = None,
) -> Any:
    """The output of an encoder for rows of token ids of one length; with a `dtype`, it computes in that.

    Args:
        model: the encoder.
        ids: the rows.
        dtype: float32, or None for the dtype of the weights.
        forward: what computes the same and runs in place of the model.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor(ids, device="cpu", pin_memory=device.type == "cuda")
    tokens = tokens.to(device, non_blocking=True)  # the host runs ahead
    run = model if forward is None else forward
    return run(tokens) if dtype is None else run(tokens, dtype)


def checked_prompts(prompts: Sequence[str], what: str = "prompt") -> list[str]:
    """One prompt or several as a list.

    Args:
        prompts: A prompt, or a sequence of prompts.
        what: What a prompt is called in an error.

    Raises:
        ValueError: the sequence is empty.
        TypeError: a prompt is not a string.
    """
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise TypeError(f"{what} is {type(prompts).__name__}, expected str or a list of str: {repr(prompts)[:80]}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError(f"the batch of {what}s is empty; give at least one {what}, which may be an empty string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"{what} {i} is {type(prompt).__name__}, expected str: {repr(prompt)[:80]}")
    return prompts


def _joined(z: Tensor, rows: Rows) -> Tensor:
    """The output of an encoder [rows, length, d] as [b, n, d]; with weights, the last row is the empty prompt.

    Raises:
        ValueError: a weight makes the output overflow its dtype.
    """
    if rows.has_weights:
        plain, z = z, weighted(z[:-1], z[-1], torch.tensor(rows.weights(), dtype=torch.float64, device="cpu"))
        if not z.is_meta and not z.isfinite().all() and plain.isfinite().all():
            largest = max((token.weight for row in rows.tokens for token in row), key=abs)
            raise ValueError(f"the largest weight in the prompt, {largest:g}, overflows {z.dtype}; use a smaller one")
    return z.unflatten(0, (-1, rows.chunks)).flatten(1, 2)


def _spans(encoder: EncoderName, first: int, prompt: int, rows: Rows) -> list[TokenSpan]:
    return [TokenSpan(first + place, encoder, token.start, token.stop) for place, token in rows.placed(prompt)]
