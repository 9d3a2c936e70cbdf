"""How text is read: each point on which the references disagree is a field of one frozen dataclass.

D is diffusers' `StableDiffusion3Pipeline`; C is ComfyUI 0.3.64, `comfy/sd1_clip.py` and
`comfy/text_encoders/sd3_clip.py`; R is Stability-AI/sd3.5, `other_impls.py` and `sd3_infer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class TextRules:
    """How prompts become token ids, and the outputs of the encoders the conditioning; the defaults are D's."""

    # A weight such as "(cat:1.2)" is text (D), is parsed and ignored (R), or is applied (C).
    weights: Literal["literal", "ignored", "applied"] = "literal"
    # Whether each word is tokenized by itself (R), or each stretch of one weight (C), which in D is the whole prompt.
    split_words: bool = False
    # Tokens of a chunk of CLIP-L and CLIP-G, with BOS, EOS and padding (all).
    clip_length: int = 77
    # What happens to longer CLIP prompts. "cut": the first tokens are read (D). "chunks": as many chunks as it takes,
    # equally many of CLIP-L and CLIP-G, pooled from the first (C); a stretch (or word) of less than 8 tokens is never
    # split between two. "first_chunk": the first of these chunks is read (R).
    long_clip: Literal["cut", "first_chunk", "chunks"] = "cut"
    # CLIP-G reads with its own tokenizer, where "!" is the padding, id 0 (D), or with CLIP-L's, padded with 0 (R, C).
    clip_g_tokenizer: Literal["own", "clip_l"] = "own"
    # Tokens that T5 is padded to: 256 (D), 77 (R, C).
    t5_length: int = 256
    # Longer T5 prompts are cut to t5_length (D) or kept (R, C).
    long_t5: Literal["cut", "keep"] = "cut"
    # T5 reads only this many characters of the prompt: 226 (R), or all (None).
    t5_characters: int | None = None
    # A missing CLIP tower is an error (D, R), or zeros stand in its place (C).
    missing_clip: Literal["error", "zeros"] = "error"
    # A missing T5 is t5_length tokens of zeros (D), no tokens (C) or an error (R).
    missing_t5: Literal["zeros", "omit", "error"] = "zeros"
    # Whether pooled CLIP-L goes through its text_projection, where the file has one (D), or not (R, C).
    project_clip_l: bool = True
    # The dtype to compute in: that of the stored weights (D), or float32 whatever is stored (R, C). R upcasts the
    # weights when it reads them, C each layer when it runs; both give the same, because upcasting is exact. Stored
    # float64 stays.
    encoder_dtype: Literal["stored", "float32"] = "stored"
    # Bounds of what no reference limits: a prompt of any length costs a bounded time and memory, and what is beyond a
    # bound is cut with a warning. Characters of a prompt that are tokenized; chunks of CLIP where long_clip is
    # "chunks"; tokens of T5, with EOS, where long_t5 is "keep" (T5-XXL's attention bias of 1024 tokens takes 0.25 GiB,
    # and it grows with the square of their number).
    max_characters: int = 32_768
    max_chunks: int = 16
    max_t5: int = 1024

    def __post_init__(self) -> None:
        """Raise ValueError for a length without room for a token and for a word that its field does not know."""
        if self.clip_length < 3 or self.t5_length < 2:
            raise ValueError(
                f"TextRules need clip_length >= 3, t5_length >= 2; got {self.clip_length}, {self.t5_length}"
            )
        if self.t5_characters is not None and self.t5_characters < 0:
            raise ValueError(f"TextRules need t5_characters >= 0 or None, got {self.t5_characters}")
        for name, least in (("max_characters", 1), ("max_chunks", 1), ("max_t5", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"TextRules need {name} >= {least}, got {getattr(self, name)}")
        for name, kind in get_type_hints(TextRules).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                choices = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"TextRules.{name} must be one of {choices}; got {getattr(self, name)!r}")


DIFFUSERS = TextRules()
COMFYUI = TextRules(
    weights="applied",
    long_clip="chunks",
    clip_g_tokenizer="clip_l",
    t5_length=77,
    long_t5="keep",
    missing_clip="zeros",
    missing_t5="omit",
    project_clip_l=False,
    encoder_dtype="float32",
)
REFERENCE = TextRules(
    weights="ignored",
    split_words=True,
    long_clip="first_chunk",
    clip_g_tokenizer="clip_l",
    t5_length=77,
    long_t5="keep",
    t5_characters=226,
    missing_t5="error",
    project_clip_l=False,
    encoder_dtype="float32",
)
