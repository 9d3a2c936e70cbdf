"""How text is read: every point on which the references disagree is a field of one frozen dataclass.

D is diffusers' `StableDiffusion3Pipeline`; C is ComfyUI 0.3.64, `comfy/sd1_clip.py` and
`comfy/text_encoders/sd3_clip.py`; R is Stability-AI/sd3.5, `other_impls.py` and `sd3_infer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class TextRules:
    """How prompts become token ids and encoders' outputs the conditioning; the defaults are D's."""

    weights: Literal["literal", "ignored", "applied"] = "literal"  # of "(cat:1.2)": text (D), parsed only (R), used (C)
    split_words: bool = False  # tokenize word by word (R), not stretches of one weight (C), which in D is the prompt
    clip_length: int = 77  # tokens of a chunk of CLIP-L and CLIP-G with both ends and padding (all)
    # CLIP prompts longer than that. "cut": its first tokens (D). "chunks": as many chunks as it takes, equally many of
    # CLIP-L and CLIP-G, pooled from the first (C); a stretch (or word) of less than 8 tokens is never split between
    # two. "first_chunk": the first of these (R).
    long_clip: Literal["cut", "first_chunk", "chunks"] = "cut"
    clip_g_tokenizer: Literal["own", "clip_l"] = "own"  # own, where "!" is id 0 (D), or CLIP-L's padded with 0 (R, C)
    t5_length: int = 256  # tokens of T5, padded to it: 256 (D), 77 (R, C)
    long_t5: Literal["cut", "keep"] = "cut"  # what of T5 is longer: cut to t5_length (D), read as it is (R, C)
    t5_characters: int | None = None  # T5 reads only this many characters of the prompt: 226 (R)
    missing_clip: Literal["error", "zeros"] = "error"  # a missing CLIP tower: error (D, R), zeros in its place (C)
    missing_t5: Literal["zeros", "omit", "error"] = "zeros"  # t5_length tokens of zeros (D), none (C), error (R)
    project_clip_l: bool = True  # pooled CLIP-L through its text_projection, where the file has one (D), or not (R, C)
    # float32 whatever is stored (R, C): R widens the files when it reads them, C each layer when it runs; as widening
    # is exact, both give the same. Stored float64 stays.
    encoder_dtype: Literal["stored", "float32"] = "stored"

    def __post_init__(self) -> None:
        """Raise ValueError for lengths without room for a token and for words that are no choice of their field."""
        if self.clip_length < 3 or self.t5_length < 2:
            raise ValueError(
                f"TextRules need clip_length >= 3, t5_length >= 2; got {self.clip_length}, {self.t5_length}"
            )
        if self.t5_characters is not None and self.t5_characters < 0:
            raise ValueError(f"TextRules need t5_characters >= 0 or None, got {self.t5_characters}")
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
